"""The groups of parameters that FSDP gathers, frees and reduces together, in the order of the forward pass.

They are those of transformers' plan (`base_model_fsdp_plan`, `_fsdp_plan`), which `hf/distributing.py`
follows: each block is one, and so are the experts of a block if expert parallelism shares them out, and its
router if it is in float32 and the block is not. A native or dense class gathers its embedding apart, and its
last norm with its head. Tied parameters, and what no rule names, are gathered with the whole model. So is
what stands around a text model: its vision tower, and its head unless the plan of the class names it. torch
gathers the blocks of some towers of sound one by one, so the forecast of these is too high.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from upcycle.blueprints.blueprint import Blueprint
from upcycle.families import Stack, _stacks
from upcycle.sharding.layout import Layout
from upcycle.sharding.placement import Sharded, Split, elements, part, planned
from upcycle.targets import Target

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # tensor parallelism cuts their outputs
_ROWS = ("o_proj", "down_proj")  # and the inputs of these


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are gathered together."""

    name: str
    parameters: tuple[Sharded, ...]
    names: tuple[str, ...]  # of the parameters, in memory
    block: tuple[str, int] | None = None  # the stack and the number of their block; None outside the blocks
    wide: bool = False  # whether they are in float32, whatever the precision
    experts: bool = False  # whether expert parallelism shares them out
    kept: bool = False  # whether they stay gathered from the forward to the end of the backward pass

    def ranks(self, layout: Layout) -> int:
        """Return the number of ranks that shard the group."""
        return layout.efsdp if self.experts else layout.fsdp

    def share(self, layout: Layout) -> int:
        """Return the elements of the most loaded rank, to which FSDP pads the share of every other."""
        return sum(elements(part(each, layout, 0)) for each in self.parameters)

    def trained(self, names: frozenset[str] | None) -> Group:
        """Return the parameters that have gradients: those called `names`; None: all."""
        if names is None:
            return self
        pairs = [pair for pair in zip(self.names, self.parameters, strict=True) if pair[0] in names]
        return replace(self, names=tuple(n for n, _ in pairs), parameters=tuple(p for _, p in pairs))

    def gathered(self, layout: Layout) -> int:
        """Return the elements of the gathered group, padding included."""
        return self.ranks(layout) * self.share(layout)

    def inner(self, layout: Layout) -> int:
        """Return those of `gathered` that are sharded along another axis than the first."""
        return self.ranks(layout) * sum(
            elements(part(each, layout, 0)) for each in self.parameters if each.fsdp
        )

    def cuts(self, layout: Layout) -> Counter[tuple[int, Split | None]]:
        """Return the numbers of parameters by how FSDP and tensor parallelism cut them."""
        split = layout.tp > 1 and not self.experts
        return Counter((each.fsdp, each.tp if split else None) for each in self.parameters)


def of(built: Blueprint, layout: Layout, precision: str = "float32") -> tuple[Group, ...]:
    """Return the groups of a blueprint's model, in the order in which the forward pass gathers them.

    `precision` is that of the run (`train.precision`).
    """
    stacks, target = built.dense.stacks, built.target
    starts = {stack.path.partition("{i}")[0]: stack.blocks for stack in stacks}
    tied = bool(built.tied_head)
    wide = target.wide_router.get(precision, ()) if layout.dp > 1 else ()
    keys: dict[str, tuple[int, str]] = {}
    cuts: dict[str, Sharded] = {}
    for name, entry in target.in_memory(built.entries).items():
        own = target.own(name) or ""  # no rule names what is around the model
        start = next((start for start in starts if own.startswith(start)), None)
        if start is None:
            keys[name] = _end(own, target, tied=tied)
        else:
            path = start + own.removeprefix(start).partition(".")[0]
            inside = _EXPERTS.search(own) if layout.ep > 1 else None
            part = _ROUTER if any(each in own for each in wide) else f".{inside[1]}" if inside else ""
            keys[name] = _BLOCK, path + part
        expert = keys[name][1].endswith(_OF_EXPERTS)
        shape = tuple(entry.shape)
        split = None if expert or layout.tp == 1 else _cut(own, shape)
        cuts[name] = Sharded(shape=shape, expert=expert, tp=split)
    found: dict[tuple[int, str], dict[str, Sharded]] = {}
    for name, each in planned(cuts, layout).items():
        found.setdefault(keys[name], {})[name] = each
    made = [
        Group(
            name=name,
            parameters=tuple(members.values()),
            names=tuple(members),
            block=_block(name, starts, stacks),
            wide=name.endswith(_ROUTER),
            experts=name.endswith(_OF_EXPERTS),
            kept=place in (_ROOT, _HEAD) or name.endswith(_ROUTER),
        )
        for (place, name), members in found.items()
    ]
    _check({group.block for group in made}, stacks)
    order = {key: number for number, key in enumerate(found)}
    places = {name: (place, order[place, name]) for place, name in found}
    return tuple(sorted(made, key=lambda group: _place(group.name, places)))


_ROOT, _EMBEDDING, _BLOCK, _HEAD = range(4)  # kinds of groups, in the order of the forward pass
_OF_EXPERTS = (".experts", ".universal")
_ROUTER = ".router"
_EXPERTS = re.compile(r"\.(experts|universal)\.")


def _end(name: str, target: Target, *, tied: bool) -> tuple[int, str]:
    """Return the group of a parameter outside the blocks, by its name in the model that has experts."""
    if target.gathers_ends and not tied and name.startswith("model.embed_tokens."):
        return _EMBEDDING, "embedding"
    if target.gathers_head and not tied and name.startswith("lm_head."):
        return _HEAD, "head"
    if target.gathers_ends and name.startswith("model.norm."):
        return _HEAD, "head"
    return _ROOT, "the rest"


def _block(name: str, starts: Mapping[str, str], stacks: Sequence[Stack]) -> tuple[str, int] | None:
    """Return the stack and the number of the block that a group belongs to."""
    for start, blocks in starts.items():
        if name.startswith(start):
            number = int(name.removeprefix(start).partition(".")[0])
            return _stacks.at(stacks, blocks, number).name, number
    return None


def _check(found: Collection[tuple[str, int] | None], stacks: Sequence[Stack]) -> None:
    """Raise `AssertionError` if a block has no group, because its tensors were counted with the rest."""
    wanted = [(stack.name, i) for stack in stacks for i in stack.numbers]
    if missing := [block for block in wanted if block not in found]:
        raise AssertionError(f"the forecast has no parameters of the blocks {missing}")


def _place(name: str, places: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """Return the place of a group in the forward pass: a block comes before its router and its experts."""
    inside = (_ROUTER, *_OF_EXPERTS)
    number = next((n for n, end in enumerate(inside, 1) if name.endswith(end)), 0)
    owner = name.removesuffix(inside[number - 1]) if number else name
    return (*places.get(owner, places[name]), number)


def _cut(name: str, shape: tuple[int, ...]) -> Split | None:
    """Return how tensor parallelism cuts a parameter: transformers' plans of decoders."""
    module, _, leaf = name.rpartition(".")
    if len(shape) == 3:  # experts, gate above up
        return Split(2) if leaf.startswith("down") else Split(1, 2 if leaf.startswith("gate_up") else 1)
    if module in ("model.embed_tokens", "lm_head") or module.endswith(_COLUMNS):
        return Split(0)
    return Split(1) if module.endswith(_ROWS) and leaf == "weight" else None

"""A smaller model made from a larger one: chosen channels, heads and neurons (MoE Jetpack, section 3.1).

The successor is a `Dense` with fewer channels, whose tensors are parts of the predecessor's or those of a
second checkpoint. Experts are made from the predecessor's whole networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config
from upcycle.families._narrowing import Axes, Axis, narrowable
from upcycle.init._selecting import Choice, Selecting
from upcycle.recipe import Recipe, Successor
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Take
from upcycle.tensors.positions import Positions, Units


@dataclass(frozen=True, kw_only=True)
class Narrowed(Dense):
    """A dense model with fewer channels, made from `predecessor`, or from `rest` except for its experts."""

    predecessor: Dense
    rest: Dense | None
    init: Selecting
    seed: int
    changed: Config  # keys of config.json that differ from the predecessor's

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        if self.rest is not None:
            return self.rest.tensors
        return {name: self._part(name, tensor) for name, tensor in self.predecessor.tensors.items()}

    def _part(self, name: str, tensor: Lazy) -> Lazy:
        for place, axis, chosen in self._cuts(name):
            tensor = Take(tensor, place, chosen if axis.unit == 1 else Units(chosen, axis.unit))
        if tensor.shape != (wanted := self._axes[2][name]):
            raise AssertionError(f"{name} is {tensor.shape} and should be {wanted}")
        return tensor

    @property
    def chosen(self) -> dict[str, Positions]:
        """The positions chosen for the dense part, by kind, stack and block; empty if that is from `rest`."""
        if self.rest is not None:
            return {}
        return {
            ".".join(
                map(str, (axis.kind, axis.stack, *(() if axis.layer is None else (axis.layer,))))
            ): chosen
            for name in self.predecessor.tensors
            for _, axis, chosen in self._cuts(name)
        }

    def _cuts(self, name: str) -> Iterator[tuple[int, Axis, Positions]]:
        """Yield the axes of a tensor that become shorter, and the positions that are kept."""
        before, after, shapes = self._axes
        sizes = zip(
            before[name], after[name], self.predecessor.tensors[name].shape, shapes[name], strict=True
        )
        for place, (axis, smaller, total, count) in enumerate(sizes):
            if axis is not None and smaller is not None and total != count:
                choice = Choice(
                    kind=axis.kind, stack=axis.stack, layer=axis.layer, blocks=self._blocks(axis),
                    seed=self.seed, total=total // axis.unit, count=count // smaller.unit,
                )  # fmt: skip
                yield place, axis, self.init.choose(choice)

    @cached_property
    def _axes(self) -> tuple[Axes, Axes, dict[str, tuple[int, ...]]]:
        """The meaning of the tensors' axes before and after narrowing, and the shapes after it."""
        family = narrowable(self.family)
        listed = family.weights(self.config) | family.optional(self.config)
        shapes = {name: weight.shape for name, weight in listed.items()}
        return family.axes(self.predecessor.config), family.axes(self.config), shapes

    def _blocks(self, axis: Axis) -> int:
        return self.predecessor.stack(axis.stack).count

    @property
    def raw(self) -> Mapping[str, Any]:
        return self.rest.raw if self.rest is not None else {**self.predecessor.raw, **self.changed}

    @property
    def others(self) -> tuple[Checkpoint, ...]:
        return () if self.rest is None else (self.rest.checkpoint,)

    def left_aside(self, experts: set[tuple[str, int]]) -> dict[str, str]:
        if self.rest is None:
            return {}

        def become(dense: Dense, name: str) -> bool:
            return any(dense.stack(stack).owns(name, i) for stack, i in experts)

        mine = [n for n in self.predecessor.tensors if not become(self.predecessor, n)]
        theirs = [f"{self.rest.checkpoint.label}: {n}" for n in self.rest.tensors if become(self.rest, n)]
        return {
            **dict.fromkeys(mine, "successor.rest has what is no expert"),
            **dict.fromkeys(theirs, "experts come from the predecessor"),
        }

    @property
    def whole(self) -> Dense:
        return self.predecessor

    def origin(self, layer: int, stack: str = "layers") -> FeedForward:
        return self.predecessor.feed_forward(layer, stack)


def narrowed(
    predecessor: Dense, recipe: Recipe, *, allow_nonfinite: bool = False, opener: Opener = open_checkpoint
) -> Narrowed:
    """Return the successor that `recipe` makes of a predecessor; `opener` opens `successor.rest`.

    Raises `UpcycleError` if widths or checkpoints do not fit.
    """
    wanted, init = recipe.successor, recipe.init
    assert wanted is not None
    if not isinstance(init, Selecting):
        raise UpcycleError(
            f"[successor] needs an initialisation that chooses weights: importance, co_activation, uniform "
            f"or random; init.name = {init.name} does not"
        )
    family = narrowable(predecessor.family)
    family.axes(predecessor.config)  # refuses a config that cannot be narrowed
    hidden, width = _widths(predecessor, wanted)
    changed = family.narrowed(predecessor.config, hidden, width)
    config = family.config({**predecessor.raw, **changed})
    rest = None
    if wanted.rest != "predecessor":
        rest = admit(opener(wanted.rest, allow_nonfinite=allow_nonfinite, label="rest"))
        shapes = {n: t.shape for n, t in rest.tensors.items()}
        body = {
            n: s for n, s in family.shapes(config).items() if "classifier" not in n and "lm_head" not in n
        }
        different = sorted(n for n, s in body.items() if shapes.get(n) != s)
        if rest.family is not family or different:
            raise UpcycleError(
                f"successor.rest: {rest.checkpoint.folder} is not a {family.model_type} of its size"
                + (f" ({listed(different)} differ)" if different else "")
            )
        config = rest.config
    return Narrowed(
        checkpoint=predecessor.checkpoint,
        family=family,
        config=config,
        left_out=predecessor.left_out,
        predecessor=predecessor,
        rest=rest,
        init=init,
        seed=recipe.seed,
        changed=changed,
    )


def _widths(predecessor: Dense, wanted: Successor) -> tuple[dict[str, int], dict[str, int]]:
    """Return channels and neurons of each stack of the successor."""
    stacks = predecessor.stacks
    given = wanted.hidden_size if isinstance(wanted.hidden_size, tuple) else (wanted.hidden_size,)
    if given == (0,):
        given *= len(stacks)
    if len(given) != len(stacks):
        raise UpcycleError(
            f"successor.hidden_size = {list(given)}; {predecessor.family.model_type} wants a number for each "
            f"of its {len(stacks)} stacks of blocks"
        )
    hidden, width = {}, {}
    for stack, channels in zip(stacks, given, strict=True):
        channels = channels or stack.hidden
        neurons = wanted.intermediate_size or stack.width * channels // stack.hidden
        if not 0 < channels <= stack.hidden or not 0 < neurons <= stack.width:
            raise UpcycleError(
                f"the successor has {channels} channels and {neurons} neurons and the predecessor "
                f"{stack.hidden} and {stack.width}; it must not be wider"
            )
        hidden[stack.name], width[stack.name] = channels, neurons
    return hidden, width

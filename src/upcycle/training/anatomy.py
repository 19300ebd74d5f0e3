"""The parts of a model by the names that people give them: router, experts, attention, embeddings, ...

A part is a set of parameters, and two parts may overlap: a norm inside attention belongs to both. Stacked
experts count one by one, so that `experts[0]` is the first expert of every layer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError, listed, nearest
from upcycle.families import Stack, _stacks
from upcycle.families._training import Trained
from upcycle.hf.body import Body
from upcycle.training import moe_layers
from upcycle.training.moe_layers import ExpertStack
from upcycle.training.routing import Routers

_EXPERTS = re.compile(r"experts\[([\d,\s-]+)\]")  # experts[0], experts[1,3], experts[2-5]
_ANCHORS = "anchors"
_PATTERN = re.compile(r"[.*?\[\]]")  # what the name of a part never has

Members = Mapping[str, frozenset[int]]
"""Parameters by name; of stacked experts, the numbers in the stack, and of all others {0}."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model whose parameters can be asked for by the names of its parts."""

    model: PreTrainedModel
    family: Trained
    stacks: tuple[Stack, ...]
    routers: Routers | None
    anchors: frozenset[int] = frozenset()  # the numbers of the experts that began as the source's own network

    def chosen(self, only: tuple[str, ...] | None, freeze: tuple[str, ...] | None) -> Members:
        """Return what is trained: `only` (None: everything), less `freeze`, and what no text reaches.

        Raises `UpcycleError` for a name that the model has no part for, and if nothing is left to train.
        """
        kept = dict(self.everything) if only is None else self._all_of("train.only", only)
        frozen = self._all_of("train.freeze", freeze or ())
        left = {
            name: numbers - frozen.get(name, frozenset())
            for name, numbers in kept.items()
            if not self.body.is_around(name)
        }
        if not any(left.values()):
            said = " and ".join(
                f"train.{key}" for key, v in (("only", only), ("freeze", freeze)) if v is not None
            )
            raise UpcycleError(
                f"{said} leave no parameter to train; name fewer parts to freeze, or more to train"
            )
        return {name: numbers for name, numbers in left.items() if numbers}

    def found(self) -> list[str]:
        """Return the names of the parts that this model has."""
        return [name for name, part in _PARTS.items() if any(part(self))]

    @cached_property
    def everything(self) -> Members:
        """All parameters that a run may train."""
        return {
            name: frozenset(range(self._count(name)))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def read(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters, without those of a multimodal model around the body, which read no text."""
        every = self.model.named_parameters()
        return ((name, p) for name, p in every if not self.body.is_around(name))

    def size(self, chosen: Members) -> int:
        """Return how many numbers are trained, on all ranks together."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        return sum(sizes[name] // self.counts[name] * len(numbers) for name, numbers in chosen.items())

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """The number of experts in each parameter that a run may train; 1 if it is no stack."""
        return {name: len(numbers) for name, numbers in self.everything.items()}

    def _count(self, name: str) -> int:
        return next((stack.count for stack in self.stacked if name.startswith(stack.prefix)), 1)

    def _all_of(self, key: str, names: tuple[str, ...]) -> dict[str, frozenset[int]]:
        out: dict[str, frozenset[int]] = {}
        for each in names:
            for name, numbers in self._named(key, each).items():
                out[name] = out.get(name, frozenset()) | numbers
        return out

    def _named(self, key: str, given: str) -> Members:
        """Return the parameters that a name in `key` stands for."""
        if (some := _EXPERTS.fullmatch(given)) is not None:
            return self._some_experts(key, given, some.group(1))
        if given == _ANCHORS:
            return self._anchors(key)
        if given in _PARTS:
            names = set(_PARTS[given](self))
        elif _PATTERN.search(given):
            names = {name for name in self.everything if fnmatch.fnmatchcase(name, given)}
        else:
            raise UpcycleError(
                f"{key} names {given!r}, which is no part of a model and no pattern such as "
                f"*.layers.0.*{nearest(given, [*_PARTS, _ANCHORS])}"
            )
        found = {name: numbers for name, numbers in self.everything.items() if name in names}
        if not found:
            raise UpcycleError(self._nothing(key, given))
        return found

    def _nothing(self, key: str, given: str) -> str:
        if given in _PARTS:
            return f"{key} names {given}, which this model does not have; it has {listed(self.found(), 9)}"
        examples = listed(sorted(self.everything)[:3])
        return f"{key} = {given!r} matches no parameter of this model; names are like {examples}"

    def _anchors(self, key: str) -> Members:
        if not self.anchors:
            raise UpcycleError(
                f"{key} names {_ANCHORS}, and no expert that this run makes is the source's own network "
                f"beside those of others; give experts by their numbers, such as experts[0]"
            )
        return self._some_experts(key, _ANCHORS, ",".join(map(str, sorted(self.anchors))))

    def _some_experts(self, key: str, given: str, text: str) -> Members:
        if not self.stacked:
            raise UpcycleError(self._nothing(key, "experts"))
        most = max(stack.first + stack.count for stack in self.stacked)
        wanted: set[int] = set()
        for piece in text.replace(" ", "").split(","):
            low, dash, high = piece.partition("-")
            if not low.isdecimal() or (dash and not high.isdecimal()):
                raise UpcycleError(
                    f"{key} = {given!r}; experts are given as experts[0], experts[1,3] or experts[2-5]"
                )
            wanted |= set(range(int(low), int(high if dash else low) + 1))
        if not wanted or (beyond := sorted(e for e in wanted if e >= most)):
            raise UpcycleError(
                f"{key} = {given!r}, and the experts of a layer have the numbers 0 to {most - 1}"
                + (f", not {listed([str(e) for e in beyond])}" if wanted else "")
            )
        out = {}
        for name in self.everything:
            for stack in self.stacked:
                own = {e - stack.first for e in wanted} & set(range(stack.count))
                if own and name.startswith(stack.prefix):
                    out[name] = frozenset(own)
        return out

    # --- where the parts are ---

    @cached_property
    def body(self) -> Body:
        """The part of the model that has the blocks."""
        return Body.of(self.model)

    @property
    def base(self) -> str:
        """The prefix of the body's parameters."""
        return self.body.prefix

    @property
    def _routers(self) -> list[str]:
        return self.routers.names if self.routers else []

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The prefixes of the parameters of MoE layers."""
        return moe_layers.layers(self._routers)

    @cached_property
    def stacked(self) -> list[ExpertStack]:
        """The stacks of experts."""
        return moe_layers.stacks(self.model, self._routers)

    @cached_property
    def blocks(self) -> list[tuple[Stack, int, str]]:
        """Every block: its stack, its number, and the prefix of its parameters."""
        out = []
        for path in _stacks.lists_of(self.stacks):
            count = len(self.body.blocks(path))
            out += [(_stacks.at(self.stacks, path, i), i, f"{self.base}{path}.{i}.") for i in range(count)]
        return out

    def networks(self) -> Iterator[tuple[bool, str]]:
        """Yield the prefix of each network outside MoE layers, and whether experts stand beside it."""
        for stack, i, block in self.blocks:
            routed = any(layer.startswith(block) for layer in self.layers)
            for path in (stack.module, stack.down, *stack.replaced):
                own = f"{self.base}{path.format(i=i)}."
                if not own.startswith(self.layers or ("\0",)):
                    yield routed, own


def _router(anatomy: Anatomy) -> Iterator[str]:
    return _below(anatomy, *(f"{name}." for name in anatomy._routers))


def _experts(anatomy: Anatomy) -> Iterator[str]:
    return _below(anatomy, *(stack.prefix for stack in anatomy.stacked))


def _shared_expert(anatomy: Anatomy) -> Iterator[str]:
    """Yield what stands beside the routed experts of a layer, with its gate."""
    routed = {*_router(anatomy), *_experts(anatomy)}
    beside = [own for has_experts, own in anatomy.networks() if has_experts]
    return (name for name in _below(anatomy, *anatomy.layers, *beside) if name not in routed)


def _network(anatomy: Anatomy) -> Iterator[str]:
    return _below(anatomy, *(own for has_experts, own in anatomy.networks() if not has_experts))


def _attention(anatomy: Anatomy) -> Iterator[str]:
    """Yield what mixes the positions of a row: modules called attention, and those of `heads`."""
    roots = set()
    for stack, i, block in anatomy.blocks:
        network = f"{anatomy.base}{stack.module.format(i=i)}"
        for head in stack.heads:
            path = f"{anatomy.base}{head.format(i=i)}"
            if not _has(anatomy.model, path):
                continue  # a block of another kind
            # The outermost module of the block around it that does not hold the network.
            parts = path.removeprefix(block).split(".")
            outer = (block + ".".join(parts[:n]) for n in range(1, len(parts) + 1))
            roots.add(next(root for root in outer if not f"{network}.".startswith(f"{root}.")))
    roots |= {
        name
        for name, module in anatomy.model.named_modules()
        if "attention" in type(module).__name__.lower() and name
    }
    return _below(anatomy, *(f"{root}." for root in roots))


def _norms(anatomy: Anatomy) -> Iterator[str]:
    for path, module in anatomy.model.named_modules():
        if "norm" in type(module).__name__.lower():
            yield from (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))


def _embeddings(anatomy: Anatomy) -> Iterator[str]:
    """Yield what lies before the blocks, and every table outside them."""
    blocks = tuple(block for _, _, block in anatomy.blocks)
    tables = [name for name, module in anatomy.model.named_modules() if isinstance(module, nn.Embedding)]
    roots = [*(f"{anatomy.base}{start}" for start in anatomy.family.before), *(f"{name}." for name in tables)]
    return (name for name in _below(anatomy, *roots) if not name.startswith(blocks))


def _head(anatomy: Anatomy) -> Iterator[str]:
    """Yield what follows the base model, and a head that is tied to the embeddings."""
    head = anatomy.model.get_output_embeddings()
    own: set[int] = set() if head is None else {id(p) for p in head.parameters()}
    for name, parameter in anatomy.model.named_parameters():
        if id(parameter) in own or anatomy.body.follows(name):
            yield name


_PARTS: Mapping[str, Callable[[Anatomy], Iterator[str]]] = {
    "router": _router,
    "experts": _experts,
    "shared_expert": _shared_expert,
    "network": _network,
    "attention": _attention,
    "norms": _norms,
    "embeddings": _embeddings,
    "head": _head,
}


def _below(anatomy: Anatomy, *roots: str) -> Iterator[str]:
    """Yield the parameters whose names begin with one of `roots`."""
    return (name for name, _ in anatomy.read() if name.startswith(roots or ("\0",)))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True

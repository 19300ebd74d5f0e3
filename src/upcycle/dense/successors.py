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
from upcycle.dense.places import Alone, Part
from upcycle.dense.rests import admit_rest
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

        def names(dense: Dense, *, of_experts: bool) -> list[str]:
            """Return the stored names of the tensors that become experts, or of the others."""
            return [
                info.name
                for name, tensor in dense.tensors.items()
                if any(dense.stack(stack).owns(name, i) for stack, i in experts) == of_experts
                for info in tensor.sources()
            ]

        label, mine = self.rest.checkpoint.label, names(self.predecessor, of_experts=False)
        theirs = dict.fromkeys(names(self.rest, of_experts=True), "experts come from the predecessor")
        return {
            **dict.fromkeys(mine, "successor.rest has what is no expert"),
            **{f"{label}: {name}": why for name, why in {**theirs, **self.rest.left_out}.items()},
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
    if isinstance(predecessor.place, Part) and not isinstance(predecessor.place, Alone):
        raise UpcycleError(
            "[successor] makes a narrower model of a whole checkpoint, and what stands around this text "
            "model fits its width; --part-only text (moe.part_only) takes the text model out first"
        )
    if predecessor.keeps_further:
        raise UpcycleError(
            "moe.mtp = keep: blocks that predict further tokens have the source's width, and [successor] "
            "makes a narrower model; set it to drop"
        )
    family = narrowable(predecessor.family)
    axes = family.axes(predecessor.config)  # refuses a config that cannot be narrowed
    hidden, width = _widths(predecessor, wanted)
    changed = family.narrowed(predecessor.config, hidden, width)
    config = family.config({**predecessor.raw, **changed})
    if wanted.rest == "predecessor":
        _refuse_unknown(predecessor, axes)
        rest = None
    else:
        opened = opener(wanted.rest, allow_nonfinite=allow_nonfinite, label="rest")
        rest = admit_rest(opened, predecessor, config)
        config = rest.config
    return Narrowed(
        checkpoint=predecessor.checkpoint,
        family=family,
        config=config,
        left_out=predecessor.left_out,
        place=(rest or predecessor).place,
        predecessor=predecessor,
        rest=rest,
        init=init,
        seed=recipe.seed,
        changed=changed,
    )


def _refuse_unknown(predecessor: Dense, axes: Axes) -> None:
    """Refuse tensors outside what the family describes, such as those of a head that it does not list."""
    if unknown := sorted(predecessor.tensors.keys() - axes.keys()):
        raise UpcycleError(
            f"{predecessor.checkpoint.folder} holds {listed(unknown)}, and upcycle does not know which of "
            f"their axes are channels; give a checkpoint without them, or leave [successor] out"
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

"""The part of a family that only a narrower successor needs: which axes are channels, heads or neurons."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.families import Config, Family


@dataclass(frozen=True)
class Axis:
    """The meaning of an axis of a tensor: channels or neurons of a stack, or heads of a block."""

    kind: Literal["channels", "heads", "neurons"]
    stack: str = "layers"
    layer: int | None = None  # block of the stack, for heads and neurons
    unit: int = 1  # elements along the axis per channel, head or neuron


Axes = dict[str, tuple[Axis | None, ...]]


class Narrowable(Family):
    """A family whose models can become narrower ones."""

    @abc.abstractmethod
    def axes(self, config: Config) -> Axes:
        """Return what each axis of every tensor is made of, by name; None if no width changes the tensor.

        Raises `UpcycleError` for a config whose axes are unknown.
        """

    @abc.abstractmethod
    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        """Return the keys of config.json that change with the channels and the neurons of the stacks."""


def narrowable(family: Family) -> Narrowable:
    """Return the family as [successor] needs it.

    Raises `UpcycleError` for a family that does not know its axes.
    """
    if isinstance(family, Narrowable):
        return family
    raise unknown_axes(family)


def unknown_axes(family: Family) -> UpcycleError:
    """Return the error for a family whose tensors have axes that nobody has described."""
    return UpcycleError(
        f"the width of {family.model_type} cannot be changed: upcycle does not know which axes of its "
        f"tensors are channels; leave [successor] out"
    )

"""What only a narrower successor asks of a family: which axes of its tensors are channels, heads, neurons."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.families import Config, Family


@dataclass(frozen=True)
class Axis:
    """What an axis of a tensor is made of: channels or neurons of a stack, heads of a block."""

    kind: Literal["channels", "heads", "neurons"]
    stack: str = "layers"
    layer: int | None = None  # block of the stack, for heads and neurons
    unit: int = 1  # elements along the axis for each channel, head or neuron


Axes = dict[str, tuple[Axis | None, ...]]


class Narrowable(Family):
    """A family whose models can become narrower ones."""

    @abc.abstractmethod
    def axes(self, config: Config) -> Axes:
        """By the name of every tensor, what each of its axes is made of; None where no width changes it.

        Raises `UpcycleError` for a config of which this is not known.
        """

    @abc.abstractmethod
    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        """The keys of config.json that change with the channels and the neurons of the stacks."""


def narrowable(family: Family) -> Narrowable:
    """The family as [successor] sees it. One that does not know its axes is refused."""
    if isinstance(family, Narrowable):
        return family
    raise unknown_axes(family)


def unknown_axes(family: Family) -> UpcycleError:
    """The refusal of a family whose tensors have axes that nobody has described."""
    return UpcycleError(
        f"the width of {family.model_type} cannot be changed: upcycle does not know which axes of its "
        f"tensors are channels; leave [successor] out"
    )

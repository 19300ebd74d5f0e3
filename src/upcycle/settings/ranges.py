"""Ranges of values, written at the field: `Annotated[int, AtLeast(1)]`.

NaN and infinity are outside every range. `None` and texts are not checked.
"""

from __future__ import annotations

import abc
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from upcycle.errors import UpcycleError, shown


class Range(abc.ABC):
    """A set of numbers."""

    @abc.abstractmethod
    def holds(self, value: float) -> bool:
        """Return whether a number lies in the range."""

    @abc.abstractmethod
    def text(self, number: str = "") -> str:
        """Return the words for the range after `it must be`; `number` is a noun before it."""


@dataclass(frozen=True)
class AtLeast(Range):
    """The numbers not below `least`."""

    least: float

    def holds(self, value: float) -> bool:
        return self.least <= value < math.inf

    def text(self, number: str = "") -> str:
        return f"{number} of {self.least:g} or more" if number else f"{self.least:g} or more"


@dataclass(frozen=True)
class Above(Range):
    """The numbers above `bound`."""

    bound: float

    def holds(self, value: float) -> bool:
        return self.bound < value < math.inf

    def text(self, number: str = "") -> str:
        return f"{number} above {self.bound:g}".strip()


@dataclass(frozen=True)
class Within(Range):
    """An interval in mathematical notation: `Within("[0, 1)")` contains 0 but not 1."""

    interval: str

    def holds(self, value: float) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        return above and (value <= high if self.interval[-1] == "]" else value < high)

    def text(self, number: str = "") -> str:
        return f"in {self.interval}"


@dataclass(frozen=True)
class Finite(Range):
    """All finite numbers."""

    def holds(self, value: float) -> bool:
        return math.isfinite(value)

    def text(self, number: str = "") -> str:
        return f"{number} that is finite" if number else "finite"


@dataclass(frozen=True)
class Verbatim:
    """A mark for a text that may hold any character; a path or a name cannot hold NUL."""


def alternatives(hint: Any) -> Iterator[tuple[Any, tuple[Range, ...]]]:
    """Yield the types that an annotation allows, each with the ranges of its values.

    For `Annotated[int, AtLeast(1)] | None`, these are `int` with that range and `NoneType` without one.
    """
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        own = tuple(mark for mark in marks if isinstance(mark, Range))
        yield from ((option, (*own, *others)) for option, others in alternatives(inner))
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from alternatives(option)
    else:
        yield hint, ()


def options(hint: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows."""
    return (option for option, _ in alternatives(hint))


def is_verbatim(hint: Any) -> bool:
    """Return whether a text may hold any character."""
    return get_origin(hint) is Annotated and any(isinstance(mark, Verbatim) for mark in get_args(hint)[1:])


def refuse_outside(value: Any, hint: Any, key: str) -> None:
    """Raise `UpcycleError` if `value`, or an item of it, is outside the range in the annotation `hint`."""
    for item, wanted in _outside(value, hint):
        given = list(value) if isinstance(value, tuple) else value
        noun = "a number" if isinstance(item, float) else ""
        raise UpcycleError(f"{key} = {shown(given)}; it must be {wanted.text(noun)}")


def _outside(value: Any, hint: Any) -> Iterator[tuple[float, Range]]:
    """Yield the numbers in a value that are outside a range, each with that range."""
    for option, wanted in alternatives(hint):
        if isinstance(value, tuple) and get_origin(option) is tuple:
            for item in value:
                yield from _outside(item, get_args(option)[0])
        elif isinstance(value, (int, float)):
            yield from ((value, one) for one in wanted if not one.holds(value))

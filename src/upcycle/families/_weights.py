"""The kinds of tensors of a dense model: shape, use of the tensor by a token, and initial value.

A family assigns one of the kinds here to every tensor of its checkpoint (`Family.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Initial:
    """The value of a tensor when training starts from scratch."""


@dataclass(frozen=True)
class Normal(Initial):
    """Independent samples of N(0, deviation^2)."""

    deviation: float


@dataclass(frozen=True)
class Constant(Initial):
    """The same number everywhere."""

    value: float


@dataclass(frozen=True)
class Identity(Initial):
    """The weight of a norm that only normalises: 1, or 0 if norms multiply by 1 + w."""


@dataclass(frozen=True)
class AsMade(Initial):
    """The value from the conversion: constants of an architecture, and what a recipe draws."""


@dataclass(frozen=True)
class Weight:
    """A tensor of which only the shape is known. A run from scratch refuses it by name."""

    shape: Shape

    in_products: ClassVar[bool] = False  # True if each token of its stack meets it in a matrix product

    def initial(self, deviation: float) -> Initial | None:
        """Return its initial value, in a family whose matrices have this deviation; None if it is unknown."""
        return None


class Matrix(Weight):
    """A matrix, or a kernel, that each token of its stack is multiplied by."""

    in_products: ClassVar[bool] = True

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class Table(Weight):
    """Random numbers that no token is multiplied by.

    They are rows that are looked up, positions, or tokens before the patches of an image.
    """

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class RowMatrix(Weight):
    """A matrix that a whole row is multiplied by once, such as a pooler or a head over classes."""

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class Norm(Weight):
    """The weight of a norm."""

    def initial(self, deviation: float) -> Initial | None:
        return Identity()


class Bias(Weight):
    """A vector that is added to a result; it starts at 0."""

    def initial(self, deviation: float) -> Initial | None:
        return Constant(0.0)


@dataclass(frozen=True)
class Scale(Weight):
    """A vector that a result is multiplied by; it starts at `value`."""

    value: float

    def initial(self, deviation: float) -> Initial | None:
        return Constant(self.value)


Weights = dict[str, Weight]


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Weights:
    """Return the tensors of a linear layer: [rows, columns], and a bias [rows]."""
    return {f"{name}.weight": Matrix((rows, columns)), **({f"{name}.bias": Bias((rows,))} if bias else {})}


def row_linear(name: str, rows: int, columns: int) -> Weights:
    """Return the tensors of a linear layer that a whole row meets once."""
    return {f"{name}.weight": RowMatrix((rows, columns)), f"{name}.bias": Bias((rows,))}


def norm(name: str, size: int) -> Weights:
    """Return the tensors of a LayerNorm."""
    return {f"{name}.weight": Norm((size,)), f"{name}.bias": Bias((size,))}


def rms_norm(name: str, size: int) -> Weights:
    """Return the tensor of an RMSNorm."""
    return {f"{name}.weight": Norm((size,))}


def below(prefix: str, weights: Mapping[str, Weight]) -> Weights:
    """Return the same tensors with `prefix` before their names."""
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def products(weights: Mapping[str, Weight]) -> int:
    """Return how many numbers of these tensors a token meets in matrix products."""
    return sum(math.prod(weight.shape) for weight in weights.values() if weight.in_products)

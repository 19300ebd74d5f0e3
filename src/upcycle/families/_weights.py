"""What a tensor of a dense model is: its shape, what a token does with it, and what it starts training as.

A family names every tensor of its checkpoint with one of the kinds here (`Family.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Initial:
    """What a tensor starts training from nothing as."""


@dataclass(frozen=True)
class Normal(Initial):
    """Independent numbers of N(0, deviation^2)."""

    deviation: float


@dataclass(frozen=True)
class Constant(Initial):
    """One number everywhere."""

    value: float


@dataclass(frozen=True)
class Identity(Initial):
    """The weight of a norm that only normalises: 1, or 0 where norms multiply by 1 + w."""


@dataclass(frozen=True)
class AsMade(Initial):
    """What the conversion makes of it: constants of an architecture, and what a recipe draws."""


@dataclass(frozen=True)
class Weight:
    """A tensor of which nothing is known but its shape. A run from scratch refuses it by name."""

    shape: Shape

    in_products: ClassVar[bool] = False  # whether each token of its stack meets it in a matrix product

    def initial(self, deviation: float) -> Initial | None:
        """What it starts as, in a family whose matrices have this deviation; None: nobody has said it."""
        return None


class Matrix(Weight):
    """A matrix, or a kernel, that each token of its stack is multiplied by."""

    in_products: ClassVar[bool] = True

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class Table(Weight):
    """Numbers that are drawn and that no token is multiplied by: rows that are looked up, positions, tokens
    before the patches of an image."""

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class RowMatrix(Weight):
    """A matrix that a whole row is multiplied by once: a pooler, a head over classes."""

    def initial(self, deviation: float) -> Initial | None:
        return Normal(deviation)


class Norm(Weight):
    """The weight of a norm."""

    def initial(self, deviation: float) -> Initial | None:
        return Identity()


class Bias(Weight):
    """What is added to a result: it starts at 0."""

    def initial(self, deviation: float) -> Initial | None:
        return Constant(0.0)


@dataclass(frozen=True)
class Scale(Weight):
    """What a result is multiplied by: it starts at `value`."""

    value: float

    def initial(self, deviation: float) -> Initial | None:
        return Constant(self.value)


Weights = dict[str, Weight]


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Weights:
    """The tensors of a linear layer: [rows, columns], and a bias [rows]."""
    return {f"{name}.weight": Matrix((rows, columns)), **({f"{name}.bias": Bias((rows,))} if bias else {})}


def row_linear(name: str, rows: int, columns: int) -> Weights:
    """The tensors of a linear layer that a whole row meets once."""
    return {f"{name}.weight": RowMatrix((rows, columns)), f"{name}.bias": Bias((rows,))}


def norm(name: str, size: int) -> Weights:
    """The tensors of a LayerNorm."""
    return {f"{name}.weight": Norm((size,)), f"{name}.bias": Bias((size,))}


def rms_norm(name: str, size: int) -> Weights:
    """The tensor of an RMSNorm."""
    return {f"{name}.weight": Norm((size,))}


def below(prefix: str, weights: Mapping[str, Weight]) -> Weights:
    """The same tensors with `prefix` before their names."""
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def products(weights: Mapping[str, Weight]) -> int:
    """How many numbers of these tensors a token meets in matrix products."""
    return sum(math.prod(weight.shape) for weight in weights.values() if weight.in_products)

"""Initialisations of a router's weight. Each file here is one.

A file `NAME.py` defines a frozen dataclass derived from `RouterStart` and binds it to the module name
`start`; NAME is the value of `router.init`, or the `name` of the table `[router.init]`, whose other keys
are the fields. These files do not import torch, because a conversion makes the weight. Letters: E experts, S
slots per expert, H hidden, G the granularity, D domains.
"""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from upcycle import registry
from upcycle.settings import Named
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.dense.source import Dense
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class RouterStart(Named, abc.ABC):
    """A way to initialise a router's weight, with the properties that expert initialisations rely on."""

    section: ClassVar[str] = "router.init"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "normal"

    summary: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    groups: ClassVar[bool] = False  # whether each run of G experts has equal scores for every token
    from_data: ClassVar[bool] = False  # whether the rows say something about what was measured

    @classmethod
    def find(cls, name: str) -> type[Self]:
        """Return the start called `name`. Raises `UpcycleError`, with the known names, if there is none."""
        found: type[Self] = registry.find(sys.modules[cls.package], name, "start", cls.section)
        return found

    @abc.abstractmethod
    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        """Return the weight [rows, H] of the router at `site`; `rows` is E or E x S.

        `std` is the standard deviation from the recipe. Random numbers must come from `site.key("router")`.
        """

    def uniform(self, std: float) -> bool:
        """Return whether all experts have the same score for every token."""
        return std == 0

    def check(self, num_experts: int, granularity: int) -> None:
        """Raise `UpcycleError` if this start does not work for layers of this shape."""

    def admit(self, dense: Dense) -> None:
        """Raise `UpcycleError` if a file that this start uses does not belong to the dense model."""


def find(name: str) -> RouterStart:
    """Return the start called `name` with its usual keys. Raise `UpcycleError` for an unknown name."""
    return RouterStart.find(name)()


def names() -> list[str]:
    """Return the names of all starts."""
    return RouterStart.names()

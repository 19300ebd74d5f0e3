"""Initialisations of a router's weight. Each file here is one.

A file `NAME.py` defines a frozen dataclass derived from `RouterStart` and binds it to the module name
`start`; NAME is the value of `router.init`. These files do not import torch, because a conversion makes the
weight. Letters: E experts, S slots per expert, H hidden, G the granularity.
"""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from upcycle import registry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class RouterStart(abc.ABC):
    """A way to initialise a router's weight, with the properties that expert initialisations rely on."""

    summary: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    groups: ClassVar[bool] = False  # whether each run of G experts has equal scores for every token

    @property
    def name(self) -> str:
        """The name in the recipe, which is the file's name."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        """Return the weight [rows, H] of the router at `site`; `rows` is E or E x S.

        `std` is the standard deviation from the recipe. Random numbers must come from `site.key("router")`.
        """

    def uniform(self, std: float) -> bool:
        """Return whether all experts have the same score for every token."""
        return std == 0

    def check(self, num_experts: int, granularity: int) -> None:  # noqa: B027 - nothing to check is the rule
        """Raise `UpcycleError` if this start does not work for layers of this shape."""


def find(name: str) -> RouterStart:
    """Return the start that `router.init` calls `name`. Raise `UpcycleError` for an unknown name."""
    found: type[RouterStart] = registry.find(sys.modules[__name__], name, "start", "router.init")
    return found()


def names() -> list[str]:
    """Return the names of all starts."""
    return registry.names(sys.modules[__name__])

"""How the weight of a router starts. One file here is one way.

A file `NAME.py` defines a frozen dataclass deriving from `RouterStart`, bound to the module name `start`;
NAME is what `router.init` says. No torch here: a conversion makes the weight. Letters: E experts, S slots of
each, H hidden, G the granularity.
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
    """A way to make the weight of a router, and what initialisations of experts may rely on."""

    summary: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    groups: ClassVar[bool] = False  # whether G experts in turn have the same score, whatever the token

    @property
    def name(self) -> str:
        """The name in the recipe: that of the file."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        """The weight [rows, H] of the router at `site`; rows are E, or E x S.

        `std` is the standard deviation that the recipe asks for. Random numbers come from
        `site.key("router")`.
        """

    def uniform(self, std: float) -> bool:
        """Whether all experts have the same score for every token."""
        return std == 0

    def check(self, num_experts: int, granularity: int) -> None:  # noqa: B027 - nothing to check is the rule
        """Raise `UpcycleError` if there is no such start for layers of this shape."""


def find(name: str) -> RouterStart:
    """The start that `router.init` calls `name`.

    Raises `UpcycleError` with the names that there are.
    """
    found: type[RouterStart] = registry.find(sys.modules[__name__], name, "start", "router.init")
    return found()


def names() -> list[str]:
    """The names of all starts."""
    return registry.names(sys.modules[__name__])

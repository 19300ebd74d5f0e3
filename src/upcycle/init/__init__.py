"""How one expert is made from the dense feed-forward network. One file here is one way.

A file `NAME.py` defines a frozen dataclass deriving from `Init`, bound to the module name `init`; its
fields are the keys that `[init] name = "NAME"` takes. Nothing else has to be touched.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import Named
from upcycle.tensors import rng
from upcycle.tensors.computed import Mean
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.positions import Order

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

Spread = Literal["down", "sqrt", "cube_root"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where experts are made: one MoE layer of `num_experts` experts, I / G of the dense width I each, or of
    `expert_width` neurons, and beside them `universal_experts` narrower ones."""

    layer: int
    stack: str = "layers"  # of which blocks it is the number
    blocks: int  # of that stack
    num_experts: int
    top_k: int
    granularity: int
    dense_width: int  # of the network that experts are made from
    hidden: int  # channels of the experts
    dense_hidden: int  # of that network; more where the model is narrowed
    expert_width: int = 0
    universal_experts: int = 0
    universal_width: int = 0
    core_width: int = 0  # neurons of the other experts, where this is the place of the universal ones
    shared_width: int = 0  # neurons of the shared expert beside them; 0: there is none
    seed: int
    grouped_router: bool
    uniform_router: bool  # all zero: every expert has the same score for every token
    gate_sum: float  # what the weights of the chosen experts sum to under a uniform router

    @property
    def width(self) -> int:
        """The number of neurons of an expert."""
        return self.expert_width or self.dense_width // self.granularity

    @property
    def all_experts(self) -> int:
        """How many experts the router knows."""
        return self.num_experts + self.universal_experts

    @property
    def universal(self) -> Site:
        """The same place for the universal experts, whose numbers go on where those of the others end."""
        return replace(self, expert_width=self.universal_width, core_width=self.width)

    @property
    def of_universal(self) -> bool:
        """Whether this is the place of the universal experts."""
        return self.core_width > 0

    def key(self, *names: object) -> rng.Key:
        """The key of a stream of random numbers of this layer."""
        return rng.key(self.seed, f"{self.stack}.{self.layer}.mlp", *names)

    def sample(self, ratio: float, n: int, *names: object) -> Order:
        """floor(ratio x n) positions of range(n), without replacement, sorted."""
        return Order(self.key(*names), n, 0, math.floor(ratio * n), sort=True)


@dataclass(frozen=True, kw_only=True)
class Init(Named, abc.ABC):
    """A way to make experts. It writes experts for gates that sum to one; `scale` does the rest."""

    section: ClassVar[str] = "init"
    package: ClassVar[str] = __name__
    noun: ClassVar[str] = "initialisation"
    usual: ClassVar[str | None] = "copy"

    summary: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    fine_grained: ClassVar[bool] = False  # whether experts may be narrower than the dense network
    selects: ClassVar[bool] = False  # whether experts may be of any width, and of fewer channels

    @abc.abstractmethod
    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        """Expert `e`, [I / G] neurons, from the networks of the dense checkpoints (the source first)."""

    @abc.abstractmethod
    def preserves(self, site: Site) -> bool:
        """Whether any choice of experts, weighted to sum to one and scaled, gives the dense output."""

    def admit(self, dense: Dense) -> None:
        """Raise where what this initialisation brings along is not of that dense model."""

    def check(self, site: Site) -> None:
        """Raise where the experts asked for cannot be made. Extend, do not replace."""
        narrow = site.granularity == 1 and site.width != site.dense_width
        if not self.selects and (narrow or site.universal_experts):
            what = "moe.universal_experts" if site.universal_experts else "moe.expert_width"
            raise UpcycleError(
                f"{what}: init {self.name} makes experts as wide as the dense network ({site.dense_width}) "
                f"or a whole part of it; importance, co_activation, uniform and random choose neurons"
            )
        if site.width > site.dense_width or site.universal_width > site.dense_width:
            raise UpcycleError(
                f"an expert of {max(site.width, site.universal_width)} neurons cannot be chosen from a "
                f"network of {site.dense_width}; lower moe.expert_width or moe.universal_width"
            )
        if site.granularity > 1 and not self.fine_grained:
            raise UpcycleError(
                f"init {self.name} makes experts as wide as the dense network, and moe.granularity is "
                f"{site.granularity}; use virtual_group, shuffle_slice or split, or granularity 1"
            )
        if site.dense_width % site.granularity:
            raise UpcycleError(
                f"moe.granularity = {site.granularity} does not divide the dense width {site.dense_width}"
            )

    def scale(self, site: Site) -> float:
        """What the output of an expert is multiplied by, for gates that sum to one."""
        return 1.0

    @property
    def spread(self) -> Spread:
        """Which matrices carry the scale: `down` alone, `sqrt` in up and down, or `cube_root` in all."""
        return "down"

    @property
    def donors(self) -> tuple[str, ...]:
        """Dense checkpoints beside the source that experts are made from."""
        return ()

    @property
    def uses_source(self) -> bool:
        """Whether the source's own weights are among those experts and the rest are made from."""
        return True

    def backbone(self, tensors: list[Lazy]) -> Lazy:
        """What is no expert, from the same tensor of each dense checkpoint."""
        return tensors[0] if len(tensors) == 1 else Mean(tuple(tensors))

    def warnings(self, site: Site) -> list[str]:
        """What a person should know before training on from here."""
        return []

    def working_memory(self, width: int, hidden: int) -> int:
        """Bytes held beside blocks of tensors, for matrices of [width, hidden]."""
        return 0


def find(name: str) -> type[Init]:
    """The initialisation called `name`."""
    return Init.find(name)


def names() -> list[str]:
    """The names of all initialisations."""
    return Init.names()

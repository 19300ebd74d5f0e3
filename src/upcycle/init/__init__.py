"""The ways to make an expert from the dense feed-forward network. Each file here is one way.

A file `NAME.py` defines a frozen dataclass that derives from `Init` and binds it to the module name `init`.
Its fields are the keys that `[init] name = "NAME"` takes. No other file has to change.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import Named
from upcycle.tensors import rng
from upcycle.tensors.computed import Mean
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.positions import Order, Positions

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

Spread = Literal["down", "sqrt", "cube_root"]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The growth of an MoE layer of the source: which of its experts each expert is, by number.

    The source's own come first, in order, and copies follow; noise may be on both. `exact` is true if the
    layer computes what it did, and `cancels` if it does so because noise of opposite signs cancels, which
    takes a type that rounds little.
    """

    parents: tuple[int, ...]
    exact: bool
    cancels: bool


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place where experts are made: one MoE layer.

    It has `num_experts` experts, each with I / G of the dense network's I neurons or with `expert_width`, and
    `universal_experts` narrower ones beside them.
    """

    layer: int
    stack: str = "layers"  # the stack that the block number `layer` belongs to
    blocks: int  # number of blocks in that stack
    num_experts: int
    top_k: int
    granularity: int
    dense_width: int  # neurons of the network that the experts are made from
    hidden: int  # channels of the experts
    dense_hidden: int  # channels of that network; more than `hidden` if the model is narrowed
    expert_width: int = 0
    universal_experts: int = 0
    universal_width: int = 0
    core_width: int = 0  # neurons of the other experts, if this is the place of the universal ones
    shared_width: int = 0  # neurons of the shared expert beside them; 0 if there is none
    seed: int
    grouped_router: bool
    uniform_router: bool  # the router is all zero: every expert has the same score for every token
    gate_sum: float  # sum of the weights of the chosen experts under a uniform router
    even_weights: bool = False  # chosen experts have equal weights, whatever the router scores
    growth: Growth | None = None  # set if the source has experts here already

    @property
    def width(self) -> int:
        """The number of neurons of an expert."""
        return self.expert_width or self.dense_width // self.granularity

    @property
    def all_experts(self) -> int:
        """The number of experts that the router chooses from."""
        return self.num_experts + self.universal_experts

    @property
    def universal(self) -> Site:
        """The same place for the universal experts, which are numbered after the others."""
        return replace(self, expert_width=self.universal_width, core_width=self.width)

    @property
    def of_universal(self) -> bool:
        """True if this is the place of the universal experts."""
        return self.core_width > 0

    def key(self, *names: object) -> rng.Key:
        """Return the key of a stream of random numbers for this layer."""
        return rng.key(self.seed, f"{self.stack}.{self.layer}.mlp", *names)

    def sample(self, ratio: float, n: int, *names: object) -> Order:
        """Return floor(ratio x n) positions of range(n), drawn without replacement and sorted."""
        return Order(self.key(*names), n, 0, math.floor(ratio * n), sort=True)


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A dense model that experts are made from: a checkpoint, with a LoRA adapter merged into it or not."""

    source: str = ""  # a folder or a hub id; empty means the source
    adapter: str = ""  # a folder or a hub id; empty means none

    @property
    def name(self) -> str:
        """A name for messages."""
        return f"{self.adapter} on {self.source or 'the source'}" if self.adapter else self.source


@dataclass(frozen=True, kw_only=True)
class Init(Named, abc.ABC):
    """A way to make experts, for gates that sum to one. `scale` is the factor for each expert's output."""

    section: ClassVar[str] = "init"
    package: ClassVar[str] = __name__
    noun: ClassVar[str] = "initialisation"
    usual: ClassVar[str | None] = "copy"

    summary: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    fine_grained: ClassVar[bool] = False  # True if experts may be narrower than the dense network
    selects: ClassVar[bool] = False  # True if experts may have any width, and fewer channels
    chooses_shared: ClassVar[bool] = False  # True if the shared expert is a part that it chooses

    @abc.abstractmethod
    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        """Return expert `e`, [I / G] neurons, made from the dense checkpoints' networks, source first."""

    def make(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        """Return expert `e`, as everybody asks for it; an initialisation may have a key called `expert`."""
        return self.expert(dense, e, site)

    def shared(self, dense: list[FeedForward], site: Site) -> FeedForward | None:
        """Return the shared expert if it is a part that experts lack; None if it is the dense network."""
        return None

    def representatives(self, site: Site) -> Positions | None:
        """Return one neuron of the dense network for each expert, for a router that is made of neurons."""
        return None

    @abc.abstractmethod
    def preserves(self, site: Site) -> bool:
        """Return whether any choice of experts, weighted to sum to one and scaled, gives the dense output."""

    def admit(self, dense: Dense) -> None:
        """Raise `UpcycleError` if a file that this initialisation uses does not belong to the dense model."""

    def check(self, site: Site) -> None:
        """Raise `UpcycleError` if the experts asked for cannot be made. Subclasses call `super()`."""
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
        if site.universal_width > site.width:
            raise UpcycleError(
                f"moe.universal_width = {site.universal_width} is more than the {site.width} neurons of the "
                f"other experts; universal experts are the narrower ones, so lower it (0 means a quarter)"
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

    def check_together(self, sites: Sequence[Site]) -> None:
        """Raise `UpcycleError` if the experts of these places cannot all be made by the same settings."""

    def scale(self, site: Site) -> float:
        """Return the factor for the output of an expert, for gates that sum to one."""
        return 1.0

    @property
    def spread(self) -> Spread:
        """The matrices that carry the scale: `down`, `sqrt` for up and down, or `cube_root` for all three."""
        return "down"

    @property
    def donors(self) -> tuple[Donor, ...]:
        """The dense models besides the source that experts are made from."""
        return ()

    @property
    def uses_source(self) -> bool:
        """True if the experts and the rest are made from the source's weights too."""
        return True

    @property
    def in_experts(self) -> frozenset[int]:
        """The places of the dense models that experts are made from; 0 is the source."""
        return frozenset(range(not self.uses_source, len(self.donors) + 1))

    @property
    def in_backbone(self) -> tuple[int, ...]:
        """The places of the dense models that everything outside the experts is made from."""
        return tuple(range(not self.uses_source, len(self.donors) + 1))

    def anchors(self, num_experts: int) -> frozenset[int]:
        """Return the numbers of the experts that are the source's own network among those of others."""
        return frozenset()

    def backbone(self, tensors: list[Lazy]) -> Lazy:
        """Return a tensor that is not part of an expert, from those of the models `in_backbone`."""
        return tensors[0] if len(tensors) == 1 else Mean(tuple(tensors))

    def merge(self, tensors: list[Lazy]) -> Lazy:
        """Return a tensor of the backbone, as everybody asks for it; `backbone` may be a key as well."""
        return self.backbone(tensors)

    def warnings(self, site: Site) -> list[str]:
        """Return what a user should know before training on from here."""
        return []

    def working_memory(self, width: int, hidden: int) -> int:
        """Return the bytes held besides blocks of tensors, for matrices of [width, hidden]."""
        return 0


def find(name: str) -> type[Init]:
    """Return the initialisation called `name`."""
    return Init.find(name)


def names() -> list[str]:
    """Return the names of all initialisations."""
    return Init.names()

"""The common part of initialisations with several dense models: a table for each kind of expert."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.init import Donor, Init, Site
from upcycle.settings import Above, AtLeast, Settings, Within
from upcycle.tensors.computed import Noise
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.mixed import Lerp, Slerp

Mix = Literal["lerp", "slerp"]


def absolute(name: str) -> str:
    """Return the absolute path of a folder, because a recipe may be read from another directory.

    The recipe is stored with its result. A hub id stays as it is.
    """
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


@dataclass(frozen=True, kw_only=True)
class Expert(Settings):
    """The origin of one expert. Without any key it is the network of SOURCE, an anchor."""

    section: ClassVar[str] = "init.expert"

    source: str = ""  # the dense checkpoint that it comes from, a folder or a hub id; empty means SOURCE
    # a LoRA adapter of that checkpoint, a folder of peft or a hub id: W + alpha / r B A (arXiv 2106.09685)
    adapter: str = ""
    # share w of this model in a mix with SOURCE: (1 - w) SOURCE + w this, if `mix` is lerp
    weight: Annotated[float, Within("(0, 1]")] = 1.0
    # how the two are mixed: along the line between them, or along the arc, matrix by matrix (Shoemake 1985)
    mix: Mix = "lerp"
    noise: Annotated[float, AtLeast(0)] = 0.0  # standard deviation of Gaussian noise on its matrices
    # whether `noise` is in standard deviations of each matrix; mergekit's noise_scale is absolute
    noise_relative: bool = True
    # factor of its last matrix, and so of its output (residual_scale of mergekit)
    residual_scale: Annotated[float, Above(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("source", "adapter"):
            object.__setattr__(self, key, absolute(getattr(self, key)))
        if self.weight != 1.0 and not self.donor:
            raise UpcycleError(
                f"init.expert.weight = {self.weight:g} mixes SOURCE with itself; name a source or an adapter"
            )

    @property
    def donor(self) -> Donor | None:
        """The dense model that it comes from; None if that is SOURCE."""
        return Donor(source=self.source, adapter=self.adapter) if self.source or self.adapter else None

    @property
    def is_anchor(self) -> bool:
        """True if it is the network of SOURCE, unchanged."""
        return not self.donor and not self.noise and self.residual_scale == 1.0

    def made(self, base: FeedForward, donor: FeedForward, e: int, site: Site) -> FeedForward:
        """Return expert `e` from the networks of SOURCE and of its own model."""
        network = donor
        if self.weight != 1.0:
            network = FeedForward.merged([base, donor], self._mixed)
        if self.noise:
            whole = site.sample(1.0, site.dense_width, "noise neurons", e)
            network = network.map(
                lambda name, axis, m: Noise(
                    m, axis, self.noise, self.noise_relative, whole, site.key(name, "noise", e)
                )
            )
        return network.scaled(down=self.residual_scale, down_bias=self.residual_scale)

    def _mixed(self, two: list[Lazy]) -> Lazy:
        if self.mix == "lerp":
            return Lerp(tuple(two), self.weight)
        return Slerp(tuple(two), (self.weight,))


@dataclass(frozen=True, kw_only=True)
class Merging(Init):
    """Experts from several dense models: each of `tables` makes an equal block of them."""

    @property
    @abc.abstractmethod
    def tables(self) -> tuple[Expert, ...]:
        """The kinds of experts, in the order of the experts."""

    @property
    @abc.abstractmethod
    def places(self) -> tuple[int, ...]:
        """The place of each table's model among the dense models; 0 is the source."""

    @cached_property
    def in_experts(self) -> frozenset[int]:
        mixed = any(table.weight != 1.0 for table in self.tables)
        return frozenset(self.places) | ({0} if mixed else frozenset())

    def anchors(self, num_experts: int) -> frozenset[int]:
        return frozenset(e for e in range(num_experts) if self._table(e, num_experts)[0].is_anchor)

    def check(self, site: Site) -> None:
        super().check(site)
        if site.num_experts % len(self.tables):
            raise UpcycleError(self._uneven(site))

    @abc.abstractmethod
    def _uneven(self, site: Site) -> str:
        """Return the sentence for a number of experts that the tables cannot make."""

    def make(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        table, place = self._table(e, site.num_experts)
        return table.made(dense[0], dense[place], e, site)

    def _table(self, e: int, num_experts: int) -> tuple[Expert, int]:
        number = e * len(self.tables) // num_experts
        return self.tables[number], self.places[number]

    def preserves(self, site: Site) -> bool:
        return self.in_backbone == (0,) and len(self.anchors(site.num_experts)) == site.num_experts

"""The base of the initialisations that choose weights of a larger network (MoE Jetpack, section 3.1)."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from upcycle.init import Init, Site
from upcycle.tensors import rng
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.positions import Computed, Given, Positions

Kind = Literal["channels", "heads", "neurons"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of `count` out of `total` channels, heads or neurons.

    It is made in one block, or (None) for all `blocks` of a stack, and for expert `who`, or (None) for the
    part that is not an expert.
    """

    kind: Kind
    stack: str
    layer: int | None
    blocks: int
    total: int
    count: int
    seed: int
    who: int | None = None

    @classmethod
    def of(cls, kind: Kind, site: Site, *, total: int, count: int, who: int) -> Choice:
        """Return the choice that an expert makes in its block."""
        return cls(
            kind=kind, stack=site.stack, layer=site.layer, blocks=site.blocks, total=total, count=count,
            seed=site.seed, who=who,
        )  # fmt: skip

    def of_the_stack(self) -> Choice:
        """Return the choice that all blocks and all experts share."""
        return replace(self, layer=None, who=None)

    def key(self, name: str) -> rng.Key:
        """Return the key of a stream of random numbers for this choice."""
        return rng.key(self.seed, self.kind, self.stack, self.layer, name, self.who)


@dataclass(frozen=True, kw_only=True)
class Selecting(Init):
    """Each expert has some of the dense network's neurons and, in a narrower model, some of its channels.

    `preset` sets the keys that are not given: `paper` is MoE Jetpack's text, `repo` its released code.

    `channels`: `shared` keeps one set everywhere, as the residual stream does (paper); `per_expert` draws a
    set for each expert, whose columns then no longer match the channels of its input (repo). Attention heads
    stay whole.

    `universal`: the neurons of universal experts are `chosen` like those of the others, or `thinned` to an
    evenly spaced subset of what such an expert would have (repo).

    `output`: `raw` keeps the weights as they are (both); `expected` multiplies an expert's output by I / I',
    the dense width over its own, so that for neurons drawn with equal probability its mean over draws is the
    dense output.
    """

    selects = True
    fine_grained = True

    # sets the keys that are not given: MoE Jetpack's text (paper) or its released code (repo)
    preset: Literal["paper", "repo"] = "paper"
    # one set of channels everywhere (shared), or one drawn for each expert (per_expert)
    channels: Literal["shared", "per_expert"] | None = None
    # neurons of universal experts: chosen like the others, or an evenly spaced subset of those (thinned)
    universal: Literal["chosen", "thinned"] | None = None
    # raw keeps the weights; expected multiplies an expert's output by the dense width over its own
    output: Literal["raw", "expected"] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        paper = self.preset == "paper"
        self._default("channels", "shared" if paper else "per_expert")
        self._default("universal", "chosen" if paper else "thinned")

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @abc.abstractmethod
    def choose(self, choice: Choice) -> Positions:
        """Return the chosen positions, ascending."""

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        out = dense[0].take(self.neurons(e, site))
        return out if site.hidden == site.dense_hidden else out.narrowed(self.channels_of(e, site))

    def channels_of(self, e: int, site: Site) -> Positions:
        """Return the channels of expert `e`."""
        channels = Choice.of("channels", site, total=site.dense_hidden, count=site.hidden, who=e)
        return self.choose(channels.of_the_stack() if self.channels == "shared" else channels)

    def neurons(self, e: int, site: Site) -> Positions:
        """Return the neurons of expert `e`."""
        thinned = site.of_universal and self.universal == "thinned"
        count = site.core_width if thinned else site.width
        chosen = self.choose(Choice.of("neurons", site, total=site.dense_width, count=count, who=e))
        if not thinned:
            return chosen
        kept = spread(count, site.width)
        return Computed(lambda: chosen.values[kept], site.width, ["thinned", site.width, chosen.describe()])

    def scale(self, site: Site) -> float:
        return site.dense_width / site.width if self.output == "expected" else 1.0

    def preserves(self, site: Site) -> bool:
        whole = site.width == site.dense_width and site.hidden == site.dense_hidden
        return whole and not site.universal_experts


def spread(total: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced positions of range(total), int64 [count], first and last included.

    They are round(linspace(0, total - 1)).
    """
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)


def drawn(key: rng.Key, weights: np.ndarray) -> np.ndarray:
    """Return all positions in the order of a weighted draw without replacement; [n].

    Each next position has a probability in proportion to its weight, and positions without weight come last.
    Sorting log(weight) + Gumbel noise in descending order gives the same distribution (Efraimidis and
    Spirakis, 2006).
    """
    uniform = np.maximum(rng.uniforms(key, 0, len(weights)).astype(np.float64), 2.0**-25)
    score = np.log(np.maximum(weights, 1e-300)) - np.log(-np.log(uniform))
    return np.argsort(-score, kind="stable")


def given(positions: np.ndarray) -> Given:
    """Return known positions."""
    return Given(tuple(positions.tolist()))

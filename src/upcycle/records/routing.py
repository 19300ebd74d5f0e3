"""`routing.json`: what `inspect` saw of the routers of a checkpoint at work. It lies beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle.records.reader import Document, Record, sometimes


@dataclass(frozen=True, kw_only=True)
class RoutingDomain(Record):
    """A set of rows that the model was shown; further keys say what the rows are."""

    name: str
    file: str | None = sometimes()
    rows: int | None = sometimes()


@dataclass(frozen=True, kw_only=True)
class RoutingLayer(Record):
    """What the router of one layer of E experts did with D domains."""

    stack: str = "layers"
    layer: int
    load: tuple[float, ...]  # [E], each expert's share of the slots
    load_by_domain: Mapping[str, tuple[float, ...]]
    weight_by_domain: Mapping[str, tuple[float, ...]] | None = sometimes()  # mean probabilities, [E] each
    confidence: float | None = sometimes()  # mean of the largest probability of a token
    entropy: float | None = sometimes()  # mean over tokens, over log E
    left_behind: float | None = sometimes()  # share of the tokens that reached no expert
    tokens: int | None = sometimes()
    divergence_of: str = "loads"  # or `weights`, if the router gives every expert as much
    divergence: tuple[tuple[float, ...], ...]  # [D, D], Jensen and Shannon's, in bits
    favourites: tuple[tuple[tuple[Any, ...], ...], ...] = ()  # by expert: tokens with their mean probability

    @property
    def by_domain(self) -> Mapping[str, tuple[float, ...]]:
        """How each domain used the experts: loads, or weights if every expert has as much."""
        weights = self.weight_by_domain if self.divergence_of == "weights" else None
        return self.load_by_domain if weights is None else weights


@dataclass(frozen=True, kw_only=True)
class RoutingRecord(Document):
    """Every Mixture-of-Experts layer of a checkpoint, in order."""

    FILE: ClassVar[str] = "routing.json"

    format: int = Document.FORMAT
    kind: str  # text or images
    domains: tuple[RoutingDomain, ...]
    layers: tuple[RoutingLayer, ...]

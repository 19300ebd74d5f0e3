"""`routing.json`: the routing of a checkpoint as `inspect` observed it. It is beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle.records.reader import Document, Record, sometimes


@dataclass(frozen=True, kw_only=True)
class RoutingDomain(Record):
    """A set of rows that the model was run on; additional keys describe the rows."""

    name: str
    file: str | None = sometimes()
    rows: int | None = sometimes()


@dataclass(frozen=True, kw_only=True)
class RoutingLayer(Record):
    """The routing of one layer of E experts on D domains."""

    stack: str = "layers"
    layer: int
    load: tuple[float, ...]  # [E], each expert's share of the slots
    load_by_domain: Mapping[str, tuple[float, ...]]
    weight_by_domain: Mapping[str, tuple[float, ...]] | None = sometimes()  # mean probabilities, [E] each
    confidence: float | None = sometimes()  # mean over tokens of the largest probability
    entropy: float | None = sometimes()  # mean over tokens, divided by log E
    left_behind: float | None = sometimes()  # share of the tokens that reached no expert
    tokens: int | None = sometimes()
    divergence_of: str = "loads"  # or `weights`, if the router gives every expert equally many tokens
    divergence: tuple[tuple[float, ...], ...]  # [D, D], Jensen-Shannon divergence in bits
    favourites: tuple[tuple[tuple[Any, ...], ...], ...] = ()  # for each expert: tokens, mean probabilities

    @property
    def by_domain(self) -> Mapping[str, tuple[float, ...]]:
        """The use of the experts by each domain: loads, or weights if the loads are equal by construction."""
        weights = self.weight_by_domain if self.divergence_of == "weights" else None
        return self.load_by_domain if weights is None else weights


@dataclass(frozen=True, kw_only=True)
class RoutingRecord(Document):
    """Every Mixture-of-Experts layer of a checkpoint, in order."""

    FILE: ClassVar[str] = "routing.json"

    format: int = Document.FORMAT
    kind: str  # text or images
    weights: str | None = sometimes()  # a hash that identifies those of the model; none in older files
    domains: tuple[RoutingDomain, ...]
    layers: tuple[RoutingLayer, ...]

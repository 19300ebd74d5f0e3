"""Routing: what a router found out about the tokens at hand, and which of them go where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from upcycle.nn.dispatch import Dispatch


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer's decision about T tokens (padding included) and E experts; numbers in float32.

    `balanced` says whether every expert gets its share by construction, so that no balance loss applies.
    `losses` are sums over the router's groups, [] each; `groups` is the number of groups.
    """

    dispatch: Dispatch
    logits: Tensor  # [T, E], of real tokens alone where there is padding
    probabilities: Tensor  # [T, E] likewise, rows sum to one
    counts: Tensor  # [E], how many tokens chose each expert, or were chosen by it
    left_behind: Tensor  # [], how many tokens reach no expert
    balanced: bool = False
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    groups: int = 1

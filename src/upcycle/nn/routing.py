"""What a router is given, and what it decided: the tokens at hand, and which of them go where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from upcycle.nn.dispatch import Dispatch


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a router decides about: G groups of N tokens for E experts, in float32 at least.

    `tensors` are the router's own by name, `top_k` the experts that a token uses where tokens choose;
    `causal` says that no token may depend on later ones.
    """

    hidden: Tensor  # [G, N, H]
    padding: Tensor | None = None  # [G, N], True where there is no token
    tensors: Mapping[str, Tensor]
    num_experts: int
    top_k: int
    training: bool = False
    causal: bool = False

    @property
    def groups(self) -> int:
        """G."""
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        """N."""
        return self.hidden.shape[1]

    @property
    def real(self) -> Tensor | None:
        """Where there are tokens, [G, N]; None if they are everywhere."""
        return None if self.padding is None else ~self.padding

    def real_of(self, values: Tensor) -> Tensor:
        """The rows of `values` [G, N, ...] that belong to tokens, [T, ...]."""
        return values.flatten(0, 1) if self.padding is None else values[~self.padding]


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

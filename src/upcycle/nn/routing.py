"""The input and output of a router: the tokens of a layer, and the decision which of them go where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from upcycle.nn.counts import counted
from upcycle.nn.dispatch import Dispatch


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The input of a router: G groups of N tokens for E experts, in float32 or wider.

    `tensors` are the router's own tensors by name. `top_k` is the number of experts per token if tokens
    choose. `causal` says that no token may depend on later ones.
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
        """The number of groups, G."""
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens in a group, N."""
        return self.hidden.shape[1]

    @property
    def real(self) -> Tensor | None:
        """The mask of real tokens, [G, N]; None if there is no padding."""
        return None if self.padding is None else ~self.padding

    @property
    def real_rows(self) -> Tensor | None:
        """The mask of real tokens over all groups, [T]; None if there is no padding."""
        return None if self.padding is None else ~self.padding.flatten()

    def real_of(self, values: Tensor) -> Tensor:
        """Return the rows of `values` [G, N, ...] that belong to real tokens, [T', ...].

        With padding, it waits until the device has computed how many there are.
        """
        return values.flatten(0, 1) if self.padding is None else values[~self.padding]

    def counts_of(self, index: Tensor) -> Tensor:
        """Return how many choices of real tokens fall on each expert, [E], for choices `index` [G, N, K]."""
        there = None if self.padding is None else (~self.padding)[..., None].expand_as(index)
        return counted(index, self.num_experts, there)

    def number_of(self, tokens: Tensor) -> Tensor:
        """Return how many real tokens the mask `tokens` [G, N] has, []."""
        return (tokens if self.padding is None else tokens & ~self.padding).sum()


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The decision of one layer about T tokens (padding included) and E experts; numbers are float32.

    `real` is the mask of the rows that are tokens and not padding; None if all are. Rows are masked and not
    taken out, because how many there are is known only after the device has computed it.

    `balanced` says that every expert gets its share by construction, so that no balance loss applies.
    `losses` are sums over the router's groups, [] each; `groups` is the number of groups. A run takes the
    mean over the groups that have a token, so that one of padding alone must add 0.
    """

    dispatch: Dispatch
    logits: Tensor  # [T, E]
    probabilities: Tensor  # [T, E]; rows of tokens sum to one
    counts: Tensor  # [E], the number of tokens that chose each expert, or that it chose
    left_behind: Tensor  # [], the number of tokens that reach no expert
    real: Tensor | None = None  # [T]
    balanced: bool = False
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    groups: int = 1

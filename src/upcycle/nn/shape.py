"""The description of the MoE layers of one stack of blocks, an entry of `moe` in config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upcycle.errors import UpcycleError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The MoE layers of one stack of blocks, as an entry of `moe` in config.json describes them."""

    stack: str
    layers: tuple[int, ...]
    module: str  # path of the feed-forward module in the base model, with {i} for the layer
    replaced: tuple[str, ...] = ()  # modules that become the identity, because the MoE layer does their work
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    universal_experts: int = 0  # narrower experts, after the num_experts others in the router's order
    universal_size: int = 0
    shared_size: int = 0
    activation: str
    gated: bool
    bias: bool
    response_norm: bool = False  # whether one acts between the activation and the last matrix of an expert
    dropout: float = 0.0
    causal: bool
    router: dict[str, Any]

    @property
    def all_experts(self) -> int:
        """The number of experts that the router scores."""
        return self.num_experts + self.universal_experts

    @classmethod
    def of(cls, table: dict[str, Any]) -> Shape:
        """Read an entry from its JSON table. Raise `UpcycleError` if its fields are not this version's."""
        lists = {k: tuple(table.get(k, ())) for k in ("layers", "replaced")}
        try:
            return cls(**{**table, **lists})
        except TypeError as error:
            raise UpcycleError(
                f"config.json: an entry of `moe` is not as this version writes it: {error}"
            ) from None

"""The MoE layers of one stack of blocks, as an entry of `moe` in config.json describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upcycle.errors import UpcycleError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The MoE layers of one stack of blocks: an entry of `moe` in config.json."""

    stack: str
    layers: tuple[int, ...]
    module: str  # path of the feed-forward module in the base model, with {i}
    replaced: tuple[str, ...] = ()  # modules that become the identity, because the layer does their work
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    universal_experts: int = 0  # narrower experts beside the num_experts, after them in the router's order
    universal_size: int = 0
    shared_size: int = 0
    activation: str
    gated: bool
    bias: bool
    response_norm: bool = False  # between the activation and the last matrix of an expert
    dropout: float = 0.0
    causal: bool
    router: dict[str, Any]

    @property
    def all_experts(self) -> int:
        """How many experts the router knows."""
        return self.num_experts + self.universal_experts

    @classmethod
    def of(cls, table: dict[str, Any]) -> Shape:
        """An entry as JSON has it."""
        lists = {k: tuple(table.get(k, ())) for k in ("layers", "replaced")}
        try:
            return cls(**{**table, **lists})
        except TypeError as error:
            raise UpcycleError(
                f"config.json: an entry of `moe` is not as this version writes it: {error}"
            ) from None

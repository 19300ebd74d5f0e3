"""The keys of [router] that only a run reads: they keep the experts in use while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from upcycle.settings import AtLeast, Settings, Within


@dataclass(frozen=True, kw_only=True)
class Balance(Settings):
    """The losses on the router, its bias, and noise. They share [router] with the keys of the router itself;
    `training/router_losses.py` computes them."""

    section: ClassVar[str] = "router"

    # each layer by itself, or all layers pooled as in transformers
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    balance_loss_coef: Annotated[float, AtLeast(0)] = 0.01  # of the loss that keeps experts equally busy
    # shares of the whole batch (exact, one more forward pass with accumulation), or of what went before
    # (buffered)
    balance_counts: Literal["exact", "buffered"] = "exact"
    z_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # of the loss on the size of the logits
    # of the bias on the choice of experts, which takes the place of a loss; 0: no bias
    bias_update_rate: Annotated[float, AtLeast(0)] = 0.0
    # tokens are multiplied by 1 +- this before the router, in training
    jitter: Annotated[float, Within("[0, 1)")] = 0.0
    importance_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # of V-MoE's loss on the weights of experts
    load_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # of V-MoE's loss on the load of experts
    layers: Literal["mean", "sum"] = "mean"  # how the layers' losses are put together

    @property
    def coefficients(self) -> dict[str, float]:
        """What a run multiplies losses by that some routers give, by their names in `Routing.losses`."""
        return {"importance": self.importance_loss_coef, "load": self.load_loss_coef}

"""The keys of [router] that only a training run reads. They keep the experts evenly used during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from upcycle.settings import AtLeast, Settings, Within


@dataclass(frozen=True, kw_only=True)
class Balance(Settings):
    """The router losses, the router bias and the noise of a training run.

    They share [router] with the router's own keys. `training/router_losses.py` computes the losses.
    """

    section: ClassVar[str] = "router"

    # compute the loss in each layer separately, or pool all layers as transformers does
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    balance_loss_coef: Annotated[float, AtLeast(0)] = 0.01  # weight of the load-balancing loss
    # take the experts' shares from the whole batch (exact; costs one more forward pass with accumulation), or
    # from the batches before (buffered)
    balance_counts: Literal["exact", "buffered"] = "exact"
    z_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # weight of the loss on the size of the logits
    # step size of the bias on the choice of experts, which replaces the balance loss; 0: no bias
    bias_update_rate: Annotated[float, AtLeast(0)] = 0.0
    # in training, tokens are multiplied by 1 +- this before the router
    jitter: Annotated[float, Within("[0, 1)")] = 0.0
    importance_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # weight of V-MoE's loss on the experts' weights
    load_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # weight of V-MoE's loss on the experts' load
    layers: Literal["mean", "sum"] = "mean"  # how the losses of the layers are combined

    @property
    def coefficients(self) -> dict[str, float]:
        """The factors for the losses that only some routers return, by their names in `Routing.losses`."""
        return {"importance": self.importance_loss_coef, "load": self.load_loss_coef}

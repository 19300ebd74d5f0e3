"""The keys of [router] that only a training run reads. They keep the experts evenly used during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Settings, Within

BUFFERED: Final = "buffered"  # values of `balance_counts`
EXACT: Final = "exact"


@dataclass(frozen=True, kw_only=True)
class Balance(Settings):
    """The router losses, the router bias and the noise of a training run.

    They share [router] with the router's own keys. `training/router_losses.py` computes the losses.
    """

    section: ClassVar[str] = "router"

    # compute the loss in each layer separately, or pool all layers as transformers does
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    balance_loss_coef: Annotated[float, AtLeast(0)] = 0.01  # weight of the load-balancing loss
    # with accumulation, take the experts' shares in the balance loss from this micro batch and those before
    # it in the step (buffered; Qiu et al. 2025, "Demons in the Detail"), or from the whole batch (exact),
    # which costs one more forward pass; None: buffered, or what the run has had if it goes on
    balance_counts: Literal["exact", "buffered"] | None = None
    z_loss_coef: Annotated[float, AtLeast(0)] = 0.0  # weight of the loss on the size of the logits
    # step size of the bias on the choice of experts; 0: no bias. It acts beside the balance loss: to balance
    # by the bias alone, set balance_loss_coef = 0
    bias_update_rate: Annotated[float, AtLeast(0)] = 0.0
    # number of steps in which that bias moves, and after which it stays as it is (DeepSeek-V3, section 4.2),
    # counted from the first step of the run, also in a [[stage]]; None: all
    bias_update_steps: Annotated[int, AtLeast(1)] | None = None
    # in training, tokens are multiplied by 1 +- this before the router
    jitter: Annotated[float, Within("[0, 1)")] = 0.0
    # weight of V-MoE's loss on the experts' weights, which router.name = top_k of moe.target = upcycled has
    importance_loss_coef: Annotated[float, AtLeast(0)] = 0.0
    # weight of V-MoE's loss on the experts' load, which it has if router.noise_std is above 0
    load_loss_coef: Annotated[float, AtLeast(0)] = 0.0
    layers: Literal["mean", "sum"] = "mean"  # how the losses of the layers are combined

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_update_steps is not None and not self.bias_update_rate:
            raise UpcycleError(
                "router.bias_update_steps ends the steps in which a bias moves; set router.bias_update_rate"
            )

    def bias_rate(self, step: int) -> float:
        """Return the step size of the bias in update `step` (0, 1, ...); 0 if it stays as it is."""
        over = self.bias_update_steps is not None and step >= self.bias_update_steps
        return 0.0 if over else self.bias_update_rate

    @property
    def coefficients(self) -> dict[str, float]:
        """The factors for the losses that only some routers return, by their names in `Routing.losses`."""
        return {"importance": self.importance_loss_coef, "load": self.load_loss_coef}

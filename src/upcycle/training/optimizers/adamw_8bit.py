"""AdamW with moments of 8 bits (Dettmers et al., ICLR 2022), through torchao."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Within
from upcycle.training.optimizers import Optimizer
from upcycle.training.optimizers._at_once import CHUNK
from upcycle.training.optimizers._blocks import LARGEST, block_of

_WORKING = 61  # bytes for each number whose moments are floats, as torch 2.13 and torchao 0.18 count them

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Optimizer):
    """AdamW that stores its moments in 8 bits: a quarter of the memory.

    Up to 256 numbers along the last axis share a scale. Tensors of fewer than `least` numbers, and those
    whose last axis does not divide into blocks of 32 to 256, have moments of the weights' type. The last axis
    of the others cannot be cut among ranks, and their moments cannot be exported.
    """

    summary = "AdamW with moments of 8 bits (needs torchao)"

    beta1: Annotated[float, Within("[0, 1)")] = 0.9  # decay of the mean of gradients
    beta2: Annotated[float, Within("[0, 1)")] = 0.95  # decay of the mean of their squares
    eps: Annotated[float, AtLeast(0)] = 1e-8  # added to the denominator
    # number of elements below which a tensor's moments have the weights' type, as in bitsandbytes
    least: Annotated[int, AtLeast(1)] = 4096

    @property
    def copies(self) -> float:
        return 0.5

    def state_bytes(self, width: int, *, outside: bool = False) -> float:
        """Two codes, and two scales in float32 for each block of 256; whatever the type of the weights."""
        return 2 * (1 + 4 / LARGEST)

    def update_bytes(self, inside: Sequence[int], outside: Sequence[int], width: int) -> float:
        """Both moments of some rows in float32, and what torchao makes of them to find their codes."""
        return _WORKING * min(CHUNK, max([*inside, *outside], default=0))

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        try:
            from upcycle.training.optimizers import _adamw_8bit
        except ImportError as error:
            raise UpcycleError(
                f"optimizer.name = {self.name} needs torchao ({error}); install upcycle[low_bit], or take "
                f"adamw"
            ) from None
        return _adamw_8bit.AdamW8bit(groups, betas=(self.beta1, self.beta2), eps=self.eps, least=self.least)

    def begun(self, made: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
        from upcycle.training.optimizers import _adamw_8bit

        assert isinstance(made, _adamw_8bit.AdamW8bit)
        return made.begun(parameter)

    def late_step(self, worked: float, idle: float) -> float:
        from upcycle.training.optimizers._late import largest_late_step

        return largest_late_step(worked, idle, beta1=self.beta1, beta2=self.beta2)

    def cannot_shard(self, shape: Sequence[int], dims: Sequence[int]) -> str | None:
        if len(shape) - 1 not in dims or block_of(shape, self.least) is None:
            return None
        return "the blocks of its 8-bit moments lie along the axis that is cut"


optimizer = AdamW8bit

"""Adafactor (Shazeer and Stern, ICML 2018). T5 and Sparse Upcycling train with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from upcycle.settings import AtLeast
from upcycle.training.optimizers import Optimizer
from upcycle.training.optimizers._at_once import TOGETHER

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Stores a matrix's second moment as one row and one column of numbers, and no first moment.

    The schedule's rate is relative: a step is as large as the rate, but at most 1 / sqrt(step), times the
    root mean square of the matrix (at least `least_scale`). Weight decay is decoupled. Each expert is a
    matrix of its own, as in t5x, and so is each half of a packed gate_up.

    T5's schedule is `constant` with a peak of 0.01: the bound makes it 1 / sqrt(step) after 10,000 steps.
    """

    summary = "second moments in rows and columns: a fraction of Adam's memory"
    by_role: ClassVar[bool] = True
    not_foretold: ClassVar[str | None] = "sums up what ranks that share a matrix know of rows and columns"

    weight_decay: Annotated[float, AtLeast(0)] = 0.0  # weight decay of matrices; see `optimizer.decays`
    decay: Annotated[float, AtLeast(0)] = 0.8  # c of beta2 = 1 - step^-c
    # the largest root mean square of an update, before the learning rate
    clip: Annotated[float, AtLeast(1)] = 1.0
    least_scale: Annotated[float, AtLeast(0)] = 1e-3  # least RMS of a matrix for its relative rate
    # the dense run's last step, from which beta2 and the bound on the rate go on, as in t5x
    start_step: Annotated[int, AtLeast(0)] = 0

    def update_bytes(self, inside: Sequence[int], outside: Sequence[int], width: int) -> float:
        """Copies of the gradients that are updated together, their updates, and the variance of one.

        Those of one role are together; in the blocks of a model they have one size.
        """
        largest = max([*inside, *outside], default=0)
        alike = max((size * times for size, times in Counter([*inside, *outside]).items()), default=0)
        together = min(alike, max(TOGETHER, largest))
        return width * (2 * together + largest)

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        from upcycle.training.optimizers import _adafactor

        return _adafactor.Adafactor(
            groups,
            decay=self.decay,
            clip=self.clip,
            least_scale=self.least_scale,
            start_step=self.start_step,
        )

    def begun(self, made: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
        from upcycle.training.optimizers import _adafactor

        assert isinstance(made, _adafactor.Adafactor)
        return made.begun(parameter)


optimizer = Adafactor

"""One step of training: forward, the losses, backward, the update; and the loss on held-out rows.

Every loss is a mean over the global batch. A rank computes its part of the sum; FSDP2 averages gradients over
the ranks that see different rows, so a part is multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.training import optimizer as optim
from upcycle.training import routing
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model that is being trained, and all that takes part in it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    routers: Routers | None
    run: Run
    ranks: Ranks
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 arithmetic over float32 weights, where FSDP2 does not do it itself."""
        if self.precision != "mixed" or self.ranks.dp_size > 1:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of rows of tokens [B, L + 1] for their L predictions: [B * L, V], float32 at least."""
        with self.autocast():
            out = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return out.flatten(0, 1).to(torch.promote_types(out.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step found, over the global batch."""

    loss: float  # cross-entropy, nats per token
    grad_norm: float
    counts: Tensor | None = None  # [L, E], on the CPU
    balance_loss: float | None = None  # mean over layers; top_k at perfect balance
    z_loss: float | None = None
    router_grad_norms: Sequence[float] = ()


def train_step(trainee: Trainee, rows: Tensor, step: int, lr: float) -> Outcome:
    """Update the model on this rank's `rows` [B, L + 1] of the global batch."""
    run, ranks, routers = trainee.run, trainee.ranks, trainee.routers
    micros = rows.split(run.train.micro_batch or len(rows))
    tokens = run.train.rows * run.train.sequence_length
    # One seed a step and rank: dropout and jitter need no state in a checkpoint.
    torch.manual_seed(run.train_seed * 1_000_003 + step * 997 + ranks.dp_rank)
    known = _count_ahead(trainee, micros, step) if _needs_counts_ahead(run, routers, micros) else None
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)  # cross-entropy, balance, z
    total: Tensor | None = None
    for place, micro in enumerate(micros):
        with _recorded(trainee, step, place):
            logits = trainee.logits(micro)
        entropy = F.cross_entropy(logits, micro[:, 1:].flatten(), reduction="sum") / tokens
        del logits
        loss, parts = entropy, [entropy.detach()]
        if routers is not None:
            seen = ranks.sum(routers.counts())
            total = seen if total is None else total + seen
            balance = _balance(trainee, total if known is None else known, place, len(micros))
            z = routing.z_loss(routers.logits, tokens)
            loss = loss + run.router.balance_loss_coef * balance + run.router.z_loss_coef * z
            parts += [balance.detach(), z.detach()]
            routers.logits.clear()
        sums[: len(parts)] += torch.stack(parts).double()
        (loss * ranks.dp_size).backward()
    entropy_sum, balance_sum, z_sum = ranks.sum(sums).tolist()
    gradients = {n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None}
    squares = optim.squared_norms(gradients)
    norm = sum(squares.values()) ** 0.5
    _refuse_nonfinite(step, entropy_sum, squares)
    if run.train.clip_grad_norm and norm > run.train.clip_grad_norm:
        optim.scale(gradients.values(), run.train.clip_grad_norm / norm)
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    if routers is None or total is None:
        return Outcome(loss=entropy_sum, grad_norm=norm)
    if run.router.bias_update_rate:
        routing.update_biases(routers.biases(), total, run.router.bias_update_rate)
    return Outcome(
        loss=entropy_sum,
        grad_norm=norm,
        counts=total.cpu(),
        balance_loss=balance_sum,
        z_loss=z_sum,
        router_grad_norms=[
            sum(s for n, s in squares.items() if n.startswith(f"{name}.")) ** 0.5 for name in routers.names
        ],
    )


def _recorded(trainee: Trainee, step: int, place: int) -> AbstractContextManager[Any]:
    """The forward pass of micro batch `place`, with what its routers say kept."""
    if trainee.routers is None:
        return nullcontext()
    seed = (trainee.run.train_seed * 1_000_003 + step) * 4099 + place * 257 + trainee.ranks.dp_rank
    return trainee.routers.recording(jitter=trainee.run.router.jitter, seed=seed)


def _needs_counts_ahead(run: Run, routers: Routers | None, micros: Sequence[Tensor]) -> bool:
    """Whether f_e of the global batch is not known when the first micro batch goes backward."""
    router = run.router
    exact = router.balance_loss == "per_layer" and router.balance_counts == "exact"
    return bool(routers is not None and len(micros) > 1 and exact and router.balance_loss_coef)


@torch.no_grad()
def _count_ahead(trainee: Trainee, micros: Sequence[Tensor], step: int) -> Tensor:
    """The counts of the global batch, [L, E], from a forward pass of its own."""
    routers = trainee.routers
    assert routers is not None
    state = torch.get_rng_state()
    total: Tensor | None = None
    for place, micro in enumerate(micros):
        with _recorded(trainee, step, place), trainee.autocast():
            trainee.model(input_ids=micro[:, :-1], use_cache=False, logits_to_keep=1)
        total = routers.counts() if total is None else total + routers.counts()
    torch.set_rng_state(state)
    assert total is not None
    return trainee.ranks.sum(total)


def _balance(trainee: Trainee, counts: Tensor, place: int, micros: int) -> Tensor:
    """This micro batch's part of the balance loss; `counts` are of all tokens whose share of it is known."""
    run, routers = trainee.run, trainee.routers
    assert routers is not None
    if run.router.balance_loss == "pooled":
        return routing.pooled_loss(routers.logits, routers.top_k) / (micros * trainee.ranks.dp_size)
    tokens = run.train.rows * run.train.sequence_length
    # Buffered (Qiu et al. 2025): the shares among the micro batches so far stand for those of all.
    seen = tokens if int(counts[0].sum()) == tokens * routers.top_k else tokens * (place + 1) / micros
    return routing.load_balancing_loss(routers.logits, counts * (tokens / seen), tokens).mean()


def _refuse_nonfinite(step: int, loss: float, squares: dict[str, float]) -> None:
    """Stop before the weights are touched, and name the first tensor that is not finite."""
    bad = next((name for name, square in squares.items() if not square < float("inf")), None)
    if bad is None and abs(loss) < float("inf"):
        return
    what = f"the first gradient that is not finite is that of {bad}" if bad else "no gradient is affected"
    raise UpcycleError(
        f"step {step + 1}: the loss is {loss:g}; {what}. The weights were not updated and the last "
        f"checkpoint is kept; lower schedule.peak, lengthen the warm-up, or look at the data of this step"
    )


@torch.no_grad()
def held_out_loss(trainee: Trainee, rows: Tensor) -> float:
    """Mean cross-entropy in nats per token on rows [N, L + 1], the same on every rank."""
    ranks, model = trainee.ranks, trainee.model
    share = -(-len(rows) // ranks.dp_size)
    size = trainee.run.train.micro_batch or max(1, trainee.run.train.rows // ranks.dp_size)
    total = torch.zeros(2, device=ranks.device, dtype=torch.float64)
    model.eval()
    for micro, count in _parts(rows, ranks.dp_rank * share, share, size):
        losses = F.cross_entropy(trainee.logits(micro), micro[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(micro), -1)[:count]
        total += torch.stack([losses.double().sum(), torch.tensor(losses.numel(), device=ranks.device)])
    model.train()
    loss, count_all = ranks.sum(total).tolist()
    return loss / count_all


def _parts(rows: Tensor, first: int, share: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """Micro batches of this rank's share, and how many of their rows count: all ranks run as many passes."""
    for start in range(first, first + share, size):
        micro = rows[start : min(start + size, first + share)]
        real = len(micro)
        if not real:
            micro = rows[:1]
        yield micro, real

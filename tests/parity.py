"""What a rank of `test_parallel.py` does: load, one step, and its gradients, at one layout after another."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from upcycle.training import optimizer, start, step
from upcycle.training.parallel import ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def run_of(source: str, parallel: dict[str, int], **changes: Any) -> Run:
    table: dict[str, Any] = {
        "source": source,
        "out": "unused",
        "moe": {"num_experts": 4, "top_k": 2},
        "init": {"name": "drop", "ratio": 0.5},
        "router": {"balance_loss_coef": 0.1, "z_loss_coef": 0.01, "std": 0.5},
        "data": {"sources": [{"path": "unused.txt"}]},
        "train": {"steps": 1, "batch_tokens": 64, "sequence_length": 16, "clip_grad_norm": 0.0},
        "schedule": {"name": "constant", "peak": 1e-3},
        "parallel": parallel,
    }
    for section, values in changes.items():
        table[section] = {**table[section], **values} if isinstance(values, dict) else values
    return Run.of(table)


def gradients(source: str, layouts: list[dict[str, int]], **changes: Any) -> list[dict[str, Any]]:
    """For each layout: the loaded parameters, the gradients of a step, what it reports, the norm."""
    out = []
    for layout in layouts:
        run = run_of(source, layout, **changes)
        experts = run.recipe.moe.num_experts if run.recipe else None
        with ranks(run.parallel, num_experts=experts) as here:
            begun = start.start_of(run)
            model = start.model_of(begun, run, here, "float32")
            loaded = {n: whole(p) for n, p in model.named_parameters()}
            adam = optimizer.make(model, run.train)
            kept: dict[str, torch.Tensor] = {}
            adam.register_step_pre_hook(
                lambda *_, model=model, kept=kept: kept.update(
                    {n: whole(p.grad) for n, p in model.named_parameters()}
                )
            )
            trainee = step.Trainee(
                model=model, optimizer=adam, routers=Routers.of(model), run=run, ranks=here, precision="float32"
            )
            generator = torch.Generator().manual_seed(0)
            rows = torch.randint(0, 96, (run.train.rows, run.train.sequence_length + 1), generator=generator)
            share = run.train.rows // here.dp_size
            outcome = step.train_step(trainee, rows[here.dp_rank * share :][:share], 0, 1e-3)
            local = sum(optimizer.local(p).nbytes for p in model.parameters())
            out.append(
                {
                    "loaded": loaded,
                    "gradients": kept,
                    "loss": outcome.loss,
                    "norm": outcome.grad_norm,
                    "balance": outcome.balance_loss,
                    "router_norms": list(outcome.router_grad_norms),
                    "counts": outcome.counts,
                    "local_bytes": local,
                    "held_out": step.held_out_loss(trainee, rows[:3]),
                }
            )
    return out


def gradients_kw(source: str, layouts: list[dict[str, int]], changes: dict[str, Any]) -> list[dict[str, Any]]:
    """`gradients` for `gloo.run`, which passes by position."""
    return gradients(source, layouts, **changes)

"""Training steps that benchmarks time: that of `upcycle train`, and that of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import machine
from upcycle import tasks
from upcycle.training import optimizer, start, step
from upcycle.training.parallel import ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.trainee import Trainee


def precision() -> str:
    """Return the precision of a run on this device by default."""
    return "float32" if machine.device().type == "cpu" else "mixed"


def trainee_of(run: Run, precision: str) -> Trainee:
    """Return the model of a run with everything that a step needs."""
    with ranks(run.parallel) as here:
        begun = start.start_of(run)
        model = start.model_of(begun, run, here, precision)
        return Trainee(
            model=model,
            task=tasks.of(begun.dense.architecture),
            start=begun,
            optimizer=optimizer.make(model, run.optimizer),
            routers=Routers.of(model),
            run=run,
            ranks=here,
            precision=precision,
        )


def ours(run: Run, rows: torch.Tensor) -> Callable[[], Any]:
    """Return a step of `upcycle train` on rows of tokens [rows, length + 1]."""
    trainee = trainee_of(run, precision())
    return lambda: step.train_step(trainee, {"rows": rows}, 0, 1e-4)


def theirs(folder: Path, rows: torch.Tensor) -> Callable[[], None]:
    """Return a step as transformers and torch do it, with the model's own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=True)
    model = model.to(machine.device()).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    ids = rows[:, :-1]

    def run() -> None:
        with torch.autocast(machine.device().type, torch.bfloat16, enabled=machine.device().type != "cpu"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return run


def random_rows(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """Return rows of random tokens [rows, length + 1] on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length + 1), generator=generator).to(machine.device())

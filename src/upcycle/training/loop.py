"""`upcycle train`: from a run file to metrics and checkpoints, stopped and gone on with anywhere."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import upcycle
from upcycle.console import count
from upcycle.errors import UpcycleError, listed
from upcycle.training import corpus, metrics, optimizer, routing, saving, start, step
from upcycle.training.batches import Batches
from upcycle.training.metrics import Metrics
from upcycle.training.parallel import Ranks, ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import Start
from upcycle.training.step import Outcome, Trainee

RECORD = "run.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended; losses are the last ones."""

    out: Path
    steps: int
    finished: bool
    loss: float | None
    held_out_loss: float | None


def train(run: Run, *, resume: bool = False) -> Result:
    """Train as `run` says, on this process or as one of those that torchrun started.

    `resume` goes on from the newest checkpoint of `run.out`, bit for bit on one process; where there is none
    it begins. SIGTERM saves and gives an unfinished result. Raises `UpcycleError` for a mistake.
    """
    precision = _precision(run)
    begun = start.start_of(run)
    experts = run.recipe.moe.num_experts if run.recipe else None
    with ranks(run.parallel, mixed=precision == "mixed", num_experts=experts) as here, _terminable() as stop:
        out = Path(run.out)
        checkpoint = _claim(run, out, here, resume)
        if here.first:
            _tokens(run, begun, out)  # the others wait, and find the files
        here.barrier()
        tokens = _tokens(run, begun, out)
        batches = Batches(
            tokens,
            [s.weight for s in run.data.sources],
            length=run.train.sequence_length,
            held_out=run.data.held_out,
            seed=run.train_seed,
        )
        if run.train.rows % here.dp_size:
            raise UpcycleError(
                f"train.batch_tokens = {run.train.batch_tokens} is {run.train.rows} rows, which "
                f"{here.dp_size} data-parallel ranks cannot share evenly"
            )
        model = start.model_of(begun, run, here, precision)
        trainee = Trainee(
            model=model,
            optimizer=optimizer.make(model, run.train),
            routers=Routers.of(model),
            run=run,
            ranks=here,
            precision=precision,
        )
        if run.router.bias_update_rate and trainee.routers:
            trainee.routers.biases()
        state = _begin(trainee, begun, batches, checkpoint)
        begun.dense.checkpoint.close()
        if here.first and checkpoint is None:
            _record(run, begun, out, precision)
        return _loop(trainee, begun, batches, state, out, stop)


def _loop(
    trainee: Trainee, begun: Start, batches: Batches, state: dict[str, Any], out: Path, stop: list[int]
) -> Result:
    run, here = trainee.run, trainee.ranks
    total = run.train.total_steps
    held_out = _held_out(run, batches, here.device)
    share = run.train.rows // here.dp_size
    part = slice(here.dp_rank * share, (here.dp_rank + 1) * share)
    log = Metrics(out, run.log, total, state["step"], run.as_table()) if here.first else None
    rate = Rate(
        begun.training_flops(run.train.sequence_length), metrics.peak_flops(run.log, here.device), here
    )
    try:
        if log is not None:
            active = count(begun.active_parameters)
            log.say(f"{count(begun.parameters)} parameters, {active} active per token")
        if state["step"] == 0 and held_out is not None:
            state["held_out_loss"] = state["held_out_start"] = step.held_out_loss(trainee, held_out)
            if log is not None:
                log.say(f"step 0: held-out loss {state['held_out_loss']:.4f}")
        while state["step"] < total:
            now = state["step"]
            began = time.perf_counter()
            rows = torch.from_numpy(batches.next(run.train.rows, part)).to(here.device)
            lr = run.schedule.at(now, total)
            outcome = step.train_step(trainee, rows, now, lr)
            seconds = time.perf_counter() - began
            state |= {"step": now + 1, "loss": outcome.loss, "batches": batches.state()}
            last = now + 1 == total
            record = _line(trainee, outcome, now + 1, lr) | rate.of(run.train.batch_tokens, seconds)
            if held_out is not None and (last or (now + 1) % run.train.eval_every == 0):
                record["held_out_loss"] = state["held_out_loss"] = step.held_out_loss(trainee, held_out)
            if now == 0 and "held_out_start" in state:
                record["held_out_start"] = state["held_out_start"]
            if log is not None:
                log.step(record)
            stopping = here.any(bool(stop))
            due = bool(run.checkpoint.every) and (now + 1) % run.checkpoint.every == 0
            if last or due or stopping:
                _save(trainee, state, out, log, must=last or stopping)
            if stopping and not last:
                if log is not None:
                    log.say(f"stopped by SIGTERM after step {now + 1}; saved, go on with --resume")
                break
    finally:
        if log is not None:
            log.close()
    return Result(
        out=out,
        steps=state["step"],
        finished=state["step"] >= total,
        loss=state.get("loss"),
        held_out_loss=state.get("held_out_loss"),
    )


@dataclass(frozen=True)
class Rate:
    """Tokens and active FLOPs a second, and the share of the peak (model FLOPs utilisation)."""

    flops: int  # of training on one token
    peak: float | None  # of one device
    ranks: Ranks

    def of(self, tokens: int, seconds: float) -> dict[str, Any]:
        """The rates of a step."""
        speed = tokens / seconds
        peak = None if self.peak is None else self.peak * self.ranks.world
        return {
            "seconds": round(seconds, 6),
            "tokens_per_s": round(speed, 1),
            "active_flops_per_s": round(speed * self.flops),
            "mfu": None if peak is None else round(speed * self.flops / peak, 5),
        }


def _line(trainee: Trainee, outcome: Outcome, done: int, lr: float) -> dict[str, Any]:
    """The record of a step, without its rates."""
    record: dict[str, Any] = {
        "step": done,
        "tokens": done * trainee.run.train.batch_tokens,
        "loss": outcome.loss,
        "lr": lr,
        "grad_norm": outcome.grad_norm,
    }
    if outcome.counts is None or trainee.routers is None:
        return record
    record |= {"balance_loss": outcome.balance_loss, "z_loss": outcome.z_loss}
    rows = routing.health(outcome.counts, trainee.routers.top_k)
    record["layers"] = [
        {"layer": layer, **row, "router_grad_norm": norm}
        for layer, row, norm in zip(trainee.routers.layers, rows, outcome.router_grad_norms, strict=True)
    ]
    return record


def _save(trainee: Trainee, state: dict[str, Any], out: Path, log: Metrics | None, *, must: bool) -> None:
    """Save; a full disk stops a run only where nothing comes after it."""
    keep = trainee.run.checkpoint.keep
    saved = {**state, "identity": trainee.run.identity()}
    reason = saving.save(out, trainee.model, trainee.optimizer, saved, trainee.ranks, keep)
    if reason is None:
        return
    kept = saving.latest(out)
    said = (
        f"step {state['step']} could not be saved ({reason}); "
        f"{f'{kept.name} is kept' if kept else 'there is no earlier checkpoint'}"
    )
    if must:
        raise UpcycleError(f"{said}. Make room in {out} and go on with --resume")
    if log is not None:
        log.say(f"[yellow]![/] {said}; training goes on")


def _begin(trainee: Trainee, begun: Start, batches: Batches, checkpoint: Path | None) -> dict[str, Any]:
    """The state to go on from: the checkpoint's, or step 0."""
    run = trainee.run
    if checkpoint is None:
        if run.optimizer.carry_state:
            start.carry_state(begun, run, trainee.ranks, trainee.model, trainee.optimizer)
        return {"step": 0}
    saving.load(checkpoint, trainee.model, trainee.optimizer)
    state = saving.read_state(checkpoint)
    batches.restore(state["batches"])
    return {k: v for k, v in state.items() if k != "identity"}


def _claim(run: Run, out: Path, here: Ranks, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to begin; an error where the folder is another's."""
    checkpoint = saving.latest(out)
    record = out / RECORD
    here.barrier()
    if not resume:
        if checkpoint is not None or record.exists():
            raise UpcycleError(
                f"{out} holds a run already; go on with it with --resume, or choose another `out`"
            )
    elif checkpoint is not None:
        theirs, mine = saving.read_state(checkpoint)["identity"], json.loads(json.dumps(run.identity()))
        if different := _differences(theirs, mine):
            raise UpcycleError(
                f"{checkpoint} is of another run: it differs in {listed(different)}; put them back, or "
                f"choose another `out`"
            )
    elif record.exists():
        before = json.loads(record.read_text())["identity"]
        if different := _differences(before, json.loads(json.dumps(run.identity()))):
            raise UpcycleError(
                f"{out} is of another run: it differs in {listed(different)}; put them back, or choose "
                f"another `out`"
            )
    here.barrier()
    if here.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UpcycleError(f"{out} is a file; `out` must be a folder to make") from None
        saving.discard_partial(out)
    here.barrier()
    return checkpoint


def _differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """The keys in which two nested tables differ, with both values."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in sorted({*theirs, *mine})
            for line in _differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if theirs == mine else [f"{path} ({theirs!r} there, {mine!r} here)"]


def _record(run: Run, begun: Start, out: Path, precision: str) -> None:
    """run.json: what this run is, for whoever reads its folder later."""
    record = {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "precision": precision,
        "training_flops_per_token": begun.training_flops(run.train.sequence_length),
        **begun.describe(),
        "run": run.as_table(),
        "identity": run.identity(),
    }
    saving.write_text(out / RECORD, json.dumps(record, indent=2))


def _tokens(run: Run, begun: Start, out: Path) -> list[corpus.Tokens]:
    cache = Path(run.data.cache) if run.data.cache else out / "tokens"
    folder, size = begun.dense.checkpoint.folder, begun.config["vocab_size"]
    return corpus.prepare(run.data, folder, cache, vocab_size=size)


def _held_out(run: Run, batches: Batches, device: torch.device) -> Tensor | None:
    """The rows that losses are compared on, [N, L + 1]."""
    if not run.data.held_out or not run.train.eval_every:
        return None
    rows = batches.held_out(max(1, run.train.eval_tokens // run.train.sequence_length))
    return torch.from_numpy(np.asarray(rows)).to(device)


def _precision(run: Run) -> str:
    """`auto` is mixed on an accelerator and float32 on a CPU."""
    if run.train.precision != "auto":
        return run.train.precision
    return "mixed" if torch.accelerator.is_available() else "float32"


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM came."""
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    except ValueError:  # not the main thread: nobody sends us signals
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)

"""The functions that experiments share: training in subprocesses, collecting results, means with errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from results_file import Key, Result, ResultsFile

_TRAIN = (
    "import json, sys; from upcycle.training.loop import train; from upcycle.training.run import Run; "
    "result = train(Run.of(json.load(sys.stdin)), resume=True); "
    "sys.exit(not result.finished)"
)


def train(table: dict[str, Any], threads: int) -> None:
    """Train a run, or resume it, in a process of its own.

    Raises `CalledProcessError` if it was stopped before its end, so that no part of a run becomes a result.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [sys.executable, "-c", _TRAIN], input=json.dumps(table), text=True, check=True, env=environment
    )


def upcycle(*arguments: str, threads: int = 1) -> str:
    """Run the command line and return its output."""
    command = [sys.executable, "-m", "upcycle", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def lines_of(out: str | Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics of a run."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def flops_per_row(table: dict[str, Any]) -> int:
    """Return the active training FLOPs of a row."""
    from upcycle import tasks
    from upcycle.training.run import Run
    from upcycle.training.start import start_of

    run = Run.of(table)
    begun = start_of(run)
    begun.dense.checkpoint.close()
    task = run.task or tasks.of(begun.dense.architecture)
    return begun.training_flops_per_row(task.lengths(run.train.sequence_length, begun.subject))


def curve(out: str | Path, rows: int, flops: int) -> list[dict[str, Any]]:
    """Return the score on held-out rows over steps and FLOPs; the first is before training."""
    lines = lines_of(out)
    points = [(0, lines[0]["held_out_start"], lines[0]["held_out_accuracy_start"])]
    points += [(x["step"], x["held_out_loss"], x["held_out_accuracy"]) for x in lines if "held_out_loss" in x]
    return [
        {"step": step, "flops": step * rows * flops, "loss": round(loss, 5), "accuracy": round(accuracy, 5)}
        for step, loss, accuracy in points
    ]


def results_file(path: Path, order: Sequence[str]) -> ResultsFile:
    """Return the file of results by variant and seed; `order` is that of the variants."""

    def place(key: Key) -> tuple[int, int]:
        variant, seed = key
        return order.index(variant) if variant in order else len(order), seed

    return ResultsFile(path=path, named_by=("variant", "seed"), order=place)


def gather(
    results: Path,
    jobs: Iterable[tuple[str, int]],
    go: Callable[[str, int], Result],
    order: Sequence[str],
    parallel: int,
    about: dict[str, Any],
) -> list[Result]:
    """Run the jobs (variant, seed) that `results` does not have yet, and add each result when it ends."""
    file = results_file(results, order)
    file.gather([*jobs], go, parallel, about)
    return [*file.known().values()]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard error, which is None for one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def error_text(error: float | None, form: str = " ± {:.4f}") -> str:
    """Return an error as `form` shows it, or an empty text if it is unknown."""
    return "" if error is None else form.format(error)

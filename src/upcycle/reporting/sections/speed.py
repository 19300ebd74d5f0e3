"""The section on the speed and memory of runs, if they recorded them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from upcycle.reporting import formats
from upcycle.reporting.document import Section, Table
from upcycle.reporting.runs import RunHistory
from upcycle.reporting.study import Study


def section(study: Study) -> Section | None:
    """Return the section; None if no step was timed."""
    group_of = {id(run): group.label for group in study.groups for run in group.runs}
    runs = [run for run in study.runs if np.isfinite(run.speeds["seconds"]).any()]
    if not runs:
        return None
    table = Table(
        caption="Speed of training",
        head=(
            "run", "model", "seconds a step", "tokens/s, median", "tokens/s, middle half", "active FLOP/s",
            "MFU", "peak memory", "all steps",
        ),
        rows=tuple(_row(run, group_of.get(id(run), "not compared")) for run in runs),
        left=2,
        note="Medians over the steps after the first tenth. Memory is the most of one process, or of one "
        "accelerator if there is one. Runs on different machines, or beside other work, say little about "
        "each other.",
    )  # fmt: skip
    return Section(name="speed", title="Speed and memory", blocks=(table,))


def _row(run: RunHistory, label: str) -> tuple[str, ...]:
    steady = slice(len(run.steps) // 10, None)
    found = {key: _finite(values[steady]) for key, values in run.speeds.items()}
    speed, memory = found["tokens_per_s"], _finite(run.speeds["peak_memory"])
    return (
        run.name,
        label,
        _median(found["seconds"], lambda s: f"{s:.3g}"),
        _median(speed, _rounded),
        formats.MISSING if not speed.size else " to ".join(map(_rounded, np.percentile(speed, [25, 75]))),
        _median(found["active_flops_per_s"], formats.flops),
        _median(found["mfu"], lambda m: f"{m:.1%}"),
        formats.size(float(memory.max())) if memory.size else "not recorded",
        formats.duration(float(_finite(run.speeds["seconds"]).sum())),
    )


def _median(values: np.ndarray, write: Callable[[float], str]) -> str:
    return write(float(np.median(values))) if values.size else formats.MISSING


def _rounded(value: float) -> str:
    """Round to three digits."""
    return formats.count(float(f"{value:.3g}"))


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]

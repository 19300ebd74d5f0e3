"""How fast runs were and how much memory they took, where they say so."""

from __future__ import annotations

import numpy as np

from upcycle.report import formats
from upcycle.report.document import Section, Table
from upcycle.report.records import RunRecord
from upcycle.report.study import Study


def section(study: Study) -> Section | None:
    """Nothing where no step was timed."""
    group_of = {id(run): group.label for group in study.groups for run in group.runs}
    runs = [run for run in study.runs if np.isfinite(run.speeds["seconds"]).any()]
    if not runs:
        return None
    table = Table(
        caption="Speed of training",
        head=(
            "run", "model", "seconds a step", "tokens/s, median", "tokens/s, middle half", "active FLOP/s", "MFU",
            "peak memory", "steps, hours",
        ),
        rows=tuple(_row(run, group_of.get(id(run), "not compared")) for run in runs),
        left=2,
        note="Medians over the steps after the first tenth. Memory is the most of one process, or of one "
        "accelerator where there is one. Runs on different machines, or beside other work, say little about "
        "each other.",
    )  # fmt: skip
    return Section(name="speed", title="Speed and memory", blocks=(table,))


def _row(run: RunRecord, label: str) -> tuple[str, ...]:
    steady = slice(len(run.steps) // 10, None)
    found = {key: _finite(values[steady]) for key, values in run.speeds.items()}
    speed, memory, mfu = found["tokens_per_s"], _finite(run.speeds["peak_memory"]), found["mfu"]
    low, high = np.percentile(speed, [25, 75]) if speed.size else (0.0, 0.0)
    return (
        run.name,
        label,
        f"{np.median(found['seconds']):.3g}",
        formats.count(float(f"{np.median(speed):.3g}")) if speed.size else formats.MISSING,
        f"{formats.count(float(f'{low:.3g}'))} to {formats.count(float(f'{high:.3g}'))}",
        formats.flops(float(np.median(found["active_flops_per_s"])))
        if found["active_flops_per_s"].size
        else formats.MISSING,
        f"{np.median(mfu):.1%}" if mfu.size else formats.MISSING,
        formats.size(float(memory.max())) if memory.size else "not recorded",
        f"{_finite(run.speeds['seconds']).sum() / 3600:.3g}",
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]

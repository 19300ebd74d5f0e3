"""The demo: does a Mixture of Experts pay if the dense model has been trained for long?

It starts from the dense model in `model/`, which `experiments/code/dense.py` made, as a user starts from a
checkpoint. It continues that model, an MoE of equal FLOPs per token and a plain copy with eight experts, each
for the same FLOPs, and reports.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.api.evaluation import Evaluation, evaluate
from upcycle.api.inspection import inspect
from upcycle.blueprints.cost import Plan, plan_of
from upcycle.conversion.write import convert
from upcycle.demo import long_run
from upcycle.demo.corpus import HELD_OUT, Corpus
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.reporting import drawing, report
from upcycle.system.wording import size
from upcycle.verification import Proof, verify

if TYPE_CHECKING:
    from upcycle.training.run import Run

MODEL = Path(__file__).parent / "model"
LENGTH, BATCH, EVAL_ROWS = 256, 16, 256
PEAK = 2e-3  # the constant rate of the dense model's training
DECAY = 0.25  # the share of the steps at the end in which the rate falls to zero
PROBE = 16  # steps of the dense model, to measure how many fit into the time
COST = 3.3  # seconds of the three trainings together, relative to those of the dense model
WAYS: dict[str, dict[str, Any]] = {
    "granular": {
        "moe": {"num_experts": 16, "top_k": 2, "granularity": 2},
        "init": {"name": "shuffle_slice"},
    },
    "copy": {"moe": {"num_experts": 8, "top_k": 2}},
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A Mixture of Experts before its training."""

    plan: Plan
    proof: Proof


@dataclass(frozen=True, kw_only=True)
class Continued:
    """A model after continued training."""

    name: str
    tokens: int
    flops: float
    before: float  # held-out loss, nats per token
    after: float


class Audience(Protocol):
    """The interface that shows the demo."""

    def say(self, sentence: str) -> None:
        """Show a sentence about the next step or a result."""

    def made(self, mixtures: Mapping[str, Made]) -> None:
        """Show the Mixtures of Experts before their training, by name."""

    def evaluated(self, found: Evaluation) -> None:
        """Show the scores of the trained models."""

    def continued(self, rows: Sequence[Continued], page: Path) -> None:
        """Show the results of continued training, and where the report is."""


def run(folder: Path, audience: Audience, *, seconds: float, seed: int) -> list[Continued]:
    """Run the demo in `folder`, which must not exist; `seconds` is the time for the three trainings."""
    if folder.exists():
        raise UpcycleError(f"{folder} exists already; delete it, or choose another with --out")
    if not 0 < seconds < math.inf:
        raise UpcycleError(f"--seconds {seconds:g}; it must be a number above zero")
    drawing.need_matplotlib()
    try:
        corpus = Corpus.write(folder)
        what = f"the last {HELD_OUT:.0%} held out"
        audience.say(f"corpus: {size(corpus.sources.stat().st_size)} of Python's standard library, {what}")
        shutil.copytree(MODEL, folder / "dense")
        steps = _steps(folder, corpus, seconds, seed)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    made = {
        name: _upcycle(folder / "dense", folder / name, {"seed": seed, **way}) for name, way in WAYS.items()
    }
    audience.made(made)
    budget = steps * _flops_per_step(_run(folder, corpus, "dense", {}, steps, seed))
    continued = [
        _go_on(folder, corpus, audience, name, way, budget, seed)
        for name, way in {"dense": {}, **WAYS}.items()
    ]
    _evaluate(folder, corpus, audience, [row.name for row in continued])
    folders = [folder / kind / row.name for row in continued for kind in ("runs", "trained")]
    page = folder / "report.html"
    beside = (long_run.section(),)
    troubles = report(folders, page, markdown=folder / "report.md", title="upcycle demo", further=beside)
    for trouble in troubles:
        audience.say(trouble)
    audience.continued(continued, page)
    return continued


def _steps(folder: Path, corpus: Corpus, seconds: float, seed: int) -> int:
    """Return the steps of dense continuation for which the three trainings take `seconds`."""
    from upcycle.training import metrics
    from upcycle.training.loop import train

    probe = _run(folder, corpus, "probe", {}, PROBE, seed)
    if not train(probe).finished:
        raise KeyboardInterrupt
    times = sorted(line.seconds or 0.0 for line in metrics.read(Path(probe.out)))
    shutil.rmtree(probe.out)
    return max(4, round(seconds / COST / times[len(times) // 2]))


def _upcycle(dense: Path, folder: Path, way: Mapping[str, Any]) -> Made:
    return Made(plan=plan_of(convert(dense, folder, Recipe.of(way))), proof=verify(dense, folder))


def _run(folder: Path, corpus: Corpus, name: str, table: Mapping[str, Any], steps: int, seed: int) -> Run:
    """Make the run of `steps` steps."""
    from upcycle.training.run import Run

    return Run.of(
        {
            "source": str(folder / "dense"), "out": str(folder / "runs" / name), "seed": seed,
            "data": {
                "sources": [{"path": str(corpus.sources)}], "held_out": HELD_OUT,
                "cache": str(folder / "runs" / "tokens"),
            },
            "train": {
                "steps": steps, "batch_tokens": BATCH * LENGTH, "sequence_length": LENGTH,
                "eval_every": max(1, steps // 8), "eval_tokens": EVAL_ROWS * LENGTH,
            },
            "schedule": {
                "name": "warmup_stable_decay", "peak": PEAK, "decay": max(1, round(DECAY * steps)),
            },
            "checkpoint": {"every": 0}, "log": {"every": 100}, **table,
        }
    )  # fmt: skip


def _go_on(
    folder: Path,
    corpus: Corpus,
    audience: Audience,
    name: str,
    way: Mapping[str, Any],
    flops: float,
    seed: int,
) -> Continued:
    """Continue the training of a model for `flops` FLOPs, and export it."""
    from upcycle.training import metrics
    from upcycle.training.export import export
    from upcycle.training.loop import train

    per_step = _flops_per_step(_run(folder, corpus, name, way, 4, seed))
    wanted = _run(folder, corpus, name, way, max(4, round(flops / per_step)), seed)
    audience.say(f"training on: {name}")
    result = train(wanted)
    if not result.finished:  # by SIGTERM; a model of fewer FLOPs is not to be compared
        raise KeyboardInterrupt
    export(wanted.out, folder / "trained" / name)
    records = metrics.read(result.out)
    assert result.held_out_loss is not None
    return Continued(
        name=name,
        tokens=records[-1].tokens,
        flops=len(records) * per_step,
        before=records[0].held_out_start or 0.0,
        after=result.held_out_loss,
    )


def _flops_per_step(wanted: Run) -> int:
    """Return the active FLOPs of training for one step."""
    from upcycle.training.start import start_of

    begun = start_of(wanted)
    begun.dense.checkpoint.close()
    return begun.training_flops(LENGTH) * BATCH * LENGTH


def _evaluate(folder: Path, corpus: Corpus, audience: Audience, names: list[str]) -> None:
    """Score all models on held-out text in bits per byte, and record the routing of those with experts."""
    found = evaluate([folder / "trained" / name for name in names], text=corpus.held_out, length=LENGTH)
    audience.evaluated(found)
    if lost := found.record().lost:
        raise lost[0]
    domains = {"code": corpus.held_out, "documentation": corpus.documentation}
    for name in names[1:]:
        inspect(folder / "trained" / name, text=domains, limit=64, length=LENGTH).save()

"""The machinery of experiments that continue from a dense model which has been trained for long.

A `Start` trains the dense model once, at a constant rate, and exports it on the way. A `Continuation` is a
table of variants, each as changes to the run file of the dense continuation. A variant continues from a start
for a share of that start's own training FLOPs. Its learning rate is that of the start, and falls to zero at
the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from results_file import ResultsFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Changes = dict[str, Any]  # to a run file; {folder} and {start} stand for those of the run
Key = tuple[int, str]  # a start and a variant
CARRIED: Changes = {"optimizer": {"carry_state": True}}  # the start is exported with its moments


def expert_choice(factor: float, layers: str, experts: int = 8) -> Changes:
    """Return the changes for Expert Choice with the capacity factor C in some of the layers."""
    return {
        "moe": {"num_experts": experts, "layers": layers, "target": "upcycled"},
        "router": {"name": "expert_choice", "capacity_factor": factor},
    }


@dataclass(frozen=True, kw_only=True)
class Start:
    """A dense model, trained at a constant rate from one start of the variants to the next."""

    table: Callable[[Path], dict[str, Any]]  # the run file, for the folder that has data, runs and models
    model: Callable[[], PreTrainedModel]  # the model with weights that are not used
    steps: Mapping[int, int]  # by the length of the training, in the unit of the experiment
    name: str = "dense"
    exported: tuple[str, ...] = ("--dtype", "float32")  # options of `upcycle export`

    def at(self, folder: Path, start: int) -> Path:
        """Return the folder of the model after a training of length `start`."""
        return folder / f"{self.name}-{start}"

    def train(self, folder: Path, until: int) -> None:
        """Train the model until `until`, or resume its training, and export each start when it is reached.

        A start that is exported is not trained again. Exits with a message if the run has passed a start and
        has no checkpoint of it.
        """
        run = self.table(folder)
        if not Path(run["source"]).exists():
            self.model().save_pretrained(run["source"])
        for start in sorted(start for start in self.steps if start <= until):
            out = self.at(folder, start)
            if not out.exists():
                self._reach(run, start, out)
                self.write(folder, start, out, *self.exported)

    def _reach(self, run: dict[str, Any], start: int, out: Path) -> None:
        """Train until the checkpoint of a start is there, which is to be exported to `out`.

        The rate is constant, so a longer training begins with the steps of a shorter one.
        """
        from upcycle.training import saving

        step, there = self.steps[start], dict(saving.checkpoints(Path(run["out"])))
        if max(there, default=0) < step:
            common.train(run | {"train": run["train"] | {"steps": step}}, threads=1)
        elif step not in there:
            sys.exit(
                f"{out} is not there, and {run['out']} is past step {step} and has no checkpoint of it; "
                f"put {out} back, or move {run['out']} away to train it again"
            )

    def write(self, folder: Path, start: int, out: Path, *options: str) -> None:
        """Export a start to `out`."""
        run = self.table(folder)["out"]
        common.upcycle("export", run, str(out), "--step", str(self.steps[start]), *options)

    def record(self, folder: Path, out: Path) -> None:
        """Write the points [step, mean loss in training since the last point, held-out loss, accuracy]."""
        points, losses = [], []
        for line in common.lines_of(self.table(folder)["out"]):
            losses.append(line["loss"])
            if "held_out_loss" in line:
                scores = (sum(losses) / len(losses), line["held_out_loss"], line["held_out_accuracy"])
                points.append([line["step"], *(round(score, 5) for score in scores)])
                losses = []
        out.write_text(json.dumps({**about(), "curve": points}, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Variants that continue from the checkpoints of a dense model, with several seeds each."""

    start: Start
    variants: Mapping[str, Changes]
    core: Sequence[str]  # the variants that answer the question of the experiment
    results: Path
    default: int  # the start that is used if none is named
    runs: str = "runs"  # the folder of the runs
    extra: float = 0.3  # training FLOPs after the start, relative to those of the start
    decay: float = 0.25  # the share of these at the end with a falling rate
    points: int = 16  # evaluations per run
    scores: tuple[str, ...] = ("loss",)  # on held-out rows
    # The variants of further questions, which have figures of their own, by the name of the question.
    questions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # What a variant's FLOPs are divided by, so that it takes the seconds of another run and not its FLOPs.
    shorter: Mapping[str, float] = field(default_factory=dict)

    def from_scratch(self, variant: str) -> bool:
        """Return whether a variant starts from random weights."""
        return bool(self.variants[variant].get("from_scratch"))

    def budget(self, variant: str) -> float:
        """Return the training FLOPs of a run, relative to those of the start."""
        return (self.extra + self.from_scratch(variant)) / self.shorter.get(variant, 1)

    def falling(self, variant: str) -> float:
        """Return the share of a run's steps with a falling rate: all runs spend the same FLOPs on it."""
        return self.decay * self.extra / self.budget(variant)

    def run_file(self, folder: Path, start: int, variant: str, seed: int, steps: int) -> dict[str, Any]:
        """Return the run file of a variant from the dense model after a training of length `start`."""
        changes = filled(self.variants[variant], str(folder), start)
        dense = self.start.table(folder)
        made = dense | {
            "source": str(self.start.at(folder, start)),
            "out": str(folder / self.runs / f"{start}-{variant}-{seed}"),
            "from_scratch": False,
            "seed": seed,
            "schedule": {
                "name": "warmup_stable_decay", "peak": dense["schedule"]["peak"],
                "decay": max(1, round(self.falling(variant) * steps)),
            } | changes.get("schedule", {}),
            "checkpoint": {"every": max(1, steps // 4), "keep": 1},
        }  # fmt: skip
        made["train"] = made["train"] | {"steps": steps, "eval_every": max(1, steps // self.points)}
        return made | {key: value for key, value in changes.items() if key != "schedule"}

    def steps_of(self, folder: Path, start: int, variant: str) -> int:
        """Return the number of steps that cost the variant's budget, a multiple of the start's FLOPs."""
        dense = self.run_file(folder, start, "dense", 0, 8)
        spent = self.start.steps[start] * common.flops_per_row(dense)
        return math.ceil(
            self.budget(variant) * spent / common.flops_per_row(self.run_file(folder, start, variant, 0, 8))
        )

    def go(self, folder: Path, start: int, variant: str, seed: int) -> common.Result:
        """Train one run and return its result."""
        run = self.run_file(folder, start, variant, seed, self.steps_of(folder, start, variant))
        common.train(run, threads=1)
        record = json.loads((Path(run["out"]) / "run.json").read_text())
        return {
            "start": start,
            "variant": variant,
            "seed": seed,
            "changes": self.variants[variant],
            "parameters": record["parameters"],
            "active_parameters": record["active_parameters"],
            "start_sha256": record["source_sha256"]["source"],  # a start can be trained a second time
            "curve": self.curve(run, record["training_flops_per_row"]),
        }

    def curve(self, run: dict[str, Any], flops_per_row: int) -> list[list[float]]:
        """Return the points [step, tokens, FLOPs, seconds, *scores] of a run; images take the place of
        tokens."""
        lines = common.lines_of(run["out"])
        rows, row = run["train"].get("batch_size"), 1
        if rows is None:
            row = run["train"]["sequence_length"]
            rows = run["train"]["batch_tokens"] // row
        begun = {
            "loss": lines[0]["held_out_start"],
            "accuracy": lines[0].get("held_out_accuracy_start"),
        }
        points: list[list[float]] = [[0, 0, 0, 0.0, *(round(begun[name], 5) for name in self.scores)]]
        seconds = 0.0
        for line in lines:
            seconds += line["seconds"]
            if "held_out_loss" in line:
                step = line["step"]
                flops = step * rows * flops_per_row
                scores = [round(line[f"held_out_{name}"], 5) for name in self.scores]
                points.append([step, step * rows * row, flops, round(seconds, 1), *scores])
        return points

    @property
    def _file(self) -> ResultsFile:
        return ResultsFile(path=self.results, named_by=("start", "variant", "seed"), order=lambda key: key)

    def known(self) -> Mapping[tuple[int, str, int], common.Result]:
        """Return the recorded runs by start, variant and seed, in this order."""
        return self._file.known()

    def gather(self, folder: Path, jobs: Sequence[tuple[int, str, int]], parallel: int) -> None:
        """Run the missing jobs, one thread each, and add every result when it ends."""
        self._file.gather(jobs, partial(self.go, folder), parallel, about())
        for (start, variant, seed), result in self.known().items():
            begins, ends = result["curve"][0], result["curve"][-1]
            shown = "  ".join(f"{a:.4f} -> {b:.4f}" for a, b in zip(begins[4:], ends[4:], strict=True))
            print(f"{start:4} {variant:28} {seed}  {shown}")

    def main(self, doc: str | None) -> None:
        """Run the jobs that the command line names."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("folder", type=Path, help="the folder that dense.py filled")
        parser.add_argument(
            "--starts", type=int, nargs="+", choices=[*self.start.steps], default=[self.default]
        )
        parser.add_argument("--variants", nargs="+", default=["core"], choices=["core", *self.variants])
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--jobs", type=int, default=2, help="runs at once")
        given = parser.parse_args()
        names = [n for v in given.variants for n in (self.core if v == "core" else [v])]
        jobs = [(s, v, seed) for s in given.starts for seed in range(given.seeds) for v in names]
        self.gather(given.folder, jobs, given.jobs)


def about() -> dict[str, Any]:
    """Return the machine and the versions, for a file of results."""
    return {
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "upcycle")},
    }


def filled(value: Any, folder: str, start: int) -> Any:
    """Return `value` with {folder} and {start} in its texts replaced."""
    if isinstance(value, dict):
        return {key: filled(each, folder, start) for key, each in value.items()}
    if isinstance(value, str):
        return value.replace("{folder}", folder).replace("{start}", str(start))
    return value

"""The contents of a report, read from the given folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.records.run import RunRecord
from upcycle.reporting.checkpoints import CheckpointRecord, is_checkpoint, read_checkpoint
from upcycle.reporting.comparison import Comparison, Group, compare
from upcycle.reporting.document import clean
from upcycle.reporting.runs import RunHistory, is_run, read_run
from upcycle.reporting.starts import DenseCost


@dataclass(frozen=True, kw_only=True)
class Column:
    """Checkpoints shown in one column: exports of a group of runs at the same step, or a single one.

    There is one of each seed. Means of checkpoints are in a column with other means of the same steps. A
    second export of a seed has a column of its own, because the scores of a column give a standard error over
    seeds.

    `place` is its number among the series of the report.
    """

    label: str
    place: int
    checkpoints: tuple[CheckpointRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The compared runs and checkpoints; `refused` are the other folders, each with the reason."""

    runs: tuple[RunHistory, ...]
    checkpoints: tuple[CheckpointRecord, ...]
    comparison: Comparison
    refused: tuple[tuple[str, str], ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of runs that are compared."""
        return self.comparison.groups

    def columns(self) -> tuple[Column, ...]:
        """The checkpoints in the order of the groups; those of one group and step share a column."""
        together: dict[tuple[int, str, tuple[int, ...]], dict[int, CheckpointRecord]] = {}
        for number, checkpoint in enumerate(self.checkpoints):
            alone = len(self.groups) + number, checkpoint.name, ()
            owner = self.comparison.owner(checkpoint)
            if owner is None:
                together[alone] = {0: checkpoint}
                continue
            group, run = owner
            training = checkpoint.training
            assert training is not None
            step = "" if training.step == run.done else f"step {training.step}"
            label = ", ".join(filter(None, [group.label, step, checkpoint.variant]))
            steps = training.averaged_steps or ()
            by_seed = together.setdefault((self.groups.index(group), label, steps), {})
            if by_seed.setdefault(run.seed, checkpoint) is not checkpoint:
                together[alone] = {run.seed: checkpoint}
        return tuple(
            Column(label=label, place=place, checkpoints=tuple(members.values()))
            for (place, label, _), members in sorted(together.items(), key=lambda item: item[0])
        )

    def troubles(self) -> list[str]:
        """The problems with the given folders: one sentence each, with what was done about it."""
        said = [f"{name} is left out: {why}" for name, why in self.refused]
        apart = (*self.comparison.foreign, *self.comparison.repeats)
        said += [f"{run.name} is not compared: {why}" for run, why in apart]
        said += [
            f"{run.name} is unfinished: {run.done:,} of {run.total_steps:,} steps; shown as far as it goes"
            for run in self.runs
            if run.unfinished
        ]
        said += [
            f"{run.name} did not update its weights in {run.skipped:,} of {run.done:,} steps, which stood "
            f"out or were not finite; their tokens and FLOPs count"
            for run in self.runs
            if run.skipped
        ]
        said += [f"{run.name}: {damage}" for run in self.runs for damage in run.damage]
        said += [f"{found.name}: {damage}" for found in self.checkpoints for damage in found.damage]
        said += [
            f"{run.name} has no held-out loss (train.eval_every, data.held_out); it is in no curve of it"
            for run in self.runs
            if not run.held_out.tokens.size
        ]
        return said


def study(folders: Sequence[str | Path], given: DenseCost) -> Study:
    """Read and compare `folders`.

    Unusable folders are listed in `refused`. Raises `UpcycleError` if none can be used.
    """
    runs, checkpoints, refused = [], [], []
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for path, name in zip(paths, map(clean, _names(paths)), strict=True):
        try:
            if is_run(path):
                runs.append(read_run(path, name))
            elif is_checkpoint(path):
                checkpoints.append(read_checkpoint(path, name))
            elif not path.exists():
                raise UpcycleError("there is no such folder")
            elif not path.is_dir():
                raise UpcycleError("it is a file; give the folder of a run or of a checkpoint")
            else:
                raise UpcycleError(
                    f"it has neither {RunRecord.FILE}, as a run of `upcycle train`, nor config.json, as a "
                    f"checkpoint"
                )
        except (UpcycleError, OSError) as error:
            refused.append((name, str(error)))
    if not runs and not checkpoints:
        raise UpcycleError(
            "there is nothing to report on; give folders of `upcycle train` or `upcycle export`. "
            + "; ".join(f"{name}: {why}" for name, why in refused)
        )
    return Study(
        runs=tuple(runs),
        checkpoints=tuple(checkpoints),
        comparison=compare(runs, given),
        refused=tuple(refused),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that distinguish them."""
    depth = 1
    while depth < 8:
        ends = ["/".join(path.parts[-depth:]) for path in paths]
        if len({*ends}) == len(ends):
            return ends
        depth += 1
    return [str(path) for path in paths]

"""The comparison of runs: which are comparable, which differ only in their seed, and which are better.

It takes runs and gives groups with means and standard errors, pairs of groups, and the runs that cannot be
compared, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upcycle import tasks
from upcycle.reporting import formats
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.crossing import Crossing, Standing, bounds, crossing, standing
from upcycle.reporting.labels import ORDER, Kind, flat, kind_of, labels_of, settings_of, short
from upcycle.reporting.runs import RunHistory
from upcycle.reporting.starts import DenseCost, StartCost, start_cost
from upcycle.training.beside import kept_tokenizer
from upcycle.training.identity import identity_of, of_any_length

Paid = Literal["yes", "no", "within two standard errors", "one seed", "cannot be told"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean curve over runs [n], with its standard error [n] if there are several runs."""

    value: np.ndarray
    error: np.ndarray | None

    @classmethod
    def of(cls, curves: Sequence[np.ndarray]) -> Mean:
        """Return the mean of curves over the same points."""
        stacked = np.stack(curves)
        one = len(stacked) < 2
        error = None if one else stacked.std(axis=0, ddof=1) / math.sqrt(len(stacked))
        return cls(value=stacked.mean(axis=0), error=error)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed and were evaluated at the same points.

    `runs` has one run of each seed. `repeats` are the others, which are in no mean: a seed that is trained
    twice ends twice at the same loss, and would make a standard error smaller than it is.
    """

    label: str
    kind: Kind
    runs: tuple[RunHistory, ...]
    repeats: tuple[RunHistory, ...]
    tokens: np.ndarray  # [n], of the held-out evaluations
    flops: np.ndarray  # [n], training FLOPs
    loss: Mean
    accuracy: Mean
    start: StartCost

    @property
    def has_experts(self) -> bool:
        """Return whether the model is a Mixture of Experts."""
        return self.kind in ("upcycled", "MoE, from scratch")

    @property
    def grown(self) -> bool:
        """Return whether its source had experts already, so that no dense model can be its baseline."""
        return self.kind == "upcycled" and self.runs[0].table.get("grow") is not None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A comparison of a Mixture of Experts with another group by held-out loss.

    The crossings are those of the drawn curves. Statements about them use `standing`, which rests on
    measurements alone.
    """

    group: Group
    against: Group
    standing: Standing  # along FLOPs
    standing_by_tokens: Standing
    standing_with_start: Standing | None
    tokens: Crossing
    flops: Crossing
    with_start: Crossing | None  # along FLOPs that include those of the starts; None if a start is unknown
    error: float | None  # standard error over seeds of the gap at the end of the common FLOPs

    @property
    def other_source(self) -> bool:
        """Return whether the two continue different checkpoints; random weights are none."""
        mine, theirs = self.group.runs, self.against.runs
        if mine[0].about.from_scratch or theirs[0].about.from_scratch:
            return False
        return not all(one.shares_source(other) for one in mine for other in theirs)

    @property
    def paid(self) -> Paid:
        """The answer whether the Mixture of Experts is better at the end.

        It is judged by the measurements and by two standard errors over seeds; one seed cannot decide it.
        """
        found, error = self.standing, self.error
        if found.low is None or found.high is None:
            return "cannot be told"
        if error is None:
            return "one seed"
        if found.high < -2 * error:
            return "yes"
        if found.low > 2 * error:
            return "no"
        if -2 * error <= found.low and found.high <= 2 * error:
            return "within two standard errors"
        return "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of the comparison of all runs."""

    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    foreign: tuple[tuple[RunHistory, str], ...]  # each with the reason

    @property
    def repeats(self) -> tuple[tuple[RunHistory, str], ...]:
        """The runs whose seed is in the comparison already, each with the reason why it is left out."""
        return tuple(
            (run, _repeated(run, {other.seed: other for other in group.runs}[run.seed]))
            for group in self.groups
            for run in group.repeats
        )

    def owner(self, checkpoint: CheckpointRecord) -> tuple[Group, RunHistory] | None:
        """Return the group and the run that a checkpoint was exported from, if the run was given.

        That is the run with the table that the checkpoint names. If no run has it, it is one that was given
        more steps since then and has taken those of the checkpoint.
        """
        training = checkpoint.training
        if training is None or training.run is None:
            return None
        of_this = _lasting(training.run)
        owners = [(g, r) for g in self.groups for r in (*g.runs, *g.repeats) if _lasting(r.table) == of_this]
        same = [(group, run) for group, run in owners if run.table == training.run]
        far_enough = [(group, run) for group, run in same or owners if run.done >= training.step]
        return next(iter(far_enough or same), None)


def _lasting(table: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return what a run keeps when it goes on: its folder, and all settings but its length."""
    return table.get("out"), of_any_length(identity_of(table))


def compare(runs: Sequence[RunHistory], given: DenseCost) -> Comparison:
    """Compare the comparable runs, which are those that share the terms of most runs."""
    terms = [_terms(run, runs) for run in runs]
    keys = [json.dumps(t, sort_keys=True, default=str) for t in terms]
    reference = terms[keys.index(max(keys, key=keys.count))] if runs else {}
    foreign, kept = [], []
    for run, own in zip(runs, terms, strict=True):
        differs = [name for name in reference if own[name] != reference[name]]
        if differs:
            foreign.append((run, _reason(differs[0], own, reference)))
        else:
            kept.append(run)
    groups = _groups(kept, given)
    return Comparison(groups=groups, pairs=tuple(_pairs(groups)), foreign=tuple(foreign))


def _terms(run: RunHistory, runs: Sequence[RunHistory]) -> dict[str, Any]:
    """Return the settings that runs must share for their held-out numbers to be comparable."""
    train = run.table["train"]
    task = {k: v for k, v in (run.table.get("task") or {}).items() if v and k not in ("augment", "name")}
    length = train.get("sequence_length", 1024)
    by_example = run.about.task.startswith("image")
    rows = train.get("eval_examples") or (None if by_example else train.get("eval_tokens", 0) // length)
    return {
        "task": run.about.task,
        "family of models": run.about.source.model_type,
        "held-out data": _held_out_data(run),
        "settings of the task": task,
        "rows that are held out": {"length": None if by_example else length, "rows": rows},
        "tokenizer": None if by_example else _tokenizer(run, runs),
    }


def _held_out_data(run: RunHistory) -> dict[str, Any]:
    """Return what says which rows are held out, and what they are seen with, stage by stage."""
    whole = run.table["data"]
    tables = [stage.get("data") or whole for stage in run.table.get("stage") or ()] or [whole]
    found = [
        {
            "sources": data.get("sources"),
            "share": data.get("held_out", 0.0),
            "isolate": data.get("isolate", False),
            **({"split": data.get("split_seed", run.seed)} if _draws(run) else {}),
        }
        for data in tables
    ]
    apart = [data for data, _ in groupby(found)]
    return apart[0] if len(apart) == 1 else {**apart[0], "then": apart[1:]}


def _draws(run: RunHistory) -> bool:
    """Return whether the held-out rows of a run were drawn from its data."""
    name, task = run.about.task, run.table.get("task") or {}
    return name in tasks.names() and tasks.find(name).splits and not task.get("test")


def _tokenizer(run: RunHistory, runs: Sequence[RunHistory]) -> str:
    """Identify a tokenizer by its bytes, or by the name of its folder if the folder is gone.

    The tokenizer of a source that is gone is that of another run which began with the same source.
    """
    if (named := _named(run)) is not None:
        return _bytes_in(kept_tokenizer(run.folder)) or _bytes_in(Path(named)) or named
    alike = [other for other in runs if _named(other) is None and run.shares_source(other)]
    folders = [each.about.source.path for each in (run, *alike)]
    return next(filter(None, map(_bytes_in, map(Path, folders))), alike[0].about.source.path)


def _named(run: RunHistory) -> str | None:
    """Return the tokenizer that the run file names; None if it is the source's."""
    named = run.table["data"].get("tokenizer")
    return str(named) if named else None


def _bytes_in(folder: Path) -> str | None:
    """Return what identifies the tokenizer in a folder; None if there is none."""
    for name in _TOKENIZERS:
        if (path := folder / name).is_file():
            return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    return None


def _reason(name: str, own: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    theirs, ours = (dict(flat(t[name], name)) for t in (own, reference))
    key = next(k for k in [*ours, *theirs] if theirs.get(k) != ours.get(k))
    found, wanted = (short(str(leaves.get(key, "not set")), 80) for leaves in (theirs, ours))
    return f"other {name}: {found}, where the runs compared have {wanted} ({key})"


def _repeated(run: RunHistory, other: RunHistory) -> str:
    return f"it repeats {other.name} with the same seed, {run.seed}, and a seed counts once"


def _groups(runs: Sequence[RunHistory], given: DenseCost) -> tuple[Group, ...]:
    together: dict[str, list[RunHistory]] = {}
    for run, settings in zip(runs, settings_of(runs), strict=True):
        key = json.dumps([settings.key, run.held_out.tokens.tolist()], sort_keys=True, default=str)
        together.setdefault(key, []).append(run)
    found = [
        _one_of_each_seed(alike)
        for alike in sorted(together.values(), key=lambda alike: ORDER.index(kind_of(alike[0])))
    ]
    labels = labels_of([runs[0] for runs, _ in found])
    return tuple(
        _group(label, runs, repeats, given) for label, (runs, repeats) in zip(labels, found, strict=True)
    )


def _one_of_each_seed(alike: Sequence[RunHistory]) -> tuple[list[RunHistory], list[RunHistory]]:
    """Return one run of each seed, and the others: the longest one counts, then the first by name."""
    best: dict[int, RunHistory] = {}
    for run in sorted(alike, key=lambda run: (-run.done, run.name)):
        best.setdefault(run.seed, run)
    chosen = {id(run) for run in best.values()}
    return [run for run in alike if id(run) in chosen], [run for run in alike if id(run) not in chosen]


def _group(label: str, runs: Sequence[RunHistory], repeats: Sequence[RunHistory], given: DenseCost) -> Group:
    tokens = runs[0].held_out.tokens
    # Records of older versions do not have the cost of each stage.
    costed = next((run for run in runs if run.about.stage_costs), runs[0])
    return Group(
        label=label,
        kind=kind_of(runs[0]),
        runs=tuple(runs),
        repeats=tuple(repeats),
        tokens=tokens,
        flops=costed.flops(tokens),
        loss=Mean.of([r.held_out.loss for r in runs]),
        accuracy=Mean.of([r.held_out.accuracy for r in runs]),
        start=start_cost(runs[0], given),
    )


def _pairs(groups: Sequence[Group]) -> Iterable[Pair]:
    """Yield every Mixture of Experts paired with every dense group.

    Upcycled ones are also paired with those from scratch.
    """
    for against in groups:
        for group in groups:
            scratch = group.kind == "upcycled" and against.kind == "MoE, from scratch"
            if group.has_experts and (scratch or not against.has_experts):
                yield _pair(group, against)


def _pair(group: Group, against: Group) -> Pair:
    flops = crossing(group.flops, group.loss.value, against.flops, against.loss.value)
    starts = (group.start.flops, against.start.flops)
    with_start = standing_with_start = None
    if starts[0] is not None and starts[1] is not None:
        curves = (group.flops + starts[0], group.loss.value, against.flops + starts[1], against.loss.value)
        with_start, standing_with_start = crossing(*curves), standing(*curves)
    error = None
    if flops.end is not None and group.loss.error is not None and against.loss.error is not None:
        error = math.hypot(*(_error_at(flops.end, each) for each in (group, against)))
    return Pair(
        group=group,
        against=against,
        standing=standing(group.flops, group.loss.value, against.flops, against.loss.value),
        standing_by_tokens=standing(group.tokens, group.loss.value, against.tokens, against.loss.value),
        standing_with_start=standing_with_start,
        tokens=crossing(group.tokens, group.loss.value, against.tokens, against.loss.value),
        flops=flops,
        with_start=with_start,
        error=error,
    )


def difference_of(pair: Pair) -> str:
    """Describe the difference in loss at the end, as an interval."""
    low, high = pair.standing.low, pair.standing.high
    if low is None or high is None:
        return formats.MISSING
    one, two = formats.signed(low), formats.signed(high)
    error = "" if pair.error is None else f" ± {pair.error:.4f}"
    return (one if one == two else f"{one} to {two}") + error


def _error_at(flops: float, group: Group) -> float:
    """Return the standard error of a loss after `flops` FLOPs: the larger of its two neighbours."""
    assert group.loss.error is not None
    return measured(group, group.loss.error, flops)[1]


def measured(group: Group, values: np.ndarray, flops: float) -> tuple[float, float]:
    """Return the bounds of a curve [n] of a group after `flops` FLOPs, as implied by the measurements."""
    low, high = bounds(np.array([flops]), group.flops, values)
    return float(low[0]), float(high[0])

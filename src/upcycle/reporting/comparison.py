"""The comparison of runs: which are comparable, which differ only in their seed, and which are better.

It takes runs and gives groups with means and standard errors, pairs of groups, and the runs that cannot be
compared, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from upcycle.reporting import formats
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.crossing import Crossing, Standing, bounds, crossing, standing
from upcycle.reporting.labels import ORDER, Kind, kind_of, labels_of, settings_of
from upcycle.reporting.runs import RunHistory
from upcycle.reporting.starts import DenseCost, StartCost, start_cost
from upcycle.reporting.terms import difference_in, terms_of
from upcycle.training.identity import identity_of, of_any_length

Paid = Literal["yes", "no", "within two standard errors", "one seed", "cannot be told"]


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

    @property
    def diverged(self) -> bool:
        """Return whether the last held-out loss of a run is not finite; the curves end before that."""
        return any(run.diverged for run in self.runs)


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
    def diverged(self) -> bool:
        """Return whether one of the two diverged, so that their curves say nothing about the end."""
        return self.group.diverged or self.against.diverged

    @property
    def paid(self) -> Paid:
        """The answer whether the Mixture of Experts is better at the end.

        It is judged by the measurements and by two standard errors over seeds; one seed cannot decide it. A
        Mixture of Experts that diverged has not paid, whatever its loss was before. A dense model that
        diverged is nothing to be ahead of.
        """
        if self.diverged:
            return "no" if self.group.diverged else "cannot be told"
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
    terms = [terms_of(run, runs) for run in runs]
    keys = [json.dumps(t, sort_keys=True, default=str) for t in terms]
    reference = terms[keys.index(max(keys, key=keys.count))] if runs else {}
    foreign, kept = [], []
    for run, own in zip(runs, terms, strict=True):
        differs = [name for name in reference if own[name] != reference[name]]
        if differs:
            foreign.append((run, difference_in(differs[0], own, reference)))
        else:
            kept.append(run)
    groups = _groups(kept, given)
    return Comparison(groups=groups, pairs=tuple(_pairs(groups)), foreign=tuple(foreign))


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

"""What came out of a `Continuation`: gaps to dense continuation, when they turn, tables and figures."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import common
import figure
from continuation import Continuation, Key
from places import PLACES
from upcycle.reporting.crossing import crossing

STEP, FLOPS, SECONDS, LOSS = 0, 2, 3, 4  # columns of a curve; after the loss come further scores


@dataclass(frozen=True)
class Outcome:
    """The recorded runs of an experiment by start and variant: one per seed.

    Everything is compared with dense continuation. So a start without a dense run is left out, and so is a
    variant that has no seed in common with the dense runs of its start.
    """

    experiment: Continuation
    recorded: Mapping[Key, Sequence[common.Result]]

    @staticmethod
    def of(experiment: Continuation) -> Outcome:
        """Read the results of an experiment."""
        runs: dict[Key, list[common.Result]] = defaultdict(list)
        for (start, variant, _), result in experiment.known().items():
            runs[start, variant].append(result)
        return Outcome(experiment, dict(runs))

    @cached_property
    def runs(self) -> Mapping[Key, Sequence[common.Result]]:
        """The recorded runs that can be compared with dense continuation."""
        return {key: runs for key, runs in self.recorded.items() if self._seeds(key) & self._dense_seeds(key)}

    def _seeds(self, key: Key) -> set[int]:
        return {run["seed"] for run in self.recorded.get(key, ())}

    def _dense_seeds(self, key: Key) -> set[int]:
        start, _ = key
        return self._seeds((start, "dense"))

    def left_out(self) -> list[str]:
        """Return a sentence for each variant of each start that is left out."""
        sentences = []
        for key in sorted({*self.recorded} - {*self.runs}):
            why = "none of its seeds has a dense run" if self._dense_seeds(key) else "there is no dense run"
            sentences.append(f"From start {key[0]}, {key[1]} is left out: {why}.")
        return sentences

    def __getitem__(self, key: Key) -> Sequence[common.Result]:
        return self.runs.get(key, ())

    def __contains__(self, key: Key) -> bool:
        return key in self.runs

    @property
    def starts(self) -> list[int]:
        """The starts that have runs, in order."""
        return sorted({start for start, _ in self.runs})

    def spent(self, start: int) -> float:
        """Return the training FLOPs of a start."""
        steps, _, flops, *_ = self[start, "dense"][0]["curve"][-1]
        return float(flops) / steps * self.experiment.start.steps[start]

    def share(self, start: int, variant: str, score: int = LOSS) -> dict[int, np.ndarray]:
        """Return the curve of each seed: [points, (extra FLOPs relative to the start's, held-out score)]."""
        unit = self.spent(start)
        before = float(self.experiment.from_scratch(variant))  # it spends the start's FLOPs as well
        curves = {run["seed"]: np.array(run["curve"], np.float64) for run in self[start, variant]}
        return {
            seed: np.stack([curve[:, FLOPS] / unit - before, curve[:, score]], axis=1)
            for seed, curve in curves.items()
        }

    def gaps(self, start: int, variant: str, score: int = LOSS) -> list[float]:
        """Return the final score of each seed, less that of dense continuation."""
        ends = {each["seed"]: each["curve"][-1][score] for each in self[start, "dense"]}
        return [
            each["curve"][-1][score] - ends[each["seed"]]
            for each in self[start, variant]
            if each["seed"] in ends
        ]

    def gap(self, start: int, variant: str, score: int = LOSS) -> tuple[float, float | None]:
        """Return mean and standard error of `gaps`; the error is None for one seed."""
        return common.mean_and_error(self.gaps(start, variant, score))

    def course(self, start: int, variant: str) -> np.ndarray:
        """Return how the held-out loss stands to that of dense continuation on the way.

        The points [points, (extra FLOPs relative to the start's, mean gap, two standard errors)] are those of
        the variant, from the first that spent as much as dense continuation. A gap is that of one seed, with
        the dense curve interpolated between its points. The error of a single seed counts as 0.
        """
        dense, curves = self.share(start, "dense"), self.share(start, variant)
        gaps = [
            curve[:, 1] - np.interp(curve[:, 0], *dense[seed].T)
            for seed, curve in curves.items()
            if seed in dense
        ]
        x, *_ = (curve[:, 0] for curve in curves.values())
        told = [common.mean_and_error(at) for at in zip(*gaps, strict=True)]
        points = [(at, mean, 2 * (error or 0.0)) for at, (mean, error) in zip(x, told, strict=True)]
        return np.array([point for point in points if point[0] >= 0])

    def behind(self, start: int, variant: str) -> float | None:
        """Return the extra FLOPs, relative to the start's, of the last point at which the variant is behind.

        Behind and ahead mean by more than two standard errors. None if it never is.
        """
        behind = [x for x, gap, error in self.course(start, variant) if gap > error]
        return float(behind[-1]) if behind else None

    def ahead(self, start: int, variant: str) -> float | None:
        """Return the extra FLOPs, relative to the start's, from which the variant is ahead to the end.

        None if it does not end ahead, or ends after dense continuation.
        """
        x, gap, error = self.course(start, variant).T
        dense, *_ = self.share(start, "dense").values()
        if gap[-1] >= -error[-1] or x[-1] > 1.01 * dense[-1, 0]:
            return None
        others = np.flatnonzero(gap >= -error)
        return float(x[others[-1] + 1 if len(others) else 0])

    def crossings(self, start: int, variant: str) -> list[float | None]:
        """Return the extra FLOPs, relative to the start's, at which each seed falls below dense for good.

        The curves are straight between their points. 0 stands for a seed that is ahead from the first point,
        and None for one that is not ahead at the end. Seeds without a dense run are left out.
        """
        dense, curves = self.share(start, "dense"), self.share(start, variant)
        found = [crossing(*curve.T, *dense[seed].T) for seed, curve in curves.items() if seed in dense]
        return [each.x for each in found]

    def crosses(self, start: int, variant: str) -> tuple[float, float | None] | None:
        """Return mean and standard error of `crossings`; None if a seed has not crossed."""
        found = self.crossings(start, variant)
        known = [at for at in found if at is not None]
        return common.mean_and_error(known) if len(known) == len(found) else None

    def draw(
        self, path: Path, start: int, variants: Sequence[str], title: str, y: str, highest: float = np.inf
    ) -> None:
        """Draw the held-out loss of those of the variants that have run from one start.

        A variant's first point is left out if the mean of its seeds is not below `highest`.
        """
        shown = [name for name in variants if (start, name) in self]
        curves = {name: self._drawn(start, name, highest) for name in shown}
        figure.write(path, title, curves, "extra training FLOPs (% of the dense model's)", y, places=PLACES)

    def _drawn(
        self, start: int, variant: str, highest: float, unit: float = 0.01
    ) -> list[list[tuple[float, float]]]:
        """Return the points of `draw` for each seed: (extra FLOPs in `unit`, held-out loss)."""
        curves = np.stack([*self.share(start, variant).values()])  # [seeds, points, 2]
        x, mean = curves[0, :, 0], curves[:, :, 1].mean(0)
        kept = (x >= 0.01) | ((x == 0) & (mean < highest))
        return [[(x / unit, y) for x, y in curve] for curve in curves[:, kept]]

    def draw_costs(
        self,
        path: Path,
        start: int,
        title: str,
        y: str,
        seconds: Mapping[str, float],
        highest: float = np.inf,
    ) -> None:
        """Draw the held-out loss of the core from one start against extra tokens, FLOPs and seconds.

        All are shares of what the start took. `seconds` are those of a step, relative to a step of the dense
        model, by variant. A variant without them is left out of the panel of seconds. For `highest` see
        `draw`.
        """
        shown = [name for name in self.experiment.core if (start, name) in self]
        tokens = {name: 0.01 * self._flops_of_a_step(start, name) for name in shown}
        units = {
            "tokens": tokens,
            "FLOPs": dict.fromkeys(shown, 0.01),
            "seconds": {name: tokens[name] / seconds[name] for name in shown if name in seconds},
        }
        notes = {"seconds": f"\n{_measured({name: seconds.get(name) for name in shown})}"}
        panels = {
            f"{title}, in {cost}": (
                f"extra {cost} (% of the dense model's){notes.get(cost, '')}",
                {name: self._drawn(start, name, highest, unit) for name, unit in of.items()},
            )
            for cost, of in units.items()
        }
        figure.write_panels(path, title, panels, y, PLACES)

    def _flops_of_a_step(self, start: int, variant: str) -> float:
        """Return the training FLOPs of a step, relative to those of a dense step; all have as many tokens."""
        step, flops = (
            [self[start, name][0]["curve"][-1][column] for name in (variant, "dense")]
            for column in (STEP, FLOPS)
        )
        return float(flops[0] / step[0] / (flops[1] / step[1]))

    def draw_gaps(self, path: Path, title: str, x: str, y: str) -> None:
        """Draw the final gap to dense continuation against the length of the start's training.

        A variant is there with the starts it has run from, if they are several. Seeds that a start lacks are
        drawn at the mean of those it has.
        """
        curves = {}
        for name in (each for each in self.experiment.core if each != "dense"):
            ends = {start: self.gaps(start, name) for start in self.starts if (start, name) in self}
            if len(ends) > 1:
                most = max(map(len, ends.values()))
                curves[name] = [
                    [
                        (start, gaps[seed] if seed < len(gaps) else float(np.mean(gaps)))
                        for start, gaps in ends.items()
                    ]
                    for seed in range(most)
                ]
        if not curves:
            return
        figure.write(path, title, curves, x, y, places=PLACES)

    def draw_crossings(self, path: Path, title: str, x: str, y: str) -> None:
        """Draw where the core crosses dense continuation against the length of the start's training.

        A variant is there with the starts from which all of its seeds cross, if they are several.
        """
        points = {}
        for name in (each for each in self.experiment.core if each != "dense"):
            found = {start: self.crosses(start, name) for start in self.starts if (start, name) in self}
            crossed = [
                (start, 100 * at[0], at[1] and 100 * at[1]) for start, at in found.items() if at is not None
            ]
            if len(crossed) > 1:
                points[name] = crossed
        if points:
            figure.write_points(path, title, points, x, y, PLACES)

    def report(self, unit: str, nats: str, *, name: str = "start", highest: float = np.inf) -> None:
        """Print the table, and draw the figures beside the results.

        `unit` is that of the lengths of starts, and `nats` that of the loss. For `highest` see `draw`.
        """
        here, of = self.experiment.results.parent, self.experiment
        print(*self.table(), *self.left_out(), sep="\n")
        y = f"held-out loss ({nats})"
        for start in self.starts:
            title = f"From {start} {unit}"
            self.draw(here / f"{name}-{start}.png", start, of.core, title, y, highest)
            for question, variants in of.questions.items():
                if any((start, each) in self for each in {*variants} - {*of.core}):
                    path = here / f"{question.replace(' ', '-')}-{start}.png"
                    self.draw(path, start, variants, f"{title}: {question}", y, highest)
        title, x = "The longer the dense model was trained", f"{unit} of the start"
        prefix = "" if name == "start" else f"{name}-"
        self.draw_gaps(here / f"{prefix}gaps.png", title, x, "nats against dense, continued")
        title, y = "Where dense continuation is passed", "extra FLOPs at the crossing (%)"
        self.draw_crossings(here / f"{prefix}crossing.png", title, x, y)

    def table(self) -> list[str]:
        """Return the lines of the table in Markdown."""
        shown = [key for s in self.starts for v in self.experiment.variants if (key := (s, v)) in self]
        return [*self._head(), *(self._row(*key) for key in shown)]

    def _head(self) -> list[str]:
        columns = ["start", "variant", "seeds", "loss at the start", "at the end", "less dense"]
        columns += ["behind until", "crosses at", "ahead from"]
        columns += [each for score in self.experiment.scores[1:] for each in (score, "less dense")]
        return [f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|"]

    def _row(self, start: int, name: str) -> str:
        """Return the row of a variant: first and final loss, gaps on the way, and the other final scores."""
        each, dense = self[start, name], name == "dense"
        begins = common.mean_and_error([r["curve"][0][LOSS] for r in each])[0]
        cells = [str(start), name, str(len(each)), f"{begins:.3f}", self._end(start, name, LOSS)]
        cells += [""] * 4 if dense else [self._gap(start, name, LOSS), *self._turns(start, name)]
        for score in range(LOSS + 1, LOSS + len(self.experiment.scores)):
            cells += [self._end(start, name, score), "" if dense else self._gap(start, name, score)]
        return f"| {' | '.join(cells)} |"

    def _turns(self, start: int, name: str) -> list[str]:
        """Return until when a variant is behind, where it crosses, and from when it is ahead, as cells."""
        turns = self.behind(start, name), self.ahead(start, name)
        behind, ahead = ["no" if at is None else f"{at:.0%}" for at in turns]
        return [behind, self._crosses(start, name), ahead]

    def _crosses(self, start: int, name: str) -> str:
        if (found := self.crosses(start, name)) is None:
            return "not yet"
        if not any(self.crossings(start, name)):
            return "-"
        mean, error = found
        return f"{100 * mean:.1f}" + common.error_text(error and 100 * error, " ± {:.1f}") + "%"

    def _end(self, start: int, name: str, score: int) -> str:
        mean, error = common.mean_and_error([r["curve"][-1][score] for r in self[start, name]])
        return f"{mean:.4f}" + common.error_text(error)

    def _gap(self, start: int, name: str, score: int) -> str:
        mean, error = self.gap(start, name, score)
        return f"{mean:+.4f}" + common.error_text(error)


def _measured(seconds: Mapping[str, float | None]) -> str:
    """Return what is known of the seconds of a step, as lines below an axis."""
    spelled = {name.replace("_", " "): each for name, each in seconds.items()}
    known = [f"{name} {each:.2f}" for name, each in spelled.items() if each is not None and name != "dense"]
    missing = [name for name, each in spelled.items() if each is None]
    text = f"measured seconds of a step, dense = 1: {', '.join(known)}"
    return textwrap.fill(text + (f"; not measured: {', '.join(missing)}" if missing else ""), 40)


def draw_start(recorded: Path, unit: str, steps: float) -> None:
    """Draw the curve that `Start.record` wrote, beside it; a unit of training is so many steps."""
    if not recorded.exists():
        return
    points = json.loads(recorded.read_text())["curve"]
    names = {"in training": 1, "held out": 2}
    curves = {name: [[(p[0] / steps, p[column]) for p in points]] for name, column in names.items()}
    figure.write(recorded.with_suffix(".png"), f"The {recorded.stem} model", curves, unit, "loss (nats)")

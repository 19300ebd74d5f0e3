"""The files of a training run, read without torch; damage is reported, not hidden."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.errors import UpcycleError, listed, shown
from upcycle.records.metrics import StepMetrics
from upcycle.records.reader import DamagedError, Table, load
from upcycle.records.run import RunRecord
from upcycle.reporting.document import clean
from upcycle.system import wording
from upcycle.training.run import Train, train_of

DEPTH = 64  # the deepest nesting of a JSON file
TAIL = 50  # the load is averaged over this many last steps
_SPEEDS = ("seconds", "tokens_per_s", "active_flops_per_s", "mfu", "peak_memory")
_HEALTH = ("entropy", "dead", "collapsed", "left_behind")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out results in the order of training; the first is before training, if it was measured."""

    tokens: np.ndarray  # [n]
    loss: np.ndarray  # [n], nats
    accuracy: np.ndarray  # [n], NaN if not recorded


@dataclass(frozen=True, kw_only=True)
class Health:
    """The router statistics of a run: n steps, L layers of E experts (E may differ)."""

    places: tuple[str, ...]  # [L]
    tokens: np.ndarray  # [n]
    entropy: np.ndarray  # [n, L], divided by log E
    dead: np.ndarray  # [n, L], number of experts without a token
    collapsed: np.ndarray  # [n, L]
    left_behind: np.ndarray  # [n, L], share of tokens
    load: tuple[np.ndarray, ...]  # L arrays [E], shares of the slots, mean over the last steps
    steps: int  # the number of steps that the load is averaged over


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run: its settings and its recorded steps."""

    name: str
    folder: Path
    about: RunRecord
    seed: int  # of everything that differs between two trainings: the order of the data, jitter, dropout
    total_steps: int
    rows: int  # rows of the global batch
    steps: np.ndarray  # [n], numbers of the recorded steps
    loss: np.ndarray  # [n], training loss
    held_out: Curve
    speeds: Mapping[str, np.ndarray]  # by name, [n], NaN where it was not recorded
    health: Health | None
    skipped: int  # the number of recorded steps that did not update the weights
    diverged: bool  # whether the last held-out loss is not finite; curves have none of these
    damage: tuple[str, ...]  # a sentence for each thing that could not be read

    @property
    def table(self) -> Table:
        """The run file as a table."""
        return self.about.run

    @property
    def done(self) -> int:
        """The last recorded step."""
        return int(self.steps[-1]) if self.steps.size else 0

    @property
    def unfinished(self) -> bool:
        """Return whether the metrics end before the last step of the run."""
        return self.done < self.total_steps

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens of a global batch."""
        return self.rows * self.about.tokens_per_row

    def shares_source(self, other: RunHistory) -> bool:
        """Return whether both runs started from one checkpoint."""
        return self._shares("source", other)

    def shares_teacher(self, other: RunHistory) -> bool:
        """Return whether both runs learned from one checkpoint, or both from none."""
        return self._shares("teacher", other)

    def _shares(self, label: str, other: RunHistory) -> bool:
        """Return whether two runs have one checkpoint in a role.

        Its files decide if both runs recorded their hashes; otherwise the path decides.
        """
        mine, theirs = ((run.about.source_sha256 or {}).get(label) for run in (self, other))
        if mine is None or theirs is None:
            return self._path_of(label) == other._path_of(label)
        return sorted(mine.values()) == sorted(theirs.values())

    def _path_of(self, label: str) -> Any:
        if label == "source":
            return self.about.source.path
        return (self.table.get(label) or {}).get("source")

    def flops(self, tokens: np.ndarray) -> np.ndarray:
        """Return the training FLOPs [n] of the run itself after `tokens` [n] tokens (active weights only)."""
        spent = np.vectorize(self.about.training_flops, otypes=[np.float64], excluded={1})
        found: np.ndarray = spent(tokens / self.about.tokens_per_row, self.rows)
        return found


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / RunRecord.FILE).is_file()


def read_run(folder: Path, name: str) -> RunHistory:
    """Read the run in `folder`. Raises `UpcycleError` if its run.json does not describe a run."""
    about = _about(folder)
    wanted = train_of(about.run)
    damage: list[str] = []
    steps: list[StepMetrics] = []
    routed = _Routed(damage)
    for step in _steps(folder / StepMetrics.FILE, damage):
        due = step.step * wanted.rows * about.tokens_per_row
        if step.tokens != due:
            raise UpcycleError(
                f"its {StepMetrics.FILE} is of another run than its {RunRecord.FILE}: step {step.step} says "
                f"{step.tokens:,} tokens and not {due:,}"
            )
        routed.add(step)
        steps.append(replace(step, layers=()))
    scored = [step for step in steps if step.held_out_loss is not None]
    infinite = [step.step for step in scored if not is_number(step.held_out_loss)]
    if infinite:
        at = listed([*map(str, infinite)])
        damage.append(f"its held-out loss is not finite at step {at}; curves leave that out")
    return RunHistory(
        name=name,
        folder=folder,
        about=about,
        seed=_seed(about, wanted),
        total_steps=wanted.total_steps,
        rows=wanted.rows,
        steps=np.array([s.step for s in steps], np.int64),
        loss=_column(steps, "loss"),
        held_out=_held_out(steps),
        speeds={key: _column(steps, key) for key in _SPEEDS},
        health=routed.health(),
        skipped=sum(step.skipped is not None for step in steps),
        diverged=bool(infinite) and scored[-1].step == infinite[-1],
        damage=tuple(dict.fromkeys(damage)),
    )


def _about(folder: Path) -> RunRecord:
    """Read run.json, with texts made safe to show."""
    file = RunRecord.FILE
    return RunRecord.of(fit(load(folder / file, f"it has no {file}", f"its {file}"), file), f"its {file}")


def _seed(about: RunRecord, train: Train) -> int:
    """Return the seed of the training, as `Run.train_seed` does."""
    seed = about.run.get("seed", 0) if train.seed is None else train.seed
    if type(seed) is not int:
        raise DamagedError(f"its {RunRecord.FILE}", f"run.seed is {shown(seed)}, not a whole number")
    return seed


def fit(value: Table, name: str) -> Table:
    """Return the contents of a JSON file with texts made safe to show; too deep nesting raises an error."""
    found: Table = _fit(value, name, DEPTH)
    return found


def _fit(value: Any, name: str, room: int) -> Any:
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, (dict, list)):
        return value
    if not room:
        raise UpcycleError(f"its {name} is nested deeper than {DEPTH} levels, which no file of upcycle is")
    if isinstance(value, list):
        return [_fit(inner, name, room - 1) for inner in value]
    return {clean(key): _fit(inner, name, room - 1) for key, inner in value.items()}


def _steps(path: Path, damage: list[str]) -> Iterator[StepMetrics]:
    """Yield the steps of a metrics file up to the first unusable one, which is reported in `damage`."""
    if not path.is_file():
        damage.append(f"it has no {path.name}: no step was recorded")
        return
    before = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of its {path.name}"
            try:
                step = StepMetrics.of_line(line, where)
                if step.step <= before:
                    raise DamagedError(where, f"step is {step.step}, after {before}")
            except DamagedError as error:
                cut = not line.endswith(b"\n")
                said = f"{where} was cut off, as a kill leaves it" if cut else str(error)
                damage.append(said if cut else f"{said}; nothing after it is shown")
                return
            before = step.step
            yield step


def _column(steps: list[StepMetrics], key: str) -> np.ndarray:
    """Return one number of every step, [n]; NaN if it is missing."""
    found = [getattr(step, key) for step in steps]
    return np.array([math.nan if value is None else float(value) for value in found])


def _held_out(steps: list[StepMetrics]) -> Curve:
    points: list[tuple[float, float | None, float | None]] = []
    if steps:
        points.append((0.0, steps[0].held_out_start, steps[0].held_out_accuracy_start))
    points += [(float(s.tokens), s.held_out_loss, s.held_out_accuracy) for s in steps]
    shown = [point for point in points if is_number(point[1])]
    return Curve(
        tokens=np.array([p[0] for p in shown]),
        loss=np.array([float(p[1] or 0.0) for p in shown]),
        accuracy=np.array([float(p[2] or 0.0) if is_number(p[2]) else math.nan for p in shown]),
    )


class _Routed:
    """The router statistics of steps, collected as long as the layers of the run do not change."""

    def __init__(self, damage: list[str]) -> None:
        self._damage, self._places = damage, tuple[str, ...]()
        self._rows: list[list[list[float]]] = []
        self._tail: deque[list[tuple[float, ...]]] = deque(maxlen=TAIL)

    def add(self, step: StepMetrics) -> None:
        """Add the layers of one more step."""
        if not step.layers:
            return
        here = tuple(place_of(layer.stack, layer.layer) for layer in step.layers)
        row = [[float(getattr(layer, key)) for layer in step.layers] for key in _HEALTH]
        loads = [layer.load for layer in step.layers]
        if not np.isfinite(row).all() or not all(map(is_load, loads)):
            self._damage.append(f"what its routers did at step {step.step} cannot be read")
            return
        if self._places and here != self._places:
            self._damage.append(f"its layers change at step {step.step}; router health ends before")
            return
        self._places = here
        self._rows.append([[float(step.tokens)] * len(here), *row])
        self._tail.append(loads)

    def health(self) -> Health | None:
        """Return the statistics; None for a run without routers."""
        if not self._rows:
            return None
        numbers = np.array(self._rows, np.float64).transpose(1, 0, 2)
        tokens, entropy, dead, collapsed, left_behind = numbers
        same = [loads for loads in self._tail if [*map(len, loads)] == [*map(len, self._tail[-1])]]
        return Health(
            places=self._places,
            tokens=tokens[:, 0],
            entropy=entropy,
            dead=dead,
            collapsed=collapsed > 0,
            left_behind=left_behind,
            load=tuple(np.mean(layer, axis=0) for layer in zip(*same, strict=True)),
            steps=len(same),
        )


def place_of(stack: str, layer: int) -> str:
    """Return the name of a layer in a file for people."""
    return clean(wording.place_of(stack, layer))


def is_load(load: Sequence[float]) -> bool:
    """Return whether the numbers can be the loads of experts."""
    return all(is_number(x) and x >= 0 for x in load) and sum(load) > 0


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

"""The folder of a run: claiming it, its run.json, and cleaning up after a killed run."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.data.corpus import Data
from upcycle.errors import UpcycleError, listed
from upcycle.nn.balance import BUFFERED, EXACT, Balance
from upcycle.records.metrics import StepMetrics
from upcycle.records.reader import load
from upcycle.records.run import RunRecord, known_in
from upcycle.records.state import PRECISIONS, RunState
from upcycle.system import claim, lock, whole_file
from upcycle.training import agreement, begun_in, beside, fit, metrics, saving, together
from upcycle.training.course import Course
from upcycle.training.identity import identity_of, of_any_length
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run, train_of
from upcycle.training.stages import Stage

LOCK = ".upcycle-lock"
MARKER = ".upcycle-run"
"""The file that marks a folder as a run's from before anything else is written there."""
_TAKEN = (
    "checkpoints", RunRecord.FILE, StepMetrics.FILE, metrics.SINKS, "tokens", "images", "teacher",
    beside.FOLDER,
)  # fmt: skip
"""What a run writes in its folder."""


def read_record(out: Path) -> RunRecord:
    """Read run.json of a run. Raises `UpcycleError` if it is missing or damaged."""
    path = out / RunRecord.FILE
    try:
        missing = f"{out} has no {path.name}; give a folder that `upcycle train` made"
        return RunRecord.of(load(path, missing), str(path))
    except UpcycleError as error:
        if not saving.checkpoints(out):
            raise
        raise UpcycleError(f"{error}; `upcycle train RUN.toml --resume` writes it anew") from None


def write_record(out: Path, record: RunRecord) -> None:
    """Write run.json. The old file stays until the new one is on disk."""
    whole_file.write_json(out / RunRecord.FILE, record.as_table())


@contextmanager
def claimed(run: Run, sources: Iterable[Path], here: Ranks, *, resume: bool) -> Iterator[Path | None]:
    """Lock the folder of a run; yield the checkpoint to resume from, or None to begin.

    Raises `UpcycleError`, before a byte is written, if the folder is the source's, another run's, somebody
    else's, or in use by another training.
    """
    out = Path(run.out)
    _refuse_place(run, sources)
    _refuse_content(run, out, resume)  # before the folder is made
    with ExitStack() as stack:
        said = _hold(out, stack) if here.first else None
        if (said := here.share(said)) is not None:
            raise UpcycleError(said)
        agreement.refuse_unseen(out, LOCK, here)
        _refuse_content(run, out, resume)  # again: another training may have written since
        # One rank looks: a network file system may show another one an older list.
        checkpoint = here.share(saving.latest(out) if resume else None)
        if checkpoint is not None:
            saving.refuse_changed(checkpoint, here)
        here.barrier()
        together.by_first(lambda: _clean(out), here)
        yield checkpoint


def _hold(out: Path, stack: ExitStack) -> str | None:
    """Make the folder, hold its lock until the stack closes, and mark it; return the reason if that fails."""
    try:
        claim.refuse_below_a_file(out)
        _refuse_foreign(out)
        out.mkdir(parents=True, exist_ok=True)
        busy = f"another training is at work in {out}; wait for its end, or choose another `out`"
        stack.enter_context(lock.held(out / LOCK, busy))
        _mark(out)
    except FileExistsError:
        return f"{out} is a file; `out` must be a folder to make"
    except UpcycleError as error:
        return str(error)
    except OSError as error:
        return f"{out} cannot be written to: {error.strerror}; choose another `out`"
    return None


def _mark(out: Path) -> None:
    """Mark a folder as a run's, unless something marks it already."""
    _refuse_foreign(out)  # again: somebody may have written since
    if not _is_marked(out):
        whole_file.write_text(out / MARKER, "This folder is a run of `upcycle train`.\n")


def _is_marked(out: Path) -> bool:
    """Return whether a folder is a run's: runs of earlier versions have no marker, but these files."""
    if (out / MARKER).is_file() or known_in(out) is not None:
        return True
    return any(saving.is_whole(path) for _, path in saving.checkpoints(out))


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that is not marked as a run's and holds what a run would write over, or delete."""
    if _is_marked(out):
        return
    if there := [name for name in _TAKEN if _holds_something(out / name)]:
        raise UpcycleError(
            f"{out} holds {listed(there)}, and nothing in it says that it is a run of `upcycle train`, which "
            f"would write there; choose another `out`, or move that away"
        )


def _holds_something(path: Path) -> bool:
    """Return whether a path is there and is no empty folder."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def _refuse_place(run: Run, sources: Iterable[Path]) -> None:
    """Refuse an `out` without a name, or one that is the source, inside it, or around it."""
    if not run.out.strip():
        raise UpcycleError(f"out = {run.out!r}; it must be the name of a folder to make")
    for folder in sources:
        claim.refuse_near([Path(run.out)], folder)


def _refuse_content(run: Run, out: Path, resume: bool) -> None:
    if resume:
        _refuse_other(run, out, saving.latest(out))
    elif saving.latest(out) is not None or (out / RunRecord.FILE).exists():
        raise UpcycleError(f"{out} holds a run already; go on with it with --resume, or choose another `out`")


def _refuse_other(run: Run, out: Path, checkpoint: Path | None) -> None:
    """Refuse to resume another run, or this run with another length if its schedule does not allow it."""
    recorded = _recorded(out, checkpoint)
    if recorded is None:
        return
    where, theirs, done = recorded
    theirs = identity_of(theirs) if isinstance(theirs, dict) else theirs
    mine = _plain(_settled_as(run, theirs).identity())
    if _differences(of_any_length(theirs), of_any_length(mine)):
        theirs = _as_read_today(theirs)
    if isinstance(theirs, dict) and _differences(of_any_length(theirs), of_any_length(mine)):
        theirs = begun_in.moved(theirs, known_in(out), out)
    _refuse_other_length(run, where, theirs, mine, done)
    if different := _differences(of_any_length(theirs), of_any_length(mine)):
        raise UpcycleError(
            f"{where} is of another run: it differs in {listed(different)}; put them back, or choose "
            f"another `out`"
        )


def _recorded(out: Path, checkpoint: Path | None) -> tuple[str, Any, int] | None:
    """Return the place of a run's record, its identity and the steps done; None if there is none."""
    if checkpoint is not None:
        state = saving.read_state(checkpoint)
        return str(checkpoint), state.identity, state.step
    record = known_in(out)
    return None if record is None else (str(out), record.identity, 0)


def settled(run: Run, checkpoint: Path | None) -> Run:
    """Return `run` with a value for settings that it leaves open: what it has had if it goes on, or today's.

    Records always have a value, so that a run keeps it if a later version has another default.
    """
    recorded = _recorded(Path(run.out), checkpoint)
    return _settled_as(run, None if recorded is None else recorded[1])


def precision(run: Run, before: RunState | None) -> str:
    """Return the precision that a run asks for, the one it has had if it goes on, or that of today."""
    if before is None or run.train.precision != "auto":
        return fit.precision(run)
    return before.precision or _recorded_precision(Path(run.out)) or fit.precision(run)


def _recorded_precision(out: Path) -> str | None:
    """Return the precision in run.json, because checkpoints of earlier versions have none."""
    record = known_in(out)
    return record.precision if record is not None and record.precision in PRECISIONS else None


def _settled_as(run: Run, theirs: Any) -> Run:
    """Return `run` with what it leaves open as in the identity `theirs`; None: as a new run."""
    there = theirs.get("stage") if isinstance(theirs, dict) else None
    own_data = any(stage.data is not None for stage in run.stage)
    stages = itertools.zip_longest(run.stage, (there if isinstance(there, list) else [])[: len(run.stage)])
    task = run.task
    if task is not None and isinstance(theirs, dict) and isinstance(recorded := theirs.get("task"), dict):
        task = task.continued(recorded)
    return replace(
        run,
        task=task,
        data=_with_split(run.data, theirs, run.train_seed),
        router=_with_counts(run.router, theirs),
        stage=tuple(
            replace(
                stage,
                data=stage.data and _with_split(stage.data, then, run.train_seed),
                router=stage.router and _with_counts(stage.router, then),
                anew=_anew(stage, theirs, then) if own_data else stage.anew,
            )
            for stage, then in stages
        ),
    )


def _with_split(data: Data, then: Any, seed: int) -> Data:
    """Return [data] with its `split_seed`, which the table `then` may have recorded.

    Records of earlier versions have none: the seed of a run chose its held-out examples.
    """
    if data.split_seed is not None:
        return data
    recorded = then.get("data") if isinstance(then, dict) else None
    split = recorded.get("split_seed", seed) if isinstance(recorded, dict) else 0
    return replace(data, split_seed=split if type(split) is int else 0)


def _with_counts(router: Balance, then: Any) -> Balance:
    """Return [router] with its `balance_counts`, which the table `then` may have recorded."""
    if router.balance_counts is not None:
        return router
    recorded = then.get("router") if isinstance(then, dict) else None
    counts = recorded.get("balance_counts", EXACT) if isinstance(recorded, dict) else BUFFERED
    return replace(router, balance_counts=EXACT if counts == EXACT else BUFFERED)


def _anew(stage: Stage, theirs: Any, then: Any) -> bool:
    """Return whether a stage reads its data anew, which its table `then` in a record may say.

    In earlier versions every table of data was read from its first rows.
    """
    if stage.anew is not None:
        return stage.anew
    recorded = isinstance(theirs, dict) and isinstance(then, dict)
    return recorded and then.get("anew", True) is True


def _as_read_today(theirs: Any) -> Any:
    """Return an identity with the keys that an older version did not know, at their defaults."""
    if not isinstance(theirs, dict):
        return theirs
    try:
        run = _settled_as(Run.of({**theirs, "out": "unused"}), theirs)
    except UpcycleError:
        return theirs  # damaged, or of a version with other keys
    return _plain(run.identity())


def _plain(identity: dict[str, Any]) -> Any:
    """Return an identity as a JSON file gives it back."""
    return json.loads(json.dumps(identity))


def _refuse_other_length(run: Run, where: str, theirs: Any, mine: Any, done: int) -> None:
    """Refuse another number of steps if the steps already done would have had other learning rates."""
    before, now = theirs.get("train"), mine["train"]
    if before == now or theirs.get("schedule") != mine["schedule"]:
        return
    if of_any_length(theirs).get("stage") != of_any_length(mine).get("stage"):
        return  # the caller names what differs
    try:
        old, new = train_of(theirs).total_steps, run.train.total_steps
    except (UpcycleError, TypeError, AttributeError, KeyError):
        return  # the caller names the keys that differ
    if new < done:
        raise UpcycleError(f"{where} is of step {done}, and the run file ends it at {new}; give more steps")
    last = Course(run).legs[-1]
    schedule, first = last.run.schedule, last.first
    taken = range(done - first)
    if all(schedule.at(s, old - first) == schedule.at(s, new - first) for s in taken):
        return
    raise UpcycleError(
        f"{where} cannot go on to {new:,} steps instead of {old:,}: with schedule.name = {schedule.name} "
        f"the {len(taken):,} steps that are done would have had other learning rates; constant can be "
        f"extended, and warmup_stable_decay before its decay"
    )


def _differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """Return the keys in which two nested tables differ, with both values."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in sorted({*theirs, *mine})
            for line in _differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
        ]
    if path == "stage" and isinstance(theirs, list) and isinstance(mine, list):
        if len(theirs) == len(mine):
            pairs = enumerate(zip(theirs, mine, strict=True))
            return [line for i, pair in pairs for line in _differences(*pair, f"{path}[{i}]")]
        return [f"stage ({len(theirs)} there, {len(mine)} here)"]
    return [] if theirs == mine else [f"{path} ({theirs!r} there, {mine!r} here)"]


def _clean(out: Path) -> None:
    """Remove the half-written files of a killed run from a folder that is marked as a run's."""
    saving.discard_partial(out)
    for name in (MARKER, RunRecord.FILE, StepMetrics.FILE, metrics.SINKS):
        whole_file.clear_of(out / name)
    for name in ("tokens", "images", "teacher"):
        whole_file.clear(out / name)

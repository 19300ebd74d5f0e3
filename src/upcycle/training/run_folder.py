"""The folder of a run: whether a run may have it, what its run.json says, what a kill left lying in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError, listed
from upcycle.system import claim, lock, whole_file
from upcycle.training import saving
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run, train_of

RECORD = "run.json"
LOCK = ".upcycle-lock"
FORMAT = 1
_LENGTH = ("steps", "tokens", "examples")  # how long a run is, of which a run file has one
_KINDS = {
    "run": dict, "identity": dict, "source": dict, "precision": str, "task": str, "upcycle_version": str,
    "versions": dict, "tokens_per_row": int, "training_flops_per_token": int, "from_scratch": bool,
}  # fmt: skip


def read_record(out: Path) -> dict[str, Any]:
    """run.json of a run. Raises `UpcycleError` where there is none, or it is damaged."""
    path = out / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UpcycleError(
            f"{out} has no {RECORD}; give a folder that `upcycle train` made" + _how_to_mend(out)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} is damaged: {error}{_how_to_mend(out)}") from None
    wrong = [
        key
        for key, kind in _KINDS.items()
        if not isinstance(record, dict) or type(record.get(key)) is not kind
    ]
    if wrong or not isinstance(record.get("blueprint_hash", 0), (str, type(None))):
        what = f"{listed(wrong or ['blueprint_hash'])} is missing in it, or is not what it should be"
        raise UpcycleError(f"{path} is damaged: {what}{_how_to_mend(out)}")
    return dict(record)


def _how_to_mend(out: Path) -> str:
    """What to do where run.json is lost and a checkpoint is not."""
    return "; `upcycle train RUN.toml --resume` writes it anew" if saving.found(out) else ""


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write run.json: what was there stays until the new one is on disk."""
    whole_file.write(out / RECORD, json.dumps(record, indent=2).encode())


@contextmanager
def claimed(run: Run, sources: Iterable[Path], here: Ranks, *, resume: bool) -> Iterator[Path | None]:
    """Hold the folder of a run, so that no other training is at it: the checkpoint to go on from, None to
    begin. Refused, before a byte is written, where it is the source's or another run's."""
    out = Path(run.out)
    _refuse_place(run, sources)
    _refuse_content(run, out, resume)  # before there is a folder
    with ExitStack() as stack:
        said = _hold(out, stack) if here.first else None
        if (said := here.share(said)) is not None:
            raise UpcycleError(said)
        _refuse_content(run, out, resume)  # what another training did meanwhile
        checkpoint = saving.latest(out) if resume else None
        if checkpoint is not None:
            saving.refuse_changed(checkpoint, here)
        here.barrier()
        if here.first:
            _clean(out)
        here.barrier()
        yield checkpoint


def _hold(out: Path, stack: ExitStack) -> str | None:
    """Make the folder and hold its lock until the stack ends; why not, where that cannot be."""
    try:
        claim.refuse_below_a_file(out)
        out.mkdir(parents=True, exist_ok=True)
        busy = f"another training is at work in {out}; wait for its end, or choose another `out`"
        stack.enter_context(lock.held(out / LOCK, busy))
    except FileExistsError:
        return f"{out} is a file; `out` must be a folder to make"
    except UpcycleError as error:
        return str(error)
    except OSError as error:
        return f"{out} cannot be written to: {error.strerror}; choose another `out`"
    return None


def _refuse_place(run: Run, sources: Iterable[Path]) -> None:
    """Refuse an `out` that is no folder of its own: the source, a folder in it, one around it."""
    if not run.out.strip():
        raise UpcycleError(f"out = {run.out!r}; it must be the name of a folder to make")
    for folder in sources:
        claim.refuse_near([Path(run.out)], folder)


def _refuse_content(run: Run, out: Path, resume: bool) -> None:
    if resume:
        _refuse_other(run, out, saving.latest(out))
    elif saving.latest(out) is not None or (out / RECORD).exists():
        raise UpcycleError(f"{out} holds a run already; go on with it with --resume, or choose another `out`")


def _refuse_other(run: Run, out: Path, checkpoint: Path | None) -> None:
    """Refuse to go on with a run that is not `run`, or that its schedule does not let end elsewhere."""
    if checkpoint is not None:
        where, state = str(checkpoint), saving.read_state(checkpoint)
        theirs, done = state["identity"], state["step"]
    elif (out / RECORD).exists():
        try:
            where, theirs, done = str(out), read_record(out)["identity"], 0
        except UpcycleError:
            return  # no step was saved, and what it says is written anew
    else:
        return
    mine = json.loads(json.dumps(run.identity()))
    _refuse_other_length(run, where, theirs, mine, done)
    if different := _differences(_of_any_length(theirs), _of_any_length(mine)):
        raise UpcycleError(
            f"{where} is of another run: it differs in {listed(different)}; put them back, or choose "
            f"another `out`"
        )


def _of_any_length(identity: Any) -> Any:
    if not isinstance(identity, dict) or not isinstance(identity.get("train"), dict):
        return identity
    return identity | {"train": {k: v for k, v in identity["train"].items() if k not in _LENGTH}}


def _refuse_other_length(run: Run, where: str, theirs: Any, mine: Any, done: int) -> None:
    """Refuse another number of steps where those that are done would have had other rates."""
    before, now = theirs.get("train"), mine["train"]
    if before == now or theirs.get("schedule") != mine["schedule"]:
        return
    try:
        old, new = train_of(theirs).total_steps, run.train.total_steps
    except (UpcycleError, TypeError, AttributeError):
        return  # the keys that differ are named
    if new < done:
        raise UpcycleError(f"{where} is of step {done}, and the run file ends it at {new}; give more steps")
    if all(run.schedule.at(step, old) == run.schedule.at(step, new) for step in range(done)):
        return
    raise UpcycleError(
        f"{where} cannot go on to {new:,} steps instead of {old:,}: with schedule.name = {run.schedule.name} "
        f"the {done:,} steps that are done would have had other learning rates; constant can be extended, "
        f"and warmup_stable_decay before its decay"
    )


def _differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """The keys in which two nested tables differ, with both values."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in sorted({*theirs, *mine})
            for line in _differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if theirs == mine else [f"{path} ({theirs!r} there, {mine!r} here)"]


def _clean(out: Path) -> None:
    """Take away what a run that was killed left half-written."""
    saving.discard_partial(out)
    found = [(out, "metrics.partial"), (out, "metrics.jsonl.*.partial"), (out, f"{RECORD}.*.partial")]
    found += [(out / folder, "*.*.partial") for folder in ("tokens", "images")]
    for folder, pattern in found:
        for left in folder.glob(pattern):
            left.unlink()

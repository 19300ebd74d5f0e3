"""Exports a checkpoint of a run to a folder, in one of the formats of `exports/` (`upcycle export`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from upcycle.blueprints import stored_types
from upcycle.checkpoints import hub
from upcycle.checkpoints.dtypes import BY_TORCH_NAME
from upcycle.conversion.provenance import Hashes
from upcycle.errors import UpcycleError, listed
from upcycle.records.run import RunRecord
from upcycle.system import claim, lock
from upcycle.training import averaging, begun_in, beside, config_hashes, enter, exports, recipe_files, saving
from upcycle.training.course import Course
from upcycle.training.exports import Trained
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.run_folder import read_record
from upcycle.training.start import Start, plain_model, start_of
from upcycle.training.teacher import LABEL


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export."""

    out: Path
    step: int
    parameters: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Return the export as JSON."""
        return {**asdict(self), "out": str(self.out)}


def export(
    run_folder: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "source",
    with_optimizer: bool = False,
    format: str = exports.DEFAULT,
    expert: int | None = None,
    average: int | None = None,
    decay: float | None = None,
) -> Exported:
    """Write the newest checkpoint of a run (or that of `step`) to the new folder `out`.

    `format` is a name of `exports/`. In `huggingface`, names, config and tokenizer are those of `upcycle
    convert`, and `upcycle.json` also describes the training. `dtype` is a torch name, or `source` for the
    dtype that each tensor has at the start. `with_optimizer` adds the optimizer's moments under the same
    names, for `optimizer.carry_state` of a later run. `expert` writes the dense model that has this expert
    (0, 1, ...) of each layer as its network. `average` takes the mean of so many checkpoints, the newest up
    to `step`, or with `decay` their exponential moving average. The whole model is held in memory, and twice
    for a mean.
    Raises `UpcycleError` for a mistake of the user, and then leaves nothing of `out`.
    """
    way = _way(format, expert, with_optimizer)
    run_folder, out = Path(run_folder), Path(out)
    _refuse_average(average, decay, with_optimizer)
    if dtype != "source" and dtype not in BY_TORCH_NAME:
        raise UpcycleError(f"dtype = {dtype!r}; allowed: source, {', '.join(BY_TORCH_NAME)}")
    record = read_record(run_folder)
    checkpoint = _checkpoint(run_folder, step)
    averaged = None if average is None else averaging.chosen(run_folder, average, step)
    partial = _place(out)
    for each in averaged or [checkpoint]:
        saving.refuse_changed(each, Ranks(device=torch.device("cpu")))
    origin = _origin(record, run_folder, [out, partial], with_optimizer=with_optimizer)
    begun = origin.start
    types = _types(begun, dtype)
    wanted = stored_types.usual(types.values()) if dtype == "source" else dtype
    trained = _trained(origin, checkpoint, types, averaged, decay, with_optimizer=with_optimizer)
    trained = replace(trained, expert=expert)
    busy = f"another export writes {out}; wait for its end, or choose another name"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with lock.held(partial.with_name(partial.name + ".lock"), busy), _whole_or_nothing(partial):
            claim.begin(partial)
            way.write(trained, partial, wanted)
            claim.finish(partial, out)
    finally:
        begun.dense.checkpoint.close()
    return Exported(out=out, step=trained.state.step, parameters=way.parameters(trained), dtype=wanted)


def _way(format: str, expert: int | None, with_optimizer: bool) -> exports.Format:
    """Return the format; raise `UpcycleError` if it has no place for what is asked."""
    given, format = format, exports.OF_EXPERT if expert is not None and format == exports.DEFAULT else format
    way = exports.find(format)
    if way.takes_expert != (expert is not None) or (expert or 0) < 0:
        raise UpcycleError(
            f"format = {given} and expert = {expert}; an expert is a number from 0, and format = "
            f"{exports.OF_EXPERT} alone takes one"
        )
    if with_optimizer and not way.holds_moments:
        raise UpcycleError(f"format = {format} has no place for the optimizer's moments; leave them out")
    return way


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """The run that a checkpoint is of, and what it started from."""

    folder: Path
    record: RunRecord
    run: Run
    start: Start


def _place(out: Path) -> Path:
    """Return the folder in which `out` is made, until it is whole."""
    claim.may_create(out)
    partial = claim.partial_of(out)
    claim.refuse_foreign(partial)
    return partial


def _origin(record: RunRecord, run_folder: Path, written: Sequence[Path], *, with_optimizer: bool) -> _Origin:
    """Open what a run started from; raise `UpcycleError` if it changed, or lies in or around `written`."""
    run = Run.of(begun_in.recipe_found(record.run, record.begun_in))
    if with_optimizer and not run.optimizer.moments:
        raise UpcycleError(
            f"{run_folder} was trained with optimizer.name = {run.optimizer.name}, whose state "
            f"has no moments, as it is set, that a later run could take; leave them out"
        )
    source = begun_in.found(run.source, record.begun_in)
    if not hub.is_id(source) and not Path(source).is_dir():
        raise UpcycleError(
            f"{run_folder} began from {source}, which is not there any more; an export reads it, so put it "
            f"back, or a link to it"
        )
    alone = replace(run, source=source, teacher=None)  # a teacher may be gone
    begun = start_of(alone, begun_in.opener(record.begun_in))
    for opened in begun.checkpoints:
        claim.refuse_near(written, opened.folder)
    if (found := config_hashes.changed(begun.checkpoints, record.config_sha256)) is not None:
        raise UpcycleError(
            f"{found} changed since {run_folder} was trained from it; put the file back as it was, because "
            f"the weights were trained with it"
        )
    _refuse_changed_blueprint(run, begun, record, run_folder)
    return _Origin(folder=run_folder, record=record, run=run, start=begun)


def _refuse_changed_blueprint(run: Run, begun: Start, record: RunRecord, run_folder: Path) -> None:
    """Raise `UpcycleError` if the source and the recipe make another model than the one that was trained."""
    if begun.built is None or begun.built.hash == record.blueprint_hash:
        return
    since = f"{run_folder} was trained from it"
    found = recipe_files.changed(run.recipe, record.recipe_sha256, since)
    if found is None:
        _hashes_of_sources(begun, record.source_sha256, run_folder)
    raise UpcycleError(found or recipe_files.of_another_version(record.upcycle_version))


def _trained(
    origin: _Origin,
    checkpoint: Path,
    types: Mapping[str, str],
    averaged: Sequence[Path] | None,
    decay: float | None,
    *,
    with_optimizer: bool,
) -> Trained:
    """Fill the model with a checkpoint, or with the mean of those that are `averaged`."""
    begun, run, record = origin.start, origin.run, origin.record
    state = saving.read_state(checkpoint)
    hashes = _hashes_of_sources(begun, state.source_sha256 or record.source_sha256, origin.folder)
    model = plain_model(begun)
    moved = _optimizer(begun, run, model, state.step) if with_optimizer else None
    if averaged is None:
        saving.load(checkpoint, model, moved)
    else:
        averaging.load(averaged, model, decay)
    return Trained(
        name=run.out.rstrip("/").rpartition("/")[2],
        model=model,
        optimizer=moved,
        start=begun,
        run=run,
        record=record,
        state=state,
        beside=beside.of(run, origin.folder, state.step),
        hashes=hashes,
        types=types,
        averaged=tuple(saving.read_state(each).step for each in averaged or ()),
        decay=decay,
    )


def _types(begun: Start, dtype: str) -> dict[str, str]:
    """Return the type of each tensor on disk, which is the one that `upcycle convert` would give it."""
    if dtype == "source":
        return {name: entry.dtype for name, entry in begun.planned.items()}
    return stored_types.of({name: entry.lazy for name, entry in begun.planned.items()}, dtype)


def _refuse_average(average: int | None, decay: float | None, with_optimizer: bool) -> None:
    """Raise `UpcycleError` for a mean of checkpoints that cannot be taken."""
    if average is not None and with_optimizer:
        raise UpcycleError("a mean of checkpoints has no optimizer's moments; leave them out, or `average`")
    if decay is not None and average is None:
        raise UpcycleError("decay is for a mean of checkpoints; give `average` as well")
    if decay is not None and not 0 < decay < 1:
        raise UpcycleError(f"decay = {decay}; it must be between 0 and 1")


def _optimizer(begun: Start, run: Run, model: PreTrainedModel, step: int) -> torch.optim.Optimizer:
    """Make the run's optimizer after `step` updates, with a state that a checkpoint can fill."""
    routers, course = Routers.of(model), Course(run)
    anatomy = enter.anatomy_of(course, begun, model, routers)
    return enter.prepared(course.after(step).run, model, begun, routers, anatomy)[1]


@contextmanager
def _whole_or_nothing(partial: Path) -> Iterator[None]:
    """Remove the partial folder if the export does not finish, and report the reason."""
    try:
        yield
    except OSError as error:
        claim.discard(partial)
        raise UpcycleError(
            f"{error.filename or partial} could not be written: {error.strerror or error}; nothing is left "
            f"of it. Make room, or choose another folder"
        ) from None
    except BaseException:
        claim.discard(partial)
        raise


def _hashes_of_sources(begun: Start, known: Hashes | None, run_folder: Path) -> Hashes:
    """Return the hashes of the files that the run started from; raise `UpcycleError` if a file changed.

    For a run of an older version, which recorded no hashes, these are the hashes of the current files.
    """
    now = {opened.label: opened.hashes() for opened in begun.checkpoints}
    before = now if known is None else {label: of for label, of in known.items() if label != LABEL}
    if before.keys() != now.keys():
        raise UpcycleError(f"{run_folder} was trained from other checkpoints than its run file names")
    for opened in begun.checkpoints:
        then, here = before[opened.label], now[opened.label]
        if changed := sorted(name for name in {*then, *here} if then.get(name) != here.get(name)):
            raise UpcycleError(
                f"{listed(changed)} in {opened.folder} changed since {run_folder} was trained from it; put "
                f"it back as it was, so that upcycle.json says what the model was made from"
            )
    return before


def _checkpoint(run_folder: Path, step: int | None) -> Path:
    there = dict(saving.checkpoints(run_folder))
    if not there:
        raise UpcycleError(f"{run_folder} has no checkpoint yet; it saves every `checkpoint.every` steps")
    if step is not None and step not in there:
        raise UpcycleError(
            f"{run_folder} has no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    return there[max(there) if step is None else step]

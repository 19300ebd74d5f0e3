"""A run before its first step here: what is refused, the model in its stage, and the data at their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from upcycle import tasks
from upcycle.conversion.provenance import Hashes
from upcycle.data import leaks, stamps
from upcycle.dense import twins
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError, listed
from upcycle.records.run import known_in
from upcycle.records.state import RunState
from upcycle.sharding.layout import Layout
from upcycle.system import progress
from upcycle.tasks import Task
from upcycle.training import (
    back,
    config_hashes,
    enter,
    fit,
    late_experts,
    micro_batch,
    moments,
    recipe_files,
    run_folder,
    saving,
    start,
    teacher,
    together,
)
from upcycle.training.anatomy import Anatomy
from upcycle.training.config_hashes import ConfigHashes
from upcycle.training.course import Course
from upcycle.training.feeds import Feeds
from upcycle.training.hashing import hashes_of
from upcycle.training.parallel import Ranks
from upcycle.training.recipe_files import FileHashes
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import Start
from upcycle.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A run that is ready for its next step."""

    course: Course
    trainee: Trainee
    anatomy: Anatomy | None  # the parts of the model; None if every stage trains everything
    feeds: Feeds
    state: RunState


def admitted(run: Run, begun: Start) -> Task:
    """Return the task of a run; raise `UpcycleError` if some stage of the run does not fit the model."""
    task = tasks.fitting(run.task, Subject.of_dense(begun.dense).architecture)
    for leg in Course(run).legs:
        fit.refuse_pooling(leg.run, begun.built)
        fit.refuse_isolation(leg.run, task, begun.subject)
        teacher.refuse_other(leg.run, task, begun.subject, begun.teacher)
    return task


def first_refusals(run: Run, begun: Start, task: Task, asked: Run | None = None) -> list[str]:
    """Return the reasons to refuse a run that begins; one that goes on may have them.

    They are a head that differs from the table it is tied to, rows that are too long for the model, router
    losses that no router computes, rows that the run is scored on though it trains on them, and a stage that
    would not read its data anew as it says.
    `asked` is the run as the user wrote it, if `run` has what a record says besides.
    """
    legs = Course(run).legs
    long = task.beyond_positions(run.train.sequence_length, begun.subject)
    lacking = (fit.without_loss(leg.run, begun.built) for leg in legs)
    scored = [leg.run.data for leg in legs if leg.run.train.eval_every]
    trained_on = [*map(leaks.within, dict.fromkeys(scored)), leaks.later(scored)]
    apart = twins.difference(begun.dense)
    return [*dict.fromkeys(filter(None, [apart, long, *lacking, *trained_on, fit.not_anew(asked or run)]))]


def ready(run: Run, begun: Start, task: Task, here: Ranks, checkpoint: Path | None) -> Ready:
    """Build the model and its optimizer and open the data, at step 0 or at `checkpoint`."""
    before = None if checkpoint is None else saving.read_state(checkpoint)
    configs = config_hashes.of(begun.checkpoints)  # as they were read: a class may change its own
    read = recipe_files.hashes(run.recipe) if before is None else None
    asked, run = run, run_folder.settled(run, checkpoint)
    task = run.task or task
    _warn(run, asked, begun, task, here, begins=checkpoint is None)
    precision = here.share(run_folder.precision(run, before))
    here = here.computing_in(precision)
    if here.first and before is not None:
        _say_changed_layout(before, here)
        _say_kept_precision(run, precision)
    _refuse_changed_sources(before, begun, here)
    _refuse_changed_blueprint(before, run, begun)
    lengths = task.lengths(run.train.sequence_length, begun.subject)
    run = micro_batch.chosen(run, begun, lengths, here, before, precision=precision)
    course = Course(run)
    feeds = Feeds.opened(course, task, begun, here)
    fit.refuse_uneven_rows(run, here.dp_size)
    fit.refuse_broken_groups(run, begun.built, lengths, here.dp_size)
    with _sources_kept(begun, here, before) as hashes:
        model = together.by_each(lambda: start.model_of(begun, run, here, precision), here)
    routers = Routers.of(model)
    anatomy = enter.anatomy_of(course, begun, model, routers)
    if here.first and checkpoint is None:
        for sentence in late_experts.warnings(course, anatomy):
            progress.warn(sentence)
    if routers and any(leg.run.router.bias_update_rate for leg in course.legs):
        routers.biases()
    trainee = enter.first(
        course.after(0 if before is None else before.step),
        model=model,
        task=task,
        begun=begun,
        routers=routers,
        here=here,
        precision=precision,
        anatomy=anatomy,
    )
    if checkpoint is None:
        state = _first_state(trainee, hashes, configs, read)
    else:
        state = back.restore(trainee, feeds, checkpoint)
    feed, left = feeds.of(course.after(state.step)), run.train.total_steps - state.step
    taught = teacher.teaching(run, begun, task, feed, here, precision=precision, steps=left)
    trainee = replace(trainee, teacher=taught)
    for opened in begun.checkpoints:
        opened.close()
    return Ready(course=course, trainee=trainee, anatomy=anatomy, feeds=feeds, state=state)


def _first_state(
    trainee: Trainee, hashes: Hashes | None, configs: ConfigHashes, read: FileHashes | None
) -> RunState:
    """Return the state at step 0. If the run asks for it, the optimizer gets the moments of its source."""
    run = trainee.run
    if run.optimizer.carry_state:
        given = (trainee.start, run, trainee.ranks, trainee.model, trainee.optimizer)
        stopped = together.by_each(lambda: moments.carry_state(*given), trainee.ranks)
        if trainee.ranks.first and (wrong := run.schedule.continuing(stopped)) is not None:
            progress.warn(wrong)
    built = trainee.start.built
    return RunState(
        step=0,
        batches={},
        identity={},
        source_sha256=hashes,
        config_sha256=configs,
        blueprint_hash=built.hash if built else None,
        recipe_sha256=read or None,
    )


def _warn(run: Run, asked: Run, begun: Start, task: Task, here: Ranks, *, begins: bool) -> None:
    """Warn the user before a run costs time, and refuse it if it could not have begun.

    A run that has already trained so only gets a warning (`first_refusals`, `Task.objection`). `asked` is the
    run as the user wrote it.
    """
    wrong = together.of_first(lambda: _wrong(run, asked, begun, task), here)  # this may list large folders
    if wrong and begins:
        raise UpcycleError(wrong[0])
    if here.first:
        found = fit.warnings(run, begun.built) if begins else []
        for sentence in [*found, *wrong]:
            progress.warn(sentence)


def _wrong(run: Run, asked: Run, begun: Start, task: Task) -> list[str]:
    """Return the reasons to refuse a run that begins, see `_warn`."""
    data = dict.fromkeys(leg.run.data for leg in Course(run).legs)
    idle = dict.fromkeys(task.idle_split(leg.run.data) for leg in Course(asked).legs)
    return [*first_refusals(run, begun, task, asked), *filter(None, [*map(task.objection, data), *idle])]


def _say_changed_layout(before: RunState, here: Ranks) -> None:
    """Say that a run goes on in another world than the one that saved it, which it may."""
    if before.layout is None or dict(before.layout) == asdict(here.layout):
        return
    then = Layout(**before.layout)
    progress.say(
        f"step {before.step} was saved by {then.world} process(es) ({then}); it goes on with {here.world} "
        f"({here.layout})"
    )


def _say_kept_precision(run: Run, precision: str) -> None:
    """Say that a run keeps its precision on a machine that would give a new run another one."""
    if (today := fit.precision(run)) != precision:
        progress.say(
            f"the run goes on in {precision}, in which it began; train.precision = auto would be {today} here"
        )


def _refuse_changed_sources(before: RunState | None, begun: Start, here: Ranks) -> None:
    """Refuse to go on if a checkpoint that the run began from has changed.

    A teacher is read again, and `upcycle export` would refuse the trained model.
    """
    if before is None:
        return
    if (found := config_hashes.changed(begun.checkpoints, before.config_sha256)) is not None:
        raise UpcycleError(
            f"{found} changed since step {before.step} was saved; put the file back as it was, or start a "
            f"new run"
        )
    if before.source_sha256 is None:
        return
    now = hashes_of(begun.checkpoints, here)
    for opened in begun.checkpoints:
        if now[opened.label] != before.source_sha256.get(opened.label):
            raise UpcycleError(
                f"the {opened.label} {opened.name} has changed since step {before.step} was saved; put it "
                f"back as it was, or start a new run"
            )


def _refuse_changed_blueprint(before: RunState | None, run: Run, begun: Start) -> None:
    """Refuse to go on if the source and the recipe make another model than the one that the run began with.

    The weights would still be those of the checkpoint, and `upcycle export` could not say what they are of.
    """
    if before is None or begun.built is None:
        return
    record = known_in(Path(run.out))
    known = before.blueprint_hash or (record and record.blueprint_hash)
    if known is None or begun.built.hash == known:
        return
    since = f"step {before.step} was saved"
    found = recipe_files.changed(run.recipe, before.recipe_sha256, since)
    raise UpcycleError(found or recipe_files.of_another_version(record.upcycle_version if record else None))


@contextmanager
def _sources_kept(begun: Start, here: Ranks, before: RunState | None) -> Iterator[Hashes | None]:
    """Yield the hashes of the files that a run starts from; these must not change while they are read.

    Yields None for a resumed run, which keeps its recorded hashes.
    """
    if before is not None:
        yield None
        return
    files = [file for opened in begun.checkpoints for file in opened.files]
    stamped = stamps.stamps(files)
    yield hashes_of(begun.checkpoints, here)
    changed = [path for path in stamped if stamps.stamp(Path(path)) != stamped[path]]
    reason = f"{listed(changed)} changed while it was read; begin again" if changed else None
    if reason is not None and here.world == 1:
        raise UpcycleError(reason)
    together.refuse_different(reason, (), here)

"""Offline upcycling: write a blueprint to a folder, streamed and resumable.

Everything is written to `OUT.partial`. A shard's header is written after its data, the folder is renamed when
all is on disk, and its config gets its name last. So nothing unfinished opens as a model.
"""

from __future__ import annotations

import errno
import shutil
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.cost import refuse_no_jobs
from upcycle.blueprints.making import blueprint
from upcycle.blueprints.shards import DEFAULT_SHARD, Extent, Shards, lay_out
from upcycle.checkpoints.carried import carried
from upcycle.checkpoints.checkpoint import CONFIG, INDEX, Checkpoint, file_hash
from upcycle.checkpoints.dtypes import TooLargeError
from upcycle.conversion import card, generation_settings, provenance, selection, tokenizer
from upcycle.conversion.journal import JOURNAL, Journal
from upcycle.conversion.shard_files import ShardFiles
from upcycle.conversion.source_hashes import SourceHashes, sources
from upcycle.conversion.syncing import Syncing
from upcycle.dense.twins import refuse_two_heads
from upcycle.errors import UpcycleError
from upcycle.recipe import RecipeLike
from upcycle.records.provenance import Provenance
from upcycle.system import claim, lock, whole_file, wording
from upcycle.system.progress import Progress, reporting_to, work
from upcycle.tensors.entries import Entry

UNNAMED_CONFIG = "config.json.partial"
SYNC_EVERY = 1 << 28  # bytes written between two points from which a run can be resumed
HEADROOM = 16 << 20  # bytes for config, tokenizer and journal, when disk space is checked

Advance = Callable[[int], None]  # called with the number of bytes written since the last call


@dataclass(frozen=True)
class Portion:
    """Tensors that are written together: one that is computed, or all that copy the same stored bytes."""

    entry: Entry
    names: list[str]


def convert(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: RecipeLike = None,
    *,
    resume: bool = False,
    jobs: int = 2,
    shard_size: int = DEFAULT_SHARD,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Blueprint:
    """Write the MoE that `recipe` makes of `source` (folder or hub id) to the new folder `out`.

    Returns the blueprint. `progress` is told how many bytes have been written. The bytes do not depend on
    `jobs`, or on whether the run was interrupted and resumed. Raises `UpcycleError` for a mistake. An
    interrupted run leaves `out.partial` behind for `resume=True`.
    """
    built = blueprint(source, recipe, allow_nonfinite=allow_nonfinite)
    out = Path(out)
    partial = _check_paths(built, out, resume)
    shards = lay_out(built.entries, shard_size)
    refuse_no_jobs(jobs)
    if not _lacks_its_config(out):
        _check_space(partial, shards)
        carried(built.source.folder)  # refuses bad files now rather than when all is written
        for model in (built.dense, *built.donors):
            refuse_two_heads(model)
    partial.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another run is writing {partial}; wait for it or stop it"
    with lock.held(partial.with_suffix(".lock"), busy):
        _check_paths(built, out, resume)  # again, because another run may have written in the meantime
        if _lacks_its_config(out):
            _commit(built, out)
        else:
            with reporting_to(progress), work("writing", "bytes", total=built.nbytes) as writing:
                _write(built, shards, partial, out, jobs, writing.advance)
    return built


def _write(built: Blueprint, shards: Shards, partial: Path, out: Path, jobs: int, progress: Advance) -> None:
    """Write the whole folder; only the run that holds the lock calls this."""
    fresh = _make_folder(partial)
    try:
        with Journal(partial / JOURNAL, _begun(built, shards)) as journal:
            with _ready_to_fit_tokenizer(built):
                hashes = _write_tensors(built, shards, partial, journal, jobs, progress)
            _finish(built, shards, partial, out, hashes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UpcycleError(
                f"the disk of {partial} is full; what is written is kept. Make room and run the same "
                f"command with --resume"
            ) from None
        raise
    except UpcycleError:
        if fresh:
            shutil.rmtree(partial)
        raise
    finally:
        for opened in built.checkpoints:
            opened.close()  # later readers open them again


def _check_paths(built: Blueprint, out: Path, resume: bool) -> Path:
    """Refuse an OUT that would overwrite or nest; return the partial folder's path."""
    partial = claim.partial_of(out)
    for opened in built.checkpoints:
        claim.refuse_near((out, partial), opened.folder)
    if _lacks_its_config(out):
        if not resume:
            raise _left_behind(out)
        return partial
    claim.may_create(out)
    claim.refuse_foreign(partial, JOURNAL)
    if partial.exists() and not resume:
        raise _left_behind(partial)
    return partial


def _left_behind(folder: Path) -> UpcycleError:
    return UpcycleError(f"{folder} is left from a run that was broken; finish it with --resume, or delete it")


def _make_folder(partial: Path) -> bool:
    """Make the folder; return whether it was made here rather than found."""
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _on_disk(file: Path) -> int:
    """Return the bytes that a file takes on disk, or 0 if another run has just moved or removed it."""
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _check_space(partial: Path, shards: Shards) -> None:
    """Refuse, before the first byte is written, a disk that cannot hold the output."""
    home = next(p for p in partial.parents if p.exists())
    try:
        there = sum(map(_on_disk, partial.glob("*")))
        free = shutil.disk_usage(home).free + there
    except PermissionError:
        raise UpcycleError(f"{home} cannot be read; check its permissions") from None
    needed = shards.nbytes + HEADROOM
    if free < needed:
        raise UpcycleError(
            f"the output takes {wording.size(needed)} and {home} has {wording.size(free)} free; "
            f"make room or write elsewhere"
        )


def _begun(built: Blueprint, shards: Shards) -> dict[str, Any]:
    """Return what a run must have in common with the run that it resumes.

    Of the source files these are the sizes. `SourceHashes` compares the content of those that were touched.
    """
    files = {key: c.stamps[f][2] for key, (c, f) in sources(built).items()}
    return {"recipe": built.hash, "shard size": list(shards.sizes), "source": files}


def _portions(built: Blueprint, done: set[str]) -> list[Portion]:
    """Return what is left to write, in the order of the output."""
    portions: dict[Any, Portion] = {}
    for name, entry in built.entries.items():
        if name not in done:
            extents = entry.extents
            same = name if extents is None else tuple((e.info, e.start, e.stop) for e in extents)
            portions.setdefault(same, Portion(entry, [])).names.append(name)
    return list(portions.values())


def _write_tensors(
    built: Blueprint, shards: Shards, partial: Path, journal: Journal, jobs: int, progress: Advance
) -> dict[str, dict[str, str]]:
    """Write what the journal does not have yet.

    Tensors are written by `jobs` threads. One more thread flushes them to disk as they come, so that the disk
    works while they compute, and two hash the sources. Returns the hashes of the source files, by
    checkpoint and name.
    """
    stop = threading.Event()
    read = SourceHashes(built, journal, stop)
    files = ShardFiles(partial, shards)
    done = {
        name
        for name, crc in journal.done.items()
        if shards.places[name].shard not in files.new and files.crc(shards.places[name]) == crc
    }
    progress(sum(shards.places[name].nbytes for name in done))
    writers, hasher = ThreadPoolExecutor(jobs), ThreadPoolExecutor(1)
    syncing = Syncing(files, shards, journal)
    hashed: Future[Any] = hasher.submit(read.take)
    try:
        running: set[Future[dict[str, int]]] = set()
        for portion in _portions(built, done):
            running.add(writers.submit(_write_portion, portion, shards, files, stop, progress))
            if len(running) > 2 * jobs:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                syncing.add(finished, at_least=SYNC_EVERY)
                if hashed.done():
                    hashed.result()  # a changed source may raise here first
        syncing.add(running, at_least=0)
        syncing.wait()
        for number, header in enumerate(shards.headers):
            files.write(Extent(number, 0, len(header)), 0, np.frombuffer(header, np.uint8))
        files.sync(set(range(len(shards.names))))
        hashed.result()
        return read.at_the_end()
    finally:
        stop.set()
        writers.shutdown(cancel_futures=True)
        syncing.close()
        hasher.shutdown(cancel_futures=True)
        files.close()


def _write_portion(
    portion: Portion, shards: Shards, files: ShardFiles, stop: threading.Event, progress: Advance
) -> dict[str, int]:
    """Write the tensors of a portion; return the CRC-32 of each."""
    places = [shards.places[name] for name in portion.names]
    crc = 0
    try:
        for start, data in portion.entry.pieces():
            if stop.is_set():
                break
            crc = zlib.crc32(data.data, crc)
            for place in places:
                files.write(place, start, data)
                progress(data.size)
    except TooLargeError as error:
        raise UpcycleError(f"{portion.names[0]} cannot be made: {error}") from None
    return dict.fromkeys(portion.names, crc)


def _finish(
    built: Blueprint, shards: Shards, partial: Path, out: Path, hashes: dict[str, dict[str, str]]
) -> None:
    """Write the files that make a folder of tensors a model, and rename the folder into place."""
    whole_file.clear(partial)
    names, left = carry(built.source.folder, partial)
    made_anew = fit_tokenizer(built, partial) | generation_settings.write(built, partial)
    if shards.index is not None:
        whole_file.write_json(partial / INDEX, shards.index)
    selection.write(built, partial)
    whole_file.write_text(partial / "README.md", card.render(built, out))
    whole_file.write_json(partial / UNNAMED_CONFIG, built.stored_config())
    weights = {JOURNAL, Provenance.FILE, *shards.names}
    files = {
        CONFIG if name == UNNAMED_CONFIG else name: file_hash(partial / name)
        for name in sorted(path.relative_to(partial).as_posix() for path in _all_files(partial))
        if name not in weights
    }
    names = [name for name in names if name not in made_anew]
    made = provenance.of_blueprint(
        built, hashes, out, carried=names, left_behind=left, files=files, made_anew=made_anew
    )
    whole_file.write_json(partial / Provenance.FILE, made.as_table())
    whole_file.sync_all(partial)
    partial.rename(out)
    _commit(built, out)


def _all_files(folder: Path) -> list[Path]:
    """Return every file in a folder and below it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _lacks_its_config(out: Path) -> bool:
    """Return whether `out` is finished except for the last step."""
    return (out / UNNAMED_CONFIG).exists() and not (out / CONFIG).exists()


def _commit(built: Blueprint, out: Path) -> None:
    """Make the folder a model by giving its config its name."""
    if Provenance.read(out).blueprint_hash != built.hash:
        raise UpcycleError(f"{out} was begun with another recipe; resume with that one, or delete it")
    (out / JOURNAL).unlink(missing_ok=True)
    (out / UNNAMED_CONFIG).rename(out / CONFIG)
    whole_file.sync_folder(out)
    whole_file.sync_folder(out.resolve().parent)


def carry(source: Path, partial: Path) -> tuple[list[str], list[str]]:
    """Copy the files that go with a model; return the names copied and those left behind."""
    names = carried(source)
    for name in names:
        (partial / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(source / name, partial / name)
    weights, taken = {"config.json", INDEX}, {name.partition("/")[0] for name in names}
    left = sorted(
        p.name
        for p in source.iterdir()
        if p.name not in weights and p.name not in taken and p.suffix != ".safetensors"
    )
    return names, left


def _ready_to_fit_tokenizer(built: Blueprint) -> AbstractContextManager[None]:
    """Return a context beside whose body `fit_tokenizer` is prepared."""
    return tokenizer.imported_beside(built.source.folder) if built.reads_otherwise else nullcontext()


def fit_tokenizer(built: Blueprint, folder: Path) -> dict[str, str]:
    """Make the tokenizer in `folder` open as the source's does; return what was made anew, and why."""
    if not built.reads_otherwise:
        return {}
    return tokenizer.fit(built.source.folder, folder, built.stored_config())

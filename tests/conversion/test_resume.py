"""What a broken conversion goes on from: a journal that may be damaged, a source that may have changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from files import digests
from upcycle import Recipe, convert
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion import write
from upcycle.conversion.journal import JOURNAL, Journal, _check, _written
from upcycle.errors import UpcycleError
from upcycle.system import open_files

RECIPE = Recipe.of(init={"name": "drop"})


@pytest.fixture
def source(dense, tmp_path):
    """A copy of a tiny dense checkpoint that a test may change."""
    return Path(shutil.copytree(dense("llama"), tmp_path / "source"))


@pytest.fixture
def hashed_first(monkeypatch):
    """The hash of the source is in the journal before anything is written."""
    hashed = threading.Event()
    real, real_write = write.SourceHashes.take, write.ShardFiles.write

    def take(self):
        known = real(self)
        hashed.set()
        return known

    def waits(self, *args):
        hashed.wait(30)
        real_write(self, *args)

    monkeypatch.setattr(write.SourceHashes, "take", take)
    monkeypatch.setattr(write.ShardFiles, "write", waits)


def broken(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 400_000) -> Path:
    """The partial folder of a conversion that was interrupted when so many bytes were written.

    One worker writes, and the interruption waits for the journal, so that the journal has many lines.
    """
    left, partial = [after], out.with_name(out.name + ".partial")
    real = write.ShardFiles.write

    def interrupted(self, place, start, data):
        left[0] -= data.size
        if left[0] < 0:
            until = time.monotonic() + 10
            while len((partial / JOURNAL).read_bytes().splitlines()) <= 4 and time.monotonic() < until:
                time.sleep(0.005)
            raise KeyboardInterrupt
        real(self, place, start, data)

    with monkeypatch.context() as patch:
        patch.setattr(write, "SYNC_EVERY", 60_000)
        patch.setattr(write.ShardFiles, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, RECIPE, shard_size=120_000, jobs=1)
    return partial


def test_a_damaged_journal(source, tmp_path, monkeypatch):
    """Whatever is done to it: a sentence, or the right bytes; and a line that was forged is not believed."""
    partial = broken(source, tmp_path / "out", monkeypatch)
    convert(source, tmp_path / "whole", RECIPE, shard_size=120_000)
    reference = digests(tmp_path / "whole")
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    every = json.dumps({"done": [*Checkpoint.open(tmp_path / "whole").tensors]}).encode() + b"\n"
    draw = random.Random(0)

    def flipped(raw: bytes) -> bytes:
        place = draw.randrange(len(raw))
        return raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :]

    damages = [
        b"".join([*lines, every]),
        b"".join([lines[0], every, *lines[1:]]),
        b"".join([lines[0], lines[2], lines[1], *lines[3:]]),
        b"".join([lines[0], *lines[2:]]),
        b"".join([*lines, lines[-1]]),
        b"".join(lines[1:]),
        b"".join(lines)[:-3],
        b"".join(lines) + b"\xff\xfe\n",
        b"".join(lines) + b"[" * 100_000 + b"\n",
        b"".join(lines) + b"5\n",
        b"".join(lines) + b'{"done": 5, "check": 6}\n',
        b"".join(lines).replace(b"\n", b"\r\n"),
        lines[0][:40],
        b"\0" * 100,
        b"",
        b"\n",
        *(flipped(b"".join(lines)) for _ in range(16)),
        *(b"".join(lines)[: draw.randrange(len(b"".join(lines)))] for _ in range(5)),
    ]
    right = 0
    for number, damage in enumerate(damages):
        out = tmp_path / str(number)
        copy = Path(shutil.copytree(partial, tmp_path / f"{number}.partial"))
        (copy / JOURNAL).write_bytes(damage)
        try:
            convert(source, out, RECIPE, shard_size=120_000, resume=True)
        except UpcycleError:
            assert copy.exists()
            continue
        assert digests(out) == reference, damage
        right += 1
        shutil.rmtree(out)
    assert right > len(damages) // 2


def test_a_journal_of_an_older_version(tmp_path):
    (tmp_path / JOURNAL).write_text('{"recipe": "x"}\n{"done": ["a"]}\n')
    with pytest.raises(UpcycleError, match="of another version of upcycle; delete"):
        Journal(tmp_path / JOURNAL, {"recipe": "x"})


def change(source: Path) -> None:
    """Other weights in the same file, whose size and time stay."""
    file = source / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-200, 2)
        draw = random.Random(before.st_ctime_ns)
        handle.write(bytes(draw.randrange(0x40) for _ in range(100)))  # finite, whatever comes
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_source_that_changes_while_it_is_read(source, tmp_path, monkeypatch):
    """After its hash was taken, and before."""
    real = write.SourceHashes.take
    for when in ("before", "after"):

        def take(self, when=when):
            if when == "before":
                change(source)
            known = real(self)
            if when == "after":
                change(source)
            return known

        monkeypatch.setattr(write.SourceHashes, "take", take)
        with pytest.raises(UpcycleError, match="has changed while it was read"):
            convert(source, tmp_path / "out", RECIPE)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_source_that_was_only_touched(source, tmp_path, monkeypatch):
    """Another mode or one more hard link changes no byte; the file is hashed again and taken."""
    real = write.SourceHashes.take

    def take(self):
        known = real(self)
        (source / "model.safetensors").chmod(0o600)
        return known

    monkeypatch.setattr(write.SourceHashes, "take", take)
    convert(source, tmp_path / "out", RECIPE)


def test_a_source_that_changed_before_the_run_goes_on(source, tmp_path, monkeypatch):
    partial = broken(source, tmp_path / "out", monkeypatch)
    change(source)
    with pytest.raises(UpcycleError, match="has changed since"):
        convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UpcycleError):
        Checkpoint.open(partial)


def test_a_source_that_was_copied_before_the_run_goes_on(source, hashed_first, tmp_path, monkeypatch):
    """The same bytes in another place are the same source, once their hash is known."""
    broken(source, tmp_path / "out", monkeypatch)
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    (tmp_path / "copy").rename(source)
    convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)
    convert(source, tmp_path / "whole", RECIPE, shard_size=120_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_source_that_was_touched_before_the_run_goes_on(source, hashed_first, tmp_path, monkeypatch):
    """A new time of the same bytes is the same source, also in a journal that has the old time."""
    partial = broken(source, tmp_path / "out", monkeypatch)
    lines = (partial / JOURNAL).read_bytes().splitlines()
    begun, *others = [{k: v for k, v in json.loads(line).items() if k != "check"} for line in lines]
    file = source / "model.safetensors"
    former = begun | {"source": {k: [size, 5] for k, size in begun["source"].items()}}
    shutil.copytree(partial, tmp_path / "old.partial")
    written = [_written(former, "")]
    for line in others:
        written.append(_written(line, _check(written[-1])))
    (tmp_path / "old.partial" / JOURNAL).write_bytes(b"".join(written))
    os.utime(file, ns=(1, 1))
    convert(source, tmp_path / "whole", RECIPE, shard_size=120_000)
    for name in ("out", "old"):
        done = Journal(tmp_path / f"{name}.partial" / JOURNAL, begun)
        assert done.done
        done._file.close()
        convert(source, tmp_path / name, RECIPE, shard_size=120_000, resume=True)
        assert digests(tmp_path / name) == digests(tmp_path / "whole")


def test_other_bytes_of_a_new_time_are_another_source(source, hashed_first, tmp_path, monkeypatch):
    """Of one size with those that the run began with, so that the hash alone tells."""
    broken(source, tmp_path / "out", monkeypatch)
    change(source)
    os.utime(source / "model.safetensors")
    with pytest.raises(UpcycleError, match=r"has changed since .* put back what it was"):
        convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_source_that_was_touched_before_it_was_hashed(source, tmp_path, monkeypatch):
    """Nobody can say whether its bytes are the same, and the refusal says so."""
    with monkeypatch.context() as patch:
        patch.setattr(write.SourceHashes, "take", lambda self: {})
        broken(source, tmp_path / "out", monkeypatch)
    os.utime(source / "model.safetensors")
    with pytest.raises(UpcycleError, match="or was only touched: it had not been hashed by then"):
        convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)


def test_the_source_is_hashed_once(source, tmp_path, monkeypatch):
    from upcycle.checkpoints import checkpoint

    hashed = []
    real = checkpoint.file_hash
    monkeypatch.setattr(
        checkpoint, "file_hash", lambda file, *a: (hashed.append(file.name), real(file, *a))[1]
    )
    convert(source, tmp_path / "out", RECIPE)
    assert hashed.count("model.safetensors") == 1


def test_few_of_many_files_are_open(dense, tmp_path, monkeypatch):
    """More shards than a process may have open files, in the source and in the output."""
    import resource

    source = dense("llama", shard="4KB")
    assert len([*source.glob("*.safetensors")]) >= 30
    monkeypatch.setattr(open_files.OpenFiles.__init__, "__defaults__", (8,))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 60
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
        convert(source, tmp_path / "many", RECIPE, shard_size=2_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 60
    convert(source, tmp_path / "one", RECIPE)
    a, b = (Checkpoint.open(tmp_path / name) for name in ("many", "one"))
    with a, b:
        assert all(
            (a.pread(t, 0, t.nbytes) == b.pread(b.tensors[n], 0, t.nbytes)).all()
            for n, t in a.tensors.items()
        )


def test_bytes_that_changed_in_a_partial_folder(source, tmp_path, monkeypatch):
    """Tensors whose bytes are no longer what was written are written again."""
    partial = broken(source, tmp_path / "out", monkeypatch)
    convert(source, tmp_path / "whole", RECIPE, shard_size=120_000)
    draw = random.Random(0)
    for shard in partial.glob("*.safetensors"):
        raw = bytearray(shard.read_bytes())
        for _ in range(20):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        shard.write_bytes(raw)
    convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_partial_folder_of_a_version_without_checksums(source, tmp_path, monkeypatch):
    """What it has is written again."""
    real = Journal.record
    monkeypatch.setattr(Journal, "record", lambda self, done, **notes: real(self, [*done], **notes))
    broken(source, tmp_path / "out", monkeypatch)
    monkeypatch.undo()
    convert(source, tmp_path / "out", RECIPE, shard_size=120_000, resume=True)
    convert(source, tmp_path / "whole", RECIPE, shard_size=120_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_small_file_that_a_kill_left_half_written(source, tmp_path, monkeypatch):
    """It is no part of the result, and upcycle.json does not speak of it."""
    partial = broken(source, tmp_path / "out", monkeypatch)
    (partial / "model.safetensors.index.json.123-0123abcd.partial").write_text("{")
    (partial / "upcycle.json.123-0123abcd.partial").write_text("{")
    convert(source, tmp_path / "out", RECIPE, resume=True, shard_size=120_000)
    convert(source, tmp_path / "calm", RECIPE, shard_size=120_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")

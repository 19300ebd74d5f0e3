"""The folder of a run: whose it may be, what is in it that can be trusted, what is left after a stop."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import forked
import tiny
import upcycle
from files import toml
from marks import quick
from upcycle import Recipe, UpcycleError, cli, plan, tasks
from upcycle.data.corpus import Data, Source
from upcycle.records.metrics import StepMetrics
from upcycle.records.state import RunState
from upcycle.sharding.layout import Layout
from upcycle.system import lock, progress, whole_file
from upcycle.system.signals import held
from upcycle.training import fit, metrics, micro_batch, run_folder, saving, start
from upcycle.training.course import Course
from upcycle.training.export import export
from upcycle.training.feeds import Feeds
from upcycle.training.identity import identity_of
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run

MOE = {"moe": {"num_experts": 4, "top_k": 2}, "init": {"name": "copy"}}
HALF = "77-0123abcd.partial"  # how the name of a half-written file ends
WORDS = "One day a small cat saw a big red ball and ran to it. "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    made = tiny.make_dense(folder / "dense", "llama", vocab_size=300, max_position_embeddings=64)
    tiny.make_bytes_tokenizer(made)
    return made


Table = Callable[..., dict[str, Any]]


@pytest.fixture
def table(source: Path, tmp_path: Path) -> Table:
    """A function that gives a run file of a few small steps, as a table."""
    text = source.with_name("text.txt")
    text.write_text(WORDS * 40)

    def make(**changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "source": str(source),
            "out": str(tmp_path / "run"),
            "data": {"sources": [{"path": str(text)}], "held_out": 0.1},
            "train": {"steps": 2, "batch_tokens": 64, "sequence_length": 16, "eval_every": 0},
            "schedule": {"name": "constant", "peak": 1e-3},
            "checkpoint": {"every": 1, "keep": 9},
        }
        for key, value in changes.items():
            made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
        return made

    return make


def begun(table: Table, **changes: Any) -> Path:
    """The folder of a run that is done. A run that only says what it becomes is made once, and copied."""
    run = Run.of(table(**changes))
    out, kept = Path(run.out), Path(run.source).with_name("moe" if changes else "dense run")
    if changes not in ({}, MOE):
        train(run)
        return out
    if not kept.exists():
        train(replace(run, out=str(kept)))
    shutil.copytree(kept, out)
    record = json.loads((out / "run.json").read_text())
    record["run"]["out"] = str(out)
    whole_file.write_json(out / "run.json", record)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- whose it may be


@pytest.mark.parametrize("where", ["", " ", ".", "inside", "around"])
def test_a_run_in_or_around_its_source_is_refused(where: str, table: Table, source: Path) -> None:
    before = content(source.parent)
    places = {".": source, "inside": source / "run", "around": source.parent}
    with pytest.raises(UpcycleError, match=r"it must be the name of a folder|in or around the source"):
        train(Run.of(table(out=str(places.get(where, where)))))
    assert content(source.parent) == before


def test_the_second_training_is_refused_and_deletes_nothing(table: Table, tmp_path: Path) -> None:
    out = begun(table)
    (out / "checkpoints" / "step-9.partial").mkdir()  # what the first is writing
    before = content(out)
    with lock.held(out / run_folder.LOCK, "busy"):
        with pytest.raises(UpcycleError, match=r"another training is at work in .*run; wait for its end"):
            train(Run.of(table(train={"steps": 4})), resume=True)
        assert (out / "checkpoints" / "step-9.partial").exists()
    assert content(out) == before
    assert train(Run.of(table(train={"steps": 3})), resume=True).finished
    assert not (out / run_folder.LOCK).exists()


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_sees(table: Table, monkeypatch) -> None:
    """A network file system may show another rank an older list of checkpoints."""
    newest = saving.latest(begun(table))
    assert newest is not None

    class Second(Ranks):
        def share(self, value: Any) -> Any:
            return newest if isinstance(value, Path) else value

    (newest.parent.parent / run_folder.LOCK).touch()  # as the first rank has made it
    monkeypatch.setattr(saving, "latest", lambda out: newest.with_name("step-1"))
    here = Second(rank=1, device=torch.device("cpu"))
    with run_folder.claimed(Run.of(table(train={"steps": 3})), [], here, resume=True) as checkpoint:
        assert checkpoint == newest


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks_of_the_data(rank: int, table: Table) -> None:
    class Told(Ranks):
        def share(self, value: Any) -> Any:
            return value or ({}, None)

    class Saying:
        cache_name = "tokens"

        def feed(self, feeding: Any, subject: Any) -> Any:
            progress.say("there are chats")
            return SimpleNamespace(known=list, checked=dict)

    heard: list[str] = []
    here = Told(rank=rank, device=torch.device("cpu"))
    with progress.reporting_to(SimpleNamespace(say=heard.append)):
        Feeds.opened(Course(Run.of(table())), Saying(), SimpleNamespace(subject=None), here)
    assert heard == ["there are chats"] * (rank == 0)


def test_what_a_kill_left_is_cleared_away(table: Table) -> None:
    out = begun(table)
    (out / "teacher").mkdir()
    left = [
        out / "tokens" / f"0123.{HALF}",
        out / "teacher" / f"0.logits.{HALF}",
        out / f"run.json.{HALF}",
        out / f"metrics.jsonl.{HALF}",
        out / "checkpoints" / "step-9.partial" / "__0_0.distcp",
        out / "checkpoints" / "step-9.partial" / f"state.json.{HALF}",
    ]
    theirs = [
        out / "tokens" / "mine.partial",
        out / "tokens" / "a.b.partial",
        out / f"model.gguf.{HALF}",  # of another command
        out / "checkpoints" / "step-8.partial" / "x",
        out / "checkpoints" / "step-x.partial" / "x",
    ]
    for path in [*left, *theirs]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    train(Run.of(table(train={"steps": 3})), resume=True)
    assert not [path for path in left if path.exists()]
    assert not left[-1].parent.exists()
    assert all(path.exists() for path in theirs)


THEIRS = {
    "several": ["checkpoints/step-3/x.bin", "checkpoints/step-9.partial/x", "images/a.b.partial"],
    "checkpoints": ["checkpoints/step-3/pytorch_model.bin"],
    "state": ["checkpoints/step-3/state.json"],
    "tokens": [f"tokens/x.{HALF}"],
    "teacher": ["teacher/config.json"],
    "beside": ["beside/notes"],
    "metrics": ["metrics.jsonl"],
    "run": ["run.json"],
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "names", quick(list(THEIRS.values()), THEIRS["several"], THEIRS["metrics"]), ids=THEIRS
)
def test_a_folder_of_somebody_else_stays_as_it_is(names: list[str], resume: bool, table: Table) -> None:
    out = Path(table()["out"])
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = content(out)
    said = r"holds .*choose another `out`|state\.json cannot be read"
    with pytest.raises(UpcycleError, match=said):
        train(Run.of(table()), resume=resume)
    assert content(out) == before


def test_a_folder_that_has_nothing_of_what_a_run_writes_is_taken(table: Table) -> None:
    out = Path(table()["out"])
    (out / "checkpoints").mkdir(parents=True)
    (out / "run.toml").write_text("mine")
    assert train(Run.of(table())).finished
    assert (out / "run.toml").read_text() == "mine"


def test_the_first_rank_says_whose_a_folder_is(table: Table) -> None:
    """Another one may see an older list of files. It asks nobody else, and writes nothing."""

    class Second(Ranks):
        def share(self, value: Any) -> Any:
            return "the first rank says no"

    out = Path(table()["out"])
    (out / "tokens").mkdir(parents=True)
    (out / "tokens" / f"x.{HALF}").touch()
    before, here = content(out), Second(rank=1, device=torch.device("cpu"))
    with pytest.raises(UpcycleError, match="the first rank says no"):
        run_folder.claimed(Run.of(table()), [], here, resume=False).__enter__()
    assert content(out) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_record_begins_anew(resume: bool, table: Table, monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    out = Path(table()["out"])
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            train(Run.of(table()))
    assert (out / "tokens").is_dir()
    assert not (out / "run.json").exists()
    (out / run_folder.LOCK).touch()  # SIGKILL leaves it
    (half := out / "tokens" / f"x.{HALF}").touch()
    assert train(Run.of(table()), resume=resume).finished
    assert not half.exists()


@pytest.mark.parametrize("has", ["record", "checkpoints"])
def test_a_folder_of_an_earlier_version_goes_on(has: str, table: Table) -> None:
    """It has no marker."""
    out = begun(table)
    (out / run_folder.MARKER).unlink()
    if has == "record":
        shutil.rmtree(out / "checkpoints")
    else:
        (out / "run.json").unlink()
    with pytest.raises(UpcycleError, match="holds a run already"):
        train(Run.of(table()))
    assert train(Run.of(table()), resume=True).finished
    assert len(read(out)) == 2


@pytest.mark.usefixtures("on_screen")
def test_a_checkpoint_of_somebody_else_is_not_written_over(table: Table, capsys) -> None:
    out = begun(table)
    theirs = ["step-0/state.json", "step-0/x", "step-3/pytorch_model.bin", "step-4.partial/x"]
    for name in theirs:
        (out / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (out / "checkpoints" / name).write_text("{}")
    kept = {"checkpoint": {"keep": 1}}
    assert train(Run.of(table(train={"steps": 5}, **kept)), resume=True).finished
    said = "".join(capsys.readouterr().err.split())  # a line may end within a path
    assert "step3couldnotbesaved(" in said
    assert "step-4.partialisintheway,anditwasnotleftbyupcycle;moveitaway" in said
    there = sorted(name for name in content(out / "checkpoints") if not name.startswith("step-5/"))
    assert there == theirs
    (out / "checkpoints" / "step-6").mkdir()
    (out / "checkpoints" / "step-6" / "mine").touch()
    with pytest.raises(UpcycleError, match=r"step 6 could not be saved .*step-6 is in the way"):
        train(Run.of(table(train={"steps": 6}, **kept)), resume=True)


DAMAGED = [b"", b"5", b"[]", b"{}", b'{"run": {}}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("content_", DAMAGED)
def test_a_damaged_record_is_said(content_: bytes, table: Table, tmp_path: Path) -> None:
    out = begun(table)
    (out / "run.json").write_bytes(content_)
    with pytest.raises(UpcycleError, match=r"run\.json is damaged: .*--resume` writes it anew"):
        export(out, tmp_path / "out")


@pytest.mark.parametrize("content_", quick(DAMAGED, b'{"run": {}}'))
def test_a_damaged_record_is_mended(content_: bytes, table: Table, tmp_path: Path) -> None:
    out = begun(table)
    whole = json.loads((out / "run.json").read_text())
    (out / "run.json").write_bytes(content_)
    assert train(Run.of(table()), resume=True).finished
    assert json.loads((out / "run.json").read_text()) == whole
    (out / "run.json").unlink()
    with pytest.raises(UpcycleError, match=r"has no run\.json.*--resume` writes it anew"):
        export(out, tmp_path / "out")
    train(Run.of(table()), resume=True)
    assert json.loads((out / "run.json").read_text()) == whole


def test_a_damaged_record_without_checkpoints_begins(table: Table) -> None:
    out = begun(table)
    for _, path in saving.checkpoints(out):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (out / "run.json").write_bytes(b"")
    with pytest.raises(UpcycleError, match="holds a run already"):
        train(Run.of(table()))
    assert train(Run.of(table()), resume=True).finished


@pytest.mark.parametrize(
    "content_",
    [
        b"{}",
        b"[]",
        b"5",
        b"\xff",
        b'{"step": 2}',
        b"[" * 100_000,
        b'{"step": 2, "batches": {}, "identity": {}, "loss": "x"}',
    ],
)
def test_a_damaged_state_is_said(content_: bytes, table: Table, tmp_path: Path) -> None:
    out = begun(table)
    (out / "checkpoints" / "step-2" / "state.json").write_bytes(content_)
    for work in (lambda: export(out, tmp_path / "out"), lambda: train(Run.of(table()), resume=True)):
        with pytest.raises(UpcycleError, match=r"step-2/state\.json cannot be read: .*delete that folder"):
            work()


LINES = [b"\xff\n", b"5\n", b"{}\n", b'{"step": "x"}\n', b"\0\0\0\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("line", LINES)
def test_damaged_metrics_are_counted(line: bytes, table: Table) -> None:
    path = begun(table) / "metrics.jsonl"
    before, steps = path.read_bytes(), read(path.parent)
    assert metrics._end_at(path, steps[-1].step)[1] == 0
    assert path.read_bytes() == before
    path.write_bytes(line + before)
    assert read(path.parent) == steps
    assert metrics._end_at(path, steps[-1].step)[1] == 1
    assert path.read_bytes() == before


def test_metrics_of_a_long_run_are_not_held_in_memory(tmp_path: Path) -> None:
    """Those of a large model over many steps are gigabytes."""
    load = {"load": [1 / 64] * 64, "dead": 0, "collapsed": False, "entropy": 1.0, "left_behind": 0.0}
    path = tmp_path / "metrics.jsonl"
    line = {"step": 0, "tokens": 1, "loss": 2.0, "layers": [load | {"layer": n} for n in range(16)]}
    path.write_text("".join(json.dumps(line | {"step": n}) + "\n" for n in range(1, 201)))
    size = path.stat().st_size
    tracemalloc.start()
    assert metrics._end_at(path, 150)[1] == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 2_000_000
    assert peak < size / 4
    assert [step.step for step in read(tmp_path)] == [*range(1, 151)]


@pytest.mark.usefixtures("on_screen")
@pytest.mark.parametrize("line", quick(LINES, LINES[-1]))
def test_damaged_metrics_lose_no_other_line(line: bytes, table: Table, capsys: Any) -> None:
    out = begun(table)
    path = out / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(line + before)
    train(Run.of(table(train={"steps": 3})), resume=True)
    assert path.read_bytes().startswith(before)
    assert "1 line of metrics.jsonl is damaged" in " ".join(capsys.readouterr().err.split())
    assert [record.step for record in read(out)] == [1, 2, 3]


# --- what can be trusted


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def without_hashes(checkpoint: Path) -> None:
    """As a version left it that wrote none."""
    state = json.loads((checkpoint / "state.json").read_text())
    for key in ("sha256", "state_sha256"):
        del state[key]
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_pickle_in_a_checkpoint_runs_nothing(table: Table, tmp_path: Path) -> None:
    out = begun(table)
    checkpoint = out / "checkpoints" / "step-2"
    without_hashes(checkpoint)
    assert train(Run.of(table()), resume=True).finished  # an old checkpoint is read
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for work in (lambda: export(out, tmp_path / "out"), lambda: train(Run.of(table()), resume=True)):
        with pytest.raises(UpcycleError, match=r"cannot be read: \.metadata: it names posix\.mkdir"):
            work()
    assert not (tmp_path / "ran").exists()
    # Nor does a value that is no tensor, which DCP unpickles by itself.
    state = {"optimizer": {"param_groups.x.lr": Evil(tmp_path / "ran")}}
    torch.distributed.checkpoint.save(state, checkpoint_id=checkpoint, no_dist=True)
    live = {"optimizer": {"param_groups.x.lr": 0.5}}
    from upcycle.training.untrusted import Planner, Reader

    with pytest.raises(torch.distributed.checkpoint.CheckpointException):
        torch.distributed.checkpoint.load(
            live, storage_reader=Reader(checkpoint), planner=Planner(), no_dist=True
        )
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_is_refused(table: Table, tmp_path: Path) -> None:
    out = begun(table, **MOE)
    checkpoint = out / "checkpoints" / "step-2"
    for name in ("__0_0.distcp", ".metadata", "state.json"):
        whole = (checkpoint / name).read_bytes()
        place = whole.index(b'"consumed": [') + 17 if name == "state.json" else len(whole) // 2
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (checkpoint / name).write_bytes(damaged)
        for work in (
            lambda: export(out, tmp_path / "out"),
            lambda: train(Run.of(table(**MOE)), resume=True),
        ):
            with pytest.raises(UpcycleError, match=rf"{name}.*delete that folder"):
                work()
        (checkpoint / name).write_bytes(whole)
    assert export(out, tmp_path / "out").step == 2


def test_export_tells_of_the_source_that_was_trained(table: Table, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    out = begun(table, source=str(mine), **MOE)
    other = tiny.make_dense(tmp_path / "other", "llama", seed=5, vocab_size=300, max_position_embeddings=64)
    shutil.copyfile(other / "model.safetensors", mine / "model.safetensors")
    with pytest.raises(UpcycleError, match=r"model\.safetensors in .*mine changed since .*run was trained"):
        export(out, tmp_path / "out")
    with pytest.raises(UpcycleError, match=r"the source mine has changed since step \d+ was saved"):
        train(Run.of(table(source=str(mine), **MOE)), resume=True)
    shutil.copyfile(source / "model.safetensors", mine / "model.safetensors")
    export(out, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert told["source"]["sha256"] == json.loads((out / "run.json").read_text())["source_sha256"]["source"]
    assert told["training"][0]["source_hashed"] == "at the start"


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "moe"])
def test_a_changed_config_is_refused(changes: Table, table: Table, source: Path, tmp_path: Path) -> None:
    """With another epsilon the same weights are another model, and no hash of a weight file shows it."""
    mine, three = shutil.copytree(source, tmp_path / "mine"), {"train": {"steps": 3}}
    out = begun(table, source=str(mine), **changes)
    before = (out / "run.json").read_bytes()
    configured(mine, rms_norm_eps=0.5, max_position_embeddings=32)
    said = r"max_position_embeddings, rms_norm_eps in config\.json of the source mine changed since "
    with pytest.raises(UpcycleError, match=rf"{said}step 2 was saved; put the file back"):
        train(Run.of(table(source=str(mine), **changes, **three)), resume=True)
    with pytest.raises(UpcycleError, match=rf"{said}\S*run was trained from it; put the file back"):
        export(out, tmp_path / "out")
    assert (out / "run.json").read_bytes() == before
    shutil.copyfile(source / "config.json", mine / "config.json")
    configured(mine, transformers_version="5.0.0", _name_or_path="mine")  # these say who wrote it
    assert train(Run.of(table(source=str(mine), **changes, **three)), resume=True).finished
    assert export(out, tmp_path / "out").step == 3


def test_a_record_of_an_earlier_version_knows_no_config(table: Table, source: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(source, tmp_path / "mine")
    out = begun(table, source=str(mine))
    record = json.loads((out / "run.json").read_text())
    assert record.pop("config_sha256").keys() == {"source"}
    whole_file.write_json(out / "run.json", record)
    for _, checkpoint in saving.checkpoints(out):
        state = replace(saving.read_state(checkpoint), config_sha256=None).sealed()
        whole_file.write_json(checkpoint / "state.json", state.as_table())
    configured(mine, rms_norm_eps=0.5)
    assert train(Run.of(table(source=str(mine), train={"steps": 3})), resume=True).finished
    assert export(out, tmp_path / "out").step == 3


def split_by(labels: Path, order: int) -> dict[str, Any]:
    """A recipe of `split` by a file, which deals neurons out in one order or the other."""
    dealt = [number % 4 for number in range(48)][::order]
    labels.write_text(json.dumps([dealt] * 4))
    moe = {"num_experts": 4, "top_k": 2, "granularity": 4}
    return {"moe": moe, "init": {"name": "split", "by": "file", "labels": str(labels)}}


def test_a_changed_file_of_the_recipe_is_refused(table: Table, tmp_path: Path) -> None:
    """With other labels the same source and the same run file make another model."""
    labels, three = tmp_path / "labels.json", {"train": {"steps": 3}}
    recipe = split_by(labels, 1)
    out = begun(table, **recipe)
    before = (out / "run.json").read_bytes()
    split_by(labels, -1)
    said = rf"init\.labels = {re.escape(str(labels))} changed since "
    with pytest.raises(UpcycleError, match=rf"^{said}step 2 was saved; put the file back as it was"):
        train(Run.of(table(**recipe, **three)), resume=True)
    with pytest.raises(UpcycleError, match=rf"^{said}\S*run was trained from it; put the file back"):
        export(out, tmp_path / "out")
    assert (out / "run.json").read_bytes() == before
    labels.write_text(json.dumps(json.loads(split_by(labels, 1) and labels.read_text()), indent=4))
    assert train(Run.of(table(**recipe, **three)), resume=True).finished  # the same labels, written otherwise
    assert export(out, tmp_path / "out").step == 3


@pytest.mark.parametrize("there", ["0.0.9", upcycle.__version__])
def test_a_version_that_plans_another_model_is_refused(there: str, table: Table, tmp_path: Path) -> None:
    out = begun(table, **MOE)
    record = json.loads((out / "run.json").read_text()) | {"blueprint_hash": "0", "upcycle_version": there}
    whole_file.write_json(out / "run.json", record)
    for _, checkpoint in saving.checkpoints(out):
        state = replace(saving.read_state(checkpoint), blueprint_hash=None, recipe_sha256=None).sealed()
        whole_file.write_json(checkpoint / "state.json", state.as_table())
    with_it = f"upcycle {there} did" if there != upcycle.__version__ else "it did"
    said = rf"upcycle {re.escape(upcycle.__version__)} makes another model of .* than {re.escape(with_it)}"
    with pytest.raises(UpcycleError, match=said):
        train(Run.of(table(**MOE, train={"steps": 3})), resume=True)
    with pytest.raises(UpcycleError, match=said):
        export(out, tmp_path / "out")


def test_a_run_of_relative_paths_is_exported_from_anywhere(
    table: Table, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source and its donors are found from where it was begun; it goes on from there alone."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "text.txt").write_text(WORDS * 40)
    for name in ("dense", "donor"):
        shutil.copytree(source, home / "models" / name)
    experts = {"name": "experts", "expert": [{}, {"source": "models/donor"}]}
    settings = table(
        source="models/dense", out="run", moe={"num_experts": 2, "top_k": 2}, init=experts,
        data={"sources": [{"path": "text.txt"}]},
    )  # fmt: skip
    monkeypatch.chdir(home)
    train(settings)
    export("run", "here")
    monkeypatch.chdir(away)
    export(home / "run", "there")
    wanted, got = content(home / "here"), content(away / "there")
    assert got.keys() == wanted.keys()
    assert got["model.safetensors"] == wanted["model.safetensors"]
    told = json.loads(got["upcycle.json"])["source"]
    assert told["name"] == "dense"
    assert (away / "there" / told["path"]).resolve() == home / "models" / "dense"
    for change in ({}, {"source": str(home / "models" / "dense")}):
        moved = {**settings, "out": str(home / "run"), **change}
        lost = "models/dense" if not change else r"text\.txt"
        with pytest.raises(UpcycleError, match=f"^{lost} is not here; .* was begun in {home}, from where"):
            upcycle.train(moved, resume=True)


def test_the_folder_that_a_run_was_begun_in_comes_before_todays(
    table: Table, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the same names elsewhere are others, unless the run was moved there with them."""
    home, away, moved = (tmp_path / name for name in ("home", "away", "moved"))
    shutil.copytree(source, home / "dense")
    (home / "text.txt").write_text(WORDS * 40)
    (away / "dense").mkdir(parents=True)
    settings = table(source="dense", out="run", data={"sources": [{"path": "text.txt"}]})

    def longer(change: Table) -> str:
        upcycle.train({**settings, **change, "train": {**settings["train"], "steps": 3}}, resume=True)
        return str(json.loads((Path(change.get("out", "run")) / "run.json").read_text())["begun_in"])

    monkeypatch.chdir(home)
    train(settings)
    for copy in (moved, tmp_path / "again"):
        shutil.copytree(home, copy)
    monkeypatch.chdir(away)
    export(home / "run", tmp_path / "out")
    with pytest.raises(UpcycleError, match=f"^dense is another one here; .* was begun in {home}, from where"):
        longer({"out": str(home / "run")})
    (away / "dense").rmdir()
    for name in ("dense", "text.txt"):
        (away / name).symlink_to(home / name)
    assert longer({"out": str(home / "run")}) == str(home)
    monkeypatch.chdir(moved)
    assert longer({}) == str(moved)
    monkeypatch.chdir(tmp_path / "again")
    upcycle.train(settings, resume=True)  # the same run, no longer than before
    assert json.loads(Path("run", "run.json").read_text())["begun_in"] == str(tmp_path / "again")


def test_files_of_a_recipe_move_with_a_run(
    table: Table, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe has the absolute paths of its files; relative ones move as that of the source does."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    shutil.copytree(source, home / "dense")
    shutil.copytree(source, home / "donor")
    (home / "text.txt").write_text(WORDS * 40)
    labels = split_by(home / "labels.json", 1)
    labels["init"]["labels"] = "labels.json"
    experts = {"name": "experts", "expert": [{}, {"source": "donor"}]}
    donors = {"moe": {"num_experts": 2, "top_k": 2}, "init": experts}
    data = {"sources": [{"path": "text.txt"}]}
    runs = [
        table(source="dense", out=f"run {i}", data=data, **each) for i, each in enumerate((labels, donors))
    ]
    monkeypatch.chdir(home)
    for each in runs:
        train(Run.of(each))
    home.rename(moved)
    monkeypatch.chdir(moved)
    for number, each in enumerate(runs):
        export(f"run {number}", tmp_path / f"before {number}")
        longer = {**each, "train": {**each["train"], "steps": 3}}
        assert upcycle.train(longer, resume=True).finished
        assert export(f"run {number}", tmp_path / f"out {number}").step == 3
    split_by(moved / "labels.json", -1)
    with pytest.raises(
        UpcycleError, match=r"^init\.labels = .*moved/labels\.json changed since step 3 was saved"
    ):
        upcycle.train({**runs[0], "train": {**runs[0]["train"], "steps": 4}}, resume=True)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("init.labels", {}),
        ("teacher.source", {"teacher": {"source": "teacher"}}),
        ("data.tokenizer", {"data": {"tokenizer": "words"}}),
    ],
    ids=["labels", "teacher", "tokenizer"],
)
def test_every_path_of_a_run_counts_from_where_it_was_begun(
    key: str, change: Table, table: Table, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    for name in ("teacher", "words"):
        shutil.copytree(source, home / name)
    recipe = split_by(home / "labels.json", 1)
    recipe["init"]["labels"] = "labels.json"
    settings = table(out=str(home / "run"), **recipe, **change)
    monkeypatch.chdir(home)
    train(Run.of(settings))
    monkeypatch.chdir(away)
    path = {"init.labels": "labels.json", "teacher.source": "teacher", "data.tokenizer": "words"}[key]
    if key != "init.labels":
        settings["init"] = {**recipe["init"], "labels": str(home / "labels.json")}
    with pytest.raises(UpcycleError, match=rf"^{path} is not here; .* was begun in {home}, from where"):
        upcycle.train(settings, resume=True)


# --- export


def test_export_deletes_no_folder_of_another(table: Table, tmp_path: Path) -> None:
    out = begun(table)
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "notes").write_text("keep")
    with pytest.raises(UpcycleError, match=r"x\.partial is in the way"):
        export(out, tmp_path / "x")
    assert content(tmp_path / "x.partial") == {"notes": b"keep"}


def test_an_export_is_on_disk_before_it_has_its_name(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power a folder of that name is a whole model."""
    synced: set[int] = set()
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    export(begun(table, **MOE), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "model.safetensors" in {path.name for path in files}
    assert {path.stat().st_ino for path in [*files, tmp_path / "out", tmp_path]} <= synced


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_that_looks_whole(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(table)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if not str(path).startswith(str(out / "checkpoints" / "step-1")) or not path.exists():
            return remove(path, **options)
        (path / ".metadata").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    three = table(train={"steps": 3}, checkpoint={"keep": 2})
    with pytest.raises(KeyboardInterrupt):
        train(Run.of(three), resume=True)
    assert [step for step, _ in saving.checkpoints(out)] == [2, 3]
    monkeypatch.undo()
    train(Run.of({**three, "train": {**three["train"], "steps": 4}}), resume=True)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-3", "step-4"]


def test_export_writes_what_the_umask_says(table: Table, tmp_path: Path) -> None:
    out = begun(table)
    before = os.umask(0o027)
    try:
        export(out, tmp_path / "out", with_optimizer=True)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes - {0o644, 0o664} == {0o640}  # carried files have the mode of the copy


def test_export_on_a_full_disk(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = begun(table)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upcycle.training.exports._beside.carry", full)
    with pytest.raises(UpcycleError, match=r"out\.partial could not be written: No space left on device"):
        export(out, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_source_that_was_moved_is_asked_for(table: Table, tmp_path: Path) -> None:
    source = Path(Run.of(table()).source)
    here, moved = tmp_path / "dense", tmp_path / "moved"
    shutil.copytree(source, here)
    train(Run.of(table(source=str(here))))
    here.rename(moved)
    with pytest.raises(UpcycleError, match=r"run began from .*dense, which is not there any more; .* a link"):
        export(tmp_path / "run", tmp_path / "out")
    here.symlink_to(moved)
    export(tmp_path / "run", tmp_path / "out")


def test_the_card_says_how_to_load(table: Table, tmp_path: Path) -> None:
    begun(table, **MOE)
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Load" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "nats per token" in card


@pytest.mark.parametrize("dense", [False, True])
def test_the_card_names_all_sources_and_shows_names_as_they_are(
    dense: bool, table: Table, source: Path, tmp_path: Path
) -> None:
    """A name is no markup, of a folder as little as of a run."""
    names = "ev`il<img src=x onerror=alert(1)>\n# H", "a donor", "<i>"
    folders = [shutil.copytree(source, tmp_path / name) for name in names]
    donors = {"init": {"name": "branch_train_mix", "sources": [*map(str, folders[1:])]}}
    changes = {} if dense else {"moe": {"num_experts": 3}, **donors}
    train(Run.of(table(source=str(folders[0]), out=str(tmp_path / "<b>x"), **changes)))
    card = (export(tmp_path / "<b>x", tmp_path / "out").out / "README.md").read_text()
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [r"# \<b\>x"]
    evil = "`` ev`il<img src=x onerror=alert(1)> # H ``"
    said = f"checkpoint {evil}," if dense else f"checkpoints {evil}, `a donor` and `<i>`,"
    assert said in card
    assert not re.search(r"(?<!\\)<", card.replace(evil, "").replace("`<i>`", ""))


# --- Ctrl-C


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C as a terminal has it, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_while_a_checkpoint_is_saved_is_heeded(
    asynchronous: bool, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = saving.write

    def slow(*args: Any) -> str | None:
        if args[2].step == 1:
            interrupt()
        return real(*args)

    monkeypatch.setattr(saving, "write", slow)
    with pytest.raises(KeyboardInterrupt):
        train(Run.of(table(checkpoint={"asynchronous": asynchronous}, train={"steps": 9})))
    out = tmp_path / "run"
    assert [step for step, _ in saving.checkpoints(out)] == [1]  # it is whole
    assert train(Run.of(table()), resume=True).finished
    assert not list((out / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_second_ctrl_c_does_not_wait(
    asynchronous: bool, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = saving.dcp.FileSystemWriter

    class Impatient(real):  # type: ignore[misc,valid-type]
        def write_data(self, *args: Any) -> Any:
            interrupt()
            time.sleep(0.3 * asynchronous)  # the end of the step, which then waits for this write
            interrupt()
            time.sleep(0.1 * asynchronous)
            return super().write_data(*args)

    monkeypatch.setattr(saving.dcp, "FileSystemWriter", Impatient)
    with pytest.raises(KeyboardInterrupt):
        train(Run.of(table(checkpoint={"asynchronous": asynchronous})))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_held_signals() -> None:
    done = []

    def work() -> None:
        with held():
            interrupt()
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- longer


def losses(out: Path) -> list[float]:
    return [record.loss for record in read(out)]


def test_a_finished_run_is_extended(table: Table, tmp_path: Path) -> None:
    whole = begun(table, out=str(tmp_path / "whole"), train={"steps": 4})
    out = begun(table)
    result = train(Run.of(table(train={"steps": 4})), resume=True)
    assert (result.finished, result.steps) == (True, 4)
    assert losses(out) == losses(whole)
    assert json.loads((out / "run.json").read_text())["run"]["train"]["steps"] == 4
    with pytest.raises(UpcycleError, match="is of step 4, and the run file ends it at 3"):
        train(Run.of(table(train={"steps": 3})), resume=True)
    with pytest.raises(UpcycleError, match=r"another run: it differs in train\.weight_decay"):
        train(Run.of(table(train={"steps": 8, "weight_decay": 0.3})), resume=True)


FREE: list[dict[str, Any]] = [  # what decides no number of a step
    {"data": {"cache": "elsewhere"}},
    {"train": {"activation_checkpointing": True}},
    {"train": {"eval_every": 1}},
]


@pytest.mark.parametrize("change", FREE, ids=str)
def test_what_decides_no_number_may_be_another_when_a_run_goes_on(
    change: dict[str, Any], table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache on the disk of a node has another path in each job, and a smaller GPU needs recomputation."""
    monkeypatch.chdir(tmp_path)
    whole = begun(table, out=str(tmp_path / "whole"), train={"steps": 4})
    out = begun(table)
    state = saving.latest(out)
    assert state is not None
    recorded = saving.read_state(state).identity
    for section, keys in change.items():
        assert not keys.keys() & recorded[section].keys()
        recorded[section] |= dict.fromkeys(keys)  # as earlier versions recorded it
    rewritten = replace(saving.read_state(state), identity=recorded).sealed()
    whole_file.write_json(state / RunState.FILE, rewritten.as_table())
    longer = {"steps": 4, **change.get("train", {})}
    train(Run.of(table(**{**change, "train": longer})), resume=True)
    assert losses(out) == losses(whole)


BOTH = {"batch_size": 4, "batch_tokens": 1024, "eval_examples": 8, "eval_tokens": 512}


def test_rows_and_tokens_are_not_both_given(table: Table, tmp_path: Path) -> None:
    """Of a batch and of what is held out. The default of tokens is not given."""
    run = table()
    head = f"source = '{run['source']}'\nout = '{run['out']}'\ndata.sources = [{{path = 'x.txt'}}]\n"
    (tmp_path / "run.toml").write_text(f"{head}schedule = {{name = 'constant', peak = 1}}\ntrain.steps = 2\n")
    one, two, three, four = (f"train.{key}={value}" for key, value in BOTH.items())
    for given in ([one, two], [three, four]):
        with pytest.raises(UpcycleError, match=rf"{given[0].replace('=', ' = ')} and train\..*; give one of"):
            Run.load(tmp_path / "run.toml", given)
    found = Run.load(tmp_path / "run.toml", [one, three])
    assert (found.train.rows, found.train.eval_rows) == (4, 8)
    (tmp_path / "over.toml").write_text("base = 'run.toml'\ntrain.batch_tokens = 2048\n")
    (tmp_path / "top.toml").write_text("base = 'over.toml'\ntrain.batch_size = 3\n")
    rows = found.train.sequence_length
    assert Run.load(tmp_path / "over.toml").train.rows == 2048 // rows
    assert Run.load(tmp_path / "top.toml").train.rows == 3  # what is laid over takes its place
    assert Run.load(tmp_path / "over.toml", [one]).train.rows == 4
    assert Run.load(tmp_path / "top.toml", ["train.batch_tokens=1024"]).train.rows == 1024 // rows


def test_a_run_that_has_recorded_rows_and_tokens_goes_on_without_tokens(table: Table, tmp_path: Path) -> None:
    whole = begun(table, out=str(tmp_path / "whole"), train={"steps": 4, "batch_size": 4})
    out = begun(table, train=BOTH)
    state = saving.latest(out)
    assert state is not None
    for path, key in ((state / RunState.FILE, "identity"), (out / "run.json", "run")):
        written = json.loads(path.read_text())
        assert written[key]["train"]["batch_size"] == 4
    recorded = saving.read_state(state).identity
    recorded["train"] |= BOTH  # as earlier versions recorded it
    rewritten = replace(saving.read_state(state), identity=recorded).sealed()
    whole_file.write_json(state / RunState.FILE, rewritten.as_table())
    assert Run.of(json.loads((out / "run.json").read_text())["run"]).train.batch_tokens == 1024
    rows = {"steps": 4, "batch_size": 4, "eval_examples": 8, "batch_tokens": 64}
    train(Run.of(table(train=rows)), resume=True)
    assert losses(out) == losses(whole)


def test_the_cache_of_a_stage_and_of_a_teacher_decide_no_number() -> None:
    table = {
        "teacher": {"cache": "a", "top_logits": 8},
        "stage": [{"name": "one", "data": {"cache": "b", "held_out": 0.1}}, {"name": "two", "data": None}],
    }
    assert identity_of(table) == {
        "teacher": {"top_logits": 8},
        "stage": [{"name": "one", "data": {"held_out": 0.1}}, {"name": "two", "data": None}],
    }


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "warmup_stable_decay", "decay": 2}])
def test_a_schedule_that_has_come_down_is_not_extended(schedule: Any, table: Table, tmp_path: Path) -> None:
    out = begun(table, schedule=schedule)
    longer = table(schedule=schedule, train={"steps": 4})
    with pytest.raises(UpcycleError, match=r"cannot go on to 4 steps instead of 2.*before its decay"):
        train(Run.of(longer), resume=True)
    if schedule["name"] != "cosine":
        (out / "checkpoints" / "step-2").rename(tmp_path / "decayed")
        assert train(Run.of(longer), resume=True).steps == 4


# --- seeds, warnings, bad settings


@pytest.mark.parametrize("seed", [20240131123456, -(1 << 63), (1 << 63) - 1, (1 << 64) - 1, -1])
def test_any_seed_trains(seed: int, table: Table) -> None:
    assert train(Run.of(table(seed=seed, train={"steps": 1}, **MOE, router={"jitter": 0.1}))).finished


@pytest.mark.usefixtures("on_screen")
def test_train_says_what_plan_says(table: Table, tmp_path: Path, capsys: Any) -> None:
    begun(table, **MOE, schedule={"warmup": 2})
    said = " ".join(capsys.readouterr().err.split())
    assert "the run ends after 2 steps, inside its warm-up of 2" in said
    begun(table, out=str(tmp_path / "b"), schedule={"name": "warmup_stable_decay", "warmup": 1, "decay": 2})
    assert "comes down before it has reached schedule.peak" in " ".join(capsys.readouterr().err.split())
    warned = plan(table()["source"], Recipe.of(MOE)).warnings
    assert warned
    assert all(sentence in said for sentence in warned)


def test_rows_beyond_the_context_are_refused(table: Table, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"sequence_length = 65 and the model takes 64 tokens"):
        train(Run.of(table(train={"sequence_length": 65, "batch_tokens": 130})))


BAD = {
    "task": ({"task": {"name": 5}}, r"task 5 is no name; give one of causal_lm"),
    "peak": ({"log": {"peak_flops": 0}}, r"log\.peak_flops = 0\.0; it must be a number above 0"),
    "out": ({"out": "a\0b"}, r"out = 'a\\x00b' holds a NUL character"),
    "cache": ({"data": {"cache": "a\0b"}}, r"data\.cache = 'a\\x00b' holds a NUL character"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str, table: Table) -> None:
    changes, message = BAD[name]
    with pytest.raises(UpcycleError, match=message):
        Run.of(table(**changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x' in the environment is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 and there is no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"RANK": "1"}, "RANK = 1 and there is no WORLD_SIZE in the environment; .* or unset RANK"),
        ({"RANK": "x"}, "RANK = 'x' in the environment is no number"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK = 1 and WORLD_SIZE = 1; start with torchrun"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1'"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(
    given: dict[str, str], message: str, table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UpcycleError, match=message):
        train(Run.of(table()))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_with_130(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "run.toml").write_text(f"source = {json.dumps(table()['source'])}\n")
    monkeypatch.setattr(Run, "load", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.toml")])
    assert ended.value.code == 130


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_of_several_processes_says_what_ends_them_all(
    elsewhere: bool, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refused(*_: Any) -> None:
        error = UpcycleError("process 1 of 2 sees another config of the source than process 0")
        error.elsewhere = elsewhere
        raise error

    (tmp_path / "run.toml").write_text(f"source = {json.dumps(table()['source'])}\n")
    monkeypatch.setattr(Run, "load", refused)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.toml")])
    assert ended.value.code == 2
    assert ("process 1 of 2 sees" in capsys.readouterr().err) != elsewhere


# --- settings that a run file leaves open


def counts_of(out: Path, step: int) -> Any:
    """What the records of a run say about `balance_counts`: run.json and a checkpoint."""
    record = json.loads((out / "run.json").read_text())
    state = saving.read_state(out / "checkpoints" / f"step-{step}").identity
    (found,) = {each["router"]["balance_counts"] for each in (record["run"], record["identity"], state)}
    return found


def test_a_run_keeps_the_counts_it_began_with(table: Table, tmp_path: Path) -> None:
    """Runs of earlier versions took exact counts if their run file said nothing."""
    parts = {**MOE, "train": {"micro_batch": 1, "steps": 4}, "schedule": {"peak": 1e-2}}
    exact, buffered = ({"router": {"balance_counts": counts}} for counts in ("exact", "buffered"))
    wanted = {}
    for name, changes in (("exact", exact), ("buffered", buffered), ("open", {})):
        wanted[name] = losses(begun(table, out=str(tmp_path / name), **parts, **changes))
    assert wanted["open"] == wanted["buffered"] != wanted["exact"]
    assert counts_of(tmp_path / "open", 4) == "buffered"
    for name in ("exact", "buffered"):
        for number in (3, 4):
            shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{number}")
        train(Run.of(table(out=str(tmp_path / name), **parts)), resume=True)
        assert losses(tmp_path / name) == wanted[name]
        assert counts_of(tmp_path / name, 4) == name
    with pytest.raises(UpcycleError, match=r"router\.balance_counts \('exact' there, 'buffered' here\)"):
        train(Run.of(table(out=str(tmp_path / "exact"), **parts, **buffered)), resume=True)


def forget(checkpoint: Path, *keys: str) -> None:
    """Make the record of a checkpoint one of a version that did not know some keys."""
    state = json.loads((checkpoint / "state.json").read_text())
    for key in keys:
        section, _, name = key.partition(".")
        del state["identity"][section][name]
    del state["state_sha256"]
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_run_goes_on_whose_keys_were_fewer(table: Table) -> None:
    """A key that an older version did not know has its default there."""
    newest = saving.latest(begun(table, **MOE))
    assert newest is not None
    forget(
        newest,
        "moe.part",
        "moe.mtp",
        "moe.granularity",
        "router.rounding",
        "init.name",
        "data.isolate",
        "data.split_seed",
    )
    with pytest.raises(UpcycleError, match=r"differs in data\.isolate \(False there, True here\)"):
        train(Run.of(table(**MOE, train={"steps": 3}, data={"isolate": True})), resume=True)
    assert train(Run.of(table(**MOE, train={"steps": 3})), resume=True).steps == 3


@pytest.mark.parametrize(
    ("then", "wanted"),
    [
        (None, ("buffered", "buffered")),
        (
            {"router": {"balance_counts": "exact"}, "stage": [{"router": {"balance_counts": "exact"}}]},
            ("exact", "exact"),
        ),
        ({"router": {"balance_counts": "buffered"}, "stage": [{}]}, ("buffered", "buffered")),
        ({"router": {}, "stage": 5}, ("exact", "buffered")),
        ([], ("buffered", "buffered")),
    ],
)
def test_counts_of_stages(then: Any, wanted: tuple[str, str], table: Table) -> None:
    stages = [{"train": {"steps": 1}, "router": {"z_loss_coef": 0.1}}, {"train": {"steps": 1}}]
    run = run_folder._settled_as(Run.of(table(**MOE, stage=stages)), then)
    assert run.stage[0].router is not None
    assert (run.router.balance_counts, run.stage[0].router.balance_counts) == wanted
    assert run.stage[1].router is None
    said = Run.of(table(**MOE, router={"balance_counts": "exact"}))
    assert run_folder._settled_as(said, then).router == said.router


@pytest.mark.parametrize(
    ("then", "wanted"),
    [
        (None, (False, False)),
        ({"stage": [{}, {"data": {}}]}, (True, True)),  # of an earlier version
        ({"stage": [{"anew": False}, {"anew": True}]}, (False, True)),
        ({"stage": 5}, (False, False)),
        ([], (False, False)),
    ],
)
def test_stages_read_their_data_as_they_began(then: Any, wanted: tuple[bool, bool], table: Table) -> None:
    """In earlier versions each table of data was read from its first rows."""
    first = {"train": {"steps": 1}}
    run = Run.of(table(**MOE, stage=[first, {**first, "data": {"held_out": 0.2}}]))
    assert tuple(stage.anew for stage in run_folder._settled_as(run, then).stage) == wanted
    alone = Run.of(table(**MOE, stage=[first, first]))
    assert [stage.anew for stage in run_folder._settled_as(alone, then).stage] == [None, None]


@pytest.mark.parametrize(
    ("then", "wanted"),
    [
        (None, (0, 0)),
        ({"data": {"split_seed": 4}, "stage": [{"data": {"split_seed": 4}}]}, (4, 4)),
        ({"data": {}, "stage": [{"data": {}}]}, (3, 3)),  # of an earlier version
        ({"data": {}, "stage": [{}]}, (3, 0)),
        ({"data": {"split_seed": "x"}}, (0, 0)),
    ],
)
def test_a_run_keeps_the_examples_that_it_held_out(then: Any, wanted: tuple[int, int], table: Table) -> None:
    """Earlier versions chose them by the seed of the run."""
    stages = [{"train": {"steps": 1}, "data": {"held_out": 0.1}}, {"train": {"steps": 1}}]
    run = run_folder._settled_as(Run.of(table(**MOE, seed=3, stage=stages)), then)
    assert run.stage[0].data is not None
    assert (run.data.split_seed, run.stage[0].data.split_seed) == wanted
    assert run.stage[1].data is None
    said = Run.of(table(**MOE, data={"split_seed": 5}))
    assert run_folder._settled_as(said, then).data == said.data


@pytest.mark.parametrize("told", [True, False], ids=["by the checkpoint", "by run.json"])
def test_a_run_keeps_its_precision(
    told: bool,
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With `auto`, a machine with an accelerator would take another one than a CPU."""
    whole = begun(table, out=str(tmp_path / "whole"), train={"steps": 4}, **MOE)
    out = begun(table, **MOE)
    if not told:  # as in checkpoints of earlier versions
        saved = out / "checkpoints" / "step-2" / "state.json"
        state = json.loads(saved.read_text())
        del state["precision"], state["state_sha256"]
        saved.write_text(json.dumps(state))
    monkeypatch.setattr(fit, "precision", lambda run: "mixed")
    with caplog.at_level("INFO"):
        train(Run.of(table(train={"steps": 4}, **MOE)), resume=True)
    assert losses(out) == losses(whole)
    assert saving.read_state(out / "checkpoints" / "step-4").precision == "float32"
    assert run_folder.read_record(out).precision == "float32"
    assert "goes on in float32, in which it began; train.precision = auto would be mixed here" in caplog.text


def test_a_run_without_a_record_of_its_precision_takes_that_of_today(table: Table, tmp_path: Path) -> None:
    run = Run.of(table(out=str(tmp_path)))
    before = RunState(step=3, batches={}, identity={})
    assert run_folder.precision(run, before) == fit.precision(run)
    assert run_folder.precision(run, replace(before, precision="bfloat16")) == "bfloat16"
    (tmp_path / "run.json").write_text("{}")
    assert run_folder.precision(run, before) == fit.precision(run)
    said = replace(run, train=replace(run.train, precision="mixed"))
    assert run_folder.precision(said, replace(before, precision="bfloat16")) == "mixed"


@pytest.mark.parametrize(
    ("task", "data", "why"),
    [
        ("causal_lm", {"split_seed": 0}, "causal_lm holds out the end of each source"),
        ("span_corruption", {"split_seed": 3}, "span_corruption holds out the end of each source"),
        ("sft", {"split_seed": 3}, None),
        ("causal_lm", {}, None),
        ({"name": "sft", "test": "x.jsonl"}, {"split_seed": 3}, "task.test is scored on"),
    ],
)
def test_a_seed_of_a_split_that_draws_nothing(task: Any, data: dict[str, Any], why: str | None) -> None:
    read = tasks.read({"name": task} if isinstance(task, str) else task)
    said = read.idle_split(Data(sources=(Source(path="x"),), **data))
    seed = data.get("split_seed")
    wanted = f"data.split_seed = {seed} draws no held-out examples, because {why}; take it out"
    assert said == (None if why is None else wanted)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_run_that_began_with_such_a_seed_goes_on(seed: int | None, table: Table, caplog: Any) -> None:
    """With a warning, which a run without one does not get: each records a seed."""
    given = table(data={} if seed is None else {"split_seed": seed})
    said = r"data\.split_seed = 0 draws no held-out examples"
    out = begun(table)
    shutil.rmtree(out / "checkpoints" / "step-2")
    train(Run.of(given), resume=True)
    assert bool(re.search(said, caplog.text)) == (seed is not None)
    if seed is not None:
        with pytest.raises(UpcycleError, match=said):
            train(Run.of({**given, "out": f"{out}-new"}))


@pytest.mark.parametrize("name", ["sft", "text_classification", "image_classification"])
def test_a_set_without_a_name_is_not_this_folder(name: str) -> None:
    with pytest.raises(UpcycleError, match=r'task\.test = "" names no set'):
        tasks.read({"name": name, "test": ""})
    with pytest.raises(UpcycleError, match=r'data\.sources path = "" names no data'):
        Source(path="")


# --- a batch that does not fit


@pytest.mark.parametrize(
    ("name", "rows"), [("adamw", 28), ("muon", 56), ("adamw_8bit", 70), ("adafactor", 84)]
)
def test_the_memory_of_an_optimizer_counts(table: Table, monkeypatch, name, rows) -> None:
    """Of 20 MB, a million weights take 4, their gradients 4, and the moments 8, 4, 2, 0: 0.7 of the rest."""
    monkeypatch.setattr(micro_batch, "_free", lambda here: 20_000_000)
    monkeypatch.setattr(micro_batch, "bytes_of_row", lambda *_: 100_000)
    begun_ = SimpleNamespace(parameters=1_000_000, teacher=None)
    here = Ranks(device=torch.device("cpu"))
    run = Run.of(table(optimizer={"name": name}))
    assert micro_batch._rows_that_fit(run, begun_, {}, here, "float32") == rows


def test_a_batch_that_does_not_fit_is_cut(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {**MOE, "router": {"balance_counts": "exact"}}
    whole = begun(table, out=str(tmp_path / "whole"), **exact)
    assert json.loads((whole / "run.json").read_text())["run"]["train"].get("micro_batch") is None
    free = 16 * json.loads((whole / "run.json").read_text())["parameters"] + 1_500_000
    monkeypatch.setattr(micro_batch.memory, "available", lambda: free)
    cut = begun(table, **exact, train={"steps": 1})
    assert json.loads((cut / "run.json").read_text())["run"]["train"]["micro_batch"] in (1, 2)
    monkeypatch.undo()  # on a machine with more memory it goes on as it began
    train(Run.of(table(**exact)), resume=True)
    state = saving.read_state(cut / "checkpoints" / "step-2")
    assert state.micro_batch in (1, 2)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(("rows", "most", "wanted"), [(8, 100, None), (8, 3, 2), (7, 3, 1), (6, 3, 3)])
def test_the_parts_are_equal(
    rows: int, most: int, wanted: int | None, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.of(table(train={"batch_tokens": 16 * rows}, **MOE))
    start_ = start.start_of(run)
    monkeypatch.setattr(micro_batch, "_rows_that_fit", lambda *_: most)
    here = Ranks(device=torch.device("cpu"))
    found = micro_batch.chosen(run, start_, {"layers": 16}, here, None)
    assert found.train.micro_batch == wanted
    pooled = Run.of(table(train={"batch_tokens": 16 * rows}, **MOE, router={"balance_loss": "pooled"}))
    assert micro_batch.chosen(pooled, start_, {"layers": 16}, here, None).train.micro_batch is None
    before = RunState(step=3, batches={}, identity={})
    assert micro_batch.chosen(run, start_, {"layers": 16}, here, before).train.micro_batch is None


@pytest.mark.parametrize(
    ("then", "now", "most", "wanted"),
    [
        (8, 8, 8, None),
        (8, 16, 8, None),
        (8, 1, 100, None),  # they fit today, so that nothing changes
        (8, 1, 3, 2),
        (8, 1, None, 8),
        (2, 4, 1, None),
    ],
)
def test_fewer_ranks_take_no_more_rows_at_once_than_fit(
    then: int,
    now: int,
    most: int | None,
    wanted: int | None,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run whose ranks had all their rows of a step in one pass goes on with other ranks."""
    monkeypatch.setattr(micro_batch, "_rows_that_fit", lambda *_: most)
    monkeypatch.setattr(Ranks, "share", lambda self, value: value)
    here = Ranks(device=torch.device("cpu"), dp_size=now, layout=Layout(fsdp=now))
    before = RunState(step=3, batches={}, identity={}, layout=asdict(Layout(fsdp=then)))
    for loss in ("per_layer", "pooled"):
        run = Run.of(table(train={"batch_tokens": 16 * 64}, **MOE, router={"balance_loss": loss}))
        found = micro_batch.chosen(run, start.start_of(run), {"layers": 16}, here, before)
        assert found.train.micro_batch == (wanted if loss == "per_layer" else None)
    said = f"has {64 // now} rows in one pass instead of {64 // then}"
    assert [said in record.message for record in caplog.records] == [True] * (wanted is not None)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_from_scratch_needs_no_weights(moe: bool, table: Table, source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    changes = MOE if moe else {}
    with pytest.raises(UpcycleError, match=r"has neither model\.safetensors nor"):
        train(Run.of(table(source=str(bare), **changes)))
    made = begun(table, source=str(bare), from_scratch=True, **changes)
    whole = begun(table, out=str(tmp_path / "whole"), from_scratch=True, **changes)
    assert losses(made) == losses(whole)
    export(made, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert [*told["source"]["sha256"]] == ["config.json"]


def test_from_scratch_warns_of_no_weights(table: Table) -> None:
    """Experts that are made of the dense network are drawn anew, and so is their router."""

    def said(**changes: Any) -> list[str]:
        router = {"init": "zeros"}
        init = {"name": "drop", "ratio": 0.5}
        run = Run.of(table(**{**MOE, "init": init, "router": router}, **changes))
        return fit.warnings(run, start.start_of(run).built)

    usual, from_scratch = said(), said(from_scratch=True)
    for of_weights in ("damages the model it starts from", "an all-zero router gives every expert the same"):
        assert any(of_weights in each for each in usual)
        assert not any(of_weights in each for each in from_scratch)


# --- a full disk


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "tokens"])
def test_a_full_disk_names_the_file(
    file: str, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nothing of it is left half-written, and the run begins where there is room."""
    monkeypatch.setattr(Run, "load", lambda *_: Run.of(table()))
    real = os.fsync

    def full(descriptor: int) -> None:
        if file in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "run.toml"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "upcycle: error: " in said
    assert f"{tmp_path}/run/{file}" in said
    assert "No space left on device" in said
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert train(Run.of(table()), resume=True).finished


@contextmanager
def on_a_full_disk(path: Path, filling: Any = whole_file.filling) -> Iterator[Any]:
    """Write a file, but leave metrics.jsonl where nothing can be added to it."""
    with filling(path) as file:
        yield file
    if path.name == StepMetrics.FILE:
        path.unlink()
        path.symlink_to("/dev/full")


def test_a_full_disk_does_not_hide_what_to_do(
    table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics.whole_file, "filling", on_a_full_disk)
    monkeypatch.setattr(saving, "write", lambda *_: "No space left on device")
    with pytest.raises(UpcycleError, match=r"step 1 could not be saved .* go on with --resume"):
        train(Run.of(table(train={"steps": 1})))
    said = [record.message for record in caplog.records]
    assert "metrics of step 1 are lost: No space left on device" in said
    assert "metrics.jsonl lacks the last steps: No space left on device" in said


def test_a_run_goes_back_when_the_disk_was_full(table: Table, tmp_path: Path) -> None:
    run = Run.of(table())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.whole_file, "write", on_a_full_disk)
        log = metrics.Metrics(tmp_path, run.log, 2, 0, {})
    log.step(StepMetrics(step=1, tokens=64, loss=1.0))
    log.go_back(0)
    log.step(StepMetrics(step=1, tokens=64, loss=2.0))
    log.close()
    assert losses(tmp_path) == [2.0]


@pytest.mark.parametrize("damaged", ["{}", "[]", '{"step": "x"}', "5"])
def test_damaged_moments_are_said(damaged: str, table: Table, tmp_path: Path) -> None:
    out = begun(table)
    export(out, tmp_path / "dense", with_optimizer=True)
    (tmp_path / "dense" / "optimizer" / "state.json").write_text(damaged)
    changes = {"source": str(tmp_path / "dense"), "optimizer": {"carry_state": True}, **MOE}
    with pytest.raises(UpcycleError, match=r"state\.json"):
        train(Run.of(table(out=str(tmp_path / "moe"), **changes)))


# --- the whole command, interrupted


@pytest.mark.slow
def test_ctrl_c_at_any_moment(table: Table, server: forked.Server, tmp_path: Path) -> None:
    """Each ends with 130 and a sentence, and a run that was interrupted five times has the losses of one that
    was not."""
    steps = {"train": {"steps": 60}, "checkpoint": {"keep": 2}}
    calm = losses(begun(table, out=str(tmp_path / "calm"), **steps))
    (tmp_path / "run.toml").write_text(toml(table(**steps)))
    drawn, codes = random.Random(0), []
    for goal in (3, 12, 20, 31, 45):
        said = tmp_path / "said"
        beside = f"checkpoint.asynchronous={str(goal % 2 == 0).lower()}"
        process = server.start(["train", str(tmp_path / "run.toml"), "--resume", "--set", beside], said)
        assert server.wait(process, lambda goal=goal: len(read(tmp_path / "run")) >= goal) is None
        time.sleep(drawn.random() * 0.05)
        os.kill(process, signal.SIGINT)
        codes.append(server.wait(process))
        assert "interrupted" in said.read_text()
        assert "Make room" not in said.read_text()
        assert "Traceback" not in said.read_text()
    assert server.wait(server.start(["train", str(tmp_path / "run.toml"), "--resume"], said)) == 0
    assert codes == [130] * 5
    assert losses(tmp_path / "run") == calm
    assert not list((tmp_path / "run").rglob("*.partial"))

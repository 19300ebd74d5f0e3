"""The library as Python calls it: paths as text or Path, typed results, progress that somebody hears."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import upcycle
from upcycle import UpcycleError, cli
from upcycle.system import progress
from upcycle.system.progress import Unit, Work


class Listener:
    """Writes down all that it hears."""

    def __init__(self) -> None:
        self.works: list[tuple[str, Unit, int | None]] = []
        self.done = 0
        self.sentences: list[str] = []

    @contextmanager
    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> Iterator[Work]:
        self.works.append((what, unit, total))
        yield self

    def total(self, n: int) -> None:
        pass

    def advance(self, n: int, note: str = "") -> None:
        self.done += n

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    warn = say


@pytest.fixture(scope="module")
def moe(trainable, tmp_path_factory):
    out = tmp_path_factory.mktemp("library") / "moe"
    upcycle.convert(trainable[0], out, {"moe": {"num_experts": 2}})
    return out


def asked_of_the_command_line(capsys, *words: object) -> dict:
    capsys.readouterr()
    cli.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_convert_and_plan_and_verify(trainable, tmp_path, capsys):
    heard = Listener()
    built = upcycle.convert(str(trainable[0]), str(tmp_path / "moe"), progress=heard)
    assert heard.works == [("writing", "bytes", built.nbytes)]
    assert heard.done == built.nbytes
    assert upcycle.plan(str(trainable[0])).blueprint_hash == built.hash
    assert upcycle.verify(str(trainable[0]), str(tmp_path / "moe"), logits=False).as_dict()["holds"]
    assert capsys.readouterr() == ("", "")


def test_advise(trainable, capsys):
    found = upcycle.advise(trainable[0], {"moe": {"num_experts": 4}}, tokens="2B", dense_tokens=10**9)
    options = ["--experts", 4, "--tokens", "2B", "--dense-tokens", "1B"]
    assert asked_of_the_command_line(capsys, "advise", trainable[0], *options) == json.loads(
        json.dumps(found.as_dict())
    )
    with pytest.raises(upcycle.UpcycleError, match="--tokens 'many'; give a number of tokens"):
        upcycle.advise(trainable[0], tokens="many")


def test_calibrate(trainable, tmp_path, capsys):
    heard = Listener()
    given = {"text": str(trainable[1]), "limit": 4, "length": 32}
    found = upcycle.calibrate(trainable[0], str(tmp_path / "a.safetensors"), **given, progress=heard)
    assert ("calibrating", "examples", 4) in heard.works
    other = upcycle.calibrate(str(trainable[0]), tmp_path / "b.safetensors", **given)
    assert found.digest == other.digest
    assert capsys.readouterr() == ("", "")


def test_evaluate(trainable, moe, tmp_path, capsys):
    heard = Listener()
    source = shutil.copytree(trainable[0], tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(trainable[1].read_text()[:3000])
    found = upcycle.evaluate([source, str(moe)], text=str(text), progress=heard)
    assert ("scoring text.txt", "bytes", text.stat().st_size) in heard.works
    assert capsys.readouterr() == ("", "")
    assert not (source / "eval.json").exists()
    assert [each.folder for each in found.scored] == [source, moe]
    assert found.differences[0].against == str(source)
    told = asked_of_the_command_line(capsys, "eval", source, moe, "--text", text)
    assert told == json.loads(json.dumps(found.as_dict()))
    recorded = found.record()
    assert recorded.written == (source / "eval.json", moe / "eval.json")
    assert recorded.lost == ()
    assert json.loads(found.write(str(tmp_path / "all.json")).read_text())["checkpoints"]
    one = upcycle.evaluate(source, text={"mine": text}, limit=2)
    assert [result.name for result in one.scored[0].results] == ["mine"]
    with pytest.raises(upcycle.UpcycleError, match="give at least one CHECKPOINT"):
        upcycle.evaluate([], text=text)
    with pytest.raises(upcycle.UpcycleError, match="no data at nowhere"):
        upcycle.evaluate(source, text="nowhere")


def test_inspect(trainable, moe, capsys):
    found = upcycle.inspect(str(moe))
    assert asked_of_the_command_line(capsys, "inspect", moe) == json.loads(json.dumps(found.as_dict()))
    assert (found.folder, found.model_type, found.routing) == (moe, "mixtral", None)
    assert len(found.blocks) == found.as_dict()["num_layers"]
    for block in found.blocks:
        assert (block.stack, block.experts.count, block.universal) == ("layers", 2, None)
        assert block.experts.between.mean == pytest.approx(1)
        assert block.to_dense == pytest.approx((1, 1))
        assert len(block.router_norms) == 2
    heard = Listener()
    seen = upcycle.inspect(moe, text={"stories": str(trainable[1])}, limit=2, length=32, progress=heard)
    assert ("watching", "examples", 2) in heard.works
    assert seen.routing.as_dict()["domains"][0]["name"] == "stories"
    assert "routing" in seen.as_dict()
    dense = upcycle.inspect(trainable[0])
    assert dense.blocks[0].experts.count == 0
    assert dense.save() is None


@pytest.mark.parametrize("given", [{"limit": 3}, {"seed": 1}, {"length": 8}, {"batch_size": 2}])
def test_what_is_for_rows_is_refused_without_rows(moe, given):
    ((name, value),) = given.items()
    with pytest.raises(
        upcycle.UpcycleError, match=rf"--{name.replace('_', '-')} {value} is for rows to watch .* none"
    ):
        upcycle.inspect(moe, **given)


def test_train_export_and_report(trainable, tmp_path, capsys):
    heard = Listener()
    run = {
        "source": str(trainable[0]), "out": str(tmp_path / "run"), "schedule": {"peak": 1e-3},
        "train": {"steps": 2, "batch_tokens": 64, "sequence_length": 32},
        "data": {"sources": [{"path": str(trainable[1])}]}, "moe": {"num_experts": 2},
    }  # fmt: skip
    result = upcycle.train(run, progress=heard)
    assert ("training", "steps", 2) in heard.works
    assert any("parameters" in sentence for sentence in heard.sentences)
    exported = upcycle.export(tmp_path / "run", str(tmp_path / "trained"))
    page = upcycle.report(tmp_path / "run", str(tmp_path / "page.html"), markdown=tmp_path / "page.md")
    assert page.files == (tmp_path / "page.html", tmp_path / "page.md")
    assert all(file.is_file() for file in page.files)
    assert capsys.readouterr() == ("", "")
    for found in (result, exported, page):
        assert dataclasses.is_dataclass(found)
        assert json.loads(json.dumps(found.as_dict()))
    with pytest.raises(upcycle.UpcycleError, match="nowhere does not exist"):
        upcycle.train({**run, "source": "nowhere"})
    with pytest.raises(upcycle.UpcycleError, match="give at least one RUN"):
        upcycle.report([], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda folder: upcycle.inspect(folder, text="f.txt"),
            r"text = 'f.txt'; give each path a name, such",
        ),
        (
            lambda folder: upcycle.inspect(folder, drop="lm_head"),
            r"drop = 'lm_head'; .* such as \['lm_head'\]",
        ),
        (
            lambda folder: upcycle.calibrate(folder, "out", collect="l2"),
            r"collect = 'l2'; give a list of nam",
        ),
        (lambda folder: upcycle.calibrate(folder, "out", domains="f.txt"), r"domains = 'f.txt'; give each"),
        (lambda folder: upcycle.evaluate(folder, tasks="piqa"), r"tasks = 'piqa'; give a list of names"),
        (
            lambda folder: upcycle.convert(folder, "out", shard_size="1MB"),
            r"shard_size = '1MB'; it must be a w",
        ),
        (lambda folder: upcycle.convert(folder, "out", jobs="2"), r"jobs = '2'; it must be a whole number"),
        (lambda folder: upcycle.plan(folder, jobs=0), r"jobs = 0; it must be a whole number of 1 or more"),
        (lambda folder: upcycle.plan(folder, shard_size=0), r"shard_size = 0; it must be a whole number"),
        (
            lambda folder: upcycle.foretell(folder, world=8, recompute="x"),
            "recompute = 'x'; allowed: True, False, selective",
        ),
        (lambda folder: upcycle.foretell(folder, world="8"), r"world = '8'; it must be a whole number of 1"),
        (lambda folder: upcycle.foretell(folder, world=8, tp="2"), r"tp = '2'; it must be a whole number of"),
        (lambda folder: upcycle.foretell(folder, world=8, gpu=100), r"unknown GPU 100; known: H100"),
        (lambda folder: upcycle.advise(folder, tokens=None), r"--tokens None; it must be a whole number of"),
        (
            lambda folder: upcycle.inspect(folder, text={"a": "f.txt"}, limit="3"),
            r"--limit '3'; it must be a whole number$",
        ),
        (
            lambda folder: upcycle.inspect(folder, text={"a": "f.txt"}, seed=1.5),
            r"--seed 1.5; it must be a whole number$",
        ),
        (
            lambda folder: upcycle.calibrate(folder, "a.safetensors", text="f.txt", seed="1"),
            r"--seed '1'; it must be a whole number$",
        ),
        (
            lambda folder: upcycle.calibrate(folder, "a.safetensors", text="f.txt", threshold="1"),
            r"--threshold '1'; it must be a number$",
        ),
        (
            lambda folder: upcycle.evaluate(folder, text="f.txt", separator=1),
            r"--separator 1; it must be text$",
        ),
    ],
)
def test_mistakes_in_python_are_sentences(call, said, trainable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UpcycleError, match=f"^{said}"):
        call(trainable[0])
    assert not list(tmp_path.iterdir())


def test_nobody_listens_unless_asked(caplog, capsys):
    with progress.work("waiting", "examples", total=3) as work:
        work.advance(1)
        work.total(2)
    with caplog.at_level("INFO", logger="upcycle"):
        progress.say("it goes on")
        progress.warn("look here")
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "it goes on"),
        ("WARNING", "look here"),
    ]
    heard = Listener()
    with progress.reporting_to(heard), progress.reporting_to(None):
        progress.say("heard")
    progress.say("not heard")
    assert heard.sentences == ["heard"]
    assert capsys.readouterr() == ("", "")

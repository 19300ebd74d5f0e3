"""A command opens files of its source, its output, its cache, a temporary folder and Python, no others."""

from __future__ import annotations

import json
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workshop import Workshop

import forked
import upcycle
from files import toml

PYTHON = [
    sys.prefix, sys.base_prefix, *site.getsitepackages(), *sysconfig.get_paths().values(),
    str(Path(upcycle.__file__).parent), str(Path(forked.__file__).parent),
]  # fmt: skip
SYSTEM = ["/proc", "/sys", "/dev", "/etc", "/usr/share", "/usr/lib", "/lib"]  # processors, locale, time zones


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("opened")


@pytest.fixture(scope="module")
def shop(home: Path) -> Workshop:
    (home / "shop").mkdir()
    return Workshop(home / "shop")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[forked.Server]:
    (home / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(home / "temporary"))
        patch.setenv("HF_HOME", str(home / "hub"))
        started = forked.Server()
    yield started
    started.close()


Opened = Callable[..., list[tuple[Path, bool]]]


@pytest.fixture
def opened(server: forked.Server, tmp_path: Path) -> Opened:
    """A function that runs a command line and gives what it opened, and whether to write."""

    def run(*words: object, code: int = 0) -> list[tuple[Path, bool]]:
        said, notes = tmp_path / "said", tmp_path / "notes"
        notes.unlink(missing_ok=True)
        process = server.start([*map(str, words)], said, opened=notes)
        assert server.wait(process) == code, said.read_text()
        lines = map(json.loads, notes.read_text().splitlines())
        return [(Path(os.path.realpath(path)), writes) for path, writes in lines]

    return run


def stray(
    found: list[tuple[Path, bool]], home: Path, *, read: list[Path], written: list[Path]
) -> set[tuple[str, bool]]:
    """What was opened that is none of a command's business."""
    hub = [home / "hub", home / "temporary"]
    both = [*written, *(p.with_name(f"{p.name}.partial") for p in written), *hub]
    both += [p.with_name(f"{p.name}.partial.lock") for p in written] + [
        p.with_name(f"{p.name}.lock") for p in written
    ]
    readable = [*both, *read, *map(Path, [*PYTHON, *SYSTEM])]
    devices = [Path("/dev")]

    def within(path: Path, roots: list[Path]) -> bool:
        return any(path.is_relative_to(os.path.realpath(root)) for root in roots)

    return {
        (str(path), writes)
        for path, writes in found
        if not within(path, [*both, *devices] if writes else readable)
    }


@pytest.mark.slow
def test_no_command_opens_what_is_not_its_own(
    opened: Opened, shop: Workshop, home: Path, tmp_path: Path
) -> None:
    out, run, cache = tmp_path / "out", tmp_path / "run", tmp_path / "cache"
    (tmp_path / "run.toml").write_text(toml(shop.table(run)))
    source, text, run_file = shop.dense, shop.text, tmp_path / "run.toml"
    on_text = ("--text", text, "--length", "16", "--cache", cache)
    commands: list[tuple[tuple[object, ...], list[Path], list[Path]]] = [
        (("plan", source), [source], []),
        (("convert", source, out), [source], [out]),
        (("verify", source, out), [source, out], []),
        (("eval", out, *on_text), [out, text], [out, cache]),
        (("train", run_file), [run_file, source, text], [run]),
        (("export", run, tmp_path / "exported"), [run, source], [tmp_path / "exported"]),
        (("inspect", out), [source, out], []),
    ]
    for words, read, written in commands:
        found = opened(*words)
        assert not stray(found, home, read=read, written=written), words
        mine = [path for path, _ in found if path.is_relative_to(os.path.realpath(read[-1] if read else out))]
        assert mine or words[0] == "train", "the watch sees nothing"


@pytest.mark.slow
def test_the_watch_sees_what_is_stray(opened: Opened, shop: Workshop, home: Path, tmp_path: Path) -> None:
    """A base of a recipe that lies elsewhere, and a file that is not the output."""
    (tmp_path / "base.toml").write_text("[moe]\nnum_experts = 4\n")
    (tmp_path / "recipe.toml").write_text('base = "base.toml"\n')
    out = tmp_path / "out"
    found = opened("convert", shop.dense, out, "--recipe", tmp_path / "recipe.toml")
    allowed = [shop.dense, tmp_path / "recipe.toml"]
    base = (os.path.realpath(tmp_path / "base.toml"), False)
    assert stray(found, home, read=allowed, written=[out]) == {base}
    written = stray(found, home, read=[*allowed, out], written=[])
    assert any(writes for _, writes in written)

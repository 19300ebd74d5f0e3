"""README and the guides are run, block by block and from top to bottom, each in a folder of its own.

- ```console: every line that begins with `$ ` is a command; the lines below it are what it prints.
- ```sh: each line is a command; what it prints is not shown. Lines that begin with `#` are comments.
- ```toml title="NAME" and ```python title="NAME": the file NAME. ```python without a title is run.
- A block that cannot run here has `<!-- not run: REASON -->` before it.

What is printed on standard output is compared line by line. Whole numbers must be the same, numbers with a
decimal point may differ, runs of spaces count as one, and `...` stands for anything.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import gloo
from marks import quick
from upcycle import cli, families

ROOT = Path(__file__).parents[2]
REFERENCE = ("architecture.md", "keys.md")
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in REFERENCE)
GUIDES = [ROOT / "README.md", *PAGES]
LONG = ("train.md", "evaluate.md", "merge.md", "cluster.md", "recycle.md", "encoders.md")
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# folders that a guide adds files to
EXTENDED = ("upcycle.families", "upcycle.init", "upcycle.nn.routers", "upcycle.tasks")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a guide."""

    kind: str
    title: str
    body: str
    reason: str  # why it is not run, or nothing

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command of a block, with the lines that it should print."""
        lines = self.body.replace("\\\n", "").splitlines()
        if self.kind == "sh":
            return [(line, ["..."]) for line in lines if line and not line.startswith("#")]
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                assert found, f"a console block begins with output: {line}"
                found[-1][1].append(line)
        return found


def blocks(guide: Path) -> list[Block]:
    """The fenced blocks of a guide, in order."""
    text = guide.read_text()
    made = [
        Block(
            kind=m["kind"], title=m["title"] or "", body=m["body"],
            reason=" ".join((m["reason"] or "").split()),
        )
        for m in BLOCK.finditer(text)
    ]  # fmt: skip
    assert text.count("\n```") == 2 * len(made), f"a block of {guide.name} is not closed, or not understood"
    return made


def masked(text: str) -> str:
    """A text without what may differ from machine to machine."""
    text = re.sub(r"\b[0-9a-f]{12,}\b", "#", text)  # hashes
    text = re.sub(r"[-+]?\d[\d,]*(?:\.\d+(?:e[-+]\d+)?|e[-+]\d+)", "#", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def matches(wanted: list[str], printed: str) -> bool:
    """Whether a command printed what the guide says."""
    pattern = ""
    for line in masked("\n".join(wanted)).splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(re.escape(part) for part in line.split("...")) + r"\n"
    came = masked(printed)
    return re.fullmatch(pattern, came + "\n" if came else "") is not None


def run(command: str) -> int:
    """Run a command line of a guide in this process; its exit code."""
    words = shlex.split(command, comments=True)
    match words:
        case ["upcycle", *rest]:
            return code_of(lambda: cli.main(rest))
        case ["python", file, *rest]:
            return code_of(lambda: script(Path(file), rest))
        case ["torchrun", "--nproc-per-node", world, "-m", "upcycle", *rest]:
            return ranks(int(world), rest)
        case ["cat", file]:
            print(Path(file).read_text(), end="")
            return 0
    raise AssertionError(f"this test does not know how to run {command!r}; say why in a comment, or teach it")


def code_of(call: Callable[[], None]) -> int:
    """How a call would have ended its process."""
    try:
        call()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


MADE: dict[str, Path] = {}  # the folder in which a script of docs/ ran once


def script(file: Path, arguments: list[str]) -> None:
    """Run a script. One of `docs/` is run once, and what it made is copied after that."""
    ours = ROOT / "docs" / file.name
    if not ours.is_file():
        before, sys.argv = sys.argv, [str(file), *arguments]
        try:
            runpy.run_path(str(file), run_name="__main__")
        finally:
            sys.argv = before
        return
    if file.name not in MADE:
        folder = Path.cwd().parent / file.stem
        folder.mkdir()
        with contextlib.chdir(folder):
            runpy.run_path(str(ours), run_name="__main__")
        MADE[file.name] = folder
    shutil.copytree(MADE[file.name], Path.cwd(), dirs_exist_ok=True)
    if not file.is_file():
        shutil.copy(ours, file)


def ranks(world: int, arguments: list[str]) -> int:
    """The command line on so many ranks, as torchrun starts it; the worst exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    started = []
    for rank in range(world):
        process = os.fork()
        if not process:
            code = 1
            try:
                os.environ.update(gloo.environment(rank, world, port))
                code = code_of(lambda: cli.main(arguments))
                sys.stdout.flush()
            finally:
                os._exit(code)
        started.append(process)
    return max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, whose `src/upcycle/` adds to the package."""
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    packages = [importlib.import_module(name) for name in EXTENDED]
    before = set(sys.modules)
    for package in packages:
        where = tmp_path / "src" / package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(where)])
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def see_new_files() -> None:
    """Let this process find the files of the package that a guide added, as a new process would."""
    importlib.invalidate_caches()
    for name in families.names():
        if f"upcycled_{name}" not in CONFIG_MAPPING and name in CONFIG_MAPPING:
            CONFIG_MAPPING._mapping[f"upcycled_{name}"] = f"Upcycled{CONFIG_MAPPING_NAMES[name]}"
            CONFIG_MAPPING._modules[f"upcycled_{name}"] = CONFIG_MAPPING._modules["upcycled_llama"]


@pytest.mark.parametrize(
    "guide", quick(GUIDES, *(g for g in GUIDES if g.name not in LONG)), ids=lambda g: g.name
)
def test_what_a_guide_says_is_what_happens(guide, room, capfd):
    stale = []
    for block in blocks(guide):
        if block.reason:
            continue
        if block.title:
            file = room / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.body)
            see_new_files()
        elif block.kind in ("console", "sh"):
            for command, wanted in block.commands:
                capfd.readouterr()
                code = run(command)
                printed, said = capfd.readouterr()
                print_for_a_reader(command, printed)
                assert code == 0, f"$ {command}\n{printed}{said}"
                if not matches(wanted, printed):
                    stale.append(f"$ {command}\nsays\n{printed}\nand not\n" + "\n".join(wanted))
        elif block.kind == "python":
            exec(compile(block.body, f"{guide.name}: {block.body.splitlines()[0]}", "exec"), {})
        elif block.kind == "toml":
            tomllib.loads(block.body)
    assert not stale, "\n\n".join(stale)


def print_for_a_reader(command: str, printed: str) -> None:
    """What really came, for the person who writes it into the guide (UPCYCLE_GUIDES=FILE)."""
    if file := os.environ.get("UPCYCLE_GUIDES"):
        with open(file, "a") as out:
            out.write(f"$ {command}\n{printed}")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_command_is_in_a_block_that_is_run(guide):
    """No command hides in a block of another kind, and a reason is a sentence."""
    for block in blocks(guide):
        starts = re.search(r"^\s*(?:\$ )?(?:upcycle|torchrun|python|make|pip) ", block.body, re.MULTILINE)
        assert block.kind in ("console", "sh") or not starts or block.title, block.body
        assert not block.reason or len(block.reason.split()) > 3
    assert not re.search(
        r"^ {4,}(?:\$ )?(?:upcycle|torchrun) ", BLOCK.sub("", guide.read_text()), re.MULTILINE
    )


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_links_lead_somewhere(guide):
    """Files and headings that a guide links to are there."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", guide.read_text()):
        name, _, heading = target.partition("#")
        file = guide.parent / name if name else guide
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize(
    ("wanted", "printed", "same"),
    [
        (["4.66 M parameters"], "4.71 M   parameters\n", True),
        (["8 experts"], "4 experts\n", False),
        (["a", "...", "d"], "a\nb\nc\nd\n", True),
        (["a", "...", "d"], "a\nb\nc\n", False),
        (["blueprint 0123456789abcdef"], "blueprint fedcba9876543210\n", True),
        (["in ... s"], "in 3 s\n", True),
        ([], "a line that the guide leaves out\n", False),
        (["holds"], "", False),
    ],
)  # fmt: skip
def test_the_comparison_itself(wanted, printed, same):
    assert matches(wanted, printed) == same


@pytest.mark.parametrize("name", LONG)
def test_what_a_long_guide_imports_is_there(name: str) -> None:
    """The guides themselves are run by the slow form of the test above."""
    for block in blocks(ROOT / "docs" / name):
        if block.kind == "python" and not block.reason:
            lines = ast.parse(block.body).body
            imports = [line for line in lines if isinstance(line, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), name, "exec"), {})

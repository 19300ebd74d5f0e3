"""A machine that converts needs no torch: the group `convert` of pyproject.toml is enough."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import upcycle
from words import make_tokenizer

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

# As on such a machine, a library is not found; an import of it says so, and `find_spec` gives None.
BLOCKED = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
COMMANDS = """
import json
from upcycle.cli import main

for words in json.loads(sys.argv[1]):
    print("\\f", end="")
    print("\\f", end="", file=sys.stderr)
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print("\\f", code, sep="", end="")
"""
CALLS = """
import upcycle

source, moe, file, run = sys.argv[1:]
for call in (
    lambda: upcycle.verify(source, moe),
    lambda: upcycle.evaluate(moe, text=file),
    lambda: upcycle.inspect(moe, text={{"file": file}}),
    lambda: upcycle.calibrate(source, moe + ".safetensors", text=file),
    lambda: upcycle.load(moe),
    lambda: upcycle.train(run),
    lambda: upcycle.export(moe, moe + "2"),
):
    try:
        call()
    except upcycle.UpcycleError as error:
        print(error)
"""


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, as they are compared."""
    return {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in requirements}


def left_out() -> set[str]:
    """The top modules of everything that is asked for and not in the group `convert`."""
    project = PROJECT["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    needless = names(asked) - names(PROJECT["dependency-groups"]["convert"]) - {"upcycle"}
    found = packages_distributions()
    owners = {top: {name.lower().replace("_", "-") for name in owners} for top, owners in found.items()}
    return {top for top, several in owners.items() if several & needless} | {"tokenizers"}


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command line ended, and what it printed."""

    code: int
    output: str
    errors: str


def run(*lines: list[object]) -> list[Done]:
    """Command lines, one after another in one process of such a machine."""
    script = (BLOCKED + COMMANDS).format(missing=sorted(left_out()))
    words = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed, errors = done.stdout.split("\f")[1:], done.stderr.split("\f")[1:]
    return [
        Done(code=int(code), output=output, errors=said)
        for output, code, said in zip(printed[::2], printed[1::2], errors, strict=True)
    ]


def test_the_group_is_the_head_of_what_is_asked_for():
    group = PROJECT["dependency-groups"]["convert"]
    assert PROJECT["project"]["dependencies"][: len(group)] == group
    assert {"torch", "transformers", "accelerate", "safetensors"} <= left_out()


def test_a_conversion_without_torch(dense, tmp_path):
    source, out = shutil.copytree(dense("llama"), tmp_path / "dense"), tmp_path / "moe"
    make_tokenizer(source)
    lines = [
        ["plan", source, "--json"],
        ["convert", source, out, "--experts", "4", "--init", "drop"],
        ["advise", source, "--tokens", "1B", "--json"],
        ["inspect", out, "--json"],
        ["list", "--json"],
        ["keys", "--json"],
        ["--version"],
    ]
    for words, done in zip(lines, run(*lines), strict=True):
        assert done.code == 0, done.errors
        if "--json" in words:
            assert json.loads(done.output)
    assert (out / "config.json").is_file()


def test_what_needs_torch_says_so(dense, tmp_path):
    source, out, run_file = dense("llama"), tmp_path / "moe", tmp_path / "run.toml"
    run_file.write_text(
        f'source = "{source}"\nout = "{tmp_path}/out"\ntrain = {{steps = 1}}\nschedule.peak = 1e-3\n'
        f'data.sources = [{{path = "{run_file}"}}]\n'
    )
    commands = [["verify", source, out], ["eval", out, "--text", run_file], ["train", run_file]]
    converted, *others = run(["convert", source, out], *commands)
    assert converted.code == 0
    for done in others:
        assert done.code == 2
        said = r"this needs \w+, which is not installed: pip install upcycle"
        assert re.search(said, done.errors), done.errors
        assert done.errors.count("\n") == 1


def test_calls_from_python_that_need_torch_say_so(dense, tmp_path):
    source, moe, run_file = dense("llama"), tmp_path / "moe", tmp_path / "run.toml"
    upcycle.convert(source, moe)
    run_file.write_text(
        f'source = "{source}"\nout = "{tmp_path}/out"\ntrain = {{steps = 1}}\nschedule.peak = 1e-3\n'
        f'data.sources = [{{path = "{run_file}"}}]\n'
    )
    script = (BLOCKED + CALLS).format(missing=sorted(left_out()))
    words = [sys.executable, "-c", script, *map(str, (source, moe, run_file, run_file))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 7
    for line in said:
        assert re.match(r"this needs \w+, which is not installed: pip install upcycle", line), line

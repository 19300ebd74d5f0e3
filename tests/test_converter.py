"""A machine that converts needs no torch: the group `convert` of pyproject.toml is enough."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from upcycle.cli import main

main(sys.argv[1:])
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


def run(*words: object) -> subprocess.CompletedProcess[str]:
    script = BLOCKED.format(missing=sorted(left_out()))
    line = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_group_is_the_head_of_what_is_asked_for():
    group = PROJECT["dependency-groups"]["convert"]
    assert PROJECT["project"]["dependencies"][: len(group)] == group
    assert {"torch", "transformers", "accelerate", "safetensors"} <= left_out()


def test_a_conversion_without_torch(dense, tmp_path):
    source, out = dense("llama"), tmp_path / "moe"
    for words in (
        ["plan", source, "--json"],
        ["convert", source, out, "--experts", "4", "--init", "drop"],
        ["advise", source, "--tokens", "1B", "--json"],
        ["inspect", out, "--json"],
        ["list", "--json"],
        ["keys", "--json"],
        ["--version"],
    ):
        done = run(*words)
        assert done.returncode == 0, done.stderr
        if "--json" in words:
            assert json.loads(done.stdout)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("command", ["verify", "eval", "train"])
def test_what_needs_torch_says_so(command, dense, tmp_path):
    source, out, run_file = dense("llama"), tmp_path / "moe", tmp_path / "run.toml"
    assert run("convert", source, out).returncode == 0
    run_file.write_text(
        f'source = "{source}"\nout = "{tmp_path}/out"\ntrain = {{steps = 1}}\nschedule.peak = 1e-3\n'
        f'data.sources = [{{path = "{run_file}"}}]\n'
    )
    words = {"verify": [source, out], "eval": [out, "--text", run_file], "train": [run_file]}[command]
    done = run(command, *words)
    assert done.returncode == 2
    assert re.search(r"this needs \w+, which is not installed: pip install upcycle", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1

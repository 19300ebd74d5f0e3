"""The corpus of the experiments stays the one of the recorded runs, although our requirements grow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import scripts

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
ELSEWHERE = ("pip", "setuptools", "torch")  # come with the environment, or stand in the makefile


@pytest.fixture
def corpus() -> Iterator[ModuleType]:
    with scripts.loaded("corpus") as module:
        yield module


def test_packages_that_the_recorded_corpus_does_not_name_are_left_out(corpus, monkeypatch, tmp_path):
    installed = [metadata.distribution(name) for name in ("pluggy", "pytest", "iniconfig")]
    monkeypatch.setattr(metadata, "distributions", lambda: installed)
    monkeypatch.setattr(corpus, "RECORDED", tmp_path / "corpus.json")
    assert [name for name, *_ in corpus.packages()] == ["iniconfig", "pluggy", "pytest"]

    kept = dict.fromkeys(("version", "files", "bytes", "held_out"), 1)
    named = [{"name": name, "sha256": "other", **kept} for name in ("gone", "iniconfig", "pluggy")]
    corpus.RECORDED.write_text(json.dumps({"packages": named}))
    taken = [
        corpus.Package(name=name, sha256=corpus.hash_of(texts), **kept)
        for name, _, texts in corpus.packages()
    ]
    assert [package.name for package in taken] == ["iniconfig", "pluggy"]
    assert corpus.others(taken) == ["gone", "iniconfig", "pluggy"]

    corpus.RECORDED.write_text(json.dumps({"packages": [vars(package) for package in taken]}))
    assert corpus.others(taken) == []


def test_a_new_environment_has_the_packages_of_the_recorded_corpus(corpus):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE))
    pinned = {corpus.normalised(name): version for name, version in pinned.items()}
    recorded = {name: package.version for name, package in corpus.recorded().items()}
    assert {n: v for n, v in recorded.items() if n not in ELSEWHERE} == {
        name: pinned.get(name) for name in recorded if name not in ELSEWHERE
    }

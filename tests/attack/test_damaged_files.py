"""Damaged files of every kind: each is taken or refused with a sentence. `make attack` tries a million."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aims
import pytest
import trial
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workshop import Workshop, in_memory

from marks import quick

TARGETS = list(aims.targets(Workshop(Path())))
PAGE = "the whole page: report"  # a second for each of its cases, and reports have tests of their own
SHARE = 8  # the suite tries an eighth of the cases that give a target its share of a campaign
JSON = [name for name in TARGETS if name.partition(":")[0].endswith(".json")]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    at = in_memory() or tmp_path_factory.mktemp("attack")
    with tempfile.TemporaryDirectory(dir=at, prefix="upcycle-attack-", ignore_cleanup_errors=True) as folder:
        yield aims.targets(Workshop(Path(folder)))


@pytest.mark.parametrize("name", quick(TARGETS, *(name for name in TARGETS if name != PAGE)))
def test_damage_is_refused_or_taken(name: str, made: dict[str, Any]) -> None:
    target = made[name]()
    for start in target.starts:
        assert trial.judged(start.run, start.data) == (True, None), "the whole file is not taken"
    tried = max(len(target.starts), target.cases // SHARE)
    counts = trial.attack(target, range(tried))
    assert not counts.crashes, "\n".join(map(str, counts.crashes))
    assert counts.cases == tried == counts.accepted + counts.refused


@pytest.mark.parametrize("name", JSON)
def test_any_value_anywhere_is_refused_or_taken(name: str, made: dict[str, Any]) -> None:
    """JSON files with one part replaced by any JSON value."""
    target = made[name]()

    @settings(
        max_examples=max(5, target.cases // 50), derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(target.starts))
        document = json.loads(start.data)
        path = data.draw(st.sampled_from(_paths(document)))
        changed = json.dumps(_put(document, path, data.draw(values))).encode()
        _, error = trial.judged(start.run, changed)
        if error is not None:
            raise error

    run()


def _paths(value: Any, most: int = 300) -> list[tuple[Any, ...]]:
    """Where the parts of a JSON value are, the whole of it first."""
    found: list[tuple[Any, ...]] = [()]
    for path in found:
        inner = value
        for key in path:
            inner = inner[key]
        keys = [*inner] if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        found += [(*path, key) for key in keys]
        if len(found) > most:
            break
    return found


def _put(value: Any, path: tuple[Any, ...], part: Any) -> Any:
    if not path:
        return part
    value[path[0]] = _put(value[path[0]], path[1:], part)
    return value


def test_a_case_is_the_same_every_time(made: dict[str, Any]) -> None:
    target = made["JSON lines: documents"]()
    assert [target.case(i)[1] for i in range(50)] == [target.case(i)[1] for i in range(50)]
    assert len({target.case(i)[1] for i in range(50)}) > 40


def test_a_crash_is_found_and_its_input_shortened() -> None:
    """The suite sees what it is there for: another exception, a wrong exit code, too little memory."""

    def fragile(data: bytes) -> None:
        if b"x" in data:
            raise KeyError("x")
        if b"y" in data:
            raise SystemExit(3)
        if b"z" in data:
            raise MemoryError

    start = trial.Start(b"abc" * 50, fragile)
    assert trial.judged(fragile, b"abc") == (True, None)
    for letter, kind in ((b"x", KeyError), (b"y", SystemExit), (b"z", MemoryError)):
        target = trial.Target("fragile", lambda draw, raw, letter=letter: raw + letter + raw, [start])
        counts = trial.attack(target, range(3))
        assert (counts.cases, counts.accepted, counts.refused, len(counts.crashes)) == (3, 0, 0, 3)
        assert counts.crashes[0].data == letter
        assert kind.__name__ in str(counts.crashes[0])

"""The documents of a folder as records: written and read again, as older versions wrote them, and damaged.

`samples` holds files that the version before the records wrote: of a run of a Mixture of Experts and of a
dense one, of what they were exported to, and of a conversion.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from damage import spoil
from upcycle.errors import UpcycleError
from upcycle.records.evaluation import EvaluationRecord
from upcycle.records.metrics import StepMetrics
from upcycle.records.provenance import Provenance
from upcycle.records.reader import DamagedError, Document, load, sometimes
from upcycle.records.routing import RoutingRecord
from upcycle.records.run import RunRecord
from upcycle.records.state import RunState

SAMPLES = Path(__file__).parent / "samples"
KINDS: dict[str, type[Document]] = {
    kind.FILE: kind
    for kind in (EvaluationRecord, Provenance, RoutingRecord, RunRecord, RunState, StepMetrics)
}


def documents() -> list[tuple[str, type[Document], dict[str, Any]]]:
    """Every document of the samples, with its file and its record; of metrics, every line."""
    found = []
    for path in sorted(SAMPLES.glob("*/*")):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        name = f"{path.parent.name}/{path.name}"
        found += [(name, KINDS[path.name], json.loads(text)) for text in texts]
    return found


def test_there_is_a_sample_of_each():
    assert {kind for _, kind, _ in documents()} == {*KINDS.values()}


@pytest.mark.parametrize(("name", "kind", "table"), documents())
def test_what_was_written_before_is_read_and_written_as_it_was(name, kind, table):
    """With no key lost, none added, and every value the same."""
    record = kind.of(table, name)
    again = json.loads(json.dumps(record.as_table()))
    assert again == table
    assert kind.of(again, name) == record
    assert not record.unknown


@pytest.mark.parametrize(("name", "kind", "table"), documents())
def test_a_key_of_a_newer_version_is_kept(name, kind, table):
    newer = {**table, "new": {"a": [1]}}
    assert kind.of(newer, name).as_table() == newer | kind.of(table, name).as_table()


@pytest.mark.parametrize(("name", "kind", "table"), documents())
def test_another_format_is_refused(name, kind, table):
    with pytest.raises(UpcycleError, match=rf"{name} has format 7; this version reads 1"):
        kind.of({**table, "format": 7}, name)


@pytest.mark.parametrize(("name", "kind", "table"), documents())
def test_every_key_that_must_be_there_is_named_if_it_is_not(name, kind, table):
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    assert needed
    for key in needed:
        with pytest.raises(DamagedError, match=rf"{name} is damaged: {key} is missing in it"):
            kind.of({k: v for k, v in table.items() if k != key}, name)


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        ("run/run.json", {"parameters": "x"}, "parameters is 'x', not a whole number below 2^63"),
        ("run/run.json", {"parameters": 2**63}, "parameters is 9223372036854775808, not a whole number"),
        ("run/run.json", {"from_scratch": 0}, "from_scratch is 0, not true or false"),
        ("run/run.json", {"source": {"name": "a", "path": 5}}, "source.path is 5, not a text"),
        ("run/run.json", {"source": []}, "source is [], not a table"),
        ("run/run.json", {"versions": {"torch": None}}, "versions.torch is None, not a text"),
        ("run/run.json", {"tokens_per_row": 0}, "tokens_per_row is 0, not 1 or more"),
        ("run/run.json", {"run": {"train": {}}}, "run.data is missing in it"),
        (
            "run/run.json",
            {"stage_costs": [{"first": 2, "training_flops_per_row": 1}]},
            "stage_costs.0.first is 2, and the steps before the first stage are 0",
        ),
        (
            "run/run.json",
            {"stage_costs": [{"first": first, "training_flops_per_row": 1} for first in (0, 5, 5)]},
            "stage_costs.2.first is 5, not after 5",
        ),
        (
            "run/run.json",
            {"stage_costs": [{"first": 0, "training_flops_per_row": 0}]},
            "stage_costs.0.training_flops_per_row is 0, not 1 or more",
        ),
        ("run/metrics.jsonl", {"loss": True}, "loss is True, not a number"),
        ("run/metrics.jsonl", {"layers": [{"layer": "1"}]}, "layers.0.layer is '1', not a whole number"),
        ("run/state.json", {"step": -1}, "step is -1, not 0 or more"),
        ("run/state.json", {"micro_batch": 0}, "micro_batch is 0, not 1 or more"),
        ("moe/upcycle.json", {"recipe": None}, "recipe and blueprint_hash are not both there"),
        ("moe/upcycle.json", {"recipe": {"moe": {}, "init": {}}}, "recipe.init.name is missing in it"),
        ("moe/upcycle.json", {"carried_files": "a"}, "carried_files is 'a', not a list"),
        ("moe/eval.json", {"results": [{"kind": 5}]}, "results.0.kind is 5, not a text"),
        ("moe/routing.json", {"layers": [5]}, "layers.0 is 5, not a table"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_key(file, change, why):
    kind = KINDS[file.partition("/")[2]]
    table = next(table for name, _, table in documents() if name == file)
    with pytest.raises(DamagedError, match=re.escape(f"{file} is damaged: {why}")):
        kind.of({**table, **change}, file)


def test_damage_ends_in_a_sentence():
    """Any leaf or branch of a document replaced by anything: read, or refused in a sentence."""
    drawn = random.Random(0)
    read = 0
    for _ in range(60):
        for name, kind, table in documents():
            spoiled = spoil(drawn, json.loads(json.dumps(table)))
            with suppress(UpcycleError):
                kind.of(spoiled, name)
                read += 1
    assert 0 < read < 60 * len(documents()) - 200


DEEP = b'{"x": ' + b"[" * 400 + b"]" * 400 + b"}"  # JSON's reader takes it, and a record could not


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000, DEEP])
def test_a_file_that_is_no_json_object(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"x\.json is damaged: it "):
        load(tmp_path / "x.json", "there is none")
    with pytest.raises(UpcycleError, match="there is none"):
        load(tmp_path / "y.json", "there is none")


def test_numbers_are_what_they_were():
    """Whole numbers stay whole, and a loss that is no number stays one."""
    step = StepMetrics.of({"step": 1, "tokens": 16, "loss": math.nan, "lr": 0, "mfu": None}, "x")
    assert json.dumps(step.as_table()).startswith('{"step": 1, "tokens": 16, "loss": NaN, "lr": 0, ')


def test_a_state_knows_itself(tmp_path):
    """Its hash is that of its file, keys of newer versions included; a change is seen."""
    state = RunState(step=3, batches={"a": 1}, identity={}, unknown={"new": 5}).sealed()
    path = tmp_path / RunState.FILE
    path.write_text(json.dumps(state.as_table()))
    assert RunState.read(tmp_path) == state
    path.write_text(json.dumps(state.as_table() | {"new": 6}))
    with pytest.raises(DamagedError, match="it is not as it was written"):
        RunState.read(tmp_path)
    for run in ("run", "run-dense"):
        assert RunState.read(SAMPLES / run).step == 2


def test_fields_that_are_there_sometimes():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Some(Document):
        format: int = sometimes(Document.FORMAT)
        always: int | None = None
        now_and_then: tuple[int, ...] = sometimes(())

    assert Some().as_table() == {"always": None}
    assert Some(now_and_then=(1,)).as_table() == {"always": None, "now_and_then": [1]}
    assert Some.of({}, "x") == Some()


def test_reading_records_needs_no_torch():
    import subprocess
    import sys

    modules = ", ".join(f"upcycle.records.{name}" for name in ("evaluation", "metrics", "provenance", "run"))
    script = f"import sys, {modules}\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"

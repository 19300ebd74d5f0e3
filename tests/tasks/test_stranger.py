"""A task that nobody here wrote, in one file: it is trained, watched and scored like the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import upcycle
from tiny import make
from upcycle import tasks
from upcycle.cli import keys
from upcycle.evaluation.scores import ToScore, evaluate
from upcycle.evaluation.specialisation import ToWatch, specialisation
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run
from words import SPECIAL, WORDS, make_tokenizer, sentence

PARITY = '''
"""Which tokens of a text have a number that leaves a rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.data.feeding import Feed, Feeding
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._tokens import TokenFeed
from upcycle.tensors import rng

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """The class of a token is the rest of its number."""

    summary = "the rest of each token's number"
    heads = ("ForTokenClassification",)

    divisor: int = 2  # what the number is divided by

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        def make(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
            return {"inputs": rows[:, :-1], "labels": rows[:, :-1] % self.divisor}

        return TokenFeed(feeding, subject, make)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        return Question({"input_ids": batch["inputs"]}, batch["labels"])

    def targets(self, batch: Batch) -> int:
        return batch["labels"].numel()

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return {"layers": length}


task = Parity
'''


@pytest.fixture
def parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stranger's file, in a folder beside those of the tasks that come with the package."""
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "parity.py").write_text(PARITY)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "strangers")])
    yield
    sys.modules.pop("upcycle.tasks.parity", None)
    vars(tasks).pop("parity", None)


def run_of(dense: Path, out: Path) -> dict[str, Any]:
    """A run of two steps of a Mixture of Experts."""
    return {
        "source": str(dense), "out": str(out), "task": {"name": "parity", "divisor": 2},
        "moe": {"num_experts": 4, "target": "upcycled"},
        "data": {"sources": [{"path": str(dense / "text.txt")}], "held_out": 0.25},
        "train": {"steps": 2, "batch_size": 8, "sequence_length": 24, "eval_every": 1},
        "schedule": {"name": "constant", "peak": 1e-3},
    }  # fmt: skip


def source(folder: Path) -> Path:
    """A BERT that classifies tokens, and a text."""
    size = len(SPECIAL) + len(WORDS) + 1
    make(folder, "BertForTokenClassification", vocab_size=size, hidden_dropout_prob=0.0)
    make_tokenizer(folder)
    random = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n".join(sentence(random) for _ in range(60)))
    return folder


def test_a_task_in_one_file(parity, tmp_path):
    """It trains two steps of a Mixture of Experts, and `eval` says what plain torch says of all rows."""
    dense = source(tmp_path / "dense")
    text = dense / "text.txt"
    train(run_of(dense, tmp_path / "run"))
    lines = read(tmp_path / "run")
    assert [line.step for line in lines] == [1, 2]
    assert lines[1].held_out_loss < lines[0].held_out_start
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"] == "parity"

    out = export(tmp_path / "run", tmp_path / "out").out
    found = evaluate(out, ToScore(text=text, length=24))
    model, ids = upcycle.open(out).eval(), rows_of(out, text, 24)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits.flatten(0, 1)
    labels = ids.flatten() % 2
    assert found["task"] == "parity"
    assert (found["examples"], found["targets"]) == (len(ids), ids.numel())
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))

    seen = specialisation(out, ToWatch(text={"text": text}, length=24, limit=8)).as_dict()
    assert seen["domains"][0]["shown"] == "parity"
    assert "divisor" in {key.name for key in keys.everything()['[task] name = "parity"']}


class Named:
    """A judge that says by which of its ways it was asked to score."""

    def rows(self, task: tasks.Task, path: Path) -> str:
        return f"rows of {task.name}"

    def windows(self, path: Path) -> str:
        return "windows"


def test_a_task_chooses_how_it_is_scored(parity):
    chosen = {name: tasks.find(name)().score(Named(), Path("text.txt")) for name in tasks.names()}
    assert chosen.pop("causal_lm") == "windows"
    assert chosen == {name: f"rows of {name}" for name in chosen}
    assert "parity" in chosen


def rows_of(folder: Path, text: Path, length: int) -> torch.Tensor:
    """All whole rows of a text, [N, length]. The last token of the text is in none of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text.read_text()).input_ids, tokenizer.eos_token_id]
    count = (len(ids) - 1) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def test_a_dry_run_of_it_takes_steps_once_it_says_its_shapes(parity, tmp_path, monkeypatch):
    run = Run.of(run_of(source(tmp_path / "dense"), tmp_path / "run"))
    found = rehearse(run)
    assert (found.stepped, found.not_stepped) == (0, "rows of parity are known only with the data")
    shapes = {"inputs": (8, 24), "labels": (8, 24)}
    monkeypatch.setattr(type(run.task), "shapes", lambda task, rows, length: shapes, raising=False)
    found = rehearse(run)
    assert (found.stepped, found.not_stepped) == (2, None)

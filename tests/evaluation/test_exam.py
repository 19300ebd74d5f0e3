"""Tasks that a model is scored on in training: the numbers of `upcycle eval`, and nothing else changes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import gloo
import ranks
import upcycle
from upcycle import UpcycleError
from upcycle.api.training import rehearse
from upcycle.dense.subject import Subject
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.exam import HarnessExaminer
from upcycle.training import loop
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upcycle[eval]'")


@pytest.fixture
def tasks(tmp_path):
    rows = [{"text": f"Once upon a time there were {n} cats who liked to"} for n in range(6)]
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"tasks": ["lambada_openai"], "task_files": str(tmp_path), "batch_size": 2}


@pytest.fixture
def table(trainable, tasks, tmp_path):
    source, text = trainable
    return {
        "source": str(source),
        "out": str(tmp_path / "run"),
        "moe": {"num_experts": 4},
        "data": {"sources": [{"path": str(text), "separator": "<|endoftext|>"}]},
        "train": {"steps": 3, "batch_tokens": 128, "sequence_length": 64, "eval_every": 0},
        "schedule": {"name": "constant", "peak": 1e-3},
        "eval": {**tasks, "every": 2},
    }


def test_tasks_are_scored_during_training(table, tasks, tmp_path):
    upcycle.train(table)
    lines = read(tmp_path / "run")
    assert [line.scores is not None for line in lines] == [False, True, True]
    upcycle.export(tmp_path / "run", tmp_path / "out")
    found = upcycle.evaluate(tmp_path / "out", **tasks).scored[0].results[0]
    wanted = {f"lambada_openai/{name}": metric.value for name, metric in found.metrics.items()}
    assert dict(lines[2].scores) == pytest.approx(wanted, rel=1e-5)
    assert lines[1].scores != lines[2].scores
    upcycle.train({**table, "out": str(tmp_path / "without"), "eval": {}})
    assert [line.loss for line in read(tmp_path / "without")] == [line.loss for line in lines]
    with pytest.raises(UpcycleError, match=r"take one of them"):
        loop.train(Run.of({**table, "out": str(tmp_path / "third")}))


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        ("", {"tasks": ["piqa"]}, r"has no piqa\.jsonl for the task piqa.*leave out --task-files .*eval\."),
        ("", {"task_files": "nowhere"}, r"no folder nowhere; --task-files, or eval\.task_files in a run"),
        ("", {"tasks": ["arc_easi"], "task_files": None}, "has no task arc_easi; near it are arc_easy"),
        ('{"text": 5}\n', {}, r"lambada_openai\.jsonl, line 1: 'text' is int"),
        ("{\n", {}, r"lambada_openai\.jsonl, line 1 is not JSON"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_step(table, tasks, tmp_path, line, changes, said):
    file = tmp_path / "lambada_openai.jsonl"
    file.write_text(line + file.read_text())
    asked = {**table["eval"], **changes}
    bad = table | {"eval": {key: value for key, value in asked.items() if value is not None}}
    for begin in (rehearse, upcycle.train):
        with pytest.raises(UpcycleError, match=said):
            begin(bad)
    assert not Path(table["out"]).exists()


def test_a_data_set_that_cannot_be_fetched_is_refused_before_the_first_step(table):
    """A dry run fetches nothing, so it does not know."""
    asked = table | {"eval": {"tasks": ["arc_easy"]}}
    assert rehearse(asked).steps == 3
    with pytest.raises(UpcycleError, match=r"arc_easy cannot be fetched .* eval\.task_files"):
        upcycle.train(asked)
    assert not Path(table["out"]).exists()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_score_that_fails_loses_no_step(table, tmp_path, monkeypatch, asynchronous):
    """In the middle of a run and at its end; a resumed run asks first for what is not there."""
    whole = {**table, "out": str(tmp_path / "whole")}
    upcycle.train(whole)
    table |= {"checkpoint": {"every": 0, "asynchronous": asynchronous}}
    score = HarnessExaminer.score
    for step, works in ((2, []), (3, [True])):
        outcomes = iter([*works, False])

        def perhaps(*given, outcomes=outcomes):
            if next(outcomes):
                return score(*given)
            raise UpcycleError("no memory")

        monkeypatch.setattr(HarnessExaminer, "score", perhaps)
        with pytest.raises(UpcycleError, match=rf"step {step} cannot be scored .*: no memory; .*--resume"):
            upcycle.train(table, resume=step > 2)
        assert (tmp_path / f"run/checkpoints/step-{step}").is_dir()
        assert [line.step for line in read(tmp_path / "run")] == [*range(1, step + 1)]
        assert read(tmp_path / "run")[-1].scores is None
    monkeypatch.setattr(HarnessExaminer, "score", score)
    assert upcycle.train(table, resume=True).finished
    found, wanted = (read(tmp_path / name) for name in ("run", "whole"))
    assert [(line.step, line.loss, line.scores) for line in found] == [
        (line.step, line.loss, line.scores) for line in wanted
    ]
    monkeypatch.setattr(HarnessExaminer, "score", None)
    upcycle.train(table, resume=True)  # nothing is left to ask


def test_a_run_that_diverges_goes_on_without_scores(table, tmp_path, caplog):
    """NaN in all logits would give it 100 % on some tasks."""
    upcycle.train(table | {"schedule": {"name": "constant", "peak": 1e38}, "spikes": {"nonfinite": "skip"}})
    assert [line.scores for line in read(tmp_path / "run")] == [None, {}, {}]
    assert "the model gives NaN, so its tasks have no scores" in caplog.messages


def test_one_rank_says_that_there_are_no_scores(table, trainable, caplog):
    run, subject = Run.of(table), Subject.of(trainable[0])
    model = upcycle.open(trainable[0])
    model.get_output_embeddings().weight.data.fill_(math.nan)
    for rank, said in ((0, 1), (1, 0)):
        here = Ranks(rank=rank, dp_rank=rank, device=torch.device("cpu"))
        examiner = HarnessExaminer()
        examiner.prepare(run, subject)
        assert examiner.score(model, run, subject, here) == {}
        assert caplog.messages.count("the model gives NaN, so its tasks have no scores") == said
        caplog.clear()


@pytest.mark.slow
def test_ranks_that_share_a_model_score_as_one_process_does(table, tmp_path):
    """Likelihoods and greedy texts, in the middle of training and at its end; no loss is another one."""
    prompts = [[1, 300, 301], [1, 290], [1, 310, 311, 312, 313]]
    table |= {"train": {**table["train"], "steps": 2}, "eval": {**table["eval"], "every": 1, "limit": 3}}
    wanted = ranks.examined(table, prompts)
    shared = {**table, "out": str(tmp_path / "shared"), "parallel": {"fsdp": 2, "ep": 2}}
    for found in gloo.run(2, "ranks:examined", shared, prompts):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert found["wrote"] == wanted["wrote"]
        for scores, expected in zip(found["scores"], wanted["scores"], strict=True):
            assert scores == pytest.approx(expected, rel=1e-5)
    assert all(wanted["wrote"])
    assert len(wanted["scores"]) == 2
    assert all(scores for scores in wanted["scores"])


def test_batches_that_ranks_agree_on_fit_everywhere_and_stay():
    size = BatchSize.agreed([BatchSize(8, 100), BatchSize(4, None), BatchSize(6, 70)])
    assert size == BatchSize(4, 70, fixed=True)

    def work(rows: list[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(UpcycleError, match=r"on 4 rows of up to 7 tokens, .* set eval\.batch_size"):
        size.over([7, 6, 5, 4, 3], work, length=int)
    assert size.rows == 4

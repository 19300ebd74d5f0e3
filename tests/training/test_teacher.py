"""Distillation: its loss against a loop over tokens, steps in chunks and on ranks, runs, and bad teachers."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gloo
import ranks
import tiny
import upcycle
from upcycle import UpcycleError
from upcycle.data.corruption import IGNORED
from upcycle.training import chunked_entropy, kept_logits, saving, step, teacher
from upcycle.training.distillation import Largest, Whole, losses
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.parallel import ranks as world
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run
from upcycle.training.sections import Teacher

WORDS = 11


def drawn(*size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in logits]
    return [x / sum(powers) for x in powers]


def naive(mine: Tensor, theirs: Tensor, labels: Tensor, teacher: Teacher, top: int | None) -> list[float]:
    """Total, cross-entropy and divergence of Hinton et al. (2015), token by token, word by word."""
    entropy = divergence = 0.0
    for row, wanted, label in zip(mine.tolist(), theirs.tolist(), labels.tolist(), strict=True):
        if label == IGNORED:
            continue
        entropy -= math.log(softmax(row, 1.0)[label])
        p, q = softmax(wanted, teacher.temperature), softmax(row, teacher.temperature)
        if top is not None:
            order = sorted(range(WORDS), key=lambda word: -p[word])
            p, q = (
                [each[word] for word in order[:top]] + [sum(each[word] for word in order[top:])]
                for each in (p, q)
            )
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    scale = teacher.weight * teacher.temperature**2
    return [(1 - teacher.weight) * entropy + scale * divergence, entropy, divergence]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("top", [None, 1, 4])
def test_the_loss_is_that_of_a_loop_over_words(temperature, weight, top):
    teacher = Teacher(source="unused", weight=weight, temperature=temperature)
    mine, theirs = drawn(7, WORDS).requires_grad_(), drawn(7, WORDS, seed=1)
    labels = torch.tensor([3, IGNORED, 0, 10, 5, IGNORED, 1])
    lesson = Whole(logits=theirs) if top is None else Largest.of(theirs, top, temperature)
    found = losses(mine, labels, lesson, teacher)
    assert found.divergence is not None
    wanted = naive(mine.detach(), theirs, labels, teacher, top)
    told = [float(x.detach()) for x in (found.total, found.entropy, found.divergence)]
    assert told == pytest.approx(wanted, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.total, mine)
    assert not gradient[1].any()
    for place in ((0, 3), (4, 7)):  # differences of the loop, in double precision
        ends = []
        for step_ in (1e-5, -1e-5):
            moved = mine.detach().double()
            moved[place] += step_
            ends.append(naive(moved, theirs, labels, teacher, top)[0])
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_more_words_tell_more_and_all_of_them_everything():
    """Words put together lose some of the divergence (data processing inequality)."""
    mine, theirs = drawn(50, WORDS), drawn(50, WORDS, seed=1)
    whole = Whole(logits=theirs).divergence(mine, 2.0)
    told = [Largest.of(theirs, top, 2.0).divergence(mine, 2.0) for top in range(1, WORDS + 1)]
    assert all(bool((a <= b + 1e-5).all()) for a, b in pairwise(told))
    assert torch.allclose(told[-1], whole, atol=1e-5)


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    same = drawn(5, WORDS).requires_grad_()
    for lesson in (Whole(logits=same.detach()), Largest.of(same.detach(), 3, 1.5)):
        found = losses(
            same, torch.zeros(5, dtype=torch.long), lesson, Teacher(source="x", weight=1.0, temperature=1.5)
        )
        assert abs(found.total.item()) < 1e-5
        assert float(torch.autograd.grad(found.total, same)[0].abs().max()) < 1e-5


# --- steps


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dense model, and another of the same vocabulary that teaches."""
    folder = tmp_path_factory.mktemp("taught")
    source = tiny.make_dense(folder / "source", "llama", num_hidden_layers=2)
    teacher = tiny.make_dense(
        folder / "teacher", "gemma2", seed=3, num_hidden_layers=2, final_logit_softcapping=4.0
    )
    return str(source), str(teacher)


def taught(teacher: str, **changes: Any) -> dict[str, Any]:
    return {"teacher": {"source": teacher, "weight": 0.7, "temperature": 2.0}, **changes}


def test_a_step_learns_from_the_teacher_as_a_loop_says(pair):
    """The loss that is reported stays the cross-entropy; the gradient is that of the mixed loss."""
    run = ranks.run_of(pair[0], {}, taught(pair[1], router={"balance_loss_coef": 0.0, "z_loss_coef": 0.0}))
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    assert trainee.teacher is not None
    assert run.teacher is not None
    rows = ranks.rows_of(run)
    mine = trainee.model(input_ids=rows[:, :-1]).logits.flatten(0, 1)
    theirs = trainee.teacher.model(input_ids=rows[:, :-1]).logits.flatten(0, 1)
    labels, t, w = rows[:, 1:].flatten(), run.teacher.temperature, run.teacher.weight
    p, q = (theirs / t).softmax(-1), (mine / t).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    entropy = -mine.softmax(-1).gather(-1, labels[:, None]).log().mean()
    loss = (1 - w) * entropy + w * t * t * divergence
    parameters = list(trainee.model.parameters())
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = sum(float(each.square().sum()) for each in wanted if each is not None) ** 0.5
    found = step.train_step(trainee, {"rows": rows}, 0, 1e-3)
    assert found.loss == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert found.divergence == pytest.approx(float(divergence.detach()), rel=1e-5)
    assert found.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"data": {"isolate": True}, "train": {"micro_batch": 2}}])
def test_a_step_in_chunks_is_the_plain_step(changes, pair, monkeypatch):
    """The teacher bounds its logits (Gemma 2), and so does the student's own head nothing."""
    found = []
    for worth in (1 << 60, 0):
        monkeypatch.setattr(chunked_entropy, "WORTH", worth)
        run = ranks.run_of(pair[0], {}, taught(pair[1], **changes))
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here)
        told = step.train_step(trainee, ranks.batch_of(run, trainee.task), 0, 1e-3)
        found.append((told.loss, told.divergence, told.grad_norm, told.balance_loss))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_several_processes_learn_what_one_does(pair):
    """The teacher is shared out as well, without experts. The model's logits are whole, or in chunks."""
    changes = taught(pair[1], data={"isolate": True})
    (wanted,) = ranks.gradients(pair[0], [({}, changes)])
    layouts = [{"fsdp": 2}, {"fsdp": 2, "ep": 2}, {"tp": 2}]
    cases = [(layout, changes) for layout in layouts]
    calls = [("gradients", (pair[0], cases)), ("gradients", (pair[0], cases, True))]
    for plain, chunked in gloo.run(2, "ranks:several", calls):
        for found in plain + chunked:
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found["divergence"] == pytest.approx(wanted["divergence"], rel=1e-5)
            for name, gradient in wanted["gradients"].items():
                assert torch.allclose(found["gradients"][name], gradient, atol=2e-6, rtol=1e-3), name


# --- runs


def table_of(trainable: tuple[Path, Path], out: Path, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "source": str(trainable[0]), "out": str(out), "moe": {"num_experts": 4, "top_k": 2},
        "init": {"name": "drop", "ratio": 0.5}, "teacher": {"source": str(trainable[0]), "weight": 0.8},
        "data": {"sources": [{"path": str(trainable[1])}], "held_out": 0.1},
        "train": {"steps": 4, "batch_size": 4, "sequence_length": 64, "eval_every": 2, "eval_examples": 6},
        "schedule": {"name": "constant", "peak": 1e-3},
        "checkpoint": {"every": 2, "keep": 2},
    }  # fmt: skip
    return {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in table.items()} | {
        k: v for k, v in changes.items() if k not in table
    }


def test_a_run_goes_on_to_the_bit_and_is_exported_without_its_teacher(trainable, tmp_path):
    teacher = shutil.copytree(trainable[0], tmp_path / "teacher")
    table = table_of(trainable, tmp_path / "run", teacher={"source": str(teacher)})
    whole = train(table)
    lines = read(tmp_path / "run")
    assert all(line.divergence is not None and line.divergence > 0 for line in lines)
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "run"))[4])
    again = train(table, resume=True)
    assert (again.loss, again.held_out_loss) == (whole.loss, whole.held_out_loss)
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "run"))[4])
    config = teacher / "config.json"
    written = config.read_text()
    config.write_text(json.dumps({**json.loads(written), "rms_norm_eps": 0.5}))
    with pytest.raises(UpcycleError, match=r"rms_norm_eps in config\.json of the teacher teacher changed"):
        train(table, resume=True)
    config.write_text(written)
    weights = teacher / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UpcycleError, match="the teacher teacher has changed since step 2 was saved"):
        train(table, resume=True)
    config.unlink()
    assert export(tmp_path / "run", tmp_path / "out").step == 2


def test_its_cost_counts(trainable, tmp_path):
    """A forward pass of the teacher beside the three of the dense model that is continued."""
    table = table_of(trainable, tmp_path / "run", train={"steps": 1, "eval_every": 0})
    del table["moe"], table["init"]
    train(table)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    alone = {**table, "out": str(tmp_path / "alone")}
    del alone["teacher"]
    train(alone)
    plain = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert 3 * record["training_flops_per_row"] == 4 * plain["training_flops_per_row"]
    assert "divergence" not in (tmp_path / "alone" / "metrics.jsonl").read_text()


def changed(table: dict[str, Any], out: Path, **teacher: Any) -> dict[str, Any]:
    """The same run into another folder, with changes of its teacher."""
    return {**table, "out": str(out), "teacher": {**table["teacher"], **teacher}}


@pytest.mark.slow
def test_kept_logits_are_those_of_the_teacher_and_are_made_once(trainable, tmp_path, monkeypatch):
    """With every word, they give the losses of a run beside its teacher. Rows come twice."""
    train_ = {"steps": 6, "batch_size": 3, "micro_batch": 2, "sequence_length": 64, "eval_every": 0}
    short = tmp_path / "short.txt"
    short.write_text(trainable[1].read_text()[:1500])  # fewer rows than the run draws
    table = table_of((trainable[0], short), tmp_path / "beside", train=train_, teacher={"temperature": 2.0})
    train(table)
    beside = [(line.loss, line.divergence, line.grad_norm) for line in read(tmp_path / "beside")]
    words = json.loads((trainable[0] / "config.json").read_text())["vocab_size"]
    cache = tmp_path / "cache"
    kept = changed(table, tmp_path / "kept", top_logits=words, cache=str(cache))
    train(kept)
    for line, wanted in zip(read(tmp_path / "kept"), beside, strict=True):
        assert (line.loss, line.divergence, line.grad_norm) == pytest.approx(wanted, rel=2e-5, abs=1e-5)
    (segment,) = cache.glob("*.logits")

    def never(*_: Any) -> Any:
        raise AssertionError("the teacher is not needed")

    monkeypatch.setattr(teacher, "model_of", never)
    again = changed(table, tmp_path / "again", top_logits=words, cache=str(cache))
    train(again)
    losses_ = [[line.loss for line in read(tmp_path / name)] for name in ("kept", "again")]
    assert losses_[0] == losses_[1]
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "again"))[6])
    train(again, resume=True)
    assert [line.loss for line in read(tmp_path / "again")] == losses_[0]

    with pytest.raises(UpcycleError, match=r"made otherwise \(they differ in temperature\)"):
        train(changed(kept, tmp_path / "warm", temperature=3.0))
    segment.write_bytes(b"x" + segment.read_bytes()[1:])
    with pytest.raises(AssertionError, match="the teacher is not needed"):
        train(changed(kept, tmp_path / "damaged"))
    other = tmp_path / "mine"
    other.mkdir()
    (other / "letter.txt").write_text("to keep")
    with pytest.raises(UpcycleError, match="holds something else than a teacher's logits"):
        train(changed(kept, tmp_path / "foreign", cache=str(other)))


def test_a_shared_folder_is_written_by_several_runs(tmp_path):
    """What another run is writing there stays."""
    maker = kept_logits.Maker(
        folder=tmp_path, about={}, length=1, count=1, vocabulary=2,
        ranks=Ranks(device=torch.device("cpu")), rows=1,
    )  # fmt: skip
    maker._claim()
    (tmp_path / "0.logits.77.partial").touch()
    maker._claim()
    assert (tmp_path / "0.logits.77.partial").exists()


def test_kept_logits_of_another_config_are_refused(trainable, tmp_path):
    """A folder of an earlier version does not say of which config its logits are."""
    teacher = shutil.copytree(trainable[0], tmp_path / "teacher")
    given = {"source": str(teacher), "top_logits": 4, "cache": str(tmp_path / "cache")}
    table = table_of(trainable, tmp_path / "run", teacher=given, train={"steps": 1, "eval_every": 0})
    train(table)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(UpcycleError, match=r"made otherwise \(they differ in config\)"):
        train({**table, "out": str(tmp_path / "other")})
    about = json.loads((tmp_path / "cache" / "about.json").read_text())
    del about["config"]
    (tmp_path / "cache" / "about.json").write_text(json.dumps(about))
    assert train({**table, "out": str(tmp_path / "another")}).finished


@pytest.mark.slow
def test_ranks_share_the_work_of_keeping_logits(trainable, tmp_path):
    """Two ranks write what one does, and take the same steps."""
    table = table_of(trainable, tmp_path / "one", teacher={"top_logits": 8})
    wanted = train(table)
    again = {**table, "out": str(tmp_path / "two"), "parallel": {"fsdp": 2, "ep": 2}}
    for (found,) in gloo.run(2, "ranks:trains", [(again, False)]):
        assert found["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        assert found["held_out"] == pytest.approx(wanted.held_out_loss, rel=1e-5)
    rows = []
    for name in ("one", "two"):
        sizes = [file.stat().st_size for file in (tmp_path / name / "teacher").glob("*.logits")]
        rows.append(sum(sizes))
        assert len(sizes) == {"one": 1, "two": 2}[name]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("top", [None, 5])
def test_a_dry_run_has_the_teacher(top, dense, tmp_path):
    """Beside the steps it takes memory, and kept on disk it takes none."""
    source = dense("llama", num_hidden_layers=2)
    run = taught(str(source))
    if top:
        run["teacher"]["top_logits"] = top
    found = rehearse(ranks.run_of(str(source), {}, run), world=2)
    assert found.not_stepped is None
    size = sum(p.numel() for p in upcycle.open(source).parameters()) * 4
    assert sum(held.teacher for held in found.ranks) == (0 if top else size)


@pytest.mark.parametrize(
    ("given", "changes", "said"),
    [
        (("llama", {"vocab_size": 64}), {}, "has a vocabulary of 64 tokens and the model one of 96"),
        (("llama", {"max_position_embeddings": 16}), {}, "= 32 and the model takes 16 tokens"),
        (("llama", {}), {"teacher": {"top_logits": 97}}, "top_logits = 97 and the vocabulary has 96 tokens"),
        (("falcon", {"alibi": True}), {"data": {"isolate": True}}, "cannot keep the documents of a row"),
        (("llama", {}), {"task": {"name": "masked_lm"}}, "the task is masked_lm; take it out"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_do(given, changes, said, dense, tmp_path):
    name, options = given
    source = dense("llama") if "task" not in changes else tiny.make(tmp_path / "bert", "BertForMaskedLM")
    changes = {
        **changes,
        "teacher": {"source": str(dense(name, **options)), **changes.get("teacher", {})},
        "train": {"sequence_length": 32},
    }
    table = table_of((source, tmp_path / "none.txt"), tmp_path / "run", **changes)
    del table["moe"], table["init"]
    for begin in (train, rehearse):
        with pytest.raises(UpcycleError) as error:
            begin(Run.of(table))
        assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_tokens_of_the_same_number(trainable, tmp_path):
    teacher = Path(shutil.copytree(trainable[0], tmp_path / "teacher"))
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    else:
        vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    file.write_text(json.dumps(content))
    table = table_of(trainable, tmp_path / "run", teacher={"source": str(teacher)})
    with pytest.raises(UpcycleError, match="a teacher must have the same vocabulary, token by token"):
        train(table)


@pytest.mark.parametrize(
    "changes",
    [{"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}, {"top_logits": 0}, {"top": 3}, {"cache": "x"}],
)
def test_keys_out_of_range(changes, trainable, tmp_path):
    with pytest.raises(UpcycleError, match=r"teacher\.|unknown key teacher"):
        Run.of(table_of(trainable, tmp_path / "run", teacher=changes))

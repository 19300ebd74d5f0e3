"""`data.isolate`: a step, a score and a run compute what they would if each document had a row to itself."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import naive_flash
import ranks
import tiny
import tiny_wrappers
from marks import quick, sampled
from upcycle import UpcycleError
from upcycle.data.corruption import IGNORED
from upcycle.dense.subject import Subject
from upcycle.hf import packing
from upcycle.training import chunked_entropy, micro_batch, saving, start, step
from upcycle.training.examining import Examiner
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import ranks as world
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run


def outcome(source: Path, changes: dict[str, Any], batch: dict[str, torch.Tensor]) -> list[float]:
    """What a step and a score afterwards say."""
    run = ranks.run_of(str(source), {}, changes)
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    found = step.train_step(trainee, batch, 0, 1e-2)
    score = ranks.score_of(trainee, batch)
    told = [found.loss, found.grad_norm, found.balance_loss, found.z_loss, score.loss, score.accuracy]
    assert all(number is not None for number in told)
    return [float(number) for number in told if number is not None]


UP = {"moe": {"target": "upcycled"}}
RECOMPUTED = {"train": {"micro_batch": 2, "activation_checkpointing": True}}
STEPS = [
    *itertools.product(["llama"], [{}, UP, {"train": {"micro_batch": 2}}], [False, True]),
    *itertools.product(["lfm2", "granitemoehybrid", "qwen3_5_text"], [RECOMPUTED | UP], [False]),
    *itertools.product(["lfm2", "qwen3_5_text"], [{}], [True]),
]


@pytest.mark.parametrize(("model", "changes", "chunks"), sampled(STEPS, 3))
def test_a_step_is_that_of_documents_alone(model, changes, chunks, tmp_path, monkeypatch):
    """Two documents a row, of 8 tokens each, against rows of 8; the losses of routers as well."""
    if chunks:
        monkeypatch.setattr(chunked_entropy, "WORTH", 0)
    source = tiny.make_dense(tmp_path / "dense", model)
    ids = torch.randint(3, 96, (8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
    alone = {"ids": ids, "labels": labels, "mask": torch.ones_like(ids)}
    changed = {
        **changes,
        "task": {"name": "sft"},
        "train": {**changes.get("train", {}), "sequence_length": 8},
    }
    wanted = outcome(source, changed, alone)
    place = torch.arange(16) % 8
    rows = torch.cat([ids.view(4, 16), torch.full((4, 1), 5)], 1)
    packed = {"rows": rows, "positions": torch.cat([place, place[:1]]).expand(4, 17)}
    assert outcome(source, {**changes, "data": {"isolate": True}}, packed) == pytest.approx(wanted, rel=1e-5)
    joined = outcome(source, changes, {"rows": rows})
    assert abs(joined[0] - wanted[0]) > 1e-3


PADDED = {"native": {}, "upcycled": UP, "recomputed": RECOMPUTED}
NATIVE = [("native", "per_layer"), ("native", "pooled")]


@pytest.mark.parametrize(("kind", "loss"), quick(itertools.product(PADDED, ("per_layer", "pooled")), *NATIVE))
def test_padding_is_no_token_of_a_router(kind, loss, tmp_path):
    """Rows of 8 tokens, as they are and padded to 32; the pooled loss is transformers' own with the mask."""
    source, changes = tiny.make_dense(tmp_path / "dense", "llama"), PADDED[kind]
    ids = torch.randint(3, 96, (8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
    found = []
    for length in (8, 32):
        batch = {
            "ids": nn.functional.pad(ids, (0, length - 8), value=7),
            "labels": nn.functional.pad(labels, (0, length - 8), value=IGNORED),
            "mask": (torch.arange(length) < 8).long().expand(8, length),
        }
        size = {**changes.get("train", {}), "sequence_length": length, "batch_tokens": 8 * length}
        changed = {**changes, "task": {"name": "sft"}, "router": {"balance_loss": loss}, "train": size}
        run = ranks.run_of(str(source), {}, changed)
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here)
        given = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
        with torch.no_grad():
            own = trainee.model(**given, output_router_logits=True).aux_loss if kind == "native" else None
        found.append(step.train_step(trainee, batch, 0, 1e-2))
        if own is not None and loss == "pooled":
            assert found[-1].balance_loss == pytest.approx(float(own), rel=1e-5)
    short, padded = found
    for one, other in zip(short.tallies, padded.tallies, strict=True):
        assert one.counts.tolist() == other.counts.tolist()
        assert int(other.tokens) * 2 == int(other.counts.sum()) == 8 * 8 * 2
    for name in ("loss", "grad_norm", "balance_loss", "z_loss"):
        assert getattr(padded, name) == pytest.approx(getattr(short, name), rel=1e-5), name


@pytest.mark.parametrize(
    ("make", "moe"),
    [
        (lambda path: tiny_wrappers.make(path, "qwen3_5"), {"num_experts": 2}),
        (lambda path: tiny.make_dense(path, "lfm2"), {"target": "depth_tiled"}),
    ],
    ids=["within a multimodal model", "in repeated blocks"],
)
def test_layers_with_a_state_are_found(make, moe, tmp_path):
    """Another first document changes no bit of the second; joined, it does."""
    table = table_of(
        make(tmp_path / "dense"), tmp_path / "unused", tmp_path / "unused", data={"isolate": True}
    )
    run = Run.of({**table, "moe": moe})
    begun = start.start_of(run)
    with world(run.parallel) as here:
        model = start.model_of(begun, run, here, "float32").eval()
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[1, 8:] = ids[0, 8:]
    place = (torch.arange(16) % 8).expand(2, 16)
    for inputs, same in (({"position_ids": place}, True), ({}, False)):
        with torch.no_grad(), packing.told(model, {"input_ids": ids, **inputs}) as given:
            first, second = model(**given).logits[:, 8:]
        assert torch.equal(first, second) == same


def test_rows_without_targets(tmp_path):
    """A step on them has a loss of zero, and the balance of the routers; a score of them is refused."""
    source = tiny.make_dense(tmp_path / "dense", "llama")
    ids = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "labels": torch.full_like(ids, IGNORED), "mask": torch.ones_like(ids)}
    run = ranks.run_of(str(source), {}, {"task": {"name": "sft"}})
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    found = step.train_step(trainee, batch, 0, 1e-2)
    assert found.loss == 0.0
    assert math.isfinite(found.grad_norm)
    with pytest.raises(UpcycleError, match="none of the 4 held-out rows has anything to predict"):
        ranks.score_of(trainee, batch)


@pytest.mark.parametrize("model", ["llama", "qwen3_5_text"])
def test_a_step_with_flash_attention_is_that_with_masks(model, tmp_path):
    """Recomputed blocks know the borders as well; layers with a state do not see them."""
    source = tiny.make_dense(tmp_path / "dense", model)
    rows = torch.randint(3, 96, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = {"rows": rows, "positions": ranks.positions_of(rows)}
    changes = {**UP, "data": {"isolate": True}}
    train = {"train": {"micro_batch": 2, "activation_checkpointing": True}}
    wanted = outcome(source, changes, batch)
    flash = {"train": {**train["train"], "attn_implementation": "flash_attention_2"}}
    with naive_flash.installed() as calls:
        assert outcome(source, changes | flash, batch) == pytest.approx(wanted, rel=1e-5)
    assert calls


class Asks(Examiner):
    """An examiner that notes whether it is asked under autocast."""

    def __init__(self) -> None:
        self.narrow: list[bool] = []

    def refuse(self, run: Run, subject: Subject) -> None:
        pass

    def prepare(self, run: Run, subject: Subject) -> None:
        pass

    def score(self, *_: Any) -> dict[str, float]:
        self.narrow.append(torch.is_autocast_enabled("cpu"))
        return {}


def test_flash_attention_is_examined_in_16_bits(trainable, tmp_path):
    """It takes no float32, which the weights of a mixed run on one process are."""
    for name, narrow in (("flash_attention_2", True), ("sdpa", False)):
        run = table_of(*trainable, tmp_path / name)
        run["train"] |= {"steps": 1, "precision": "mixed", "attn_implementation": name, "eval_every": 0}
        asks = Asks()
        with naive_flash.installed():
            train(run | {"eval": {"tasks": ["any"]}}, examiner=asks)
        assert asks.narrow == [narrow]


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        ("llama", "flash_attention_2", "flash_attention_2 cannot be used with LlamaForCausalLM here"),
        ("stablelm", "flash_attention_2", "does not tell flash attention where documents begin"),
    ],
)
def test_flash_attention_that_cannot_is_refused_in_a_sentence(model, name, said, tmp_path):
    source = tiny.make_dense(tmp_path / "dense", model)
    run = ranks.run_of(str(source), {}, {"data": {"isolate": True}, "train": {"attn_implementation": name}})
    run = replace(run, recipe=None)
    usual = naive_flash.installed() if model == "stablelm" else nullcontext()
    with usual, world(run.parallel) as here, pytest.raises(UpcycleError, match=said):
        start.model_of(start.start_of(run), run, here, "float32")


@pytest.fixture(scope="module")
def stories_apart(trainable: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of JSON lines with a hundred characters of a text in each."""
    file = tmp_path_factory.mktemp("apart") / "stories.jsonl"
    text = trainable[1].read_text()
    pieces = [text[start : start + 100] for start in range(0, 20_000, 100)]
    file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return file


def table_of(source: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "source": str(source), "out": str(out), "moe": {"num_experts": 4, "top_k": 2},
        "data": {"sources": [{"path": str(text)}], "held_out": 0.1, "isolate": True},
        "train": {"steps": 4, "batch_size": 4, "sequence_length": 96, "eval_every": 2, "eval_examples": 6},
        "schedule": {"name": "constant", "peak": 1e-3},
        "checkpoint": {"every": 2, "keep": 2},
    }  # fmt: skip
    return {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in table.items()} | {
        k: v for k, v in changes.items() if k not in table
    }


def test_a_run_scores_documents_as_if_alone_and_goes_on_to_the_bit(
    trainable, stories_apart, tmp_path, caplog
):
    """Its first score is that of a loop over the documents of the held-out rows."""
    with caplog.at_level("INFO", "upcycle"):
        whole = train(table_of(trainable[0], stories_apart, tmp_path / "whole"))
    assert "documents in a row do not see each other, by masks for sdpa" in caplog.text
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "whole"))[4])
    again = train(table_of(trainable[0], stories_apart, tmp_path / "whole"), resume=True)
    assert (again.loss, again.held_out_loss) == (whole.loss, whole.held_out_loss)

    run = Run.of(table_of(trainable[0], stories_apart, tmp_path / "whole"))
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    feed = trainee.task.feed(run.feeding(trainee.task), Subject.of(trainable[0]))
    batch = feed.held_out(6)
    losses, count = 0.0, 0
    for row, positions in zip(batch["rows"], batch["positions"], strict=True):
        ends = [i for i in range(1, len(row)) if positions[i] == 0]
        for first, last in zip([0, *ends], [*ends, len(row)], strict=True):
            ids = torch.tensor(row[first:last])
            if len(ids) > 1:
                with torch.no_grad():
                    logits = trainee.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
                losses += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
                count += len(ids) - 1
    assert 0 < count < batch["rows"].size - len(batch["rows"]), "some row holds several documents"
    assert read(tmp_path / "whole")[0].held_out_start == pytest.approx(losses / count, rel=1e-5)


def test_a_checkpoint_of_an_older_version_goes_on(trainable, tmp_path):
    """It knows no `data.isolate`, which was false."""
    table = table_of(trainable[0], trainable[1], tmp_path / "run", data={"isolate": False})
    whole = train(table)
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "run"))[4])
    file = dict(saving.checkpoints(tmp_path / "run"))[2] / "state.json"
    state = json.loads(file.read_text())
    del state["identity"]["data"]["isolate"], state["state_sha256"]
    file.write_text(json.dumps(state))
    assert train(table, resume=True).loss == whole.loss
    other = {**table, "data": {**table["data"], "isolate": True}}
    with pytest.raises(UpcycleError, match=r"differs in data\.isolate"):
        train(other, resume=True)


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("BertForMaskedLM", {}, "is for causal_lm and sft, and the task is masked_lm; set it to false"),
        ("FalconForCausalLM", {"alibi": True}, "its biases (alibi) are rounded by the place in the row"),
        (
            "Phi3ForCausalLM",
            tiny.VARIANTS["phi3-longrope"][1] | {"original_max_position_embeddings": 16},
            "its long rope goes by the longest document of a batch if rows have more than",
        ),
    ],
)
def test_what_cannot_be_kept_apart_is_refused_in_a_sentence(architecture, changes, said, tmp_path):
    if architecture == "Phi3ForCausalLM":
        changes["rope_parameters"] = changes["rope_parameters"] | {"original_max_position_embeddings": 16}
    source = tiny.make(tmp_path / "dense", architecture, **changes)
    table = table_of(source, tmp_path / "none.txt", tmp_path / "run", train={"sequence_length": 32})
    del table["moe"]
    for begin in (train, rehearse):
        with pytest.raises(UpcycleError) as error:
            begin(Run.of(table))
        assert said in str(error.value)
        assert str(error.value).count(". ") == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_steps_with_positions(dense, tmp_path):
    run = Run.of(table_of(dense("llama"), tmp_path / "none.txt", tmp_path / "run"))
    run = replace(run, train=replace(run.train, sequence_length=32))
    assert rehearse(run, world=2).not_stepped is None
    taught = {"teacher": {"source": str(dense("lfm2"))}, "data": {"isolate": True}}
    found = rehearse(ranks.run_of(str(dense("llama")), {}, taught))
    assert found.not_stepped == "how long documents are is known only with the data"


@pytest.mark.parametrize(("recompute", "copies"), [(False, 3), ("selective", 3), (True, 1)])
def test_masks_count_in_the_memory_of_a_row(recompute, copies, dense):
    """Each block that is not recomputed keeps a copy in numbers, as the forecast counts it."""
    source = str(dense("llama", num_hidden_layers=3))
    found = []
    for isolate in (False, True):
        changes = {"data": {"isolate": isolate}, "train": {"activation_checkpointing": recompute}}
        run = ranks.run_of(source, {}, changes)
        begun = start.start_of(run)
        found.append(micro_batch.bytes_of_row(run, begun, {"layers": 16}, "float32"))
    assert found[1] - found[0] == 16**2 * (1 + 4 * copies)

"""Training and scoring of images, T5, BERT and texts with labels, dense and upcycled, through run files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

import upcycle
from marks import quick
from ranks import trainee_of
from upcycle import Recipe, UpcycleError, families, tasks
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.subject import Subject
from upcycle.evaluation.scores import ToScore, evaluate
from upcycle.nn.moe import MoE
from upcycle.training import moments, saving, start
from upcycle.training.export import export
from upcycle.training.held_out import HeldOut
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from words import SPECIAL, WORDS, make_tokenizer, sentence

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Dense models of every kind, and what they are trained on: three colours, made-up sentences."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(16):
            pixels = np.clip(rng.normal(colour, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{i}.png")
    (folder / "text.txt").write_text("\n".join(sentence(rng) for _ in range(400)))
    with (folder / "labelled.jsonl").open("w") as file:
        for _ in range(64):
            text = sentence(rng)
            file.write(json.dumps({"text": text, "label": "dog" if "dog" in text else "none"}) + "\n")
    torch.manual_seed(0)
    names = dict(enumerate("012"))
    ViTForImageClassification(
        ViTConfig(
            **SMALL, image_size=8, patch_size=2, id2label=names, label2id={v: k for k, v in names.items()}
        )
    ).save_pretrained(folder / "vit")
    Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=8,
            patch_size=2,
            id2label=names, label2id={v: k for k, v in names.items()},
        )
    ).save_pretrained(folder / "dinov2")  # fmt: skip
    for name in ("t5", "bert", "classifier"):
        make_tokenizer(folder / name)
    size = len(SPECIAL) + len(WORDS) + 1
    T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=32, d_ff=48, d_kv=8, num_layers=4, num_heads=4, dropout_rate=0.1)
    ).save_pretrained(folder / "t5")
    bert = BertConfig(**SMALL, vocab_size=size, max_position_embeddings=64)
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    BertForSequenceClassification(bert).save_pretrained(folder / "classifier")
    return folder


UPCYCLED = {"moe": {"num_experts": 4, "layers": "last_half", "target": "upcycled"}}
CHOICE = {**UPCYCLED, "router": {"name": "expert_choice", "capacity_factor": 2.0}}
T5 = {**CHOICE, "decoder": {"router": {"name": "top_k", "capacity_factor": 2.0, "rounding": "flaxformer"}}}


def table(kind: str, folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run file for one of the dense models."""
    source = {
        "vit": "images",
        "dinov2": "images",
        "t5": "text.txt",
        "bert": "text.txt",
        "classifier": "labelled.jsonl",
    }[kind]
    made: dict[str, Any] = {
        "source": str(folder / kind),
        "out": str(out),
        "data": {"sources": [{"path": str(folder / source)}], "held_out": 0.25},
        "train": {"steps": 6, "batch_size": 8, "sequence_length": 24, "eval_every": 3, "eval_examples": 16},
        "schedule": {"peak": 1e-3, "warmup": 2},
        "checkpoint": {"every": 2, "keep": 5},
    }
    for key, value in changes.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


CASES = {
    "vit": ("vit", {}, "image_classification"),
    "vit, expert choice": ("vit", CHOICE, "image_classification"),
    "vit, soft": ("vit", {**UPCYCLED, "router": {"name": "soft", "slots": 4}}, "image_classification"),
    "vit, as MoE Jetpack": (
        "vit",
        {
            **UPCYCLED,
            "router": {"name": "soft"},
            "train": {
                "layer_decay": 0.6,
                "drop_path": 0.2,
                "expert_dropout": 0.4,
                "expert_output_dropout": 0.4,
                "micro_batch": 4,
                "activation_checkpointing": True,
            },
            "task": {
                "name": "image_classification",
                "augment": {
                    "resized_crop": 0.08,
                    "interpolation": "bicubic",
                    "rand_augment_layers": 2,
                    "rand_augment_magnitude": 27.0,
                    "rand_augment_std": 1.5,
                    "rand_augment_probability": 0.5,
                    "rand_augment_operations": "increasing",
                    "mixup": 0.8,
                    "cutmix": 1.0,
                    "erasing": 0.25,
                    "erasing_fill": "noise",
                    "label_smoothing": 0.1,
                },
            },
        },
        "image_classification",
    ),
    "vit, sigmoid": (
        "vit",
        {**UPCYCLED, "router": {"name": "sigmoid", "bias_update_rate": 0.01}},
        "image_classification",
    ),
    "vit, spherical": (
        "vit",
        {
            "moe": {**UPCYCLED["moe"], "expert_width": 24, "universal_experts": 4, "universal_width": 8},
            "init": {"name": "random"},
            "successor": {"hidden_size": 16},
            "router": {"name": "spherical", "expert_dropout": 0.1},
        },
        "image_classification",
    ),
    "dinov2": ("dinov2", {}, "image_classification"),  # whose mask token no gradient reaches
    "t5": ("t5", {}, "span_corruption"),
    "t5, both routers": ("t5", T5, "span_corruption"),
    "t5, as Sparse Upcycling": (
        "t5",
        {
            **T5,
            "optimizer": {"name": "adafactor", "start_step": 100},
            "schedule": {"name": "inverse_sqrt", "peak": 0.1, "start_step": 100},
        },
        "span_corruption",
    ),
    "bert": ("bert", {}, "masked_lm"),
    "bert, top-k": ("bert", UPCYCLED, "masked_lm"),
    "classifier, expert choice": ("classifier", CHOICE, "text_classification"),
}


@pytest.mark.parametrize("case", quick(CASES, "vit, sigmoid", "bert, top-k", "t5"))
def test_a_run_trains_is_resumed_to_the_bit_and_exported(case, data, tmp_path):
    kind, changes, task = CASES[case]
    whole = train(Run.of(table(kind, data, tmp_path / "whole", **changes)))
    lines = read(tmp_path / "whole")
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line.loss) for line in lines)
    assert 0 <= lines[-1].held_out_accuracy <= 1
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["task"] == task
    # Stopped after four steps, and gone on with.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step, path in saving.checkpoints(tmp_path / "parts"):
        if step > 4:
            shutil.rmtree(path)
    again = train(Run.of(table(kind, data, tmp_path / "parts", **changes)), resume=True)
    assert again.loss == whole.loss
    assert again.held_out_loss == whole.held_out_loss
    out = export(tmp_path / "whole", tmp_path / "out").out
    model = upcycle.open(out)
    assert sum(isinstance(m, MoE) for m in model.modules()) == (
        0 if not changes else 4 if kind == "t5" else 2
    )
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((tmp_path / "whole" / "run.json").read_text())["parameters"]
    )
    for line in lines if changes else ():
        assert len(line.layers) == (4 if kind == "t5" else 2)
        assert all(0 <= layer.left_behind < 1 for layer in line.layers)


def test_the_loss_is_that_of_transformers(data, tmp_path):
    """The first loss against the model's own, on the rows that the feed gives."""
    for kind, names in (("t5", ("inputs", "targets")), ("bert", ("inputs", "labels"))):
        run = Run.of(table(kind, data, tmp_path / kind, train={"steps": 1, "eval_every": 0}))
        begun = start.start_of(run)
        task = tasks.of(begun.dense.architecture)
        batch = task.feed(run.feeding(task), begun.subject).next(8)
        train(Run.of(table(kind, data, tmp_path / f"{kind}-run", train={"steps": 1, "eval_every": 0})))
        model = upcycle.open(data / kind).train()
        model.config.decoder_start_token_id = 0
        torch.manual_seed(run.train_seed * 1_000_003)  # the seed of step 0: dropout
        labels = torch.from_numpy(np.array(batch[names[1]]))
        wanted = model(input_ids=torch.from_numpy(np.array(batch[names[0]])), labels=labels).loss
        assert read(tmp_path / f"{kind}-run")[0].loss == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_images_are_learned_and_scored(data, tmp_path):
    """Three colours are told apart after a few steps, and every way to score says the same."""
    changes = {"train": {"steps": 40, "batch_size": 16, "eval_every": 40}, "schedule": {"peak": 3e-3}}
    result = train(Run.of(table("vit", data, tmp_path / "run", **CHOICE, **changes)))
    assert read(result.out)[-1].held_out_accuracy == 1.0
    out = export(result.out, tmp_path / "out").out
    scores = evaluate(out, ToScore(images=data / "images"))
    model = upcycle.open(out).eval()
    right = 0
    with torch.inference_mode():
        for path in sorted((data / "images").rglob("*.png")):
            pixels = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            right += int(model(pixel_values=(pixels - 0.5) / 0.5).logits.argmax()) == int(path.parent.name)
    assert scores["accuracy"] == right / 48
    assert scores["examples"] == 48
    shots = Path(shutil.copytree(data / "images", tmp_path / "shots"))
    probe = evaluate(out, ToScore(images=data / "images", shots=shots))["few_shot"]
    assert probe["accuracy"] == 1.0
    assert len(probe["accuracies"]) == 5


def test_texts_are_scored_as_transformers_scores_them(data, tmp_path):
    found = evaluate(data / "bert", ToScore(text=data / "text.txt", length=24, batch_size=8, limit=16))
    assert found["task"] == "masked_lm"
    assert found["loss"] == pytest.approx(np.log(len(SPECIAL) + len(WORDS) + 1), rel=0.05)  # untrained
    found = evaluate(data / "t5", ToScore(text=data / "text.txt", length=24, limit=8))
    assert found["task"] == "span_corruption"
    assert found["targets"] == 8 * tasks.find("span_corruption")().spans(24).targets


def test_moments_of_a_vit_are_tiled(data, tmp_path):
    """Every expert starts from the dense network's moments, routers from zero; the rest as it was."""
    train(Run.of(table("vit", data, tmp_path / "dense")))
    export(tmp_path / "dense", tmp_path / "trained", with_optimizer=True)
    changes = {**CHOICE, "optimizer": {"carry_state": True}, "train": {"steps": 1, "eval_every": 0}}
    run = Run.of(table("vit", data, tmp_path / "moe", **changes) | {"source": str(tmp_path / "trained")})
    begun = start.start_of(run)
    here = Ranks(device=torch.device("cpu"))
    trainee = trainee_of(run, here)
    assert moments.carry_state(begun, run, here, trainee.model, trainee.optimizer) == 6
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "trained" / "optimizer" / "exp_avg_sq" / "model.safetensors")
    states = {n: trainee.optimizer.state[p]["exp_avg_sq"] for n, p in trainee.model.named_parameters()}
    up = stored["vit.encoder.layer.3.intermediate.dense.weight"]
    assert float(up.abs().max()) > 0
    assert torch.equal(states["vit.layers.3.mlp.experts.up_proj"], up.expand(4, *up.shape))
    down = stored["vit.encoder.layer.3.output.dense.bias"]
    assert torch.equal(states["vit.layers.3.mlp.experts.down_proj_bias"], down.expand(4, *down.shape))
    assert not states["vit.layers.3.mlp.router.weight"].any()
    assert torch.equal(states["classifier.weight"], stored["classifier.weight"])


def test_the_rate_goes_on_where_the_dense_run_stopped(data, tmp_path):
    schedule = {"name": "inverse_sqrt", "peak": 1e-3, "warmup": 2}
    train(Run.of(table("vit", data, tmp_path / "dense", schedule=schedule)))
    export(tmp_path / "dense", tmp_path / "trained")
    later = table("vit", data, tmp_path / "moe", **CHOICE, schedule={**schedule, "start_step": 6})
    train(Run.of(later | {"source": str(tmp_path / "trained")}))
    rates = [line.lr for out in ("dense", "moe") for line in read(tmp_path / out)]
    assert rates == pytest.approx([1e-3 * min(1, n / 2) * (2 / max(2, n)) ** 0.5 for n in range(1, 13)])


def test_flops_of_a_row_are_those_of_its_parts(data):
    """By hand, for the encoder and the decoder of a T5, and for a ViT."""
    begun = start.start_of(Run.of(table("t5", data, data / "unused")))
    h, f, inner, words = 32, 48, 32, len(SPECIAL) + len(WORDS) + 1
    encoder = 4 * (4 * h * inner + 2 * h * f)
    decoder = 4 * (4 * h * inner + 2 * h * inner + 2 * h * f) + words * h
    scores = 4 * 4 * inner * (20 * 20 + 6 * 6 / 2 + 6 * 20)
    forward = 2 * (20 * (encoder + 4 * 2 * h * inner) + 6 * decoder) + scores
    assert begun.training_flops_per_row({"encoder": 20, "decoder": 6}) == 3 * forward
    begun = start.start_of(Run.of(table("vit", data, data / "unused")))
    token = 4 * (4 * h * h + 2 * h * f) + 3 * 2 * 2 * h
    assert begun.training_flops_per_row({"layers": 17}) == 3 * (2 * 17 * token + 4 * 4 * h * 17 * 17)


def test_active_flops_of_expert_choice(data):
    """Factor 2 of 17 tokens and 4 experts: round(8.5) = 8 tokens an expert, 32 / 17 experts a token."""
    dense, moe = (
        start.start_of(Run.of(table("vit", data, data / "unused", **changes))) for changes in ({}, CHOICE)
    )
    more = 2 * ((32 / 17 - 1) * 2 * 32 * 48 + 4 * 32)  # two layers: experts beyond the first, the router
    difference = moe.training_flops_per_row({"layers": 17}) - dense.training_flops_per_row({"layers": 17})
    assert difference == pytest.approx(3 * 2 * 17 * more, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vit", {"data": {"sources": [{"path": "nowhere"}]}}, "nowhere"),
        ("vit", {"task": {"name": "causal_lm"}}, "is for models that end in ForCausalLM"),
        ("vit", {"task": {"name": "image_clasification"}}, "did you mean image_classification"),
        ("vit", {"task": {"name": "image_classification", "augment": {"flop": 1}}}, "did you mean flip"),
        ("vit", {"train": {"tokens": 9, "steps": 1}}, "give one of train.steps"),
        ("t5", {"train": {"sequence_length": 512}}, "sentinels"),
        ("t5", {"task": {"name": "span_corruption", "noise_density": 2.0}}, "noise_density = 2.0"),
        ("classifier", {"task": {"name": "text_classification", "fields": ["body"]}}, "no 'body'"),
        ("vit", {**CHOICE, "router": {**CHOICE["router"], "group": 5}}, "router.group = 5 does not divide"),
        ("t5", CHOICE, "router expert_choice cannot stand in the decoder"),
        ("bert", {"train": {"drop_path": 0.1}}, "the blocks of BertForMaskedLM have no place where a branch"),
        ("vit", {"train": {"expert_dropout": 0.1}}, "act on experts of moe.target = upcycled"),
    ],
)  # fmt: skip
def test_mistakes(kind, changes, message, data, tmp_path):
    with pytest.raises(UpcycleError, match=message):
        train(Run.of(table(kind, data, tmp_path / "run", **changes)))


def test_an_id_beyond_the_embedding_of_a_classifier(data, tmp_path):
    """A tokenizer that got a token, and a model that was not resized."""
    source = shutil.copytree(data / "classifier", tmp_path / "classifier")
    model = BertForSequenceClassification.from_pretrained(source)
    model.resize_token_embeddings(6)
    model.save_pretrained(source)
    run = table("classifier", data, tmp_path / "run") | {"source": str(source)}
    with pytest.raises(UpcycleError, match=r"gives id \d+ in .*labelled.jsonl and the embedding has 6 rows"):
        train(Run.of(run))


ON = {"train": {"steps": 2, "eval_every": 1}}


def test_a_bias_in_one_stack_alone(data, tmp_path):
    """The decoder of a T5 balances by its bias, the encoder's experts choose for themselves."""
    router = {**CHOICE["router"], "bias_update_rate": 0.01}
    mixed = {**UPCYCLED, "router": router, "decoder": {"router": {"name": "sigmoid"}}, **ON}
    train(Run.of(table("t5", data, tmp_path / "run", **mixed)))
    model = upcycle.open(export(tmp_path / "run", tmp_path / "out").out)
    biases = {n: b for n, b in model.state_dict().items() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert all(n.startswith("decoder.") and 0 < float(b.abs().max()) <= 0.02 for n, b in biases.items())


def test_a_router_has_no_moments_of_the_dense_model(data, tmp_path):
    """Not in its query norm either, which starts as a copy of a norm of the dense model."""
    changes = {**UPCYCLED, "router": {"name": "spherical"}, "optimizer": {"carry_state": True}}
    run = Run.of(table("vit", data, tmp_path / "run", **changes))
    entries = moments.moments_of(Checkpoint.open(data / "vit"), run)
    routers = {n: e for n, e in entries.items() if ".router." in n}
    assert any("query_norm_weight" in n for n in routers)
    assert not any(e.lazy.all("F32").any() for e in routers.values())
    assert any(e.lazy.all("F32").any() for n, e in entries.items() if "layernorm_after.weight" in n)


def test_groups_of_several_rows(data, tmp_path):
    """Held-out rows that are no whole number of groups are made up to one; training rows must be one."""
    router = {**CHOICE["router"], "group": 34}  # two images of 16 patches and a class token
    changes = {**CHOICE, "router": router, "train": {**ON["train"], "eval_examples": 11}}
    assert train(Run.of(table("vit", data, tmp_path / "run", **changes))).finished
    for micro, size in ((1, 1), (5, 5), (7, 7)):
        changes["train"]["micro_batch"] = micro
        with pytest.raises(UpcycleError, match=f"router.group = 34 does not divide the {size} x 17 tokens"):
            train(Run.of(table("vit", data, tmp_path / str(micro), **changes)))
    changes["train"] |= {"micro_batch": 6, "batch_size": 9}
    with pytest.raises(UpcycleError, match="does not divide the 3 x 17 tokens"):
        train(Run.of(table("vit", data, tmp_path / "rest", **changes)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("whole", [1, 2, 4])
def test_every_rank_scores_as_many_whole_groups(whole, world):
    rows, size = 13, 4
    batch = {"x": torch.arange(rows)}
    ranks = [SimpleNamespace(dp_size=world, dp_rank=rank) for rank in range(world)]
    parts = [list(HeldOut.of(batch, here, whole).parts(size)) for here in ranks]
    assert len({len(each) for each in parts}) == 1
    assert all(len(batch["x"]) % whole == 0 for each in parts for batch, _ in each)
    assert [int(i) for each in parts for batch, n in each for i in batch["x"][:n]] == list(range(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"moe": {"num_experts": 3}}}, "the encoder has top-2 of 4 experts and the decoder has"),
        ({"decoder": {"moe": {"top_k": 1}}}, "the decoder has top-1 of 4 experts"),
        ({**CHOICE, "decoder": {"router": {"name": "top_k"}}}, "expert_choice needs no balance loss"),
    ],
)
def test_a_pooled_loss_of_unlike_routers(changes, message, data, tmp_path):
    router = {**changes.get("router", {}), "balance_loss": "pooled"}
    with pytest.raises(UpcycleError, match=message):
        train(Run.of(table("t5", data, tmp_path / "run", **{**UPCYCLED, **changes, "router": router})))


def test_every_stack_shares_its_experts_out(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {**UPCYCLED, "decoder": {"moe": {"num_experts": 3}}}
    with pytest.raises(UpcycleError, match="ep must divide the 3 experts of a layer"):
        train(Run.of(table("t5", data, tmp_path / "run", **changes, parallel={"fsdp": 2, "ep": 2})))
    layout = {"fsdp_size": 2, "ep_size": 2}
    with pytest.raises(UpcycleError, match="ep_size must divide the 3 experts of a layer"):
        upcycle.load(data / "t5", Recipe.of(changes), distributed_config=layout)
    others = {**CASES["vit, spherical"][1], "parallel": {"fsdp": 2, "ep": 2}}
    others["moe"] = {**others["moe"], "universal_experts": 5}
    with pytest.raises(UpcycleError, match="ep must divide the 5 experts of a layer"):
        train(Run.of(table("vit", data, tmp_path / "run", **others)))
    with pytest.raises(UpcycleError, match="a dense model has no experts to share out"):
        upcycle.load(data / "t5", Recipe.of(moe={"target": "depth_tiled"}), distributed_config=layout)


def test_labels_that_disagree_with_the_head(data, tmp_path):
    (tmp_path / "images").mkdir()
    for label in "0123":
        (tmp_path / "images" / label).symlink_to(data / "images" / "0")
    changed = table("vit", data, tmp_path / "run", data={"sources": [{"path": str(tmp_path / "images")}]})
    with pytest.raises(UpcycleError, match="has 4 classes and the model's head 3"):
        train(Run.of(changed))
    for classes, said in (
        (
            ["0", "1"],
            "has 4 classes and task.classes names 2, and not 2, 3; name all of them in task.classes",
        ),
        (2, "has 4 classes and task.classes = 2; set it to 4"),
    ):
        changed["task"] = {**changed.get("task", {}), "name": "image_classification", "classes": classes}
        with pytest.raises(UpcycleError, match=said):
            train(Run.of(changed))


def test_a_new_head_for_other_classes(data, tmp_path):
    """Another number of classes: the head alone is drawn anew, as transformers starts one; it is exported."""
    (tmp_path / "images").mkdir()
    names = ["red", "green", "blue", "red again"]
    for i, name in enumerate(names):
        (tmp_path / "images" / name).symlink_to(data / "images" / str(i % 3))
    changes = {"data": {"sources": [{"path": str(tmp_path / "images")}]}, **CHOICE}
    given = table("vit", data, tmp_path / "run", **changes)
    given["task"] = {**given.get("task", {}), "name": "image_classification", "classes": sorted(names)}
    run = Run.of(given)
    begun = start.start_of(run)
    model = start.plain_model(begun)
    dense = ViTForImageClassification.from_pretrained(data / "vit")
    assert model.classifier.weight.shape == (4, 32)
    assert 0.015 < float(model.classifier.weight.detach().std()) < 0.025
    assert not model.classifier.bias.any()
    assert torch.equal(model.vit.layernorm.weight, dense.vit.layernorm.weight)
    train(run)
    export(tmp_path / "run", tmp_path / "out")
    opened = upcycle.open(tmp_path / "out")
    assert opened.config.id2label == dict(enumerate(sorted(names)))
    assert opened.classifier.out_features == 4


def test_a_new_head_is_for_classes_and_has_no_moments(data, tmp_path):
    spans = Run.of(table("t5", data, tmp_path / "a", task={"name": "span_corruption", "classes": 3}))
    with pytest.raises(UpcycleError, match="has none"):
        start.start_of(spans)
    task = {"name": "image_classification", "classes": 4}
    carried = table("vit", data, tmp_path / "b", task=task, optimizer={"carry_state": True})
    with pytest.raises(UpcycleError, match="moments of the head"):
        Run.of(carried)
    twice = table("vit", data, tmp_path / "c", task={**task, "classes": ["a", "a"]})
    with pytest.raises(UpcycleError, match="different names"):
        Run.of(twice)


def named(folder: Path, source: Path, names: dict[str, str]) -> Path:
    """A copy of a model whose head has other names for its classes."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def coloured(folder: Path, data: Path, names: list[str]) -> Path:
    """The images of `data`, in class folders of these names."""
    folder.mkdir()
    for i, name in enumerate(names):
        (folder / name).symlink_to(data / "images" / str(i))
    return folder


def test_classes_are_those_that_the_head_has_by_name(data, tmp_path):
    """Class folders come by the alphabet, a text file with the names that it has; the head's order counts."""
    source = named(tmp_path / "vit", data / "vit", {"0": "red", "1": "green", "2": "blue"})
    images = coloured(tmp_path / "images", data, ["red", "green", "blue"])
    subject = Subject(folder=source, config=json.loads((source / "config.json").read_text()))
    task = tasks.of("ViTForImageClassification")
    found = task.images(str(images), subject, tmp_path / "cache")
    assert found.class_names == ("red", "green", "blue")
    for label, channel in enumerate(range(3)):  # red images have the label 0
        means = found.read(np.flatnonzero(found.labels == label)).mean((0, 1, 2))
        assert means.argmax() == channel
    shutil.rmtree(images)
    few = coloured(tmp_path / "few", data, ["red", "green"])
    found = task.images(str(few), subject, tmp_path / "cache")
    assert (found.num_labels, sorted(set(found.labels.tolist()))) == (3, [0, 1])
    assert evaluate(source, ToScore(images=few))["examples"] == 32
    source = named(tmp_path / "classifier", data / "classifier", {"0": "none", "1": "dog"})
    subject = Subject(folder=source, config=json.loads((source / "config.json").read_text()))
    run = Run.of(table("classifier", data, tmp_path / "texts"))
    task = tasks.of("BertForSequenceClassification")
    rows = task.feed(run.feeding(task), subject).next(48)
    dog = len(SPECIAL) + WORDS.index("dog")
    assert (rows["labels"] == (rows["ids"] == dog).any(1)).all()
    assert 0 < rows["labels"].sum() < 48


@pytest.mark.parametrize(
    ("head", "folders", "message"),
    [
        (
            ["red", "green", "blue"],
            ["red", "green", "yellow"],
            "has the class 'yellow', and .* has red, green",
        ),
        (["red", "RED", "blue"], ["Red", "blue"], "class 'Red', and .* has 'red', which is not the same"),
        (["a b", "c", "d"], ["a_b", "c", "d"], "class 'a_b', and .* has 'a b', which is not the same"),
        (["red", "red", "blue"], ["red", "blue"], "class 'red', and .* has 2 of that name"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["red", "green", "yellow"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["red", "green"], None),
        (["red", "green", "blue"], ["0", "1", "2"], None),
        (["red", "green", "blue"], ["1", "2", "3"], "class '1', and .* has red"),
    ],
)
def test_classes_that_the_head_does_not_know(head, folders, message, data, tmp_path):
    source = named(tmp_path / "vit", data / "vit", {str(i): name for i, name in enumerate(head)})
    images = coloured(tmp_path / "images", data, folders)
    subject = Subject(folder=source, config=json.loads((source / "config.json").read_text()))
    task = tasks.of("ViTForImageClassification")
    if message is None:
        found = task.images(str(images), subject, tmp_path / "cache")
        assert found.class_names == tuple(sorted(folders))
        return
    with pytest.raises(UpcycleError, match=message):
        task.images(str(images), subject, tmp_path / "cache")


@pytest.mark.usefixtures("on_screen")
def test_corrupt_images_are_named_and_left_out(data, tmp_path, capsys):
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "1" / "3.png").write_bytes(b"no image")
    changed = table("vit", data, tmp_path / "run", data={"sources": [{"path": str(tmp_path / "images")}]})
    assert train(Run.of(changed)).finished
    said = " ".join(capsys.readouterr().err.split())
    assert "1 images cannot be read" in said
    assert "3.png" in said.replace(" ", "")


def test_tensor_parallelism_is_for_natives(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UpcycleError, match="fsdp and ep share an upcycled model out"):
        upcycle.load(data / "vit", Recipe.of(UPCYCLED), distributed_config={"tp_size": 2})


@pytest.mark.parametrize(
    ("kind", "task", "keys", "said"),
    [
        ("vit", "image_classification", {"tokenizer": "a"}, r'data.tokenizer = "a" does nothing, because'),
        ("vit", "image_classification", {"append_eos": False}, "data.append_eos = false does nothing"),
        ("classifier", "text_classification", {"field": "body"}, 'data.sources field = "body" does nothing'),
        ("classifier", "text_classification", {"split": "test"}, 'data.sources split = "test" does nothing'),
        ("bert", "sft", {"separator": "#"}, r'data.sources separator = "#" does nothing'),
        ("bert", "sft", {"append_eos": False}, "data.append_eos = false does nothing, because the task sft"),
        ("bert", "sft", {"split": "test"}, "split = test, and .* is no dataset with splits"),
        ("bert", "sft", {"test": "a.jsonl"}, r"data.held_out = 0.25 holds nothing out, because the model is"),
        ("vit", "image_classification", {"test": "a.parquet"}, "data.held_out = 0.25 holds nothing out"),
        ("bert", "masked_lm", {"field": "body"}, "field = body is for JSON lines, parquet and datasets"),
        ("bert", "masked_lm", {"separator": "#", "append_eos": False}, None),
        ("classifier", "text_classification", {"tokenizer": "a"}, None),
        ("t5", "span_corruption", {"split": "test"}, "split = test, and .* is no dataset with splits"),
    ],
)  # fmt: skip
def test_keys_of_the_data_that_a_task_does_not_read(kind, task, keys, said, data, tmp_path):
    keys = dict(keys)
    of_source = {key: keys.pop(key) for key in ("field", "separator", "split") if key in keys}
    of_task = {"name": task, **{key: keys.pop(key) for key in ("test",) if key in keys}}
    run = Run.of(table(kind, data, tmp_path, data=keys, task=of_task))
    (source,) = run.data.sources
    found = run.task.objection(replace(run.data, sources=(replace(source, **of_source),)))
    assert (found is None) if said is None else re.search(said, found), found


def test_every_head_has_one_task():
    # Whoever trains on chats says so.
    heads = [head for name in tasks.names() if name != "sft" for head in tasks.find(name).heads]
    assert len(heads) == len(set(heads))
    for model_type in families.names():
        for architecture in families.find(model_type).architectures:
            known = architecture.endswith(tuple(heads))
            bare = architecture.endswith(("Model", "PreTraining", "QuestionAnswering", "TokenClassification"))
            assert known != (bare and architecture != "GPT2LMHeadModel"), architecture
    for name in ("BertModel", "BertLMHeadModel"):  # the second reads both ways
        with pytest.raises(UpcycleError, match="has no head to train") as caught:
            tasks.of(name)
        assert str(caught.value).count("ForCausalLM") == 1
    for name in ("GPT2LMHeadModel", "UpcycledGPT2LMHeadModel"):
        assert tasks.of(name).name == "causal_lm"
        assert tasks.fitting(tasks.find("sft")(), name).name == "sft"
    assert Subject(folder=Path(), config={"architectures": ["UpcycledViTModel"]}).architecture == "ViTModel"


@pytest.mark.parametrize("changes", [{}, UPCYCLED], ids=["dense", "upcycled"])
@pytest.mark.parametrize("kind", ["vit", "t5", "bert"])
def test_from_scratch_starts_as_transformers_does(kind, changes, data, tmp_path):
    """Each parameter has the mean and the deviation that the dense class starts it with, experts too."""
    run = Run.of(table(kind, data, tmp_path, from_scratch=True, **changes))
    begun = start.start_of(run)
    ours = start.plain_model(begun)
    torch.manual_seed(1)
    theirs = type(upcycle.open(data / kind))(upcycle.open(data / kind).config)
    wanted = dict(theirs.named_parameters())
    experts = {"up_proj": ("fc1", "wi", "dense"), "down_proj": ("fc2", "wo", "dense")}
    seen = 0
    for name, parameter in ours.named_parameters():
        if ".router." in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3)
            continue
        if ".experts." in name:
            matrix = name.rpartition(".")[2].removesuffix("_bias")
            kinds = [
                p
                for n, p in wanted.items()
                if n.split(".")[-2] in [k.split(".")[-1] for k in experts[matrix]]
            ]
            like = next(p for p in kinds if p.shape == parameter.shape[1:] or "_bias" in name)
            if "_bias" in name:
                assert not parameter.any()
                continue
        else:
            like = wanted[name]
        seen += 1
        spread = float(like.detach().std(correction=0))
        error = 5 * spread * (2 / like.numel()) ** 0.5
        assert abs(float((parameter.mean() - like.mean()).detach())) <= error + 1e-9, name
        if spread:
            assert 0.5 < float(parameter.detach().std(correction=0)) / spread < 1.6, name
    assert seen > 20


def test_mean_pooling_is_what_the_head_sees(data, tmp_path):
    recipe = Recipe.of(moe={**UPCYCLED["moe"], "pooling": "mean"})
    built = upcycle.convert(data / "vit", tmp_path / "moe", recipe)
    assert not built.preserves_function
    model = upcycle.open(tmp_path / "moe").eval()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = upcycle.load(data / "vit", Recipe.of(moe=UPCYCLED["moe"])).eval()
        states = plain.vit(pixel_values=pixels).last_hidden_state
        wanted = plain.classifier(states[:, 1:].mean(1))
        assert torch.allclose(model(pixel_values=pixels).logits, wanted, atol=1e-6)
        assert torch.allclose(model(pixel_values=pixels, return_dict=False)[0], wanted, atol=1e-6)
        bare = [model.vit(pixel_values=pixels, return_dict=given)[0] for given in (True, False)]
        assert torch.equal(*bare)
    run = table("vit", data, tmp_path / "run", moe={**UPCYCLED["moe"], "pooling": "mean"})
    assert train(Run.of(run)).finished
    with pytest.raises(UpcycleError, match="is for heads on a class token"):
        upcycle.blueprint(data / "bert", recipe)


def test_a_capacity_below_one_token(data):
    for router in ({"name": "expert_choice", "capacity_factor": 0.1}, {"capacity_factor": 0.01}):
        with pytest.raises(UpcycleError, match="capacity_factor is too small: an expert's part of 17 tokens"):
            upcycle.blueprint(data / "vit", Recipe.of(moe=UPCYCLED["moe"], router=router))


@pytest.mark.parametrize("rounding", ["vmoe", "flaxformer"])
def test_a_rounding_that_gives_every_expert_places(rounding, data):
    """An expert's part of 17 tokens is less than half of one, and it gets four."""
    router = {"name": "expert_choice", "capacity_factor": 0.01, "rounding": rounding}
    upcycle.blueprint(data / "vit", Recipe.of(moe=UPCYCLED["moe"], router=router | {"name": "top_k"}))
    model = upcycle.load(data / "vit", Recipe.of(moe=UPCYCLED["moe"], router=router))
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    hidden = torch.randn(1, 17, layer.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    assert layer.router(hidden, None).counts.tolist() == [4] * layer.shape.num_experts


def test_the_normalisation_is_that_of_the_checkpoint(data, tmp_path):
    """preprocessor_config.json says it, comes along, and a run file may say otherwise."""
    source = tmp_path / "vit"
    shutil.copytree(data / "vit", source)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (source / "preprocessor_config.json").write_text(json.dumps(said))
    upcycle.convert(source, tmp_path / "moe", Recipe.of(moe=UPCYCLED["moe"]))
    for folder in (source, tmp_path / "moe"):
        subject = Subject(folder=folder, config=json.loads((folder / "config.json").read_text()))
        batch = {"pixels": torch.full((1, 8, 8, 3), 255, dtype=torch.uint8), "labels": torch.zeros(1).long()}
        found = tasks.of("ViTForImageClassification").question(batch, subject, training=False)
        wanted = (1 - torch.tensor(said["image_mean"])) / torch.tensor(said["image_std"])
        assert torch.allclose(found.inputs["pixel_values"][0, :, 0, 0], wanted)
        own = tasks.read({"name": "image_classification", "augment": {"mean": [0], "std": [1]}})
        assert own.question(batch, subject, training=False).inputs["pixel_values"].max() == 1


def test_a_shared_expert_in_one_stack(data):
    """Each stack has its own: halves where there is one, whole experts where there is none."""
    moe = UPCYCLED["moe"]
    for encoder, decoder in ((0, 1), (1, 0)):
        recipe = Recipe.of(
            moe={**moe, "shared_experts": encoder}, decoder={"moe": {"shared_experts": decoder}}
        )
        assert upcycle.blueprint(data / "t5", recipe).preserves_function
        model, dense = upcycle.load(data / "t5", recipe).eval(), upcycle.open(data / "t5").eval()
        shared = {s.stack: s.shared_size for s in model.config.shapes}
        assert shared == {"encoder": 48 * encoder, "decoder": 48 * decoder}
        ids = torch.arange(6, 18)[None]
        with torch.inference_mode():
            a, b = (m(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for m in (model, dense))
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5
    for key, value in (("target", "native"), ("pooling", "mean"), ("depth", 3)):
        with pytest.raises(UpcycleError, match=f"decoder.moe.{key}: a model has one"):
            Recipe.of(moe=moe, decoder={"moe": {key: value}})


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("classifier", {"text": "text.txt"}, "classifies texts; score it in a run"),
        ("bert", {"images": "images", "shots": "images"}, "reads no images"),
        ("vit", {"text": "text.txt"}, "reads images and no text"),
        ("bert", {"images": "images"}, "does not classify images"),
        ("bert", {"text": "text.txt", "length": 65}, "the model takes 64 tokens"),
        ("vit", {"images": "images", "limit": -1}, "--limit -1"),
        ("vit", {}, "give either --text FILE or --images SET"),
        ("vit", {"shots": "images", "text": "text.txt"}, "give both"),
        ("nowhere", {"text": "text.txt"}, "no config.json"),
    ],
)  # fmt: skip
def test_mistakes_in_what_to_score(kind, asked, message, data):
    paths = {k: data / v if isinstance(v, str) else v for k, v in asked.items()}
    with pytest.raises(UpcycleError, match=message):
        evaluate(data / kind, ToScore(**paths))


def test_examples_are_all_scored(data, tmp_path):
    changes = {"train": {"steps": 1, "eval_every": 1, "eval_examples": None, "sequence_length": 1024}}
    made = table("vit", data, tmp_path / "run", **changes)
    del made["train"]["eval_examples"]
    train(Run.of(made))
    shares = read(tmp_path / "run")[0].held_out_accuracy * 12  # a quarter of 48
    assert shares == pytest.approx(round(shares))

"""Checkpoints of a known body as the hub has them: any head, old names, heads that the class does not use."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
import upcycle
from marks import sampled
from upcycle import Recipe, UpcycleError, blueprint, convert, plan, verify

MOE = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, router={"std": 0.5})


def edited(folder, out, change=lambda tensors: tensors, **changes):
    """A copy of a folder with other tensors or other keys of config.json."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: t.contiguous() for name, t in change(load_file(out / "model.safetensors")).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def old_names(tensors):
    """The norms as TensorFlow called them, and the heads of BERT's training."""
    words = tensors["bert.embeddings.word_embeddings.weight"]
    square = torch.zeros(words.shape[1], words.shape[1])
    extra = {
        "bert.pooler.dense.weight": square,
        "bert.pooler.dense.bias": square[0].clone(),
        "cls.seq_relationship.weight": square[:2].clone(),
        "cls.seq_relationship.bias": square[0, :2].clone(),
        "cls.predictions.decoder.weight": words.clone(),
    }
    renamed = {
        re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", n)): t
        for n, t in tensors.items()
    }
    return renamed | extra


def without_pooler(tensors):
    return {name: t for name, t in tensors.items() if not name.startswith("pooler.")}


# The class, what is changed, keys of config.json, and the class of the result.
CASES = {
    "bert-base-uncased": ("BertForMaskedLM", old_names, {}, "UpcycledBertForMaskedLM"),
    "a BERT without a pooler": ("BertModel", without_pooler, {}, "UpcycledBertModel"),
    "a ViT without a pooler": ("ViTModel", without_pooler, {}, "UpcycledViTModel"),
    "BertLMHeadModel": ("BertLMHeadModel", None, {}, "UpcycledBertLMHeadModel"),
    "a choice": ("BertForMultipleChoice", None, {}, "UpcycledBertForMultipleChoice"),
    "T5WithLMHeadModel": (
        "T5ForConditionalGeneration", None, {"architectures": ["T5WithLMHeadModel"]},
        "UpcycledT5ForConditionalGeneration",
    ),
    "classes of a T5": ("T5ForSequenceClassification", None, {}, "UpcycledT5ForSequenceClassification"),
    "tokens of a T5": ("T5ForTokenClassification", None, {}, "UpcycledT5ForTokenClassification"),
    "answers of a T5": ("T5ForQuestionAnswering", None, {}, "UpcycledT5ForQuestionAnswering"),
    "classes of a BART": (
        "BartForSequenceClassification", None, {}, "UpcycledBartForSequenceClassification",
    ),
    "answers of a BART": ("BartForQuestionAnswering", None, {}, "UpcycledBartForQuestionAnswering"),
    "classes of a Whisper": (
        "WhisperForAudioClassification", None, {}, "UpcycledWhisperForAudioClassification",
    ),
    "masked images": ("ViTForMaskedImageModeling", None, {}, "UpcycledViTForMaskedImageModeling"),
}  # fmt: skip


def bare(prefix):
    """The body alone, as its own class stores it."""
    return lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


CASES |= {
    "all-mpnet-base-v2": ("MPNetForMaskedLM", bare("mpnet."), {}, "UpcycledMPNetModel"),
    "all-distilroberta-v1": ("RobertaForMaskedLM", bare("roberta."), {}, "UpcycledRobertaModel"),
    "the body of a DINOv2": (
        "Dinov2ForImageClassification", bare("dinov2."), {}, "UpcycledDinov2Model",
    ),
    "a body with its prefix": (
        "BertForMaskedLM", None, {"architectures": ["BertModel"]}, "UpcycledBertModel",
    ),
    "a RoBERTa without a class": (
        "RobertaForMaskedLM", None, {"architectures": None}, "UpcycledRobertaModel",
    ),
}  # fmt: skip


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    name = type(model).__name__.removeprefix("Upcycled")
    if name.startswith("Whisper"):
        given = {"input_features": torch.randn(2, 8, 40, generator=generator)}
    elif name.startswith(("ViT", "Dinov2")):
        given = {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    else:
        shape = (2, 3, 7) if "MultipleChoice" in name else (2, 7)
        given = {"input_ids": torch.randint(3, 60, shape, generator=generator)}
        if "SequenceClassification" in name:
            end = 2 if "Bart" in name else 1
            given["input_ids"][:, -1] = end  # the end of a text, which the head reads
    if name in ("T5ForConditionalGeneration", "T5ForQuestionAnswering"):
        given["decoder_input_ids"] = given["input_ids"]
    with torch.inference_mode():
        return model.eval()(**given)[0]


@pytest.mark.parametrize("case", sampled(CASES, 2))
def test_it_becomes_experts_with_the_same_head(case, tmp_path):
    name, change, keys, wanted = CASES[case]
    made = tiny.make(tmp_path / "made", name, **({"patch_size": 4} if "ViT" in name else {}))
    source = edited(made, tmp_path / "dense", change or (lambda tensors: tensors), **keys)
    built = convert(source, tmp_path / "moe", MOE)
    assert built.preserves_function
    dense = getattr(transformers, wanted.removeprefix("Upcycled")).from_pretrained(source)
    model = upcycle.open(tmp_path / "moe")
    assert type(model).__name__ == wanted
    found, due = outputs(model), outputs(dense)
    assert float((found - due).abs().max() / due.abs().max()) < 1e-5
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert proof.logits["random"].scale > 0


def test_what_the_class_does_not_use_is_named(tmp_path):
    source = edited(tiny.make(tmp_path / "made", "BertForMaskedLM"), tmp_path / "dense", old_names)
    left = blueprint(source, MOE).left_out
    assert left["bert.pooler.dense.weight"] == "of another head than that of the class in config.json"
    assert left["cls.seq_relationship.bias"] == left["bert.pooler.dense.weight"]
    assert "tied" in left["cls.predictions.decoder.weight"]
    assert len(left) == 5


def test_a_tensor_that_nobody_knows_is_refused_or_dropped_by_name(dense, tmp_path):
    source = edited(
        dense("llama"), tmp_path / "dense", lambda t: {**t, "v_head.summary.weight": torch.zeros(1, 32)}
    )
    with pytest.raises(UpcycleError, match=r"v_head\.summary\.weight.*--drop NAME"):
        blueprint(source, Recipe.of())
    convert(source, tmp_path / "moe", Recipe.of(drop=["v_head.*"], moe={"num_experts": 2}))
    assert verify(source, tmp_path / "moe").holds
    with pytest.raises(UpcycleError, match=r"no tensor called 'x_head"):
        blueprint(source, Recipe.of(drop=["x_head.*"]))
    with pytest.raises(UpcycleError, match=r"lacks lm_head\.weight"):
        blueprint(source, Recipe.of(drop=["v_head.*", "lm_head.weight"]))


# Tensors that a check of the whole checkpoint refuses, how it says so, and what the recipe drops.
BESIDE = {
    "buffers of a draft head": (
        lambda t: {**t, "d2t": torch.zeros(5, dtype=torch.int64), "t2d": torch.ones(5, dtype=torch.bool)},
        "holds d2t, t2d as I64",
        ["d2t", "t2d"],
    ),
    "a mean of the weights": (
        lambda t: {**t, **{f"ema.{name}": tensor + 1 for name, tensor in t.items()}},
        "a text model more than once",
        ["ema.*"],
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_dropped_is_not_looked_at(case, dense, tmp_path):
    """The result has the bytes of that of a source without these tensors."""
    change, said, drop = BESIDE[case]
    source = edited(dense("llama"), tmp_path / "dense", change)
    with pytest.raises(UpcycleError, match=said):
        blueprint(source, MOE)
    without = Recipe.of(MOE.as_table() | {"drop": drop})
    convert(source, tmp_path / "moe", without)
    convert(dense("llama"), tmp_path / "plain", MOE)
    assert verify(source, tmp_path / "moe", logits=False).holds
    found, due = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("moe", "plain"))
    assert found == due


def test_a_body_without_its_head_is_named(tmp_path):
    """A BART's head is the table of its body, so that nothing would be missing, and it is refused."""
    made = tiny.make(tmp_path / "made", "MPNetForMaskedLM")
    source = edited(made, tmp_path / "dense", bare("mpnet."))
    assert any("the result is a MPNetModel, without a head" in said for said in plan(source, MOE).warnings)
    assert not any("without a head" in said for said in plan(made, MOE).warnings)
    whole = tiny.make(tmp_path / "whole", "BartForConditionalGeneration")
    with pytest.raises(UpcycleError, match=r"lacks model\."):
        plan(edited(whole, tmp_path / "bart", bare("model.")), MOE)

"""Families with names of their own: their tensors, and experts in them, against transformers."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers

import tiny
import upcycle
from upcycle import Recipe, convert, families, verify
from upcycle.checkpoints.checkpoint import Checkpoint

# The class, and changes of its config.
CASES = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2, wider": ("GPT2LMHeadModel", {"n_inner": 24, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_neox, one after the other": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", {}),
    "opt, norms behind": ("OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "roberta": ("RobertaForMaskedLM", {}),
    "roberta, classes": ("RobertaForSequenceClassification", {}),
    "xlm-roberta": ("XLMRobertaModel", {}),
    "camembert": ("CamembertForMaskedLM", {}),
    "electra": ("ElectraModel", {}),
    "electra, discriminator": ("ElectraForPreTraining", {}),
    "mpnet": ("MPNetModel", {}),
    "distilbert": ("DistilBertModel", {}),
    "distilbert, masked": ("DistilBertForMaskedLM", {}),
    "distilbert, classes": ("DistilBertForSequenceClassification", {}),
    "clip": ("CLIPModel", {}),
    "siglip": ("SiglipModel", {}),
    "clip_vision_model": ("CLIPVisionModel", {}),
    "siglip_vision_model": ("SiglipVisionModel", {}),
    "pixtral": ("PixtralVisionModel", {}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon, two norms": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon, alibi": (
        "FalconForCausalLM",
        {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True, "ffn_hidden_size": 24},
    ),
    "deberta-v2": ("DebertaV2Model", {}),
    "deberta-v2, masked": (
        "DebertaV2ForMaskedLM",
        {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2, "conv_kernel_size": 3},
    ),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "dinov2_with_registers, classes": (
        "Dinov2WithRegistersForImageClassification",
        {"use_swiglu_ffn": True},
    ),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "dinov3_vit, gated": ("DINOv3ViTModel", {"use_gated_mlp": True, "mlp_bias": False, "key_bias": True}),
    "bart": ("BartForConditionalGeneration", {}),
    "bart, base": ("BartModel", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
    "modernbert": ("ModernBertModel", {}),
    "modernbert, masked": ("ModernBertForMaskedLM", {"mlp_bias": True, "norm_bias": True}),
    "modernbert, classes": ("ModernBertForSequenceClassification", {}),
}


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    ids, name = torch.randint(3, 60, (2, 20), generator=generator), type(model).__name__
    given = {} if re.search("DINO|Dino|Whisper|Vision", name) else {"input_ids": ids}
    if re.search("CLIP|Siglip|Pixtral|DINO|Dino", name):
        given["pixel_values"] = torch.randn(2, 3, 12, 12, generator=generator)
    if "Whisper" in name:
        given["input_features"] = torch.randn(2, 8, 40, generator=generator)
        given["decoder_input_ids"] = ids
    with torch.inference_mode():
        return model.eval()(**given)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_dense_function(case, tmp_path):
    architecture, changes = CASES[case]
    source = tiny.make(tmp_path / "dense", architecture, **changes)
    recipe = Recipe.of(moe={"num_experts": 4, "target": "upcycled"}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert built.preserves_function
    assert len(built.sites) == (6 if case in ("clip", "siglip") else 4)
    dense = getattr(transformers, architecture).from_pretrained(source)
    model = upcycle.open(tmp_path / "moe")
    assert isinstance(model, getattr(transformers, architecture))
    found, due = outputs(model), outputs(dense)
    assert float((found - due).abs().max() / due.abs().max()) < 1e-5
    with torch.no_grad():  # experts count
        for name, parameter in model.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.zero_()
    assert float((outputs(model) - due).abs().max() / due.abs().max()) > 1e-3
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_transformers(case, tmp_path):
    """The tensors that transformers itself saves, of which each has its place in the family."""
    architecture, changes = CASES[case]
    with Checkpoint.open(tiny.make(tmp_path / "dense", architecture, **changes)) as saved:
        wanted, raw = {name: tensor.shape for name, tensor in saved.tensors.items()}, saved.config
    family = families.find(raw["model_type"])
    whole = family.config(raw)
    found = family.shapes(whole) | {name: weight.shape for name, weight in family.optional(whole).items()}
    assert found == {name: shape for name, shape in wanted.items() if not family.unlisted(whole, name)}


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without the prefix of its class, and with the masks that transformers makes itself."""
    from safetensors.torch import load_file, save_file

    source = tiny.make(tmp_path / "dense", "GPT2LMHeadModel")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40) for i in range(4)}
    save_file(bare | masks, source / "model.safetensors", {"format": "pt"})
    built = convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    assert set(built.left_out) == set(masks)
    assert verify(source, tmp_path / "moe").holds


def test_llama_under_another_name(dense, tmp_path):
    import shutil

    source = shutil.copytree(dense("llama"), tmp_path / "dense")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "internlm3"}
    (source / "config.json").write_text(json.dumps(config))
    for target, wanted in (("native", "mixtral"), ("upcycled", "upcycled_llama")):
        built = convert(source, tmp_path / target, Recipe.of(moe={"num_experts": 2, "target": target}))
        assert built.config["model_type"] == wanted
        assert verify(source, tmp_path / target).holds

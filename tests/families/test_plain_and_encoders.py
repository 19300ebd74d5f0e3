"""Families with names of their own: their tensors, and experts in them, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import tiny
import upcycle
from upcycle import Recipe, convert, families, verify

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
    "modernbert": ("ModernBertModel", {}),
    "modernbert, masked": ("ModernBertForMaskedLM", {"mlp_bias": True, "norm_bias": True}),
    "modernbert, classes": ("ModernBertForSequenceClassification", {}),
}


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    given = {"input_ids": torch.randint(3, 60, (2, 20), generator=generator)}
    if "CLIP" in type(model).__name__ or "Siglip" in type(model).__name__:
        given["pixel_values"] = torch.randn(2, 3, 12, 12, generator=generator)
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
def test_shapes_are_those_of_transformers(case):
    architecture, changes = CASES[case]
    cls = getattr(transformers, architecture)
    config = cls.config_class(**{**tiny._SIZES[cls.config_class.model_type], **changes})
    family = families.find(config.model_type)
    raw = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}
    with torch.device("meta"):
        model = cls(config)
    tied = model.all_tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    wanted = {name.replace("lm_head.weight", "embed_out.weight") if "neox" in case else name: shape
              for name, shape in wanted.items()}  # fmt: skip
    found = family.shapes(family.config(raw)) | {
        name: weight.shape for name, weight in family.optional(family.config(raw)).items()
    }
    whole = family.config(raw)
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

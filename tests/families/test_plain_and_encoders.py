"""Families with names of their own: their tensors, and experts in them, against transformers."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
import upcycle
from arrays import stored
from marks import sampled
from upcycle import Recipe, UpcycleError, blueprint, convert, families, plan, verify
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
    "gemma4_text, wider last layers": (
        "Gemma4ForCausalLM",
        {"use_double_wide_mlp": True, "final_logit_softcapping": 30.0},
    ),
    "gemma4_text, keys that are values": (
        "Gemma4ForCausalLM",
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "nomic_bert": ("NomicBertModel", {}),
    "nomic_bert, masked": ("NomicBertForMaskedLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "bloom, residuals of norms": ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
    "siglip2": ("Siglip2Model", {}),
    "wav2vec2": ("Wav2Vec2Model", {"add_adapter": True, "output_hidden_size": 12}),
    "wav2vec2, text": (
        "Wav2Vec2ForCTC",
        {
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "conv_bias": True,
            "adapter_attn_dim": 3,
            "mask_time_prob": 0.0,
        },
    ),
    "wav2vec2, before training": ("Wav2Vec2ForPreTraining", {}),
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
    given = {} if re.search("DINO|Dino|Whisper|Wav2Vec2|Vision", name) else {"input_ids": ids}
    if "Siglip2" in name:  # nine places, of which the second image fills six
        given["pixel_values"] = torch.randn(2, 9, 12, generator=generator)
        given["spatial_shapes"] = torch.tensor([[3, 3], [2, 3]])
        given["pixel_attention_mask"] = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    elif "Wav2Vec2" in name:
        given["input_values"] = torch.randn(2, 200, generator=generator)
    elif re.search("CLIP|Siglip|Pixtral|DINO|Dino", name):
        given["pixel_values"] = torch.randn(2, 3, 12, 12, generator=generator)
    if "Whisper" in name:
        given["input_features"] = torch.randn(2, 8, 40, generator=generator)
        given["decoder_input_ids"] = ids
    with torch.inference_mode():
        return model.eval()(**given)[0]


@pytest.mark.parametrize("case", sampled(CASES, 8))
def test_the_dense_function(case, tmp_path):
    architecture, changes = CASES[case]
    source = tiny.make(tmp_path / "dense", architecture, **changes)
    recipe = Recipe.of(moe={"num_experts": 4, "target": "upcycled"}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert built.preserves_function
    assert len(built.sites) == (6 if case in ("clip", "siglip", "siglip2") else 4)
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
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    assert generates == any(check.name == "generation" for check in proof.checks)


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


def test_a_wav2vec2_as_the_hub_has_it(tmp_path):
    """Its positions under their former names, and no vector for masked frames, which only training reads."""
    from safetensors.torch import load_file, save_file

    source = tiny.make(tmp_path / "dense", "Wav2Vec2ForCTC")
    tensors = load_file(source / "model.safetensors")
    for number, then in enumerate(("weight_g", "weight_v")):
        now = f"parametrizations.weight.original{number}"
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    del tensors["wav2vec2.masked_spec_embed"]
    assert any(name.endswith("weight_g") for name in tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "BertForTokenClassification", "T5ForTokenClassification"])
def test_a_deeper_model_keeps_a_head_that_no_family_lists(name, tmp_path):
    source = tiny.make(tmp_path / "dense", name)
    recipe = Recipe.of(moe={"target": "depth_tiled"})
    built = convert(source, tmp_path / "deep", recipe)
    before, after = stored(source), stored(tmp_path / "deep")
    heads = [n for n in before if n.startswith(("lm_head.", "classifier."))]
    assert heads
    for head in heads:
        assert (after[head] == before[head]).all()
        assert built.weights[head].shape == before[head].shape
    assert plan(source, recipe).total_parameters == sum(t.size for t in after.values())


def test_a_modernbert_cannot_be_deeper(tmp_path):
    """Its first block has no norm before attention, so it is like no other block."""
    source = tiny.make(tmp_path / "dense", "ModernBertForMaskedLM")
    with pytest.raises(upcycle.UpcycleError, match="its blocks cannot be repeated"):
        plan(source, Recipe.of(moe={"target": "depth_tiled"}))


def test_a_mask_of_samples_is_not_one_of_frames(tmp_path):
    """Routers learn which positions are padding from a mask of as many positions, and from no other."""
    source = tiny.make(tmp_path / "dense", "WhisperForConditionalGeneration")
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    model = upcycle.open(tmp_path / "moe").eval()
    given = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.full((2, 5), 7)}
    heard = torch.ones(2, 40, dtype=torch.long)  # twice as long as the encoder's positions
    heard[1, 20:] = 0
    seen = []
    layer = model.model.encoder.layers[0].fc1
    layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.inference_mode():
        model(**given, attention_mask=heard)
        model.model.encoder(given["input_features"], attention_mask=heard[:, ::2])
    assert seen[0] is None
    assert seen[1].tolist() == (heard[:, ::2] == 0).tolist()


def test_a_nomic_bert_built_without_a_folder(tmp_path):
    """Its class splits stored matrices, and so does the loader that training uses."""
    source = tiny.make(tmp_path / "dense", "NomicBertModel")
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, router={"std": 0.5})
    convert(source, tmp_path / "moe", recipe)
    opened, built = upcycle.open(tmp_path / "moe"), upcycle.load(source, recipe)
    assert torch.equal(outputs(opened), outputs(built))


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


@pytest.mark.parametrize("model_type", ["internlm3", "aquila"])
def test_llama_under_another_name(model_type, dense, tmp_path):
    """Transformers knows the first; the second is nobody's type, and its config names the class of Llama."""
    import shutil

    source = shutil.copytree(dense("llama"), tmp_path / "dense")
    config = json.loads((source / "config.json").read_text()) | {"model_type": model_type}
    (source / "config.json").write_text(json.dumps(config))
    for target, wanted in (("native", "mixtral"), ("upcycled", "upcycled_llama")):
        built = convert(source, tmp_path / target, Recipe.of(moe={"num_experts": 2, "target": target}))
        assert built.config["model_type"] == wanted
        proof = verify(source, tmp_path / target)
        assert proof.holds, proof.checks
    (source / "config.json").write_text(json.dumps(config | {"model_type": "no", "architectures": ["NoLM"]}))
    with pytest.raises(upcycle.UpcycleError, match="unknown model_type 'no'"):
        convert(source, tmp_path / "no")


STORED_TWICE = {  # tensors that the class ties to others
    "BertForMaskedLM": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    "RobertaForMaskedLM": ("lm_head.decoder.weight", "lm_head.decoder.bias"),
    "T5ForConditionalGeneration": ("encoder.embed_tokens.weight",),
    "BartForConditionalGeneration": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
}

HEADS = ("cls.predictions.decoder.weight", "lm_head.decoder.weight", "lm_head.weight")


@pytest.mark.parametrize("architecture", STORED_TWICE)
def test_a_tied_tensor_that_is_stored_is_left_out_if_it_is_the_same(architecture, tmp_path):
    """transformers keeps one that differs, so it is asked which is meant."""
    source = tiny.make(tmp_path / "dense", architecture)
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"})
    whole = getattr(transformers, architecture).from_pretrained(source).state_dict()
    file = source / "model.safetensors"
    for name in STORED_TWICE[architecture]:
        kept = load_file(file)
        save_file({**kept, name: whole[name].clone()}, file, {"format": "pt"})
        assert name in blueprint(source, recipe).left_out
        assert convert(source, tmp_path / name, recipe).preserves_function
        save_file({**kept, name: whole[name] + 1}, file, {"format": "pt"})
        with pytest.raises(UpcycleError, match=f"stores an {re.escape(name)} that differs from") as said:
            convert(source, tmp_path / "other", recipe)
        assert ("set tie_word_embeddings" in str(said.value)) == (name in HEADS)
        dropped = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, drop=[name])
        convert(source, tmp_path / f"{name} dropped", dropped)
        proof = verify(source, tmp_path / f"{name} dropped")
        assert proof.holds, proof.checks
        save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize("named", ["CLIPForImageClassification", "CLIPVisionModelWithProjection"])
def test_one_encoder_of_two_is_refused_by_its_class(named, tmp_path):
    source = tiny.make(tmp_path / "dense", "CLIPModel")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [named]}))
    with pytest.raises(UpcycleError, match=f"names the class {named}, which has one of the two encoders"):
        blueprint(source, Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))

"""A head of its own where the dense model ties one, and the experts of Qwen3.5-MoE as the hub has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_wrappers
from marks import sampled
from upcycle import Recipe, UpcycleError, convert, families, plan, verify
from upcycle.inspection import inspect
from upcycle.targets import natives
from upcycle.targets.natives import qwen3_5_moe_text

MOE = {"num_experts": 2, "top_k": 1}


@pytest.mark.parametrize("target", ["native", "upcycled"])
def test_an_untied_head_is_a_copy_of_the_embeddings(target, dense, tmp_path):
    source = dense("qwen3", tie_word_embeddings=True)
    tied = Recipe.of(moe={**MOE, "target": target})
    untied = Recipe.of(moe={**MOE, "target": target, "untie": True})
    built = convert(source, tmp_path / "moe", untied)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert built.preserves_function
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    a, b = plan(source, tied), plan(source, untied)
    assert b.total_parameters - a.total_parameters == 96 * 32
    assert b.flops_per_token == a.flops_per_token
    said = [warning for warning in a.warnings if "SGLang never ties" in warning]
    assert len(said) == (target == "native")
    assert all("(moe.untie = true stores a head): it" in warning for warning in said)
    assert not any("SGLang" in warning for warning in b.warnings)


@pytest.mark.parametrize(
    ("name", "changes", "target", "can"),
    [
        ("llama", {}, "mixtral", ["upcycled"]),
        ("phi3", {}, "mixtral", ["upcycled"]),  # it has a sliding window
        ("phi3", {"sliding_window": None}, "mixtral", ["glm4_moe", "upcycled"]),
        ("qwen2", {}, "granitemoe", ["qwen2_moe", "upcycled"]),
    ],
)
def test_a_target_with_experts_in_every_layer_names_those_of_the_model_that_can_keep_dense_ones(
    name, changes, target, can, dense
):
    source = dense(name, **changes)
    with pytest.raises(UpcycleError) as found:
        plan(source, {"moe": {"layers": "last_half", "target": target}})
    assert str(found.value).endswith(f"use moe.layers = all, or moe.target = {' or '.join(can)}")
    for other in can:
        assert plan(source, {"moe": {"layers": "last_half", "target": other}}).num_moe_layers == 2


def test_what_cannot_be_untied(dense, tmp_path):
    import tiny

    source = tiny.make(tmp_path / "vit", "ViTModel")
    with pytest.raises(UpcycleError, match=r"moe\.untie is for a model whose head can be tied"):
        plan(source, Recipe.of(moe={**MOE, "target": "upcycled", "untie": True}))
    whole = plan(dense("qwen3"), Recipe.of(moe={**MOE, "untie": True}))
    assert whole.total_parameters == plan(dense("qwen3"), Recipe.of(moe=MOE)).total_parameters


@pytest.mark.parametrize("moe", [{}, {"part_only": "text"}])
def test_a_part_of_a_checkpoint_is_not_told_to_untie_its_head(moe, tmp_path):
    """moe.untie is refused there, so no warning proposes it."""
    source = tiny_wrappers.make(tmp_path / "internvl", "internvl", tie_word_embeddings=True)
    (said,) = (w for w in plan(source, Recipe.of(moe={**MOE, **moe})).warnings if "never ties" in w)
    assert said.startswith("SGLang never ties the head of qwen3_moe to its embeddings:")
    with pytest.raises(UpcycleError, match=r"moe\.untie is for"):
        plan(source, Recipe.of(moe={**MOE, **moe, "untie": True}))


def test_experts_of_qwen3_5_are_stored_fused_and_read_in_both_forms(dense, tmp_path):
    source = dense("qwen3_5_text")
    convert(source, tmp_path / "moe", Recipe.of(moe=MOE))
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    both, down = (stored[f"model.layers.0.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj"))
    assert (both.shape, down.shape) == ((2, 96, 32), (2, 32, 48))
    network = load_file(source / "model.safetensors")
    parts = [network[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    assert torch.equal(both[1], torch.cat(parts))
    found = inspect(tmp_path / "moe")["layers"]
    earlier = Path(shutil.copytree(tmp_path / "moe", tmp_path / "earlier"))
    each = {}
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith("mlp.experts"):
            each[name] = tensor
            continue
        names = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
        for e in range(2):
            for n, matrix in zip(names, tensor[e].chunk(len(names)), strict=True):
                each[f"{path}.{e}.{n}_proj.weight"] = matrix.contiguous()
    save_file(each, earlier / "model.safetensors", {"format": "pt"})
    assert inspect(earlier)["layers"] == found
    assert qwen3_5_moe_text.native.layout.each.path == "mlp.experts.{e}"


@pytest.mark.parametrize(
    ("width", "granularity", "said"),
    [(1024, 2, []), (768, 2, ["multiple of 256"]), (608, 2, ["multiple of 128", "multiple of 256"])],
)
def test_widths_that_no_block_divides(width, granularity, said, dense):
    recipe = Recipe.of(moe={"num_experts": 2, "granularity": granularity}, init={"name": "split"})
    found = [w for w in plan(dense("llama", intermediate_size=width), recipe).warnings if "multiple of" in w]
    assert [next(s for s in ("multiple of 128", "multiple of 256") if s in w) for w in found] == said


def test_a_config_that_turns_the_cache_off(dense, tmp_path):
    """It is a setting of a training script: the result does not have it, and both models generate alike."""
    source = Path(shutil.copytree(dense("llama"), tmp_path / "dense"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert any("use_cache = false" in w for w in plan(source, Recipe.of(moe=MOE)).warnings)
    convert(source, tmp_path / "moe", Recipe.of(moe=MOE))
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["use_cache"] is True
    assert verify(source, tmp_path / "moe").holds


def test_special_tokens_stay_what_they_are(dense, tmp_path):
    """Null stays null, and a token that only the new class knows is as the source has it."""
    for name, config in (
        ("null", {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}),
        ("set", {"sep_token_id": 5, "eos_token_id": [2, 3]}),
    ):
        source = Path(shutil.copytree(dense("hunyuan_v1_dense"), tmp_path / name))
        whole = json.loads((source / "config.json").read_text()) | config
        (source / "config.json").write_text(json.dumps(whole))
        (source / "generation_config.json").unlink(missing_ok=True)
        convert(source, tmp_path / f"{name}-moe", Recipe.of(moe=MOE))
        made = json.loads((tmp_path / f"{name}-moe" / "config.json").read_text())
        assert {key: made[key] for key in config} == config
        assert made["sep_token_id"] == whole.get("sep_token_id")
        assert verify(source, tmp_path / f"{name}-moe").holds


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "glm", "youtu"])
def test_a_shared_network_is_as_wide_as_the_experts(model_type, dense, tmp_path):
    """These classes read one width for both, so an idle shared network has that of the experts."""
    recipe = Recipe.of(moe={"num_experts": 4, "expert_width": 24}, init={"name": "random"})
    convert(dense(model_type), tmp_path / "moe", recipe)
    assert verify(dense(model_type), tmp_path / "moe").holds
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model(torch.arange(12)[None]).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "glm", "ernie4_5", "cohere2"])
def test_a_shared_expert_that_the_class_would_build_narrower_is_refused(model_type, dense):
    moe = {"num_experts": 4, "expert_width": 24, "shared_experts": 1}
    with pytest.raises(UpcycleError, match=r"of 24 neurons, as its experts have 24, and this recipe .* 48"):
        plan(dense(model_type), Recipe.of(moe=moe, init={"name": "random"}))
    whole = plan(dense(model_type), Recipe.of(moe={**moe, "expert_width": 48}, init={"name": "random"}))
    assert whole.shared_width == 48


@pytest.mark.parametrize(
    "model_type", sampled(["glm", "youtu", "nemotron_h", "qwen3", "hunyuan_v1_dense", "lfm2"], 3)
)
def test_one_expert_runs_or_is_refused(model_type, dense, tmp_path):
    """Those that score groups of experts by the best two need two."""
    source, recipe = dense(model_type), Recipe.of(moe={"num_experts": 1, "top_k": 1})
    name = families.find(model_type).natives[0]
    if natives.find(name).least_experts > 1:
        with pytest.raises(UpcycleError, match=rf"{name} .* takes 2 experts or more; moe\.num_experts is 1"):
            plan(source, recipe)
        recipe = Recipe.of(moe={"num_experts": 2, "top_k": 1})
    convert(source, tmp_path / "moe", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model(torch.arange(12)[None]).logits.isfinite().all()

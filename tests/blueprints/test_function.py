"""Function preservation: every family x every initialisation that claims it, against transformers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from marks import quick, sampled
from upcycle import Recipe, UpcycleError, blueprint, cli, convert, families, init, plan
from upcycle.targets import natives
from upcycle.verification import verify


def logits(folder, ids, mask=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(ids, attention_mask=mask).logits


def difference(a, b, mask):
    """The largest difference where the mask says there is a token, over the largest logit."""
    keep = mask.bool()
    return float((a[keep] - b[keep]).abs().max() / a[keep].abs().max())


@pytest.fixture(scope="module")
def batch():
    """Two rows of 40 tokens, beyond every sliding window, one of them padded on the left."""
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def claims() -> list[tuple[str, dict]]:
    """The recipes by which an initialisation preserves the function, out of those worth trying."""
    shapes = [
        {"moe": {"num_experts": 4, "top_k": 2}},
        {"moe": {"num_experts": 4, "top_k": 1}},
        {"moe": {"num_experts": 8, "top_k": 4, "granularity": 2}, "router": {"init": "grouped"}},
        {"moe": {"num_experts": 6, "top_k": 3, "granularity": 3}, "router": {"init": "grouped"}},
        {"moe": {"num_experts": 4, "top_k": 4, "granularity": 4}, "router": {"init": "zeros"}},
        {"moe": {"num_experts": 4, "top_k": 2, "shared_experts": 1}},
    ]
    options = [
        {}, {"ratio": 0.0}, {"sigma": 0.0}, {"scale_mode": "sqrt"}, {"output": "expected"},
    ]  # fmt: skip
    out = []
    for name in init.names():
        for shape in shapes:
            for option in options:
                try:
                    recipe = Recipe.of({**shape, "init": {"name": name, **option}})
                except UpcycleError:
                    continue  # this initialisation has no such option
                if (name, recipe) not in [(n, r) for n, r in out]:
                    out.append((name, recipe))
    return out


CLAIMS = claims()


@pytest.mark.parametrize("model_type", quick(tiny.DECODERS, "qwen3"))
def test_every_claim_of_every_initialisation(model_type, dense, batch, tmp_path):
    source = dense(model_type)
    ids, mask = batch
    expected = logits(source, ids, mask)
    tried = set()
    for number, (name, recipe) in enumerate(CLAIMS):
        try:
            built = blueprint(source, recipe)
        except UpcycleError:
            continue  # refused with a reason; the reasons have tests of their own
        if not built.preserves_function:
            continue
        # A router with a wide spread: the function must not depend on which experts are chosen.
        if recipe.router.init != "zeros":
            std = tiny.ROUTER_STD.get(model_type, 0.5)
            recipe = Recipe.of({**recipe.as_table(), "router": {**recipe.as_table()["router"], "std": std}})
        out = tmp_path / str(number)
        convert(source, out, recipe)
        found = logits(out, ids, mask)
        assert difference(expected, found, mask) < 1e-5, (name, recipe)
        tried.add(name)
    assert {"copy", "drop", "noise", "shuffle_slice", "virtual_group", "split"} <= tried


# The natives that can leave the weights of a token's experts as they are, each with a family that becomes it.
OPTIONAL = {
    name: next(family for family in tiny.DECODERS if name in families.find(family).natives)
    for name in natives.names()
    if natives.find(name).renormalizes == "optional"
}


@pytest.mark.parametrize("target", quick(OPTIONAL, "nemotron_h"))
@pytest.mark.parametrize(("top_k", "router"), [(2, {"init": "zeros"}), (4, {"std": 0.5})])
def test_weights_that_are_not_renormalised(target, top_k, router, dense, batch, tmp_path):
    """Experts are scaled by what the scores of the class sum to: K / E for a softmax, K / 2 for sigmoids.

    Where they vary from token to token, nothing is promised: with all experts, the weights of a softmax alone
    sum to one.
    """
    source = dense(OPTIONAL[target])
    ids, mask = batch
    moe = {"num_experts": 4, "top_k": top_k, "target": target}
    built = convert(source, tmp_path / "moe", Recipe.of(moe=moe, router={"normalize": False, **router}))
    assert built.preserves_function == (top_k == 2 or natives.find(target).scores == "top_k")
    found = difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask)
    assert found < 1e-5 if built.preserves_function else found > 0.01
    said = [w for w in plan(source, built.recipe).warnings if "not renormalised" in w]
    assert len(said) == (top_k == 2 or not built.preserves_function)


@pytest.mark.parametrize(
    ("table", "blind"),
    [
        ({"router": {"name": "top_k"}}, True),
        ({"router": {"name": "sigmoid"}}, True),
        ({"router": {"name": "sigmoid", "normalize": False}}, False),
        ({"router": {"name": "analytic"}}, False),
        ({"moe": {"top_k": 2}, "decoder": {"moe": {"top_k": 1}}}, True),
    ],
)
def test_a_router_without_a_gradient_is_named(table, blind, tmp_path):
    """The weight of a token's only expert is one, whatever its score, if weights are shares."""
    moe = {"num_experts": 4, "top_k": 1, "target": "upcycled", **table.get("moe", {})}
    kind = "T5ForConditionalGeneration" if "decoder" in table else "LlamaForCausalLM"
    said = plan(tiny.make(tmp_path / "dense", kind), Recipe.of({**table, "moe": moe})).warnings
    assert sum("top-1 with renormalised weights is always exactly 1" in w for w in said) == blind


@pytest.mark.parametrize("model_type", sampled([*tiny.DECODERS, *tiny.OTHERS], 4))
def test_every_decoder_upcycled_in_its_own_class(model_type, dense, batch, tmp_path):
    source = dense(model_type)
    ids, mask = batch
    moe = {"num_experts": 4, "layers": "last_half", "target": "upcycled"}
    built = convert(source, tmp_path / "moe", Recipe.of(moe=moe, router={"std": 0.5}))
    assert built.preserves_function
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize("variant", sampled(tiny.VARIANTS, 2))
def test_variants_of_a_config(variant, dense, batch, tmp_path):
    model_type, changes = tiny.VARIANTS[variant]
    source = dense(model_type, **changes)
    ids, mask = batch
    std = tiny.ROUTER_STD.get(model_type, 0.5)
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 4}, router={"std": std}))
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "target", "changes"),
    [
        ("llama", "granitemoe", {}),
        ("llama", "granitemoe", {"attention_bias": True}),
        ("qwen2", "granitemoe", {}),
        ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": None}),
    ],
)
def test_other_targets(model_type, target, changes, dense, batch, tmp_path):
    source = dense(model_type, **changes)
    ids, mask = batch
    convert(source, tmp_path / "moe", Recipe.of(moe={"target": target}, router={"std": 0.5}))
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


def test_a_router_whose_scores_are_too_small_for_lfm2_moe_is_promised_nothing(dense, batch, tmp_path):
    """Its class adds 1e-6 to the sum of scores that it divides by."""
    ids, mask = batch
    source = dense("lfm2")
    expected = logits(source, ids, mask)
    for std, top_k, kept in (
        (0.0, 1, True),
        (0.05, 1, True),
        (0.05, 2, True),
        (1.0, 1, False),
        (1.0, 2, False),
    ):
        out = tmp_path / f"{std} {top_k}"
        recipe = Recipe.of(moe={"num_experts": 4, "top_k": top_k}, router={"std": std})
        built = convert(source, out, recipe)
        assert built.preserves_function == kept, (std, top_k)
        if kept:
            assert difference(expected, logits(out, ids, mask), mask) < 1e-5
    recipe = Recipe.of(moe={"num_experts": 8, "top_k": 2})
    router, (site, *_) = recipe.router, blueprint(source, recipe).sites
    wide = dataclasses.replace(site, hidden=2048)
    assert natives.find("lfm2_moe").divides_exactly(wide, router)
    assert not natives.find("lfm2_moe").divides_exactly(wide, dataclasses.replace(router, std=0.1))


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
INSIDE = {"original_max_position_embeddings": 32}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    ("model_type", "target", "scaling"),
    [
        ("llama", "granitemoe", YARN),
        ("llama", "granitemoe", LLAMA3 | INSIDE),
        ("llama", "mixtral", YARN | INSIDE),
        ("qwen2", "qwen2_moe", YARN),
        ("qwen3", "qwen3_moe", YARN | INSIDE),
        ("smollm3", "granitemoe_swa", LONG),
        ("cwm", "upcycled", None),
    ],
)
def test_the_length_of_the_first_training_at_the_top_of_a_config(
    model_type, target, scaling, dense, tmp_path
):
    """It counts more than the one in the table, which may be missing there; 40 tokens lie beyond it."""
    source = shutil.copytree(dense(model_type), tmp_path / "dense")
    raw = json.loads((source / "config.json").read_text())
    del raw["rope_parameters"]
    raw["original_max_position_embeddings"] = 16
    if scaling is not None:
        raw |= {"rope_scaling": scaling, "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(raw))
    built = convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 4, "target": target}))
    assert built.preserves_function
    assert built.dense.config["rope_parameters"]["original_max_position_embeddings"] == 16
    ids = torch.arange(3, 43)[None]
    found = difference(logits(source, ids), logits(tmp_path / "moe", ids), torch.ones_like(ids))
    assert found < 1e-5


@pytest.mark.parametrize("model_type", quick(["qwen2", "qwen3", "ernie4_5", "cohere2"], "qwen2", "ernie4_5"))
@pytest.mark.parametrize("layers", ["every_other", "last_half", [1, 2], [3]])
def test_some_layers_stay_dense(model_type, layers, dense, batch, tmp_path):
    source = dense(model_type)
    ids, mask = batch
    convert(
        source, tmp_path / "moe", Recipe.of(moe={"num_experts": 4, "layers": layers}, router={"std": 0.5})
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    kinds = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    wanted = (
        {"every_other": [1, 3], "last_half": [2, 3]}.get(layers, layers)
        if isinstance(layers, str)
        else layers
    )
    assert [i for i, moe in enumerate(kinds) if moe] == wanted
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize("model_type", sampled(tiny.DECODERS, 3))
def test_verify_agrees(model_type, dense, tmp_path):
    convert(dense(model_type), tmp_path / "moe", Recipe.of(moe={"num_experts": 4}))
    proof = verify(dense(model_type), tmp_path / "moe")
    assert proof.holds, proof.checks
    assert proof.coverage
    assert proof.bit_identical
    assert proof.logits["random"].relative < 1e-5


def test_a_drop_is_not_the_dense_function(dense, batch, tmp_path):
    """The comparison can fail: it sees half of the neurons redrawn."""
    ids, mask = batch
    convert(dense("llama"), tmp_path / "moe", Recipe.of(init={"name": "drop"}))
    assert difference(logits(dense("llama"), ids, mask), logits(tmp_path / "moe", ids, mask), mask) > 0.05


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "cohere2"])
def test_depth_tiling_repeats_every_block(model_type, dense, batch, tmp_path):
    """Against transformers' own deeper model with each block's weights loaded twice."""
    source = dense(model_type)
    ids, mask = batch
    built = convert(source, tmp_path / "deep", Recipe.of(moe={"target": "depth_tiled", "depth": 2}))
    assert not built.preserves_function
    assert not built.sites
    shallow = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    deep = AutoModelForCausalLM.from_pretrained(tmp_path / "deep", dtype=torch.float32).eval()
    assert len(deep.model.layers) == 8
    config = shallow.config
    if getattr(config, "layer_types", None):
        assert deep.config.layer_types == [kind for kind in config.layer_types for _ in range(2)]
    for j, layer in enumerate(deep.model.layers):
        for (name, a), (_, b) in zip(
            layer.named_parameters(), shallow.model.layers[j // 2].named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
    # With every second block silenced, it is the dense model again.
    with torch.no_grad():
        for layer in deep.model.layers[1::2]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            if layer.self_attn.o_proj.bias is not None:
                layer.self_attn.o_proj.bias.zero_()
    with torch.inference_mode():
        found = deep(ids, attention_mask=mask).logits
    assert difference(logits(source, ids, mask), found, mask) < 1e-5
    assert plan(source, built.recipe).total_parameters == sum(p.numel() for p in deep.parameters())
    assert verify(source, tmp_path / "deep").holds


@pytest.mark.parametrize(
    ("model_type", "changes", "key"),
    [
        ("gemma2", {}, "layer_types"),
        ("gemma3_text", {"sliding_window_pattern": 3}, "layer_types"),
        ("qwen3_5_text", {"full_attention_interval": 2}, "layer_types"),
        ("cohere2", {"sliding_window_pattern": 2}, "layer_types"),
        ("exaone4", {"sliding_window_pattern": 2}, "layer_types"),
        ("olmo3", {}, "layer_types"),
        ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers"),
    ],
)
def test_kinds_of_blocks_that_follow_from_an_interval(model_type, changes, key, dense, tmp_path):
    """Each block of a deeper model keeps its kind, and a list of something else its length."""
    source = tmp_path / "dense"
    shutil.copytree(dense(model_type, **changes), source)
    kinds = getattr(AutoModelForCausalLM.from_pretrained(source).config, key)
    config = json.loads((source / "config.json").read_text())
    config |= {"eos_token_id": [1, 2, 3, 4], **changes}  # as long as there are layers
    config = {k: v for k, v in config.items() if k not in ("layer_types", "no_rope_layers")}
    (source / "config.json").write_text(json.dumps(config))
    assert getattr(AutoConfig.from_pretrained(source), key) == kinds
    assert len(set(kinds)) == 2
    convert(source, tmp_path / "deep", Recipe.of(moe={"target": "depth_tiled", "depth": 3}))
    deep = AutoModelForCausalLM.from_pretrained(tmp_path / "deep").config
    assert getattr(deep, key) == [kind for kind in kinds for _ in range(3)]
    assert deep.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"moe": {"num_experts": 4}}, "moe.num_experts = 4"),
        ({"moe": {"layers": [1, 3]}}, "moe.layers"),
        ({"moe": {"shared_experts": 1}}, "moe.shared_experts = 1"),
        ({"init": {"name": "drop"}}, "init.name = drop"),
        ({"router": {"std": 0.1}}, "router.std = 0.1"),
        ({"router": {"name": "soft"}}, "router.name = soft"),
        ({"decoder": {"moe": {"num_experts": 4}}}, r"\[decoder\]"),
    ],
)
def test_a_deeper_model_has_no_experts_to_ask_for(table, key, dense):
    recipe = Recipe.of({**table, "moe": {**table.get("moe", {}), "target": "depth_tiled"}})
    with pytest.raises(UpcycleError, match=f"depth_tiled makes no experts, and {key}"):
        plan(dense("llama"), recipe)


def test_a_deeper_model_says_that_it_is_dense(dense, tmp_path, capsys):
    recipe = Recipe.of(moe={"target": "depth_tiled"})
    convert(dense("llama"), tmp_path / "deep", recipe)
    card = (tmp_path / "deep" / "README.md").read_text()
    assert "every block 2 times" in card
    assert "It is a dense model of 8 layers, no experts." in card
    assert "model = LlamaForCausalLM.from_pretrained" in card
    made = plan(dense("llama"), recipe)
    assert (made.num_experts, made.top_k, made.expert_width) == (0, 0, 0)
    for command in ("plan", "inspect"):
        folder = tmp_path / "deep" if command == "inspect" else dense("llama")
        cli.main([command, str(folder), *(["--target", "depth_tiled"] if command == "plan" else [])])
    said = capsys.readouterr().out
    assert "every block 2 times" in said
    for text in (card, said):
        assert not re.search(r"MoE|mixture|upcycled|init", text.partition("## Recipe")[0], re.IGNORECASE)


@pytest.mark.parametrize(
    ("model_type", "bias"), [("lfm2", "expert_bias"), ("youtu", "e_score_correction_bias")]
)
def test_a_correction_bias_keeps_its_type(model_type, bias, dense):
    built = blueprint(dense(model_type), Recipe.of({"moe": {"num_experts": 4}, "dtype": "bfloat16"}))
    types = {name: entry.dtype for name, entry in built.entries.items()}
    assert {dtype for name, dtype in types.items() if name.endswith(bias)} == {"F32"}
    assert {dtype for name, dtype in types.items() if not name.endswith(bias)} == {"BF16"}

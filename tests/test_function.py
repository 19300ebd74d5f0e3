"""Function preservation: every family x every initialisation that claims it, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from upcycle import Recipe, UpcycleError, blueprint, convert, init, plan
from upcycle.proof import verify


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


@pytest.mark.parametrize("model_type", tiny.DECODERS)
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
            recipe = Recipe.of({**recipe.as_table(), "router": {**recipe.as_table()["router"], "std": 0.5}})
        out = tmp_path / str(number)
        convert(source, out, recipe)
        found = logits(out, ids, mask)
        assert difference(expected, found, mask) < 1e-5, (name, recipe)
        tried.add(name)
    assert {"copy", "drop", "noise", "shuffle_slice", "virtual_group", "split"} <= tried


@pytest.mark.parametrize("model_type", [*tiny.DECODERS, *tiny.OTHERS])
def test_every_decoder_upcycled_in_its_own_class(model_type, dense, batch, tmp_path):
    source = dense(model_type)
    ids, mask = batch
    moe = {"num_experts": 4, "layers": "last_half", "target": "upcycled"}
    built = convert(source, tmp_path / "moe", Recipe.of(moe=moe, router={"std": 0.5}))
    assert built.preserves_function
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_variants_of_a_config(variant, dense, batch, tmp_path):
    model_type, changes = tiny.VARIANTS[variant]
    source = dense(model_type, **changes)
    ids, mask = batch
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 4}, router={"std": 0.5}))
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "target", "changes"),
    [
        ("llama", "granitemoe", {}),
        ("llama", "granitemoe", {"attention_bias": True}),
        ("qwen2", "granitemoe", {}),
    ],
)
def test_other_targets(model_type, target, changes, dense, batch, tmp_path):
    source = dense(model_type, **changes)
    ids, mask = batch
    convert(source, tmp_path / "moe", Recipe.of(moe={"target": target}, router={"std": 0.5}))
    assert difference(logits(source, ids, mask), logits(tmp_path / "moe", ids, mask), mask) < 1e-5


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "ernie4_5", "cohere2"])
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


@pytest.mark.parametrize("model_type", tiny.DECODERS)
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

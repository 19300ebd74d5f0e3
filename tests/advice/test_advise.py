"""Advice against what the papers print, closed forms, and what torch and transformers hold in memory."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tiny
import upcycle
from marks import sampled
from tiny_mixtures import make_mixture
from upcycle import Recipe, UpcycleError, blueprint, cli, families, load, plan
from upcycle.advice import comparison as compared
from upcycle.advice import drop_ratio, duration, inference, layout, published, recipe_file, scaling_law
from upcycle.advice.gather import advise
from upcycle.advice.situation import Budget, Situation, parse_tokens
from upcycle.advice.verdict import verdict
from upcycle.blueprints.cost import flops_per_row
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.forecast import activations, memory
from upcycle.recipe import override
from upcycle.settings import keys
from upcycle.system import gpus

ROOT = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
LLAMA_3_8B = {
    **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_3_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip
LLAMA_22B = {
    **LLAMA_3_8B, "vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384,
    "num_hidden_layers": 56, "num_attention_heads": 48,
}  # fmt: skip
ONE_B = {
    **LLAMA, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
VIT_B = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip
T5_BASE = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": 768,
    "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SPARSE = {"target": "upcycled", "num_experts": 32}
S = {"moe": SPARSE}
CHOICE = {"name": "expert_choice"}
S_T5 = {
    "moe": {**SPARSE, "layers": "every_other"},
    "router": CHOICE,
    "decoder": {"router": {"name": "top_k"}},
}
S_VIT = {"moe": {**SPARSE, "layers": "last_half"}, "router": CHOICE}
DROP = {"init": {"name": "drop"}}
UPCYCLED = {"target": "upcycled"}
CONVNEXT_B = {
    "model_type": "convnext", "architectures": ["ConvNextForImageClassification"],
    "hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3],
}  # fmt: skip
CONVNEXT_V2 = {
    **CONVNEXT_B, "model_type": "convnextv2", "architectures": ["ConvNextV2ForImageClassification"],
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Checkpoints of published models, headers alone."""
    folder = tmp_path_factory.mktemp("large")
    configs = {
        "8B": LLAMA_3_8B, "1B": ONE_B, "vit": VIT_B, "t5": T5_BASE, "convnext": CONVNEXT_B,
        "convnextv2": CONVNEXT_V2, "bert": BERT, "22B": LLAMA_22B, "70B": LLAMA_70B,
    }  # fmt: skip
    return {name: tiny.make_headers(folder / name, config) for name, config in configs.items()}


def situation(source, recipe=None, /, **asked):
    return Situation(asked=Budget(**asked), built=blueprint(source, Recipe.of(recipe or {})))


def said(source, recipe=None, /, **asked):
    return advise(source, Recipe.of(recipe or {}), Budget(**asked))


# --- the scaling law


def test_the_law_at_its_published_constants():
    """Worked out from Table 2: 2.145 nats upcycled and 2.25 dense at 1 B parameters, 74 B and 37 B tokens."""
    assert scaling_law.upcycled(1e9, 74e9, 37e9) == pytest.approx(2.145, abs=1e-3)
    assert scaling_law.dense(1e9, 74e9) == pytest.approx(2.25, abs=5e-3)


@pytest.mark.parametrize(
    ("parameters", "dense_tokens", "tokens"), [(1e9, 20e9, 12e9), (1e9, 100e9, 52e9), (3.7e9, 1e12, 0.29e12)]
)
def test_the_law_s_crossovers(parameters, dense_tokens, tokens):
    """From scratch is behind before, level at, and ahead after the tokens that a second hand found."""
    point = scaling_law.overtaken(parameters, dense_tokens)
    assert point == pytest.approx(tokens, rel=0.03)

    def behind(d):
        return scaling_law.from_scratch(parameters, d) - scaling_law.upcycled(parameters, dense_tokens, d)

    assert behind(point) == pytest.approx(0, abs=1e-8)
    assert behind(0.9 * point) > 0 > behind(1.1 * point)


def test_the_more_the_dense_model_saw_the_more_slowly_the_moe_learns():
    """The exponent of D2 is -a2 + a3 ln D1, read off the slope of the reducible loss."""
    n, floor = 1e9, 8.53 * 1e9**-0.112 + 0.165

    def exponent(d1):
        near, far = (math.log(scaling_law.upcycled(n, d1, d2) - floor) for d2 in (1e10, 1e11))
        return (far - near) / math.log(10)

    for d1 in (1e9, 2e10, 3e11):
        assert exponent(d1) == pytest.approx(-0.085 + 7.98e-4 * np.log(d1), abs=1e-9)
    assert exponent(1e9) < exponent(1e11) < 0


@pytest.mark.parametrize("law", [scaling_law.dense, scaling_law.from_scratch])
def test_losses_fall(law):
    assert law(1e9, 1e10) > law(1e9, 2e10) > law(2e9, 2e10) > scaling_law.IRREDUCIBLE


def test_a_crossover_outside_the_fitted_tokens_is_none():
    n, d1, most = 5e8, 368e9, scaling_law.TOKENS[1]
    assert scaling_law.from_scratch(n, most) > scaling_law.upcycled(n, d1, most)
    assert scaling_law.from_scratch(n, 3 * most) < scaling_law.upcycled(n, d1, 3 * most)
    assert scaling_law.overtaken(n, d1) is None


def test_dense_continuation_has_the_same_flops(large):
    here = situation(large["1B"], tokens=10**10, dense_tokens=2 * 10**10)
    moe = flops_per_row(here.built.dense, here.built, {"layers": 2048})
    dense = flops_per_row(here.built.dense, None, {"layers": 2048})
    n = here.plan.dense_parameters
    total = 2e10 + 1e10 * moe / dense
    assert scaling_law.losses(here) == {
        "upcycling": scaling_law.upcycled(n, 2e10, 1e10),
        "from scratch": scaling_law.from_scratch(n, 1e10),
        "dense continuation": pytest.approx(scaling_law.dense(n, total), abs=1e-12),
    }


@pytest.mark.parametrize(
    ("model", "recipe", "asked", "reason"),
    [
        ("8B", {}, {}, "47.5 B parameters"),
        ("1B", {"moe": {"num_experts": 16}}, {}, "found with 8 experts, not 16"),
        ("1B", {"moe": {"top_k": 1}}, {}, "found with 2 experts a token, not 1"),
        (
            "1B",
            {"moe": {"target": "upcycled", "layers": "every_other"}},
            {},
            "found with experts in 100% of the layers, not in 50%",
        ),
        ("1B", {"init": {"name": "drop"}}, {}, "init.name = drop"),
        ("1B", {"init": {"name": "noise", "sigma": 0.5}}, {}, "init.name = noise"),
        ("1B", {"moe": {**UPCYCLED, "shared_experts": 1}}, {}, "without shared"),
        ("1B", {"moe": UPCYCLED, "router": {"name": "sigmoid"}}, {}, "router.name = top_k, not sigmoid"),
        ("1B", {"moe": UPCYCLED, "router": {"capacity_factor": 1.0}}, {}, "router.capacity_factor is set"),
        (
            "1B",
            {"moe": {"granularity": 2, "num_experts": 8}, "init": {"name": "virtual_group"}},
            {},
            "whole experts",
        ),
        ("1B", {}, {"tokens": 10**12}, "training of 1 T tokens"),
        ("1B", {}, {"tokens": 10**6}, "training of 1 M tokens"),
        ("1B", {}, {"dense_tokens": 2 * 10**12}, "dense training of 2 T tokens"),
        ("1B", {}, {"dense_tokens": None}, "--dense-tokens"),
        ("vit", {"moe": SPARSE}, {}, "of the kind vision transformer"),
        ("t5", {"moe": SPARSE}, {}, "of the kind encoder-decoder"),
    ],
)
def test_outside_the_fitted_range_nothing_is_computed(large, model, recipe, asked, reason):
    here = situation(large[model], recipe, **{"tokens": 10**10, "dense_tokens": 10**11, **asked})
    assert scaling_law.losses(here) == {}
    (only,) = scaling_law.statements(here)
    assert (only.inside, only.value) == (False, None)
    assert reason in only.why


# --- published results


@pytest.mark.parametrize(
    ("model", "paper", "recipe", "tokens", "dense_tokens"),
    [
        ("1B", "OLMoE", {}, 500, 2000),
        ("t5", "Sparse Upcycling", S_T5, 1.2, 1),
        ("1B", "Skywork", {}, 2.0, 1),
    ],
)
def test_a_budget_lies_on_its_side_of_a_crossover(large, model, paper, recipe, tokens, dense_tokens):
    """OLMoE: 500 B after 2 T, in tokens; 120 % and twice, in FLOPs."""
    (crossover,) = (c for c in published.CROSSOVERS if c.paper.startswith(paper))
    scale = 10**9
    if crossover.unit == "cost":
        one = situation(large[model], recipe, tokens=10**9, dense_tokens=10**9)
        tokens = tokens * one.dense_flops / one.moe_flops
    for factor in (0.99, 1.01):
        asked = {"tokens": round(tokens * scale * factor), "dense_tokens": dense_tokens * scale}
        here = situation(large[model], recipe, **asked)
        assert published.distance(here, crossover) == pytest.approx(factor, rel=1e-6)
        assert published.crossover_inside(here, crossover)[0] is (
            True if crossover.exact and crossover.experts.complete else None
        )


def test_statements_of_a_model_like_llama_3_meets_moe(large):
    found = said(large["8B"], tokens=27 * 10**9)
    (like,) = (s for s in found.statements if s.source.startswith("Llama 3 Meets MoE") and "MMLU" in s.said)
    assert like.inside is True
    other = said(large["8B"], {"moe": {"num_experts": 16}}, tokens=27 * 10**9)
    (unlike,) = (s for s in other.statements if s.source.startswith("Llama 3 Meets MoE") and "MMLU" in s.said)
    assert (unlike.inside, unlike.why) == (False, "found with 8 experts, not 16")


def comparison(paper, init):
    (found,) = (c for c in published.COMPARISONS if c.paper.startswith(paper) and init in c.inits)
    return found


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({}, None),
        ({"moe": {"top_k": 1}}, "2 experts a token, not 1"),
        ({"moe": {"num_experts": 4}}, "8 experts, not 4"),
        ({"moe": {**UPCYCLED, "layers": "every_other"}}, "100% of the layers, not in 50%"),
        ({"moe": UPCYCLED, "router": {"name": "sigmoid"}}, "not sigmoid"),
        ({"init": {"name": "noise", "sigma": 0.01}}, None),
        ({"init": {"name": "noise", "sigma": 10.0}}, "init.name = noise"),
        ({"init": {"name": "drop", "ratio": 0.0}}, None),
        ({"init": {"name": "virtual_group"}, "moe": {"granularity": 2, "num_experts": 16}}, "virtual_group"),
    ],
)
@pytest.mark.parametrize(("paper", "tokens"), [("Llama 3", 27e9), ("He et al.", 1e12)])
def test_what_is_unlike_a_comparison_is_outside(large, paper, tokens, recipe, why):
    here = situation(large["8B"], recipe, tokens=int(tokens))
    inside, said = compared.inside(here, comparison(paper, "copy"))
    assert inside is (why is None)
    assert why is None or why in said


def test_a_stack_of_its_own_counts(large):
    """The decoder's top_k is looked at, not that of [moe] alone."""
    asked = {"tokens": 20 * 10**9, "dense_tokens": 100 * 10**9}
    (sparse,) = (c for c in published.COMPARISONS if c.kind == "encoder-decoder")
    assert compared.inside(situation(large["t5"], S_T5, **asked), sparse)[0] is True
    other = {**S_T5, "decoder": {"router": {"name": "top_k"}, "moe": {"top_k": 1}}}
    inside, why = compared.inside(situation(large["t5"], other, **asked), sparse)
    assert (inside, why) == (False, "found with 2 experts a token, not 1 or 2")
    smaller = {**S_T5, "router": {**CHOICE, "capacity_factor": 1.0}}
    assert not compared.inside(situation(large["t5"], smaller, **asked), sparse)[0]


@pytest.mark.parametrize("model", ["convnext", "convnextv2"])
def test_results_of_vit_are_none_of_a_convnet(large, model):
    found = said(large[model], S_VIT, tokens=20 * 10**9, dense_tokens=100 * 10**9)
    assert not [s for s in found.statements if s.topic == "dense continuation"]
    vit = said(large["vit"], S_VIT, tokens=20 * 10**9, dense_tokens=100 * 10**9)
    of_paper = [s for s in vit.statements if s.topic == "dense continuation" and "arXiv" in s.source]
    assert [s.inside for s in of_paper] == [True]


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, True), ({"sigma": 0.05}, True), ({"sigma": 0.051}, False),
        ({"sigma": 0.5, "fraction": 0.0}, True),
        ({"sigma": 0.02, "relative": False}, False), ({"sigma": 0.0, "relative": False}, True),
    ],
)  # fmt: skip
def test_noise_leaves_copies_while_it_is_small(large, options, whole):
    assert situation(large["1B"], {"init": {"name": "noise", **options}}, tokens=1).copies is whole


# --- the drop ratio


@pytest.mark.parametrize(
    ("tokens", "ratio"), [(10**9, 0.0), (50 * 10**9, 0.0), (150 * 10**9, None), (500 * 10**9, 0.5)]
)
def test_the_ratio_by_budget(large, tokens, ratio):
    assert drop_ratio.advised(tokens) == ratio
    assert drop_ratio.statements(situation(large["1B"], tokens=tokens))[0].value == ratio


@pytest.mark.parametrize(
    ("model", "tokens", "inside", "why"),
    [
        ("1B", 50e9, None, "what was read of the source does not say"), ("1B", 1e9, False, "found at 50 B"),
        ("1B", 100e9, False, "found at 50 B"), ("1B", 500e9, True, "500 B tokens"),
        ("1B", 250e9, False, "found at 500 B"), ("1B", 5e12, False, "found at 500 B"),
        ("8B", 500e9, False, "found on 152 M and 1.56 B"), ("8B", 50e9, False, "found on 490 M and 1.54 B"),
    ],
)  # fmt: skip
def test_where_the_ratio_was_found(large, model, tokens, inside, why):
    first = drop_ratio.statements(situation(large[model], tokens=int(tokens)))[0]
    assert first.inside is inside
    assert why in first.why
    assert "r = 0.5 lost" not in first.said


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_a_drop_of_unknown_ratio_decides_nothing(large, ratio):
    here = situation(large["1B"], {"init": {"name": "drop", "ratio": ratio}}, tokens=50 * 10**9)
    inside, why = compared.inside(here, comparison("FineRMoE", "drop"))
    assert inside is None
    assert "init.name = drop" in why


@pytest.mark.parametrize("indices", ["shared", "independent"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_intact_neurons_are_those_of_the_initialisation(dense, ratio, indices):
    """Counted on experts that the initialisation makes of 4000 neurons."""
    source = dense("llama", intermediate_size=4000, num_hidden_layers=1)
    recipe = {"init": {"name": "drop", "ratio": ratio, "indices": indices}, "moe": {"num_experts": 2}}
    here = situation(source, recipe, tokens=10**9)
    plain, whole = here.built.dense.feed_forward(0), []
    (site,) = here.built.sites
    for e in range(2):
        made = here.built.recipe.init.expert([plain], e, site)
        same = [
            np.all(getattr(made, name).all("F32") == getattr(plain, name).all("F32"), axis=axis)
            for name, axis in (("gate", 1), ("up", 1), ("down", 0))
        ]
        whole.append(np.logical_and.reduce(same).mean())
    expected = drop_ratio.intact(ratio, indices)
    assert np.mean(whole) == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 8000) ** 0.5 + 1e-3)
    assert drop_ratio.statements(here)[1].value == expected


# --- time


def test_llama_3_meets_moe(large):
    """Table 1: 4.7e14 and 7.5e14 FLOPs a sequence of 8192; 100 B tokens took 11 k GPU hours."""
    here = situation(large["8B"], tokens=100 * 10**9, gpus=512, context=8192)
    assert here.plan.total_parameters / 1e9 == pytest.approx(47.5, abs=0.05)
    assert here.plan.active_parameters / 1e9 == pytest.approx(13.7, abs=0.05)
    rows = {"layers": 8192}
    sequence = 3 * flops_per_row(here.built.dense, here.built, rows, all_scores=True)
    assert sequence / 1e14 == pytest.approx(7.5, abs=0.05)
    dense = 3 * flops_per_row(here.built.dense, None, rows, all_scores=True)
    assert dense / 1e14 == pytest.approx(4.7, abs=0.05)
    assert duration.total_flops(here) == pytest.approx(9.2e21, rel=0.005)
    assert f" {sequence / dense:.2f} times the dense model's" in duration.statements(here)[0].said
    assert duration.gpu_hours(here, 389.7e12 / 989.4e12) == pytest.approx(6.5e3, rel=0.01)
    (run,) = (s for s in duration.statements(here) if s.source.startswith("Llama 3 Meets MoE"))
    assert run.value == pytest.approx(11e3, rel=0.03)  # what it took
    assert run.inside is True


def test_time_by_hand(large):
    here = situation(large["1B"], tokens=10**9, gpu="a100")
    assert duration.gpu_hours(here, 0.5) * 3600 * 312e12 * 0.5 == pytest.approx(duration.total_flops(here))
    longer = situation(large["1B"], tokens=2 * 10**9)
    assert duration.total_flops(longer) == 2 * duration.total_flops(here)
    assert duration.gpu_hours(here, 0.1) > duration.gpu_hours(here, 0.2)


FINE = {"moe": {"granularity": 8, "num_experts": 64, "top_k": 8}, "init": {"name": "virtual_group"}}


@pytest.mark.parametrize(
    ("model", "recipe", "asked", "mfus", "inside"),
    [
        ("8B", {}, {"gpus": 128}, (0.234, 0.468), (False, True)),
        ("8B", {}, {"gpus": 512}, (0.234, 0.23), (False, True)),
        ("8B", {}, {"gpus": 256}, (0.234, 0.468), (False, False)),
        ("8B", {}, {}, (0.234, 0.468), (False, None)),
        ("8B", {}, {"gpus": 8}, (0.234, 0.468), (False, False)),
        ("8B", {}, {"gpus": 128, "gpu": "A100"}, (0.234, 0.468), (False, False)),
        ("8B", FINE, {"gpus": 64}, (0.254, 0.39), (True, True)),
        ("22B", {}, {"gpus": 128}, (0.234, 0.493), (True, True)),
        ("22B", FINE, {"gpus": 128}, (0.09, 0.288), (True, True)),
        ("70B", {}, {"gpus": 256}, (0.196, 0.416), (True, True)),
        ("1B", {}, {"gpus": 128}, (0.234, 0.468), (False, False)),
        ("vit", S, {"gpus": 128}, (0.234, 0.468), (False, False)),
    ],
)  # fmt: skip
def test_where_utilisation_was_measured(large, model, recipe, asked, mfus, inside):
    """Table 1 of MoE Parallel Folding, Table 2 of Llama 3 Meets MoE and the GPU hours of its run."""
    here = situation(large[model], recipe, tokens=10**9, **asked)
    found = [s for s in duration.statements(here) if s.unit == "GPU hours"]
    reached = duration.total_flops(here) / here.gpu.peak_flops / 3600
    assert [reached / s.value for s in found] == pytest.approx(mfus)
    assert tuple(s.inside for s in found) == inside


# --- memory


def test_weights_gradients_and_moments_are_what_torch_holds(dense, tmp_path):
    """One process after one step of AdamW."""
    from upcycle.training import optimizer, start
    from upcycle.training.parallel import Ranks
    from upcycle.training.run import Run

    source = dense("llama")
    run = Run.of(
        {
            "source": str(source), "out": str(tmp_path), "moe": {"num_experts": 4},
            "schedule": {"peak": 1e-3}, "data": {"sources": [{"path": "none"}]}, "train": {"steps": 1},
        }
    )  # fmt: skip
    begun = start.start_of(run)
    model = start.model_of(begun, run, Ranks(device=torch.device("cpu")), "float32")
    adam = optimizer.make(model, run.optimizer)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    for parameter in model.parameters():  # experts that no token chose
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    adam.step()
    found = memory.held(layout.setting(situation(source, {"moe": {"num_experts": 4}}, tokens=1), 1))
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = [t for state in adam.state.values() for t in state.values() if t.ndim]
    assert found.moments == sum(t.nbytes for t in moments)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_size": 96},
        {"hidden_size": 64},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
    ],
)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (8, 3)])
def test_a_block_keeps_what_torch_keeps(dense, changes, experts, top_k):
    """Bytes that autograd saves for a block of transformers' Mixtral in bfloat16, counted by hooks: a model
    of three blocks less one of one."""
    here = situation(dense("llama", **changes), {"moe": {"num_experts": experts, "top_k": top_k}}, tokens=1)
    tokens, saved = 64, {}
    for layers in (1, 3):
        config = {k: v for k, v in here.built.config.items() if k not in ("dtype", "torch_dtype")}
        settings = {**config, "num_hidden_layers": layers, "experts_implementation": "grouped_mm"}
        model = MixtralForCausalLM(MixtralConfig(**settings)).bfloat16().train()
        saved[layers] = bytes_saved(model.model, torch.arange(tokens)[None] % 90, use_cache=False)
    found = (saved[3] - saved[1]) / 2 / tokens
    (stack,) = here.built.dense.stacks
    assert activations.block_bytes(here.built, stack, 0) == pytest.approx(found, abs=1)


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 96}, {"hidden_size": 64}])
def test_shared_experts_keep_what_torch_keeps(dense, changes):
    """What autograd saves more with them, in the layers of our own."""
    source, saved, told = dense("llama", **changes), [], []
    for shared in (0, 1):
        recipe = {"moe": {**UPCYCLED, "shared_experts": shared}}
        model = load(source, recipe).bfloat16().train()
        saved.append(bytes_saved(model.model, torch.arange(64)[None] % 90, use_cache=False))
        built = situation(source, recipe, tokens=1).built
        told.append(sum(activations.block_bytes(built, built.dense.stacks[0], n) for n in range(4)))
    assert len(built.sites) == 4
    assert told[1] - told[0] == pytest.approx((saved[1] - saved[0]) / 64, abs=4)


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 96}, {"hidden_size": 64}])
def test_a_dense_block_keeps_what_torch_keeps(dense, changes):
    """The same of transformers' Llama: blocks that stay dense."""
    here = situation(dense("llama", **changes), {"moe": {**UPCYCLED, "layers": "last_half"}}, tokens=1)
    tokens, saved = 64, {}
    for layers in (1, 3):
        config = {k: v for k, v in here.built.dense.config.items() if k not in ("dtype", "architectures")}
        model = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": layers})).bfloat16().train()
        saved[layers] = bytes_saved(model.model, torch.arange(tokens)[None] % 90, use_cache=False)
    (stack,) = here.built.dense.stacks
    assert activations.block_bytes(here.built, stack, 0) == pytest.approx(
        (saved[3] - saved[1]) / 2 / tokens, abs=1
    )


@pytest.mark.parametrize(
    ("config", "model"), [(ConvNextConfig, ConvNextModel), (ConvNextV2Config, ConvNextV2Model)]
)
@pytest.mark.parametrize("hidden", [16, 32])
def test_a_convnet_s_dense_block_keeps_what_torch_keeps(tmp_path, config, model, hidden):
    settings = {"hidden_sizes": [hidden, 8, 8, 8], "image_size": 64}
    saved = {}
    for depth in (1, 3):
        made = model(config(**settings, depths=[depth, 1, 1, 1])).bfloat16().train()
        saved[depth] = bytes_saved(made, torch.randn(1, 3, 64, 64).bfloat16())
    source = tiny.make_headers(
        tmp_path / "dense",
        {
            **settings, "model_type": config.model_type, "depths": [3, 1, 1, 1],
            "architectures": [f"{model.__name__.removesuffix('Model')}ForImageClassification"],
        },
    )  # fmt: skip
    built = situation(source, {"moe": {**UPCYCLED, "layers": [5]}}, tokens=1).built
    found = activations.block_bytes(built, built.dense.stacks[0], 0)
    assert found == pytest.approx((saved[3] - saved[1]) / 2 / 256, abs=8)


def bytes_saved(model, inputs, **options):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(inputs, **options)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total


def test_a_large_model_needs_many_gpus(large):
    """47.5 B parameters: 12 bytes of weights and moments each are 570 GB, which eight H200 hold with
    gradients and eight H100 do not."""
    here = situation(large["8B"], tokens=10**9, gpus=8)
    found = layout.per_gpu(here, 8)
    assert 8 * (found.weights + found.moments) == pytest.approx(570e9, rel=0.001)
    h100, h200 = gpus.find("H100"), gpus.find("H200")
    assert not layout.fits(here, 8, h100)
    assert layout.fits(here, 8, h200)
    least = layout.least(here, h100)
    assert layout.fits(here, least, h100)
    assert not layout.fits(here, least // 2, h100)
    said = layout.statements(here)[-1].said
    assert said.startswith(
        "it does not fit into 90% of the 80 GB of H100: the smallest power of two that fits "
    )
    assert f" is {least} H100; 8 H200" in said
    assert "it fits" in layout.statements(situation(large["8B"], tokens=1, gpus=least))[-1].said
    assert layout.statements(situation(large["8B"], tokens=1))[0].value == least


def test_gathered_blocks_by_hand(large):
    """The head stays in bfloat16 until its gradient is there, with the buffer that it came in. In the
    backward pass a block is whole with an eighth of the experts, the attention of the block before it is on
    its way, and the gradients of the one after it are still in float32. One GPU keeps a bfloat16 copy of
    every matrix."""
    here = situation(large["8B"], tokens=1)
    h, i, words = 4096, 14336, 128256
    end = next(m for m in memory.moments(layout.setting(here, 512)) if m.moment == "the gradient of the loss")
    assert end.gathered == pytest.approx(2 * 2 * (h * words + h), rel=3e-3)  # rows are padded
    # Logits come in chunks of 128 tokens. The head's gradient is summed up in float32 and then rounded.
    chunk = max(12 * 128 * words, 2 * 128 * words + 2 * h * words)
    assert end.logits == 4 * h * words + 2 * 4096 * h + chunk
    # The 8 rows of a router are padded to one for each rank.
    own, experts = 2 * h * h + 2 * h * 1024 + 512 * h + 2 * h, 3 * h * i
    going = next(m for m in memory.moments(layout.setting(here, 512)) if m.moment == "the network of block 7")
    assert going.gathered == pytest.approx(2 * (own + experts + own), rel=1e-3)
    assert going.reduced == pytest.approx(2 * experts + 4 * own, rel=1e-3)
    alone = {m.moment: m for m in memory.moments(layout.setting(here, 1))}
    assert alone["the loss"].gathered == pytest.approx(2 * here.plan.total_parameters, rel=0.02)


def test_memory_falls_with_gpus_and_rises_with_context(large):
    here, longer = (situation(large["8B"], tokens=1, context=context) for context in (4096, 8192))
    totals = [layout.per_gpu(here, count).total for count in (2, 4, 8, 16, 64, 512)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)
    short, long = (
        next(m for m in memory.moments(layout.setting(each, 512)) if m.moment == "the activation of block 7")
        for each in (here, longer)
    )
    assert long.activations == pytest.approx(2 * short.activations)
    assert layout.per_gpu(longer, 512).total > layout.per_gpu(here, 512).total


@pytest.mark.parametrize(
    ("count", "experts", "ep"), [(8, 8, 8), (512, 8, 8), (6, 8, 2), (3, 8, 1), (16, 64, 8)]
)
def test_expert_parallelism_divides_both(large, count, experts, ep):
    built = blueprint(large["1B"], Recipe.of(moe={"num_experts": experts}))
    assert layout.expert_parallel(count, built) == ep


def test_a_convnet_recomputes_nothing(large):
    """All blocks are kept, not the largest alone, and no head over words."""
    here = situation(large["convnext"], S_VIT, tokens=1, gpus=8)
    lengths = here.lengths
    kept = sum(
        activations.block_bytes(here.built, stack, layer) * lengths[stack.name]
        for stack in here.built.dense.stacks
        for layer in range(stack.count)
    )
    loss = next(memory.moments(layout.setting(here, 8)))
    assert loss.moment == "the loss"
    assert loss.logits == 0
    assert loss.activations == pytest.approx(kept + (2 + 4 + 2 + 2) * 1024 * 49)  # and the last norm
    words = " ".join(s.why for s in layout.statements(here))
    assert "no layer recomputed" in words
    assert ", layers recomputed" in layout.statements(situation(large["vit"], S, tokens=1))[0].why


def test_the_largest_block_may_be_dense(large):
    """Experts that take a tenth of the tokens keep less than the network that stays dense."""
    recipe = {"moe": {**UPCYCLED, "layers": [1]}, "router": {**CHOICE, "capacity_factor": 0.1}}
    here = situation(large["vit"], recipe, tokens=1)
    (stack,) = here.built.dense.stacks
    dense_block, moe_block = (activations.block_bytes(here.built, stack, layer) for layer in (0, 1))
    assert moe_block < dense_block
    dense_network, moe_network = (
        activations.alive_in_network(layout.setting(here, 8), stack, layer)[0] for layer in (0, 1)
    )
    assert moe_network < dense_network == 2 * (4 * 3072 + 768) * 197


def test_no_expert_parallelism_with_response_norms(large):
    """As loading refuses it."""
    experts = {"moe": {**SPARSE, "num_experts": 8}}
    v1, v2 = (blueprint(large[name], Recipe.of(experts)) for name in ("convnext", "convnextv2"))
    assert layout.expert_parallel(8, v1) == 8
    assert layout.expert_parallel(8, v2) == 1


def test_universal_experts_take_memory(large):
    spherical = {
        "moe": {**UPCYCLED, "num_experts": 8, "universal_experts": 8},
        "router": {"name": "spherical"},
    }
    spherical["init"] = {"name": "uniform"}
    without = {**spherical, "moe": {**UPCYCLED, "num_experts": 8}}
    here, less = (situation(large["vit"], recipe, tokens=1).built for recipe in (spherical, without))
    (site, *_), (stack,) = here.sites, here.dense.stacks
    chosen = here.recipe.router.experts_per_token(8, 2, 197)
    more = chosen * (4 * 768 + 4 * site.universal_width + 40) + 4 * 8
    found = activations.block_bytes(here, stack, site.layer) - activations.block_bytes(
        less, stack, site.layer
    )
    assert found == pytest.approx(more)
    assert site.universal_width == 768


@pytest.mark.parametrize(
    ("model", "recipe", "asked", "words"),
    [
        ("8B", {}, {"context": 8192}, "rows of 8,192 tokens"),
        ("t5", S_T5, {"context": 512}, "rows of 1,024 tokens (512 in encoder, 512 in decoder)"),
        ("vit", S_VIT, {}, "an image counts as 197 tokens"),
        (
            "convnext", S_VIT, {},
            "an image counts as 4,165 tokens (3,136 in stage_1, 784 in stage_2, 196 in stage_3, 49 in",
        ),
    ],
)  # fmt: skip
def test_how_many_tokens_a_row_counts_as(large, model, recipe, asked, words):
    """The number that FLOPs of a row are divided by, and the one that training counts."""
    here = situation(large[model], recipe, tokens=10**9, gpus=8, **asked)
    shown = [s.why for s in (*duration.statements(here), *layout.statements(here))]
    assert sum(words in why for why in shown) >= 2
    row = 3 * flops_per_row(here.built.dense, here.built, here.lengths, all_scores=True)
    counted = float(words.split(" tokens")[0].split()[-1].replace(",", ""))
    assert duration.total_flops(here) == pytest.approx(10**9 * row / counted)


# --- inference


GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"head_dim": 8}), ("qwen3", {}), ("gemma2", {}), ("mistral", {}), ("qwen3_5_text", {}),
        ("phi3", {}), ("gemma4_text", {}), ("youtu", {}), ("falcon", {}), ("falcon", GROUPED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [5, 20])
def test_keys_and_values_are_what_transformers_keeps(dense, model_type, options, length):
    """Layers with a window keep one token less than it there, as the newest is not needed any more."""
    source = dense(model_type, **options)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.inference_mode():
        cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
    kept, sliding = 0, 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                kept += tensor.nbytes
                sliding += tensor.nbytes // tensor.shape[-2] if tensor.shape[-2] < length else 0
    opened = admit(Checkpoint.open(source))
    assert inference.cache_bytes(opened, opened.family.row(opened.config, length), 4) == kept + sliding


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("T5ForConditionalGeneration", {}),
        ("BartForConditionalGeneration", {"decoder_layers": 1}),
        ("WhisperForConditionalGeneration", {"decoder_layers": 1}),
    ],
)
def test_the_cache_of_an_encoder_decoder(tmp_path, architecture, options):
    """The sound that Whisper reads has 20 tokens here, whatever the length of the text."""
    folder = tiny.make(tmp_path / "model", architecture, **options)
    opened = admit(Checkpoint.open(folder))
    model, ids = getattr(transformers, architecture).from_pretrained(folder), torch.ones(1, 7).long()
    read = {"input_features": torch.zeros(1, 8, 40)} if "Whisper" in architecture else {"input_ids": ids}
    with torch.inference_mode():
        cache = model(**read, decoder_input_ids=ids, use_cache=True).past_key_values
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert inference.cache_bytes(opened, opened.family.row(opened.config, 7), 4) == kept
    found = said(folder, {"moe": UPCYCLED}, tokens=10**9, context=7).statements
    (stated,) = (one for one in found if one.unit == "bytes a token")
    assert stated.value == kept / 7


def test_a_model_that_generates_nothing_keeps_nothing(tmp_path):
    """The texts of CLIP are causal, and its class has no cache."""
    opened = admit(Checkpoint.open(tiny.make(tmp_path / "clip", "CLIPModel")))
    assert any(stack.causal for stack in opened.stacks)
    assert inference.cache_bytes(opened, opened.lengths, 4) == 0


def test_parameters_are_those_of_the_plan(large):
    found = said(large["8B"], tokens=10**9)
    costs = plan(large["8B"], Recipe.of())
    first = next(s for s in found.statements if s.topic == "inference")
    assert first.value == costs.active_parameters / costs.dense_parameters
    assert "47.5 B parameters (95 GB in bfloat16), 13.7 B active" in first.said
    cache = next(s for s in found.statements if s.unit == "bytes a token")
    assert cache.value == 2 * 32 * 8 * 128 * 2


# --- the verdict


@pytest.mark.parametrize("tokens", [2e9, 5e9, 11e9, 36e9, 60e9, 150e9])
@pytest.mark.parametrize("dense_tokens", [4e9, 20e9, 74e9, 140e9])
def test_the_verdict_follows_the_law(large, tokens, dense_tokens):
    """The smallest loss, unless two are within a hundredth of a nat."""
    here = situation(large["1B"], tokens=int(tokens), dense_tokens=int(dense_tokens))
    losses, found = scaling_law.losses(here), verdict(here)
    assert found.sure == "fitted law"
    if len(losses) < 3:
        assert "dense continuation compares is not known" in found.sentence
    first, second = sorted(losses.values())[:2]
    if second - first < 0.01:
        assert found.choice is None
        assert found.sentence.startswith("Too close to call")
    elif found.choice is not None:
        assert losses[found.choice] == first
    assert all(f"{loss:.3f}" in found.sentence for loss in losses.values())


@pytest.mark.parametrize(
    ("model", "recipe", "asked", "choice", "sure", "words"),
    [
        ("1B", {}, {"tokens": 2e9, "dense_tokens": 140e9}, "dense continuation", "fitted law", "is best"),
        ("1B", {}, {"tokens": 15e9, "dense_tokens": 74e9}, "upcycling", "fitted law", "init copy"),
        ("1B", {}, {"tokens": 60e9, "dense_tokens": 20e9}, "from scratch", "fitted law", "is best"),
        ("1B", {}, {"tokens": 37e9, "dense_tokens": 74e9}, None, "fitted law", "Too close to call"),
        ("8B", {}, {"tokens": 100e9, "dense_tokens": 15e12}, "upcycling", "published runs", "init copy"),
        ("8B", {}, {"tokens": 100e9}, "upcycling", "published runs", "without --dense-tokens"),
        ("8B", {}, {"tokens": 3e12, "dense_tokens": 1e12}, "from scratch", "rule of thumb", "Skywork-MoE"),
        ("1B", {}, {"tokens": 1e12, "dense_tokens": 2e12}, None, "rule of thumb", "Not settled"),
        ("1B", {}, {"tokens": 400e9, "dense_tokens": 2e12}, None, "rule of thumb", "Not from scratch"),
        ("1B", {}, {"tokens": 50e9}, None, "not known", "without --dense-tokens"),
        ("1B", DROP, {"tokens": 50e9, "dense_tokens": 2e12}, None, "not known", "Nothing is known"),
        ("bert", S, {"tokens": 50e9}, None, "not known", "Nothing is known"),
        ("convnext", S, {"tokens": 50e9}, None, "not known", "Nothing is known"),
        ("convnext", S_VIT, {"tokens": 20e9, "dense_tokens": 100e9}, None, "not known", "Nothing is known"),
        ("vit", S_VIT, {"tokens": 20e9}, None, "not known", "without --dense-tokens"),
        ("vit", S, {"tokens": 20e9, "dense_tokens": 100e9}, None, "not known", "Nothing is known"),
        ("t5", S, {"tokens": 20e9, "dense_tokens": 100e9}, None, "not known", "Nothing is known"),
        ("8B", {"moe": {"top_k": 1}}, {"tokens": 27e9, "dense_tokens": 15e12}, None, "rule of thumb", "Not "),
        ("t5", S_T5, {"tokens": 20e9, "dense_tokens": 100e9}, "upcycling", "published runs", "at equal cost"),
        ("t5", S_T5, {"tokens": 200e9, "dense_tokens": 100e9}, "from scratch", "rule of thumb", "past"),
        ("t5", S_T5, {"tokens": 105e9, "dense_tokens": 100e9}, "from scratch", "rule of thumb", "past"),
        ("t5", S_T5, {"tokens": 80e9, "dense_tokens": 100e9}, None, "rule of thumb", "Not from scratch"),
        ("vit", S_VIT, {"tokens": 20e9, "dense_tokens": 100e9}, "upcycling", "published runs", "Sparse"),
        ("vit", S_VIT, {"tokens": 900e9, "dense_tokens": 100e9}, None, "not known", "Nothing is known"),
        ("1B", {}, {"tokens": 250e9, "dense_tokens": 20e9}, None, "fitted law", "Rather from scratch than"),
    ],
)  # fmt: skip
def test_verdicts(large, model, recipe, asked, choice, sure, words):
    found = verdict(situation(large[model], recipe, **{k: int(v) for k, v in asked.items()}))
    assert (found.choice, found.sure) == (choice, sure), found.sentence
    assert words in found.sentence
    assert found.sentence.count("\n") == 0
    assert found.sentence.endswith(".")


@pytest.mark.parametrize(
    ("model", "recipe", "tokens", "dense_tokens"),
    [
        ("8B", {}, 1e12, 8e12),
        ("8B", {"init": {"name": "noise", "sigma": 0.01}}, 1e12, 8e12),
        ("1B", {}, 15e9, 74e9),
        ("1B", {}, 110e9, 368e9),
    ],
)
def test_the_initialisation_is_that_of_the_source(large, model, recipe, tokens, dense_tokens):
    """He et al. used copies, and the law is fitted on them, whatever ratio of drop the budget suggests."""
    found = said(large[model], recipe, tokens=int(tokens), dense_tokens=int(dense_tokens))
    assert "pcycling, init copy, " in found.verdict.sentence
    assert "drop" not in found.verdict.sentence
    assert found.recommended.recipe == Recipe.of(recipe)
    (ratio,) = (one for one in found.statements if one.topic == "drop ratio")
    assert ratio.inside is False


def test_drop_is_named_with_a_source_of_its_own(large, monkeypatch):
    """Where its paper compared ratios. No run of copies reaches there, so one is made up."""
    asked = {"tokens": 500 * 10**9, "dense_tokens": 5 * 10**12}
    clause = "; for upcycling with drop, r = 0.5 was best of those tried, with independent indices "
    clause += f"({drop_ratio.PAPER})."
    open_ = said(large["1B"], **asked)
    assert open_.verdict.choice is None
    assert open_.verdict.sentence.endswith(f"with and without [moe]{clause}")
    assert open_.recommended.recipe == Recipe.of()
    run = replace(comparison("He et al.", "copy"), sizes=(1e9, 1e9), tokens=500e9)
    monkeypatch.setattr(published, "EVERY_COMPARISON", (run,))
    found = said(large["1B"], **asked)
    assert found.verdict.sentence.startswith("Probably upcycling, init copy, as found")
    assert found.verdict.sentence.endswith(clause)
    drop = {"name": "drop", "ratio": 0.5, "indices": "independent"}
    assert found.recommended.recipe == Recipe.of(init=drop)


def test_a_crossover_is_compared_in_its_own_unit(large):
    """400 B after 2 T are 20 % of the tokens and more of the cost: OLMoE's 25 % are of tokens."""
    here = situation(large["1B"], tokens=400 * 10**9, dense_tokens=2 * 10**12)
    assert here.share_of_cost > 0.25
    cost = f"{100 * here.share_of_cost:.0f} % of the dense cost, short of the 200 % of Skywork-MoE"
    assert f"this budget is 20 % of the dense tokens, short of the 25 % of OLMoE, and {cost}" in (
        verdict(here).sentence
    )
    past = situation(large["1B"], tokens=10**12, dense_tokens=2 * 10**12)
    assert "50 % of the dense tokens, past the 25 % of OLMoE" in verdict(past).sentence


@pytest.mark.parametrize(
    ("model", "recipe", "helps"),
    [
        ("1B", {}, True), ("1B", {"moe": {"top_k": 1}}, True), ("t5", S_T5, True), ("vit", S_VIT, True),
        ("1B", DROP, False), ("bert", S, False), ("convnext", S, False), ("vit", S, False), ("t5", S, False),
    ],
)  # fmt: skip
def test_dense_tokens_are_asked_for_where_they_help(large, model, recipe, helps):
    """Nothing published covers the others, whatever the dense model was trained on."""
    without = verdict(situation(large[model], recipe, tokens=20 * 10**9)).sentence
    assert ("--dense-tokens" in without) is helps
    known = [
        verdict(situation(large[model], recipe, tokens=20 * 10**9, dense_tokens=n * 10**9)).sure
        for n in (40, 100)
    ]
    assert (set(known) != {"not known"}) is helps


def test_a_small_trained_model(stories, capsys):
    """Nothing published is of 260 k parameters, and that is said."""
    cli.main(["advise", str(stories), "--tokens", "1M", "--dense-tokens", "300M"])
    out = capsys.readouterr().out
    assert "Nothing is known about this input" in out
    assert "with and without [moe]." in out


# --- every kind of model, and the command


OTHERS = [
    *tiny.OTHERS, "ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification",
    "BertForMaskedLM", "T5ForConditionalGeneration", "T5EncoderModel", "MT5ForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", sampled([*tiny.DECODERS, *OTHERS], 3))
def test_every_family(dense, tmp_path, name):
    """Every statement has a sentence, a source and a reason, for any model there is, in JSON as well."""
    source = dense(name) if name[0].islower() else tiny.make(tmp_path / "dense", name)
    recipe = {} if name in tiny.DECODERS else {"moe": {"target": "upcycled", "num_experts": 4}}
    found = said(source, recipe, tokens=10**6, dense_tokens=10**7, gpus=2)
    assert {s.topic for s in found.statements} >= {
        "scaling law",
        "from scratch",
        "time",
        "memory",
        "inference",
    }
    for statement in found.statements:
        assert all((statement.said, statement.source, statement.why))
        assert statement.inside in (True, False, None)
    assert json.loads(json.dumps(found.as_dict()))["verdict"]["sure"] == "not known"
    kinds = {
        "V": "vision transformer", "D": "vision transformer", "B": "encoder", "C": "convolutional network",
    }  # fmt: skip
    if name[0] in kinds:
        assert situation(source, recipe, tokens=1).kind == kinds[name[0]]


def test_headers_only(dense, monkeypatch):
    monkeypatch.setattr(Checkpoint, "pread", lambda *_: pytest.fail("a tensor was read"))
    said(dense("llama"), {"init": {"name": "drop"}}, tokens=10**9, dense_tokens=10**9)


def test_torch_is_not_loaded(dense):
    script = (
        "import sys\nfrom upcycle.cli import main\nmain(sys.argv[1:])\n"
        "print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, "advise", str(dense("llama")), "--tokens", "1M"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == ""


def test_json(large, capsys):
    cli.main(
        ["advise", str(large["8B"]), "--tokens", "100B", "--dense-tokens", "15T", "--gpus", "512", "--json"]
    )
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["asked"]["tokens"] == 100 * 10**9
    assert found["verdict"]["choice"] == "upcycling"
    assert {"topic", "said", "value", "unit", "source", "inside", "why"} == set(found["statements"][0])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("100B", 10**11),
        ("1.5T", 15 * 10**11),
        ("37_000", 37000),
        ("2 M", 2 * 10**6),
        ("3k", 3000),
        ("1e9", 10**9),
        ("1.5E+10", 15 * 10**9),
        ("1_0.5k", 10500),
        ("123456789012345678", 123456789012345678),
    ],
)
def test_tokens(text, tokens):
    assert parse_tokens(text, "--tokens") == tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "--tokens 0; it must be a whole number of 1 or more"),
        (["--tokens", "many"], "--tokens 'many'; give a number of tokens"),
        *((["--tokens", text], f"--tokens {text!r}; give a number of tokens") for text in (
            "_", "_1", "1e", "1e9B", "1e-3", "1e99", "9" * 400,
        )),
        (["--tokens", "1B", "--dense-tokens", "__"], "--dense-tokens '__'"),
        (["--tokens", "1B", "--dense-tokens", "0"], "--dense-tokens 0"),
        (["--tokens", "1B", "--gpus", "0"], "--gpus 0"),
        (["--tokens", "1B", "--gpu", "V100"], "unknown GPU 'V100'; known: H100, H200, H800, A100, A800"),
        (["--tokens", "1B", "--context", "0"], "--context 0"),
        (["--tokens", "1B", "--context", "65"], "--context = 65 and the model takes 64 tokens"),
        (["--tokens", "1B", "--target", "depth_tiled"], "depth_tiled makes a dense model"),
    ],
)  # fmt: skip
def test_bad_input(dense, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["advise", str(dense("llama")), *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "key", "texts"),
    [
        ("BartForConditionalGeneration", "max_position_embeddings", {"encoder", "decoder"}),
        ("WhisperForConditionalGeneration", "max_target_positions", {"decoder"}),
        ("CLIPModel", "max_position_embeddings", {"text"}),
        ("BertForMaskedLM", "max_position_embeddings", {"layers"}),
    ],
)
def test_a_text_is_as_long_as_the_model_takes(tmp_path, architecture, key, texts):
    """For advise and for the forecast. Sound and images, in other stacks, have lengths of their own."""
    source, recipe = tiny.make(tmp_path / "model", architecture), {"moe": UPCYCLED}
    dense = blueprint(source, recipe).dense
    most = dense.family.length(dense.config)
    longest, one = (situation(source, recipe, tokens=1, context=context) for context in (most, 1))
    assert longest.lengths == upcycle.foretell(source, recipe, world=1, context=most).setting.lengths
    assert longest.lengths == dense.lengths
    assert {name for name, length in one.lengths.items() if length == 1} == texts
    assert all(one.lengths[name] == length for name, length in dense.lengths.items() if name not in texts)
    refused = rf"context = {most + 1} and the model takes {most} tokens \(by {key}"
    with pytest.raises(UpcycleError, match=f"^--{refused}"):
        said(source, recipe, tokens=10**6, context=most + 1)
    with pytest.raises(UpcycleError, match=f"^{refused}"):
        upcycle.foretell(source, recipe, world=1, context=most + 1)


def test_a_model_without_positions_takes_any_text(tmp_path):
    source = tiny.make(tmp_path / "model", "T5ForConditionalGeneration")
    long = situation(source, {"moe": UPCYCLED}, tokens=1, context=100_000).lengths
    assert long == {"encoder": 100_000, "decoder": 100_000}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA H800", "H800"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-PCIE-40GB", "A100"), ("A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA GH200 144G HBM3e", None), ("NVIDIA H800 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H20", None), ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device(name, known):
    """Data sheets, dense bf16: 756 TFLOP/s for H100 PCIe and 835 for NVL, not the 989 of SXM."""
    found = gpus.of_device(name)
    assert (found and found.name) == known


def test_a_source_that_is_no_dense_language_model(dense, large, tmp_path):
    from upcycle import convert

    convert(dense("llama"), tmp_path / "moe", Recipe.of())
    with pytest.raises(UpcycleError, match="already a Mixture of Experts"):
        said(tmp_path / "moe", tokens=1)
    with pytest.raises(UpcycleError, match="an image is 197 tokens here"):
        said(large["vit"], {"moe": SPARSE}, tokens=1, context=64)


def test_nothing_is_known_about_a_source_that_grows(tmp_path):
    """All that is known is of experts made of a dense model, even at the size and budget of our own runs."""
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64}
    source = make_mixture(tmp_path / "mixtral", "mixtral", **sizes)
    recipe, size = {"grow": {"experts": 8, "top_k": 2}}, plan(source, {"grow": {}}).dense_parameters
    for asked in ({}, {"dense_tokens": 80 * size, "gpus": 128}):
        found = said(source, recipe, tokens=20 * size, **asked)
        assert (found.verdict.choice, found.verdict.sure) == (None, "not known")
        assert found.verdict.sentence.startswith("Nothing is known about this input")
        assert "[grow]" in found.verdict.sentence
        assert "[moe]" not in found.verdict.sentence
        assert "No source that advise has is about a model that grows" in found.recommended.reasons[1]
        holding = [one for one in found.holding() if one.source != "data sheet of the maker"]
        assert all(one.source.startswith("counted") for one in holding)
        assert all("dense" not in one.said for one in holding)
        assert any("; the source has " in one.said for one in holding)
    (only,) = scaling_law.statements(situation(source, recipe, tokens=15 * 10**9))
    assert only.why == "found on experts made of a dense model, and [grow] copies those that the source has"


# --- what is shown, and the recipe


def printed(capsys, *arguments):
    cli.main(["advise", *map(str, arguments)])
    return capsys.readouterr().out


def test_what_holds_comes_first_and_the_rest_is_counted(large, capsys):
    question = [large["8B"], "--tokens", "100B", "--dense-tokens", "15T", "--gpus", "512"]
    found = said(large["8B"], tokens=100 * 10**9, dense_tokens=15 * 10**12, gpus=512)
    short, whole = printed(capsys, *question), printed(capsys, *question, "--all")
    assert short.splitlines()[2] == whole.splitlines()[2] == found.verdict.sentence
    outside = [one for one in found.statements if one.inside is False]
    assert len(outside) > 1
    assert {*found.holding(), *found.outside()} == {*found.statements}
    assert f"{len(outside)} statements do not cover this input; --all shows them." in short
    assert "--all" not in whole
    for text, marks in ((short, ("yes: ", "not known: ")), (whole, ("yes: ", "not known: ", "no: "))):
        places = [[at for at in range(len(text)) if text.startswith(f"  {mark}", at)] for mark in marks]
        assert all(max(before) < min(after) for before, after in itertools.pairwise(places))
    assert "  no: " not in short
    assert whole.count("  no: ") == len(outside)


def test_the_recipe_that_is_shown_converts(dense, tmp_path, capsys):
    source = dense("llama")
    shown = printed(capsys, source, "--tokens", "1M", "--experts", "4", "--seed", "7")
    recipe = tmp_path / "moe.toml"
    recipe.write_text(shown[shown.index("\n# ") :])
    assert Recipe.load(recipe) == Recipe.of(seed=7, moe={"num_experts": 4})
    cli.main(["convert", str(source), str(tmp_path / "moe"), "--recipe", str(recipe)])
    assert (tmp_path / "moe" / "config.json").is_file()


@pytest.mark.parametrize(
    ("model", "recipe", "asked", "wanted"),
    [
        ("8B", {}, {"tokens": 100e9, "dense_tokens": 15e12}, {}),
        ("8B", {"moe": {"top_k": 1}}, {"tokens": 27e9}, {"moe": {"num_experts": 8, "top_k": 2}}),
        ("8B", {"moe": {"num_experts": 16}}, {"tokens": 27e9}, {"moe": {"num_experts": 8}}),
        ("8B", DROP, {"tokens": 27e9}, {"init": {"name": "copy"}}),
        ("8B", {}, {"tokens": 300e9, "dense_tokens": 15e12}, {}),
        ("8B", DROP, {"tokens": 300e9, "dense_tokens": 15e12}, {"init": {"name": "copy"}}),
        (
            "1B", {"moe": {"num_experts": 16}}, {"tokens": 1e12, "dense_tokens": 2e12},
            {"moe": {"num_experts": 16}},
        ),
        ("1B", {}, {"tokens": 60e9, "dense_tokens": 20e9}, {}),
        (
            "1B", {"moe": {"granularity": 2, "num_experts": 16}, "init": {"name": "virtual_group"}},
            {"tokens": 15e9, "dense_tokens": 74e9},
            {"moe": {"granularity": 2, "num_experts": 16}, "init": {"name": "virtual_group"}},
        ),
        ("bert", S, {"tokens": 50e9}, S),
        ("convnext", S, {"tokens": 50e9}, S),
        (
            "vit", S, {"tokens": 20e9, "dense_tokens": 100e9},
            {**S_VIT, "router": {**CHOICE, "capacity_factor": 2.0}},
        ),
        (
            "t5", S, {"tokens": 20e9, "dense_tokens": 100e9},
            {
                "moe": S_T5["moe"],
                "router": {**CHOICE, "capacity_factor": 2.0, "normalize": False, "rescale": False},
                "decoder": {"router": {"name": "top_k", "capacity_factor": 2.0, "rounding": "flaxformer"}},
            },
        ),
    ],
)  # fmt: skip
def test_the_recipe_follows_from_the_advice(large, tmp_path, model, recipe, asked, wanted):
    """It is what was asked about, unless sources that cover the input found other settings to pay. It can be
    read back from its text, and it passes plan."""
    found = said(large[model], recipe, **{key: int(value) for key, value in asked.items()}).recommended
    assert found.recipe == Recipe.of(wanted)
    (tmp_path / "moe.toml").write_text(found.toml)
    assert Recipe.load(tmp_path / "moe.toml") == found.recipe
    assert plan(large[model], found.recipe).num_moe_layers
    changed = any(reason.startswith("Changed from what was asked") for reason in found.reasons)
    assert changed is (found.recipe != Recipe.of(recipe))


def test_the_recipe_of_a_source_that_grows_converts(tmp_path, capsys):
    source = make_mixture(tmp_path / "source", "mixtral")
    recipe = tmp_path / "moe.toml"
    for asked in (["grow.experts=8", "grow.top_k=2"], ["grow.factor=2"], ["grow.factor=3", "seed=2"]):
        sets = [part for each in asked for part in ("--set", each)]
        shown = printed(capsys, source, "--tokens", "1M", *sets)
        recipe.write_text(shown[shown.index("\n# ") :])
        assert blueprint(source, recipe).hash == blueprint(source, override({}, asked)).hash


def test_what_is_said_of_the_whole_model_is_kept(tmp_path):
    """Where other experts are advised: tensors to leave out, and keys of which a model has one."""
    family = families.find("llama")
    shapes = family.shapes(family.config(LLAMA_3_8B)) | {"v_head.weight": (1, 4096)}
    source = tiny.write_headers(tmp_path / "with_v_head", LLAMA_3_8B, shapes)
    asked = {"drop": ["v_head.*"], "seed": 5, "dtype": "float32", "moe": {"num_experts": 16, "untie": True}}
    found = said(source, asked, tokens=27 * 10**9).recommended
    assert found.recipe == Recipe.of(asked | {"moe": {"num_experts": 8, "untie": True}})
    assert plan(source, tomllib.loads(found.toml)).num_experts == 8


def test_a_changed_setting_is_said(large):
    found = said(large["8B"], {"moe": {"num_experts": 16}}, tokens=27 * 10**9).recommended
    assert "Changed from what was asked: moe.num_experts = 8, not 16." in found.reasons


@pytest.mark.parametrize(
    ("tokens", "dense_tokens", "open_"),
    [
        (37e9, 74e9, "does not tell upcycling and from scratch apart here"),
        (250e9, 20e9, "does not reach dense continuation here"),
        (11e9, 74e9, "does not tell dense continuation and upcycling apart here"),
    ],
)
def test_what_the_law_leaves_open_is_said(large, tokens, dense_tokens, open_):
    """A loss below that of dense continuation shows that upcycling may pay."""
    found = said(large["1B"], tokens=int(tokens), dense_tokens=int(dense_tokens))
    assert found.verdict.choice is None
    assert found.recommended.reasons[1] == (
        f"The fitted law {open_}, so this is the recipe that was asked about."
    )


def test_narrower_experts_have_the_dense_flops(large):
    """The keys beside the recipe bring a token's FLOPs to those of the dense model and of a router."""
    found = said(large["8B"], tokens=27 * 10**9).recommended
    (keys,) = (reason for reason in found.reasons if reason.startswith("  --set"))
    table = override(found.recipe.as_table(), keys.replace("--set", "").split())
    costs = plan(large["8B"], Recipe.of(table))
    assert (costs.num_experts, costs.top_k, costs.expert_width) == (16, 2, 7168)
    routers = 2 * 4096 * 16 * 32
    assert costs.flops_per_token - costs.dense_flops_per_token == routers


def test_json_has_the_recipe(large):
    found = json.loads(json.dumps(said(large["8B"], tokens=27 * 10**9).as_dict()))
    assert {"source", "moe", "asked", "statements", "verdict"} < set(found)
    assert Recipe.of(found["recommended"]["table"]) == Recipe.of()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_read_back_from_its_text(path, tmp_path):
    recipe = Recipe.load(path)
    (tmp_path / "again.toml").write_text(
        recipe_file.text(recipe, ["A comment.\nOf two lines = [", "  --set a=b"])
    )
    assert Recipe.load(tmp_path / "again.toml") == recipe


EVERY_SECTION = {
    "seed": 3,
    "dtype": "float32",
    "drop": ["v_head.*", "score"],
    "moe": {"layers": [0, 2], "target": "upcycled"},
    "init": {"name": "experts", "expert": [{}, {"source": "other", "noise": 0.1}], "backbone": "average"},
    "router": {"name": "top_k", "std": 0.5},
    "successor": {"hidden_size": 48},
    "grow": {"experts": 8, "top_k": 2},
    "decoder": {"moe": {"num_experts": 4}, "router": {"name": "sigmoid", "std": 0.1}},
}


@pytest.mark.parametrize(
    "table",
    [
        {}, EVERY_SECTION, {"grow": {}}, {"successor": {}}, {"decoder": {}}, {"drop": ["v_head.*"]},
        {"grow": {"factor": 3, "noise": 0.1}, "moe": {"target": "mixtral"}},
        {"router": {"init": {"name": "ridge", "statistics": "found.safetensors"}}},
        {"vision": {"moe": {"num_experts": 4}}}, {"stage_3": {"router": {"std": 0.1}}},
        *({"init": {"name": name}} for name in ("drop", "noise", "virtual_group", "split")),
    ],
)  # fmt: skip
def test_a_recipe_is_read_back_whatever_is_in_it(table):
    recipe = Recipe.of(table)
    assert Recipe.of(tomllib.loads(recipe_file.text(recipe, ["A comment."]))) == recipe


def test_a_recipe_with_every_section_has_every_section():
    """A field that a recipe gets later has to be in the text as well."""
    every, usual = Recipe.of(EVERY_SECTION), Recipe.of()
    assert not [key for key in keys(Recipe) if getattr(every, key) == getattr(usual, key)]


def test_a_stack_with_its_own_router_is_read_back(tmp_path):
    own = {"moe": {"num_experts": 4}, "router": {"name": "sigmoid", "std": 0.1}}
    table = {
        "dtype": "float32",
        "moe": {"layers": [0, 2]},
        "router": {"name": "top_k", "std": 0.5},
        "decoder": own,
    }
    recipe = Recipe.of(table)
    (tmp_path / "again.toml").write_text(recipe_file.text(recipe, []))
    assert Recipe.load(tmp_path / "again.toml") == recipe

"""The plan against transformers' own counts and a closed form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from marks import quick
from upcycle import Recipe, convert, plan
from upcycle.blueprints.cost import flops_per_row
from upcycle.blueprints.shards import parse_size
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError


def recipe_for(model_type: str) -> Recipe:
    return Recipe.of(moe={"num_experts": 6, "top_k": 2})


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_parameters(model_type, dense, tmp_path):
    """Total as transformers counts the model; active: what is left of it with K experts a layer."""
    source, recipe = dense(model_type), recipe_for(model_type)
    costs = plan(source, recipe)
    convert(source, tmp_path / "moe", recipe)
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        large = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "moe"))
    assert costs.dense_parameters == small.num_parameters()
    stored = {name for name, buffer in large.named_buffers() if name in large.state_dict()}  # corrections
    assert costs.total_parameters == large.num_parameters() + sum(large.get_buffer(n).numel() for n in stored)
    experts = sum(p.numel() for n, p in large.named_parameters() if ".experts." in n)
    assert costs.active_parameters == costs.total_parameters - experts * 4 // 6
    files = sum(f.stat().st_size for f in (tmp_path / "moe").glob("*.safetensors"))
    assert costs.output_bytes == files


def test_flops_of_llama(dense):
    """2 FLOPs a weight in q, k, v, o, the router, K experts and the head; hidden 32, 4 layers, width 48."""
    costs = plan(dense("llama"), Recipe.of(moe={"num_experts": 8, "top_k": 3}))
    h, d, v, i, layers = 32, 12, 96, 48, 4
    attention = h * (4 * d) + 2 * h * (2 * d) + (4 * d) * h
    assert costs.dense_flops_per_token == 2 * (layers * (attention + 3 * h * i) + v * h)
    assert costs.flops_per_token == 2 * (layers * (attention + 3 * 3 * h * i + 8 * h) + v * h)


def test_flops_against_torch(dense, tmp_path):
    """What torch counts for one pass, attention scores taken off, is what the plan says."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(dense("llama"), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 16, dtype=torch.long))
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    scores = sum(n for op, n in by_op.items() if "bmm" in op) - 2 * 6 * 16  # the rotary outer product
    total = sum(by_op.values()) - 2 * 6 * 16
    assert (total - scores) / 16 == plan(dense("llama"), Recipe.of()).dense_flops_per_token


def test_the_plan_reads_headers_only(dense, monkeypatch):
    from upcycle.checkpoints.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "pread", lambda *_: pytest.fail("a tensor was read"))
    for name in ("copy", "drop", "noise"):
        plan(dense("llama"), Recipe.of(init={"name": name}))


def test_hash(dense):
    """The same for the same recipe and headers; another for another seed, recipe or shape."""
    base = plan(dense("llama"), Recipe.of()).blueprint_hash
    assert plan(dense("llama"), Recipe.of()).blueprint_hash == base
    assert plan(dense("llama", seed=1), Recipe.of()).blueprint_hash == base
    others = [
        plan(dense("llama"), Recipe.of(seed=1)),
        plan(dense("llama"), Recipe.of(moe={"num_experts": 4})),
        plan(dense("llama"), Recipe.of(init={"name": "drop"})),
        plan(dense("llama"), Recipe.of(dtype="bfloat16")),
        plan(dense("llama", rms_norm_eps=1e-3), Recipe.of()),
        plan(dense("llama", intermediate_size=64), Recipe.of()),
    ]
    assert len({base, *(o.blueprint_hash for o in others)}) == 7


def test_the_plan_is_json(dense):
    costs = plan(dense("qwen2"), Recipe.of())
    assert json.loads(json.dumps(costs.as_dict()))["expert_width"] == 48


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1 GiB", 2**30), ("1.5MB", 1_500_000), ("7", 7), ("2kb", 2000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


# --- attention scores

ATTENDING = (
    "llama", "mistral", "ministral", "phi3", "gemma2", "gemma3_text", "gemma4_text", "cohere2", "olmo3",
    "exaone4", "cwm", "smollm3", "granite_swa", "qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h",
)  # fmt: skip


def attended(model: Any, length: int) -> list[int]:
    """How many scores of a row of `length` are not masked in each layer that attends."""
    ids = torch.arange(length)[None] % 90
    with torch.inference_mode():
        found = model(ids, output_attentions=True).attentions
    return [int((each[0, 0] > 0).sum()) for each in found if each is not None]


@pytest.mark.parametrize("model_type", quick(ATTENDING, "mistral", "gemma3_text", "lfm2", "nemotron_h"))
def test_a_token_reaches_what_its_mask_leaves(model_type, dense):
    """Windows, layers of a convolution or a state, and those of a feed-forward network alone."""
    source, length = dense(model_type), 24
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    opened = admit(Checkpoint.open(source))
    every = range(opened.stacks[0].count)
    reaches = [opened.family.reach(opened.config, i, length) for i in every]
    wanted = [reach * length - reach * (reach - 1) // 2 for reach in reaches if reach]
    assert attended(model, length) == wanted


def test_a_token_of_a_modernbert_reaches_half_a_window_on_either_side(tmp_path):
    source = tiny.make(tmp_path / "dense", "ModernBertModel", local_attention=8, num_hidden_layers=4)
    model = transformers.AutoModel.from_pretrained(source, attn_implementation="eager")
    opened, length = admit(Checkpoint.open(source)), 24
    reaches = [opened.family.reach(opened.config, i, length) for i in range(4)]
    assert reaches == [24, 9, 9, 24]
    edges = 2 * sum(range(1, 5))  # the first and the last tokens have fewer on one side
    assert attended(model, length) == [n * length - (edges if n < length else 0) for n in reaches]


UNLIKE: dict[str, dict[str, Any]] = {
    "lfm2": {},  # half of its layers do not attend
    "gemma4_text": {"sliding_window": 512},  # some layers have wider heads than others
    "youtu": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 14},
}


@pytest.mark.parametrize("model_type", UNLIKE)
def test_flops_of_unlike_heads_and_layers_are_those_that_torch_counts(model_type, dense):
    length = 512
    source = dense(model_type, max_position_embeddings=length, **UNLIKE[model_type])
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    opened = admit(Checkpoint.open(source))
    found = flops_per_row(opened, None, {"layers": length}, all_scores=True)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("kinds", [["p2c", "c2p"], "p2c|c2p", ["c2p"], None])
def test_a_deberta_scores_tokens_against_relative_positions(kinds, tmp_path):
    """As torch counts them, for each row more: the positions are projected once for a batch."""
    source, length = tiny.make(tmp_path / "dense", "DebertaV2Model", pos_att_type=kinds), 32
    model = transformers.AutoModel.from_pretrained(source, attn_implementation="eager")
    counted = []
    for rows in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(rows, length, dtype=torch.long))
        counted.append(counter.get_total_flops())
    opened = admit(Checkpoint.open(source))
    assert flops_per_row(opened, None, {"layers": length}) == counted[1] - counted[0]


STRAYS = {"sliding_window": 4, "layer_types": ["sliding_attention"], "local_attention": 4}


def edit(source: Path, keys: Mapping[str, Any]) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    "architecture", ["BertModel", "GPT2LMHeadModel", "T5ForConditionalGeneration", "ViTModel"]
)
def test_a_class_without_windows_heeds_none(architecture, tmp_path):
    """Its config.json may hold such keys all the same."""
    source = tiny.make(tmp_path / "dense", architecture)
    edit(source, STRAYS)
    opened = admit(Checkpoint.open(source))
    assert opened.family.reach(opened.config, 1, 24) == 24


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_types", ["full_attention"]), ("local_attention", "abc"), ("local_attention", -1)],
)
def test_a_modernbert_with_odd_windows_is_refused(key, value, tmp_path):
    source = tiny.make(tmp_path / "dense", "ModernBertModel")
    edit(source, {key: value})
    with pytest.raises(UpcycleError, match=key):
        admit(Checkpoint.open(source))

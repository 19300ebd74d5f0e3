"""`plan` names what vLLM and SGLang, which were read, leave out; docs/clients.md says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny
from upcycle import Recipe, blueprint, plan
from upcycle.targets import natives
from upcycle.targets._clients import ACTIVATION, Gap

CLIENTS = ("vLLM", "SGLang", "llama.cpp", "mlx-lm")
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE = {
    "qwen3": {"head_dim": 16}, "glm": {"head_dim": 16}, "cohere2": {"tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 16},
    "lfm2": {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 4},
    "youtu": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4,
        "v_head_dim": 12, "qk_nope_head_dim": 8,
    },
    "qwen3_5_text": {
        "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "granitemoehybrid": {
        "num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["attention"] * 4,
    },
}  # fmt: skip
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
TIED, BIASED, WIDE = {"tie_word_embeddings": True}, {"attention_bias": True}, {"head_dim": 24}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
GRANITE, FEWER = {"target": "granitemoe"}, {"layers": "last_half"}
NO_SCALING, NO_HEAD_DIM = "ignores the scaling of rotary positions", "ignores head_dim"
NO_WINDOW, NO_DENSE = "ignores sliding_window", "has experts in every layer"


def both(words: str) -> dict[str, str]:
    return {"vLLM": words, "SGLang": words}


@pytest.mark.parametrize(
    ("model_type", "changes", "moe", "expected"),
    [
        ("llama", {}, {}, {}),
        ("llama", TIED, {}, {"SGLang": "never ties"}),
        ("llama", WIDE, {}, {"SGLang": NO_HEAD_DIM}),
        ("llama", LINEAR, {}, {"SGLang": NO_SCALING}),
        ("llama", {"hidden_act": "gelu"}, {}, both("hard-codes SiLU")),
        ("llama", {**TIED, **LINEAR}, {}, {"SGLang": f"{NO_SCALING} in mixtral, and it never ties"}),
        ("mistral", {"sliding_window": 8}, {}, {"SGLang": NO_WINDOW}),
        ("llama", TIED, GRANITE, {}),
        ("llama", WIDE, GRANITE, both(NO_HEAD_DIM)),
        ("llama", LINEAR, GRANITE, {"SGLang": NO_SCALING}),
        ("qwen2", {}, GRANITE, both("has no biases")),
        ("smollm3", {}, {}, {}),
        ("smollm3", LINEAR, {}, {"SGLang": NO_SCALING}),
        ("qwen2", LINEAR, {}, {}),
        ("qwen2", TIED, {}, {"SGLang": "never ties"}),
        ("qwen2", WIDE, {}, both(NO_HEAD_DIM)),
        ("qwen2", {**SLIDING, "max_window_layers": 2}, {}, both(NO_WINDOW)),
        ("qwen2", {**SLIDING, "max_window_layers": 0}, {}, {"SGLang": NO_WINDOW}),
        ("qwen2", {}, FEWER, {"SGLang": NO_DENSE}),
        ("qwen3", WIDE, {}, {}),
        ("qwen3", BIASED, {}, {"vLLM": "has no bias on the o_proj"}),
        ("qwen3", {**SLIDING, "max_window_layers": 0}, {}, {"SGLang": NO_WINDOW}),
        ("qwen3", {**SLIDING, "max_window_layers": 2}, {}, {}),  # mellum
        ("qwen3", {**TIED, **SLIDING, "max_window_layers": 2}, {}, {"SGLang": "never ties"}),
        ("qwen3", {}, FEWER, {"SGLang": NO_DENSE}),
        ("qwen3", {}, {**FEWER, "target": "mellum"}, {}),
        ("cohere2", {}, {}, {}),
        ("cohere2", BIASED, {}, both("has no biases")),
        ("cohere2", {"tie_word_embeddings": False}, {}, both("always ties")),
        ("cohere2", {}, FEWER, {"SGLang": NO_DENSE}),
        ("glm", {}, FEWER, {}),
        ("glm", TIED, {}, both("never ties")),
        ("youtu", {}, {}, {}),
        ("youtu", TIED, {}, {"vLLM": "never ties"}),
        ("lfm2", {}, {}, {}),
        ("lfm2", {"tie_word_embeddings": False}, {}, {"vLLM": "always ties"}),
        ("hunyuan_v1_dense", BIASED, {}, {}),
        ("hunyuan_v1_dense", {}, {"top_k": 1}, {"SGLang": "weight of a single expert"}),
        ("qwen3_5_text", TIED, {}, {}),
        ("qwen3_5_text", BIASED, {}, both("has no biases")),
        ("qwen3_5_text", {"full_attention_interval": 2}, {}, {"SGLang": "full attention in every fourth"}),
        ("ernie4_5", {**TIED, **LINEAR}, FEWER, {}),
        ("granitemoehybrid", TIED, {}, {}),
        ("olmo2", BIASED, {}, {}),
    ],
)  # fmt: skip
def test_plan_says_what_they_leave_out(model_type, changes, moe, expected, tmp_path):
    config = {"model_type": model_type, **SIZES, **MORE.get(model_type, {}), **changes}
    source = tiny.make_headers(tmp_path / "dense", config)
    recipe = Recipe.of(moe={"num_experts": 4, "top_k": 2, **moe})
    found = [w for w in plan(source, recipe).warnings if w.startswith(("vLLM ", "SGLang "))]
    assert {w.partition(" ")[0] for w in found} == expected.keys()
    for client, words in expected.items():
        assert any(w.startswith(f"{client} ") and words in w for w in found), found


def test_youtu_has_the_keys_that_vllm_and_sglang_read(tmp_path):
    source = tiny.make_headers(tmp_path / "dense", {"model_type": "youtu", **SIZES, **MORE["youtu"]})
    config = blueprint(source, Recipe.of(moe={"num_experts": 4})).config
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")


def cell(gaps: tuple[Gap, ...] | None) -> str:
    """A cell of the table; activations stand above it."""
    if gaps is None:
        return "not tried"
    whole = [gap.label for gap in gaps if gap.everywhere]
    parts = ", ".join(gap.label for gap in gaps if not gap.everywhere and gap is not ACTIVATION)
    if whole:
        return f"no: {whole[0]}; nor {parts}" if parts else f"no: {whole[0]}"
    return f"yes, but not {parts}" if parts else "yes"


def test_the_page_has_every_target_and_says_what_plan_says():
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| `\w+` \| ", line)]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 1 + len(CLIENTS)}
    for name in natives.names():
        declared = natives.find(name).clients
        assert table.pop(name) == [cell(declared.get(client)) for client in CLIENTS], name
    assert not table

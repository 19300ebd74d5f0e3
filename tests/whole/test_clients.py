"""Other people's programs on our output: they compute the dense function, or the plan says they will not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import tiny
import tiny_wrappers
from clients import llama_cpp_logits, mlx_logits, transformers_logits
from marks import sampled
from upcycle import Recipe, convert, plan

PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
GATED = {"head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
HYBRID = {"shared_intermediate_size": 64}
FAMILIES = {
    "llama": {}, "llama-head_dim": {"head_dim": 24}, "mistral": {}, "mistral-full": {"sliding_window": None},
    "phi3": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "granite": {},
    "gemma": {}, "ernie4_5": {}, "cohere2": {}, "hunyuan_v1_dense": {}, "smollm3": {},
    "smollm3-sliding": {"use_sliding_window": True},
    "qwen3_5_text": GATED, "qwen3_5_text-bias": {**GATED, "attention_bias": True},
}  # fmt: skip
FAMILIES |= {
    "llama-rope3": tiny.VARIANTS["llama-rope3"][1],
    "llama-linear": tiny.VARIANTS["llama-linear"][1],
    "llama-theta": tiny.VARIANTS["llama-theta"][1],
    "llama-tied": {"tie_word_embeddings": True},
    "llama-gelu": {"hidden_act": "gelu"},
    "phi3-longrope": {
        **tiny.VARIANTS["phi3-longrope"][1],
        "rope_parameters": {
            **tiny.VARIANTS["phi3-longrope"][1]["rope_parameters"],
            "short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        },
        "sliding_window": None,
    },
    "qwen2-sliding": tiny.VARIANTS["qwen2-sliding"][1],
    "qwen3-bias": {"attention_bias": True},
    "qwen3-sliding": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3-yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16
        }
    },
    "granite-linear": tiny.VARIANTS["llama-linear"][1],
    "ernie4_5-linear": tiny.VARIANTS["llama-linear"][1],
    "granite-bias": {"attention_bias": True},
    "youtu": {},
    "youtu-yarn": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16
        },
    },
    "youtu-whole": {**tiny.VARIANTS["youtu-whole"][1], "tie_word_embeddings": False},
    "lfm2": {}, "lfm2-untied": {"tie_word_embeddings": False}, "lfm2-bias": {"conv_bias": True},
    "glm": {}, "phi3-part": {"sliding_window": None, "rope_parameters": PART},
    "granitemoehybrid": HYBRID,
    "granitemoehybrid-nope": {**HYBRID, "position_embedding_type": None},
    "granitemoehybrid-attention": {**HYBRID, "layer_types": ["full_attention"] * 4},
    "granitemoehybrid-linear": {
        **HYBRID, **tiny.VARIANTS["llama-linear"][1], "layer_types": ["full_attention"] * 4
    },
    "granitemoehybrid-still": {
        **HYBRID, "layer_types": ["full_attention"] * 4, "position_embedding_type": None
    },
    "granitemoehybrid-biases": {**HYBRID, "position_embedding_type": None, "mamba_proj_bias": True},
    "granitemoehybrid-no_bias": {**HYBRID, "position_embedding_type": None, "mamba_conv_bias": False},
    "granitemoehybrid-groups": {**HYBRID, "position_embedding_type": None, "mamba_n_groups": 2},
    "granitemoehybrid-limit": {**HYBRID, "position_embedding_type": None, "time_step_limit": [0.05, 0.1]},
    "granitemoehybrid-head_dim": {**HYBRID, "position_embedding_type": None, "head_dim": 24},
    "youtu-halves": {"tie_word_embeddings": False, "rope_interleave": False},
    "hunyuan_v1_dense-bias": {"attention_bias": True}, "cohere2-bias": {"attention_bias": True},
    "phi3-partial": {**tiny.VARIANTS["phi3-partial"][1], "bos_token_id": None, "eos_token_id": None},
}  # fmt: skip
# Families that `copy` would not tell apart, because they fail for another reason there.
OF_RECIPES = {"qwen2-tied": {"tie_word_embeddings": True}, "qwen2-head_dim": {"head_dim": 24}}
RECIPES = {
    "copy": {},
    "granitemoe": {"moe": {"target": "granitemoe"}},
    "raw gates": {"router": {"normalize": False, "std": 1e-4}},
    "shared": {"moe": {"shared_experts": 1}},
    "fewer": {"moe": {"layers": "last_half"}},
    "fewer, raw gates": {"moe": {"layers": "last_half"}, "router": {"normalize": False, "std": 1e-4}},
}
CASES = [
    *((family, "copy") for family in FAMILIES),
    ("llama", "granitemoe"), ("qwen2", "granitemoe"),
    ("llama-head_dim", "granitemoe"), ("llama-rope3", "granitemoe"),
    ("qwen2", "raw gates"), ("qwen2-tied", "raw gates"), ("qwen2-head_dim", "raw gates"),
    ("qwen3", "raw gates"),
    ("qwen2", "fewer, raw gates"), ("qwen3", "fewer"),
    ("qwen2", "shared"), ("ernie4_5", "shared"), ("cohere2", "shared"), ("hunyuan_v1_dense", "shared"),
]  # fmt: skip
WITHOUT_HEAD_DIM = (
    "cohere2", "granite", "granitemoehybrid", "lfm2", "olmo2", "phi3", "qwen2", "smollm3", "youtu"
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 96, 40).tolist()  # beyond every sliding window


def compare(family: str, recipe: str, client, name: str, tolerance: float, dense, tmp_path) -> None:
    model_type = family.partition("-")[0]
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    if model_type not in WITHOUT_HEAD_DIM:
        sizes["head_dim"] = 16
    source = dense(model_type, **{**sizes, **(FAMILIES | OF_RECIPES).get(family, {})})
    table = RECIPES[recipe]
    built = Recipe.of({**table, "moe": {"num_experts": 4, **table.get("moe", {})}})
    warned = [w for w in plan(source, built).warnings if w.startswith(f"{name} ")]
    convert(source, tmp_path / "moe", built)
    wanted = transformers_logits(source, IDS)
    try:
        found = client(tmp_path / "moe", IDS)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        if not warned:
            pytest.fail(f"{name} cannot load it, and plan does not say so: {error}")
        return
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    if "raw gates" in recipe:  # exact only as far as the router is uniform, in transformers as well
        tolerance = 3e-3
    if warned:
        assert difference > 30 * tolerance, f"{name} is right, and plan warns: {warned}"
    else:
        assert difference < tolerance


@pytest.mark.parametrize(("family", "recipe"), sampled(CASES, 6))
def test_mlx_lm(family, recipe, dense, tmp_path):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    compare(family, recipe, mlx_logits, "mlx-lm", 1e-5, dense, tmp_path)


@pytest.mark.parametrize(("family", "recipe"), sampled(CASES, 11))
def test_llama_cpp(family, recipe, dense, tmp_path):
    pytest.importorskip("cyllama", reason="cyllama, which carries llama.cpp, is not installed")
    compare(family, recipe, llama_cpp_logits, "llama.cpp", 5e-4, dense, tmp_path)


# Multimodal models: the kind, what its text_config has otherwise, [moe], and who reads the text model in it.
_FOUR = {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]}
WRAPPED = {
    "qwen3_vl": ("qwen3_vl", {}, {}, {"llama.cpp", "mlx-lm"}),
    "qwen3_vl-bias": ("qwen3_vl", {"attention_bias": True}, {}, set()),
    "qwen3_vl-fewer": ("qwen3_vl", {}, {"layers": "last_half"}, {"mlx-lm"}),
    "qwen3_5": ("qwen3_5", {**GATED, **_FOUR}, {}, {"llama.cpp", "mlx-lm"}),
    "mistral3": ("mistral3", {"sliding_window": None}, {}, {"llama.cpp"}),
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}


@pytest.mark.parametrize("client", ["llama.cpp", "mlx-lm"])
@pytest.mark.parametrize("case", sampled(WRAPPED, 2))
def test_multimodal_models(case, client, tmp_path):
    """They are asked about a text."""
    package, read = {"llama.cpp": ("cyllama", llama_cpp_logits), "mlx-lm": ("mlx_lm", mlx_logits)}[client]
    pytest.importorskip(package, reason=f"{client} is not installed")
    kind, changes, moe, readers = WRAPPED[case]
    config = tiny_wrappers.KINDS[kind].config
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        **(_MROPE if kind == "qwen3_vl" else {}),
    }
    text = {**config["text_config"], **sizes, **changes}
    vision = {**config["vision_config"], **({} if kind == "mistral3" else {"out_hidden_size": 64})}
    whole = {**config, "text_config": text, "vision_config": vision}
    made = transformers.AutoModelForImageTextToText.from_config(transformers.CONFIG_MAPPING[kind](**whole))
    tiny.shake(made.float(), 0).save_pretrained(tmp_path / "dense")
    recipe = Recipe.of(moe={"num_experts": 4, **moe})
    warned = any(w.startswith(f"{client} ") for w in plan(tmp_path / "dense", recipe).warnings)
    assert warned == (
        client not in readers and kind != "mistral3"
    )  # which mlx-lm knows with its own text model
    convert(tmp_path / "dense", tmp_path / "moe", recipe)
    if client not in readers:
        with pytest.raises((RuntimeError, ValueError)):
            read(tmp_path / "moe", SHORT)
        return
    with torch.inference_mode():
        wanted = made.eval()(input_ids=torch.tensor([SHORT])).logits[0].numpy()
    found = read(tmp_path / "moe", SHORT)
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


SHORT = [i for i in IDS if i != tiny_wrappers.IMAGE]

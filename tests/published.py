"""Published config.json files, made small: sizes shrink, and every other field stays as it is published.

`published.json` has one line a model: where its config was read (public repositories that carry it, or
memory, so that a field may differ), the config, and what is refused of it, if anything is.
"""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import CENTRED_NORMS
from upcycle import families
from upcycle.families._wrappers import WRAPPERS

FILE = Path(__file__).with_name("published.json")
VOCABULARY = 96
WINDOW, ORIGINAL, LONGEST = 8, 24, 96  # tokens: a sliding window, a length before rope is scaled, a row


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published config."""

    source: str
    config: dict[str, Any]
    refused: str = ""  # what is said of it, whatever the target
    native: str = ""  # what is said of it if a native target is asked for
    otherwise: str = ""  # why the function is not kept, as the plan says


@cache
def table() -> dict[str, Row]:
    """Every row by the name of its model."""
    return {name: Row(**row) for name, row in json.loads(FILE.read_text()).items()}


def family(config: dict[str, Any]) -> families.Family:
    """The family of the model, or of the text model within it."""
    known = WRAPPERS.get(config["model_type"])
    text = config["text_config"].get("model_type", known.text) if known else config["model_type"]
    return families.find(text)


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The config with small sizes."""
    out = _with_small_vocabulary(deepcopy(config))
    if parts := {key: value for key, value in config.items() if key.endswith(_PARTS) and value}:
        return out | {key: small(_sized(key, value, config)) for key, value in parts.items()}
    if "hybrid_override_pattern" in config:
        return _small_hybrid(out)
    if isinstance(config.get("conv_dim"), list):
        out |= {"conv_dim": [8] * len(config["conv_dim"])}
    if "encoder_layers" in config:
        return out | {k: v for k, v in _SEQ2SEQ.items() if k in config}
    if "d_model" in config:
        return out | {k: v for k, v in _T5.items() if k in config or k in ("d_model", "num_heads")}
    if "hidden_sizes" in config:
        return out | {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
    if "num_kv_heads" in config or not {"num_key_value_heads", "rms_norm_eps", "rope_theta"} & {*config}:
        return out | {k: v for k, v in _ENCODER.items() if k in config}
    return _small_decoder(out)


_PARTS = ("text_config", "vision_config", "audio_config", "text_config_dict", "vision_config_dict")


def _sized(key: str, part: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The config of a part with the sizes that transformers assumes if it leaves them out."""
    if key != "text_config" or config["model_type"] not in WRAPPERS:
        return part
    known = family(config)
    heads = {k: known.defaults[k] for k in ("num_key_value_heads", "head_dim") if k in known.defaults}
    return {**known.assumed, **heads, **part}


def _small_hybrid(config: dict[str, Any]) -> dict[str, Any]:
    """A Nemotron-H with one layer of each kind, or two."""
    pattern = "M-M*-"
    return config | {
        "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "hidden_size": 32,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "attention_head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 2, "chunk_size": 16, "max_position_embeddings": LONGEST,
    }  # fmt: skip


_T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "num_hidden_layers": 2,
    "max_source_positions": 20, "max_target_positions": 40, "max_position_embeddings": 40,
}  # fmt: skip
_ENCODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2, "n_embd": 16,
    "n_embed": 16, "n_head": 2, "n_layer": 2,
    "n_positions": 40, "n_ctx": 40, "ffn_dim": 24, "word_embed_proj_dim": 16,
    "image_size": 64, "stage_names": ["stem", "stage1", "stage2"],
    "out_features": ["stage2"], "out_indices": [2], "num_patches": 16,
    "projection_size": 16, "num_kv_heads": 1, "ffn_hidden_size": 24, "depth": 2, "num_heads": 2,
    "pooler_hidden_size": 16, "attention_head_size": 8, "position_buckets": 8,
}  # fmt: skip


_IDS = ("_token_id", "suppress_tokens", "forced_decoder_ids")


def _with_small_vocabulary(config: dict[str, Any]) -> dict[str, Any]:
    """Map the ids of special tokens into a small vocabulary; different ones stay different."""
    if "vocab_size" not in config:
        return config
    seen: dict[int, int] = {}

    def into(value: Any) -> Any:
        if isinstance(value, list):
            return [into(one) for one in value]
        if type(value) is not int or value < VOCABULARY // 2:
            return value
        if value >= config["vocab_size"]:
            return VOCABULARY + value - config["vocab_size"]
        return VOCABULARY // 2 + seen.setdefault(value, len(seen))

    ids = {key: into(value) for key, value in config.items() if key.endswith(_IDS)}
    return {**config, **ids, "vocab_size": VOCABULARY}


def _small_decoder(config: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    keys = config.get("num_key_value_heads") or heads
    linear = "linear_num_key_heads" in config
    size = 32 if linear else 16  # of a head
    few = 1 if keys == 1 else 2
    many = few * min(heads // keys, 3)
    out = config | {
        "num_attention_heads": many,
        "intermediate_size": 24,
        "num_hidden_layers": _layers(config),
    }
    odd = config.get("head_dim") and heads * config["head_dim"] != hidden
    out["hidden_size"] = many * size + (2 * many if odd else 0)
    small_ = {
        "num_key_value_heads": few, "head_dim": size, "attention_head_dim": size,
        "sliding_window": _window(config),
        "max_position_embeddings": LONGEST, "original_max_position_embeddings": ORIGINAL,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "block_ff_dim": 24, "block_multiple_of": 8, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_head_dim": 2 * size, "qk_nope_head_dim": size, "qk_rope_head_dim": size,
        "v_head_dim": size, "shared_intermediate_size": 24, "mamba_d_head": size, "mamba_d_state": 8,
        "mamba_n_heads": out["hidden_size"] * config.get("mamba_expand", 2) // size, "mamba_chunk_size": 16,
        "max_window_layers": _window_layers(config, out["num_hidden_layers"]), "global_head_dim": 2 * size,
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
    }  # fmt: skip
    out |= {key: value for key, value in small_.items() if config.get(key) is not None}
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(config.get(key), list):
            out[key] = config[key][: out["num_hidden_layers"]]
    if "num_kv_shared_layers" in config:  # each kind once with keys of its own, once with shared ones
        out["layer_types"] = config["layer_types"][-2:] * 2
    if "full_attn_idxs" in config:
        out["full_attn_idxs"] = [i for i in config["full_attn_idxs"] if i < out["num_hidden_layers"]]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(out.get(key), dict):
            share = config.get("partial_rotary_factor") or out[key].get("partial_rotary_factor") or 1.0
            out[key] = _small_rope(out[key], int(size * share) // 2)
    return out


def _layers(config: dict[str, Any]) -> int:
    """Two layers, or as many as it takes to have every kind of them."""
    if "num_kv_shared_layers" in config:
        return 4
    lists = [config[key] for key in ("layer_types", "no_rope_layers") if isinstance(config.get(key), list)]
    keys = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
    periods = [config[key] for key in keys if type(config.get(key)) is int]
    periods += [len(config[key]) for key in keys if isinstance(config.get(key), str)]
    default = {"cohere2": 4, "exaone4": 4, "olmo3": 4, "smollm3": 4, "gemma3_text": 6}.get(
        config["model_type"], 2
    )
    firsts = [one.index(value) + 1 for one in lists for value in set(one)]
    return max(default, *periods, *firsts, 1 + min(config.get("full_attn_idxs", [1])))


def _window(config: dict[str, Any]) -> int:
    """Return a window that rows outgrow, unless those of the published config never do."""
    given = config.get("sliding_window") or 0
    return 1 << 18 if given >= config.get("max_position_embeddings", 1 << 40) else WINDOW


def _window_layers(config: dict[str, Any], layers: int) -> int:
    """The same share of the layers as is published."""
    given, of = config.get("max_window_layers") or 0, config["num_hidden_layers"]
    return layers if given >= of else given * layers // of


def _small_rope(rope: dict[str, Any], pairs: int) -> dict[str, Any]:
    out = dict(rope)
    for key in ("short_factor", "long_factor"):
        if key in rope:
            out[key] = [rope[key][i * len(rope[key]) // pairs] for i in range(pairs)]
    if rope.get("original_max_position_embeddings"):
        beyond = "llama_4_scaling_beta" in rope  # mixtral has none behind it, where no row of verify reaches
        out["original_max_position_embeddings"] = LONGEST if beyond else ORIGINAL
    if "mrope_section" in rope:
        out["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return out


def checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """A dense checkpoint with this config.json to the letter, as transformers opens and saves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    made = transformers.AutoConfig.from_pretrained(folder)
    auto = _auto(config)
    torch.manual_seed(0)
    model = auto.from_config(made) if auto else _named(config)(made)
    model = _shaken(model.float(), config["model_type"])
    if hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def placeholder(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with this config.json and some tensors, for a config that transformers does not open."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    table = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(20)}
    text = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(80))
    return folder


def _named(config: dict[str, Any]) -> Any:
    names = config.get("architectures") or family(config).architectures
    return getattr(transformers, names[0])


def _auto(config: dict[str, Any]) -> Any:
    """The Auto class of a decoder; the others name a class that is theirs, or have the family's."""
    names = config.get("architectures") or family(config).architectures
    return transformers.AutoModelForCausalLM if names[0].endswith("ForCausalLM") else None


def _shaken(model: Any, model_type: str) -> Any:
    """Every parameter drawn so that a missing or misplaced one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                centred = model_type in CENTRED_NORMS and "linear_attn.norm" not in name
                p.copy_(0.3 * noise + (0.0 if centred else 1.0))
            elif name.endswith(("bias", "A_log")):
                p.copy_(0.2 * noise)
            else:
                p.copy_(noise * (p[0].numel() ** -0.5 if p.ndim > 1 and len(p) > 1 else 0.3))
    return model

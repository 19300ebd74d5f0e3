"""Qwen3: queries and keys are normalised per head."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder, sizes
from upcycle.families._weights import Norm
from upcycle.families.qwen2 import layer_types


class Qwen3(Decoder):
    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    summary = "Qwen3 dense, 0.6B to 32B"
    natives: tuple[str, ...] = ("qwen3_moe", "mellum")
    tokenizer = "Qwen2Tokenizer"
    numbers: tuple[str, ...] = ("max_window_layers",)
    spellings = Decoder.spellings | {"max_window_layers"}
    assumed = sizes(151_936, 4096, 22016, 32, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        return {**config, "layer_types": layer_types(config)}

    def attention(self, config: Config, layer: int) -> Weights:
        norm = Norm((config["head_dim"],))
        return {
            **super().attention(config, layer),
            "self_attn.q_norm.weight": norm,
            "self_attn.k_norm.weight": norm,
        }

    def refusal(self, config: Config, native: str) -> str | None:
        if native == "qwen3_moe" and len(set(config["layer_types"])) > 1:
            return "some of its layers have a sliding window and qwen3_moe knows one setting for all"
        return super().refusal(config, native)

    def native_config(self, config: Config, native: str) -> Config:
        if native == "mellum":
            return config
        # A single setting for all layers, under the name that qwen3_moe uses.
        return {**config, "use_sliding_window": set(config["layer_types"]) == {"sliding_attention"}}


family = Qwen3()

"""Ministral 8B: Mistral with sliding windows in some layers."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import sizes
from upcycle.families._sinks import WithoutSinks


class Ministral(WithoutSinks):
    model_type = "ministral"
    architectures = ("MinistralForCausalLM",)
    summary = "Ministral 8B (2410)"
    tokenizer = "TokenizersBackend"
    assumed = sizes(32_000, 4096, 14336, 32, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
        "head_dim": None,
        "layer_types": None,
        "num_key_value_heads": 8,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        if config["layer_types"] is None:
            kind = "full_attention" if config["sliding_window"] is None else "sliding_attention"
            config["layer_types"] = [kind] * config["num_hidden_layers"]
        return config


family = Ministral()

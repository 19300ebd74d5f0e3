"""CWM, the Code World Model: Llama with sliding windows in three of four layers."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._sinks import WithoutSinks


class CWM(WithoutSinks):
    model_type = "cwm"
    architectures = ("CwmForCausalLM",)
    summary = "Meta CWM 32B"
    theta = 1_000_000.0
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 128000,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "sliding_window": 8192,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "head_dim": 128,
        "layer_types": None,
        "num_key_value_heads": 8,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        if config["eos_token_id"] is None:
            config["eos_token_id"] = [128001, 128008, 128009]
        if config["layer_types"] is None:
            kinds = ("full_attention", *["sliding_attention"] * 3)
            config["layer_types"] = [kinds[i % 4] for i in range(config["num_hidden_layers"])]
        if raw.get("rope_scaling") is None and raw.get("rope_parameters") is None:
            config["rope_parameters"] = {
                "rope_type": "llama3", "rope_theta": self.theta, "factor": 16.0, "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": config.get("original_max_position_embeddings", 8192),
            }  # fmt: skip
        return config


family = CWM()

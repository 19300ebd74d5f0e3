"""Granite with sliding windows and attention sinks."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Bias


class GraniteSWA(Decoder):
    model_type = "granite_swa"
    architectures = ("GraniteSWAForCausalLM",)
    summary = "IBM Granite with windows and sinks"
    natives = ("granitemoe_swa",)
    per_block = ("layer_types", "layer_rope_theta")
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "sliding_window": 128,
        "layer_types": None,
        "layer_rope_theta": None,
        "num_key_value_heads": 4,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        layers = config["num_hidden_layers"]
        if config["layer_types"] is None:
            kinds = ("full_attention", *["sliding_attention"] * 3)
            config["layer_types"] = [kinds[i % 4] for i in range(layers)]
        if config["layer_rope_theta"] is None:
            config["layer_rope_theta"] = [config["rope_parameters"]["rope_theta"]] * layers
        return config

    def attention(self, config: Config, layer: int) -> Weights:
        sinks: Weights = {"self_attn.sinks": Bias((config["num_attention_heads"],))}
        return super().attention(config, layer) | sinks


family = GraniteSWA()

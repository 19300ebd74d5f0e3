"""GLM-4-9B: Llama with a partial, interleaved rotation, biased queries and keys."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import FusedGate
from upcycle.families._interleaved import Interleaved


class Glm(FusedGate, Interleaved):
    model_type = "glm"
    architectures = ("GlmForCausalLM",)
    summary = "GLM-4-9B, GLM-Edge (rows of queries and keys put in another order)"
    natives = ("glm4_moe",)
    tokenizer = "TokenizersBackend"
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1.5625e-07,
        "pad_token_id": 151_329,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        config["rope_parameters"].setdefault("partial_rotary_factor", 0.5)
        if config["eos_token_id"] is None:
            config["eos_token_id"] = [151329, 151336, 151338]
        return config

    def attention_biases(self, config: Config) -> str:
        return "qkv" if config["attention_bias"] else ""


family = Glm()

"""The common part of GLM-4's families: gate and up in one matrix, biased queries and keys."""

from upcycle.families import Config
from upcycle.families._decoder import FusedGate


class GlmDecoder(FusedGate):
    """A decoder with the defaults of GLM-4-9B and GLM-4-0414."""

    rotated = 0.5
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

    def attention_biases(self, config: Config) -> str:
        return "qkv" if config["attention_bias"] else ""

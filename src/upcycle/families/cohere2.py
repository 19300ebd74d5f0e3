"""Cohere Command R7B: attention and feed-forward in parallel under one LayerNorm, scaled logits."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import Decoder, every_nth_full, sizes


class Cohere2(Decoder):
    model_type = "cohere2"
    architectures = ("Cohere2ForCausalLM",)
    summary = "Cohere Command R7B"
    reads = Decoder.reads | {"sliding_window_pattern"}
    spellings = Decoder.spellings | {"sliding_window_pattern"}
    natives = ("cohere2_moe",)
    tokenizer = "CohereTokenizer"
    norms = ("input_layernorm",)
    network_norm = ""  # attention reads the norm as well
    assumed = sizes(256_000, 8192, 22528, 40, 64)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "pad_token_id": 0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": 4096,
        "layer_types": None,
        "num_key_value_heads": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        # transformers computes the head size and ignores the one in config.json.
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        pattern = config.pop("sliding_window_pattern", None) or 4
        return {**config, "layer_types": every_nth_full(config, pattern)}


family = Cohere2()

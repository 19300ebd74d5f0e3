"""Qwen2 and Qwen2.5: biases on q, k and v, some layers with a sliding window."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import Decoder, as_granite, sizes
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy


def layer_types(config: Config) -> list[str]:
    """Return the kinds of layers; if sliding is used, those from `max_window_layers` on slide."""
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    return [
        "sliding_attention" if slides and i >= config["max_window_layers"] else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


class Qwen2(Decoder):
    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    summary = "Qwen2, Qwen2.5 and whatever shares their class"
    natives = ("qwen2_moe", "granitemoe")
    tokenizer = "Qwen2Tokenizer always"
    numbers = ("max_window_layers",)
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
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
        "num_key_value_heads": 32,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        return {**config, "layer_types": layer_types(config)}

    def attention_biases(self, config: Config) -> str:
        return "qkv"

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        out = super().backbone(config, native, tensors)
        if native == "granitemoe":  # granitemoe has a bias on o as well
            for layer in range(config["num_hidden_layers"]):
                attention = f"model.layers.{layer}.self_attn."
                dtype = out[attention + "q_proj.bias"].dtype
                out[attention + "o_proj.bias"] = Fill((config["hidden_size"],), dtype, 0.0)
        return out

    def refusal(self, config: Config, native: str) -> str | None:
        if native == "granitemoe" and "sliding_attention" in config["layer_types"]:
            return "some of its layers have a sliding window and granitemoe's have none"
        return super().refusal(config, native)

    def native_config(self, config: Config, native: str) -> Config:
        if native == "granitemoe":
            return as_granite({**config, "attention_bias": True})
        # Its class needs a window if it is told to use one, which this config may not have.
        return {**config, "use_sliding_window": "sliding_attention" in config["layer_types"]}


family = Qwen2()

"""SmolLM3: Llama without rotation in every fourth layer."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import as_granite
from upcycle.families._sinks import WithoutSinks


class SmolLM3(WithoutSinks):
    model_type = "smollm3"
    architectures = ("SmolLM3ForCausalLM",)
    summary = "SmolLM3 (layers without rotation kept)"
    inexact = {"mixtral": "mixtral rotates every layer and smollm3 skips some"}
    per_block = ("layer_types", "no_rope_layers")
    spellings = WithoutSinks.spellings | {"no_rope_layer_interval"}
    theta = 2_000_000.0
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "num_key_value_heads": 4,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        layers = range(config["num_hidden_layers"])
        if config["no_rope_layers"] is None:
            interval = config["no_rope_layer_interval"]
            config["no_rope_layers"] = [int((i + 1) % interval != 0) for i in layers]
        slides = config["use_sliding_window"] and config["sliding_window"] is not None
        if config["layer_types"] is None:
            config["layer_types"] = [
                "sliding_attention" if slides and not config["no_rope_layers"][i] else "full_attention"
                for i in layers
            ]
        return config

    def native_config(self, config: Config, native: str) -> Config:
        theta = config["rope_parameters"]["rope_theta"]
        rotated = [theta if rotates else 0 for rotates in config["no_rope_layers"]]
        # Its class builds the mask of a window even where no layer slides; this one is never left.
        window = config["sliding_window"] or config["max_position_embeddings"]
        return as_granite({**config, "layer_rope_theta": rotated, "sliding_window": window})


family = SmolLM3()

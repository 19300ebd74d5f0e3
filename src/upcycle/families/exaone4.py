"""EXAONE 4: norms after attention and the feed-forward network, queries and keys normalised per head."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder, every_nth_full, sizes
from upcycle.families._weights import Norm


class Exaone4(Decoder):
    model_type = "exaone4"
    architectures = ("Exaone4ForCausalLM",)
    summary = "EXAONE 4"
    reads = Decoder.reads | {"sliding_window_pattern"}
    spellings = Decoder.spellings | {"sliding_window_pattern"}
    natives = ()
    no_native = "exaone_moe lacks its post-norms"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    network_norm = ""
    residual = norms
    assumed = sizes(102_400, 4096, 16384, 32, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "layer_types": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        # transformers saves an interval of 0 if there is no window; then it lists the kinds of layers.
        config = super().config({k: v for k, v in raw.items() if (k, v) != ("sliding_window_pattern", 0)})
        interval = config.get("sliding_window_pattern") or 4
        return {**config, "layer_types": every_nth_full(config, interval)}

    def attention(self, config: Config, layer: int) -> Weights:
        norm = Norm((config["head_dim"],))
        norms: Weights = {"self_attn.q_norm.weight": norm, "self_attn.k_norm.weight": norm}
        return super().attention(config, layer) | norms

    def ignored(self, name: str) -> str | None:
        if name.startswith("mtp."):
            return "a block that predicts further tokens, which transformers never reads"
        return super().ignored(name)


family = Exaone4()

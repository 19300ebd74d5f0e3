"""LFM2: short convolutions in most layers, attention with normalised queries and keys in the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Bias, Matrix, Norm, linear


class Lfm2(Decoder):
    model_type = "lfm2"
    architectures = ("Lfm2ForCausalLM",)
    summary = "Liquid LFM2, 350M to 2.6B"
    natives = ("lfm2_moe",)
    reads = Decoder.reads | {"block_ff_dim", "tie_embedding", "full_attn_idxs"}
    spellings = Decoder.spellings | {"block_ff_dim", "tie_embedding", "full_attn_idxs"}
    theta = 1_000_000.0
    norms = ("operator_norm", "ffn_norm")
    network_norm = "ffn_norm"
    part = "feed_forward"
    network = {"gate": "w1", "up": "w3", "down": "w2"}
    output = "out_proj"
    final_norm = "embedding_norm"
    after = ("embedding_norm.",)
    residual = ("self_attn", "conv", "feed_forward")
    carriers = {"conv": "conv"}
    defaults = {
        "max_position_embeddings": 128_000,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "num_key_value_heads": 8,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "layer_types": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        formerly = {"intermediate_size": "block_ff_dim", "tie_word_embeddings": "tie_embedding"}
        given = {now: raw[before] for now, before in formerly.items() if before in raw}
        config = super().config({**raw, **given})
        config["hidden_act"] = "silu"
        if config["layer_types"] is None:
            layers = range(config["num_hidden_layers"])
            full = layers if (listed := config.get("full_attn_idxs")) is None else listed
            config["layer_types"] = ["full_attention" if i in full else "conv" for i in layers]
        return config

    def width(self, config: Config) -> int:
        """Return the number of neurons, which its class rounds up unless config.json says otherwise."""
        width = super().width(config)
        if not config["block_auto_adjust_ff_dim"]:
            return width
        width, factor, unit = (
            int(2 * width / 3),
            config["block_ffn_dim_multiplier"],
            config["block_multiple_of"],
        )
        return width if factor is None else -(-int(factor * width) // unit) * unit

    def attention(self, config: Config, layer: int) -> Weights:
        if config["layer_types"][layer] != "conv":
            norm = Norm((config["head_dim"],))
            norms: Weights = {"self_attn.q_layernorm.weight": norm, "self_attn.k_layernorm.weight": norm}
            return super().attention(config, layer) | norms
        hidden, bias = config["hidden_size"], config["conv_bias"]
        out: Weights = {"conv.conv.weight": Matrix((hidden, 1, config["conv_L_cache"]))}
        out |= {"conv.conv.bias": Bias((hidden,))} if bias else {}
        out |= linear("conv.in_proj", 3 * hidden, hidden, bias=bias)
        return out | linear("conv.out_proj", hidden, hidden, bias=bias)

    def native_config(self, config: Config, native: str) -> Config:
        return {**config, "intermediate_size": self.width(config)}

    def warnings(self, native: str) -> list[str]:
        if native not in self.natives:
            return []
        return [
            "lfm2_moe adds 1e-6 to the sum of the chosen experts' scores before it divides by it: the "
            "function is kept to about 1e-6, and to 1e-4 where a token's scores are as small as 0.01; "
            "nothing is promised if router.std is wide enough for that, or if the router starts from data"
        ]

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        conv = "layers.{i}.conv.out_proj"
        return tuple(replace(stack, heads=(*stack.heads, conv)) for stack in super().stacks(config))


family = Lfm2()

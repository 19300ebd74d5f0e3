"""Granite 4 without experts: attention and Mamba layers, a network that its class calls shared."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._decoder import FusedGate
from upcycle.families._weights import Bias, Matrix, Norm, Weight, below, linear

_FORMERLY = {"mamba": "linear_attention", "attention": "full_attention"}


class GraniteMoeHybrid(FusedGate):
    model_type = "granitemoehybrid"
    architectures = ("GraniteMoeHybridForCausalLM",)
    summary = "IBM Granite 4 without experts: micro, h-micro, nano"
    natives = ("granitemoehybrid",)
    tokenizer = "TokenizersBackend"
    part = "shared_mlp"
    both = "input_linear"
    network = {"down": "output_linear"}
    residual = ("self_attn", "mamba", "shared_mlp")
    carriers = {"linear_attention": "mamba"}
    reads = FusedGate.reads | {"layers_block_type"}
    spellings = FusedGate.spellings | {"layers_block_type"}
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        "position_embedding_type": None,
        "layer_types": None,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_head": "auto",
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_key_value_heads": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        if raw.get("shared_intermediate_size") == 0:
            raise UpcycleError(
                "config.json of a granitemoehybrid model: shared_intermediate_size = 0, so it has no network "
                "to make experts of; give a model with a size of 1 or more"
            )
        limit = raw.get("time_step_limit")
        raw = {key: value for key, value in raw.items() if key != "time_step_limit"}  # it may hold inf
        kinds = raw.get("layer_types") or raw.get("layers_block_type")
        if isinstance(kinds, (list, tuple)):
            raw = {**raw, "layer_types": [_FORMERLY.get(k, k) if isinstance(k, str) else k for k in kinds]}
        config = super().config(raw)
        if config["layer_types"] is None:
            config["layer_types"] = ["linear_attention"] * config["num_hidden_layers"]
        if config["mamba_d_head"] == "auto":
            config["mamba_d_head"] = config["mamba_expand"] * config["hidden_size"] // config["mamba_n_heads"]
        finite = isinstance(limit, (list, tuple)) and all(map(_is_finite, limit))
        return config | ({"time_step_limit": list(limit)} if limit and finite else {})

    def weights(self, config: Config) -> Weights:
        # Not in `config`: tasks read the settings of its native Mixture of Experts, too.
        if (experts := config.get("num_local_experts", 8)) != 0:
            raise UpcycleError(
                f"config.json of a granitemoehybrid model: num_local_experts = {experts}, so it is a Mixture "
                f"of Experts already; upcycle takes those with 0"
            )
        return super().weights(config)

    def width(self, config: Config) -> int:
        """Return the number of neurons, which its class keeps apart from that of its experts."""
        return int(config["shared_intermediate_size"])

    def attention(self, config: Config, layer: int) -> Weights:
        if config["layer_types"][layer] != "linear_attention":
            return super().attention(config, layer)
        return below("mamba.", _mamba(config))

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        mamba = "layers.{i}.mamba.out_proj"
        return tuple(replace(stack, heads=(*stack.heads, mamba)) for stack in super().stacks(config))


def _is_finite(value: Any) -> bool:
    """Return whether a value is a finite number; transformers writes inf as a table."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _mamba(config: Config) -> Weights:
    """Return the tensors of a Mamba layer."""
    hidden, heads = config["hidden_size"], config["mamba_n_heads"]
    inner = config["mamba_expand"] * hidden
    channels = inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    out: Weights = {name: Weight((heads,)) for name in ("dt_bias", "A_log", "D")}
    out["conv1d.weight"] = Matrix((channels, 1, config["mamba_d_conv"]))
    out |= {"conv1d.bias": Bias((channels,))} if config["mamba_conv_bias"] else {}
    out["norm.weight"] = Norm((inner,))
    out |= linear("in_proj", inner + channels + heads, hidden, bias=config["mamba_proj_bias"])
    return out | linear("out_proj", hidden, inner, bias=config["mamba_proj_bias"])


family = GraniteMoeHybrid()

"""Apertus: plain networks whose activation (xIELU) learns two numbers; the experts of a layer share them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Norm, Scale

# What transformers starts xIELU with (arXiv:2411.13010), before its softplus: 0.8, and 0.8 - beta.
_BETA, _EPSILON, _RISE = 0.5, -1e-6, 0.8
_ROPE = {
    "rope_type": "llama3", "rope_theta": 12_000_000.0, "factor": 8.0,
    "original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


class Apertus(Decoder):
    model_type = "apertus"
    architectures = ("ApertusForCausalLM",)
    summary = "Swiss AI Apertus, 8B and 70B"
    natives = ()
    no_native = "no native MoE has its plain networks and their learned activation (xIELU)"
    network = {"up": "up_proj", "down": "down_proj"}
    norms = ("attention_layernorm", "feedforward_layernorm")
    network_norm = "feedforward_layernorm"
    of_all_experts = ".mlp.act_fn."
    theta = 12_000_000.0
    defaults = {
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        rotates = raw.get("rope_parameters") or raw.get("rope_scaling")
        return super().config(raw if rotates else {**raw, "rope_parameters": _ROPE})

    def attention(self, config: Config, layer: int) -> Weights:
        norm = Norm((config["head_dim"],))
        norms: Weights = {"self_attn.q_norm.weight": norm, "self_attn.k_norm.weight": norm}
        return super().attention(config, layer) | norms

    def mlp(self, config: Config) -> Weights:
        return super().mlp(config) | (_xielu() if config["hidden_act"] == "xielu" else {})

    def may_lack(self, config: Config) -> frozenset[str]:
        """Return the two constants of xIELU, which some files leave out."""
        return frozenset(n for n in self.shapes(config) if n.endswith((".act_fn.beta", ".act_fn.eps")))

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        """Return the stack; the activation is no part of what becomes experts."""
        (stack,) = super().stacks(config)
        owned = tuple(f"model.layers.{{i}}.mlp.{name}." for name in self.network.values())
        return (replace(stack, owned=owned),)


def _xielu() -> Weights:
    """Return the tensors of an xIELU, by their names in a block."""
    starts = {"alpha_p": _RISE, "alpha_n": _RISE - _BETA}
    out: Weights = {f"mlp.act_fn.{n}": Scale((1,), math.log(math.expm1(x))) for n, x in starts.items()}
    return out | {"mlp.act_fn.beta": Scale((), _BETA), "mlp.act_fn.eps": Scale((), _EPSILON)}


family = Apertus()

"""Cohere Command R: attention and network in parallel under one LayerNorm, scaled logits."""

from dataclasses import replace

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._narrowing import Axis
from upcycle.families._weights import Norm


class Cohere(Decoder):
    model_type = "cohere"
    architectures = ("CohereForCausalLM",)
    summary = "Cohere Command R, Aya"
    natives = ()
    no_native = "cohere2_moe rotates no layer of full attention, and all layers of cohere rotate"
    norms = ("input_layernorm",)
    network_norm = ""  # attention reads the norm as well
    theta = 500_000.0
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
        "use_qk_norm": False,
        "num_key_value_heads": None,
    }

    def attention(self, config: Config, layer: int) -> Weights:
        out = super().attention(config, layer)
        if config["use_qk_norm"]:
            heads, head = (config["num_attention_heads"], config["num_key_value_heads"]), config["head_dim"]
            out["self_attn.q_norm.weight"] = Norm((heads[0], head))
            out["self_attn.k_norm.weight"] = Norm((heads[1], head))
        return out

    def head_norm(self, heads: Axis, head: int) -> tuple[Axis | None, ...]:
        """Each head has a row of its own."""
        return replace(heads, unit=heads.unit // head), None


family = Cohere()

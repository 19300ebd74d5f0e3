"""OLMo 2: norms after attention and feed-forward network, queries and keys normalised over all heads."""

from collections.abc import Mapping

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._narrowing import Axis
from upcycle.families._weights import Norm


class Olmo2(Decoder):
    model_type = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    tokenizer = "TokenizersBackend"
    summary = "OLMo 2"
    natives: tuple[str, ...] = ("flex_olmo",)
    inexact: Mapping[str, str] = {"olmoe": "olmoe normalises before its blocks and olmo2 after them"}
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    network_norm = ""
    residual = norms
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": None,
    }

    def attention(self, config: Config, layer: int) -> Weights:
        out = super().attention(config, layer)
        return {
            **out,
            "self_attn.q_norm.weight": Norm(out["self_attn.q_proj.weight"].shape[:1]),
            "self_attn.k_norm.weight": Norm(out["self_attn.k_proj.weight"].shape[:1]),
        }

    def head_norm(self, heads: Axis, head: int) -> tuple[Axis | None, ...]:
        """The norm is over all heads together."""
        return (heads,)


family = Olmo2()

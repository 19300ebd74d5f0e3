"""OLMo 2: norms after attention and after the feed-forward network, queries and keys normalised whole."""

from upcycle.families import Config, Shapes
from upcycle.families._decoder import Decoder


class Olmo2(Decoder):
    model_type = "olmo2"
    architectures = ("Olmo2ForCausalLM",)
    summary = "OLMo 2"
    natives: tuple[str, ...] = ("flex_olmo",)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    network_norm = ""
    branches = norms
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

    def attention(self, config: Config, layer: int) -> Shapes:
        out = super().attention(config, layer)
        return {
            **out,
            "self_attn.q_norm.weight": out["self_attn.q_proj.weight"][:1],
            "self_attn.k_norm.weight": out["self_attn.k_proj.weight"][:1],
        }


family = Olmo2()

"""GLM-4-0414: norms before and after each part, gate and up in one matrix, biased queries and keys."""

from upcycle.families import Config
from upcycle.families._decoder import FusedGate


class Glm4(FusedGate):
    model_type = "glm4"
    architectures = ("Glm4ForCausalLM",)
    summary = "GLM-4-0414"
    natives = ()
    no_native = "glm4_moe lacks its post-norms"
    norms = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    residual = norms[2:]
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1.5625e-07,
        "pad_token_id": 151_329,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }

    def attention_biases(self, config: Config) -> str:
        return "qkv" if config["attention_bias"] else ""


family = Glm4()

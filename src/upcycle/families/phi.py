"""Phi-1, Phi-1.5 and Phi-2: attention and plain network in parallel, biases everywhere, also on the head."""

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Bias, norm


class Phi(Decoder):
    model_type = "phi"
    architectures = ("PhiForCausalLM",)
    summary = "Phi-1, Phi-1.5, Phi-2"
    natives = ()
    no_native = "no native MoE computes its parallel, biased block"
    network = {"up": "fc1", "down": "fc2"}
    output = "dense"
    final_norm = "final_layernorm"
    norms = ("input_layernorm",)
    network_norm = ""  # attention reads the norm as well
    biased_norms = True
    after = ("final_layernorm.",)
    rotated = 0.5
    defaults = {
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "qk_layernorm": False,
        "num_key_value_heads": None,
    }

    def weights(self, config: Config) -> Weights:
        return super().weights(config) | {"lm_head.bias": Bias((config["vocab_size"],))}

    def attention(self, config: Config, layer: int) -> Weights:
        out = super().attention(config, layer)
        for part in ("q", "k") if config["qk_layernorm"] else ():
            out |= norm(f"self_attn.{part}_layernorm", config["head_dim"])
        return out

    def attention_biases(self, config: Config) -> str:
        return "qkvo"

    def mlp_biases(self, config: Config) -> bool:
        return True


family = Phi()

"""Llama, and other models that call themselves llama: TinyLlama, SmolLM, Yi, ..."""

from upcycle.families import Config
from upcycle.families._decoder import Decoder, as_granite, attention_bias_refusal, sizes


class Llama(Decoder):
    model_type = "llama"
    architectures = ("LlamaForCausalLM",)
    summary = "Llama 1 to 3.x, TinyLlama, SmolLM, Yi"
    natives = ("mixtral", "granitemoe")
    inexact = {
        "olmoe": "olmoe normalises queries and keys; the norms have no source in llama",
        "qwen3_moe": "qwen3_moe normalises queries and keys; the norms have no source in llama",
    }
    assumed = sizes(32_000, 4096, 11008, 32, 32)
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
        "mlp_bias": False,
        "head_dim": None,
        "num_key_value_heads": None,
    }

    def refusal(self, config: Config, native: str) -> str | None:
        # Biases in the networks first: no other native target takes them.
        return super().refusal(config, native) or attention_bias_refusal(config, native)

    def native_config(self, config: Config, native: str) -> Config:
        return as_granite(config) if native == "granitemoe" else config


family = Llama()

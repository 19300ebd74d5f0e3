"""Helium: Llama with interleaved rotary halves."""

from upcycle.families._decoder import Decoder


class Helium(Decoder):
    model_type = "helium"
    architectures = ("HeliumForCausalLM",)
    summary = "Helium 1"
    natives = ()
    no_native = "no native MoE interleaves the halves that it rotates"
    theta = 100_000.0
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-8,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "head_dim": 128,
        "num_key_value_heads": 20,
    }


family = Helium()

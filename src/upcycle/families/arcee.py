"""Arcee AFM: Llama with plain networks of squared ReLU."""

from upcycle.families._decoder import Decoder


class Arcee(Decoder):
    model_type = "arcee"
    architectures = ("ArceeForCausalLM",)
    summary = "Arcee AFM-4.5B"
    natives = ()
    no_native = "no native MoE has its plain networks"
    network = {"up": "up_proj", "down": "down_proj"}
    defaults = {
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "head_dim": None,
        "num_key_value_heads": None,
    }


family = Arcee()

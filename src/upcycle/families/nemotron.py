"""Nemotron and Minitron: plain networks with squared ReLU, LayerNorms that multiply by 1 + w."""

from upcycle.families._decoder import Decoder


class Nemotron(Decoder):
    model_type = "nemotron"
    borders = False  # its blocks leave out the arguments of flash attention
    architectures = ("NemotronForCausalLM",)
    summary = "Nemotron-3, Nemotron-4, Minitron"
    natives = ()
    no_native = "no native MoE has its LayerNorms and plain networks"
    network = {"up": "up_proj", "down": "down_proj"}
    biased_norms = True
    centred_norms = True
    rotated = 0.5
    defaults = {
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "head_dim": None,
        "num_key_value_heads": None,
    }


family = Nemotron()

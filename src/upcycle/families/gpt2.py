"""GPT-2 and its kin: learned positions, biases everywhere, matrices stored [inputs, outputs]."""

from upcycle.families import Config, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._weights import Bias, Matrix, Table, norm


class GPT2(PlainDecoder):
    model_type = "gpt2"
    architectures = ("GPT2LMHeadModel",)
    base_class = "GPT2Model"
    summary = "GPT-2, DistilGPT-2, CodeParrot"
    root = "transformer."
    tied = ("lm_head.weight", "transformer.wte.weight")
    before = ("wte.", "wpe.")
    after = ("ln_f.",)
    blocks = "h"
    up, down_name = "mlp.c_fc", "mlp.c_proj"
    attention = "attn.c_proj"
    across = True
    residual = ("attn", "mlp")
    counts = ("n_layer",)
    keys = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    }  # fmt: skip
    defaults = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }

    def outside(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        out: Weights = {"wte.weight": Table((config["vocab_size"], hidden))}
        out["wpe.weight"] = Table((config["max_position_embeddings"], hidden))
        return out | norm("ln_f", hidden)

    def block(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        out = norm("ln_1", hidden) | norm("ln_2", hidden)
        out |= _conv("attn.c_attn", hidden, 3 * hidden) | _conv("attn.c_proj", hidden, hidden)
        return out | _conv("mlp.c_fc", hidden, width) | _conv("mlp.c_proj", width, hidden)

    def ignored(self, name: str) -> str | None:
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return "a mask that transformers makes itself"
        return super().ignored(name)


def _conv(name: str, inputs: int, outputs: int) -> Weights:
    """Return the tensors of a linear layer whose matrix is stored [inputs, outputs]."""
    return {f"{name}.weight": Matrix((inputs, outputs)), f"{name}.bias": Bias((outputs,))}


family = GPT2()

"""StarCoder2: plain networks, LayerNorms and biases everywhere."""

from upcycle.families import Config
from upcycle.families._decoder import Decoder


class StarCoder2(Decoder):
    model_type = "starcoder2"
    architectures = ("Starcoder2ForCausalLM",)
    summary = "StarCoder2"
    natives = ()
    no_native = "no native MoE has its plain, biased networks"
    network = {"up": "c_fc", "down": "c_proj"}
    biased_norms = True
    defaults = {
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "use_bias": True,
        "num_key_value_heads": 2,
    }

    def attention_biases(self, config: Config) -> str:
        return "qkvo" if config["use_bias"] else ""

    def mlp_biases(self, config: Config) -> bool:
        return bool(config["use_bias"])


family = StarCoder2()

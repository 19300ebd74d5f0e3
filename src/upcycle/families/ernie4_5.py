"""ERNIE 4.5: Llama with interleaved rotary halves."""

from upcycle.families import Config
from upcycle.families._decoder import Decoder


class Ernie45(Decoder):
    model_type = "ernie4_5"
    architectures = ("Ernie4_5ForCausalLM",)
    summary = "ERNIE 4.5 dense"
    natives = ("ernie4_5_moe",)
    tokenizer = "TokenizersBackend"
    theta = 500_000.0
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "use_bias": False,
        "head_dim": 128,
        "num_key_value_heads": 2,
    }

    def attention_biases(self, config: Config) -> str:
        return "qkvo" if config["use_bias"] else ""

    def mlp_biases(self, config: Config) -> bool:
        return bool(config["use_bias"])


family = Ernie45()

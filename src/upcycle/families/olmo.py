"""OLMo 1: norms without weights."""

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder


class Olmo(Decoder):
    model_type = "olmo"
    architectures = ("OlmoForCausalLM",)
    summary = "OLMo 1"
    natives = ()
    tokenizer = "GPTNeoXTokenizer"
    no_native = "olmoe normalises queries and keys and olmo does not; the norms have no source"
    norms = ()
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": None,
        "clip_qkv": None,
    }

    def weights(self, config: Config) -> Weights:
        return {name: w for name, w in super().weights(config).items() if name != "model.norm.weight"}


family = Olmo()

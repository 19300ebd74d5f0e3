"""Hunyuan V1 dense: Llama with queries and keys normalised per head, after rotation."""

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Norm


class HunyuanV1Dense(Decoder):
    model_type = "hunyuan_v1_dense"
    architectures = ("HunYuanDenseV1ForCausalLM",)
    summary = "Tencent Hunyuan dense, 0.5B to 7B"
    natives = ("hunyuan_v1_moe",)
    reads = Decoder.reads | {"sep_token_id"}
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eod_token_id": 3,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": None,
        "num_key_value_heads": None,
    }

    def attention(self, config: Config, layer: int) -> Weights:
        norm = Norm((config["head_dim"],))
        return {
            **super().attention(config, layer),
            "self_attn.query_layernorm.weight": norm,
            "self_attn.key_layernorm.weight": norm,
        }

    def native_config(self, config: Config, native: str) -> Config:
        return {"sep_token_id": None, **config}  # its class has a default of its own


family = HunyuanV1Dense()

"""Seed-OSS: Llama with biased queries, keys and values."""

from collections.abc import Mapping

from upcycle.families import Config
from upcycle.families._decoder import Decoder, as_granite
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy


class SeedOss(Decoder):
    model_type = "seed_oss"
    architectures = ("SeedOssForCausalLM",)
    summary = "ByteDance Seed-OSS 36B"
    natives = ("granitemoe",)
    reads = Decoder.reads | {"residual_dropout"}
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_out_bias": False,
        "attention_dropout": 0.1,
        "mlp_bias": False,
        "head_dim": 128,
        "num_key_value_heads": 8,
    }

    def attention_biases(self, config: Config) -> str:
        return ("qkv" if config["attention_bias"] else "") + ("o" if config["attention_out_bias"] else "")

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        out = super().backbone(config, native, tensors)
        given = self.attention_biases(config)
        shapes = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
        for layer in range(config["num_hidden_layers"] if given else 0):
            attention = f"model.layers.{layer}.self_attn."
            for part in [part for part in "qkvo" if part not in given]:  # granitemoe has all or none
                rows = config[shapes[part]] * config["head_dim"] if part in shapes else config["hidden_size"]
                dtype = out[f"{attention}{part}_proj.weight"].dtype
                out[f"{attention}{part}_proj.bias"] = Fill((rows,), dtype, 0.0)
        return out

    def native_config(self, config: Config, native: str) -> Config:
        return as_granite({**config, "attention_bias": bool(self.attention_biases(config))})


family = SeedOss()

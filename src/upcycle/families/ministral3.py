"""Ministral 3: Mistral whose queries grow with their position, far from the start."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import Decoder, sizes


class Ministral3(Decoder):
    model_type = "ministral3"
    architectures = ("Ministral3ForCausalLM",)
    summary = "the text model of Ministral 3"
    natives = ("mixtral",)
    tokenizer = "TokenizersBackend"
    assumed = sizes(131_072, 4096, 14336, 34, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 11,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "num_key_value_heads": 8,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        if raw.get("rope_scaling") is None and raw.get("rope_parameters") is None:
            config["rope_parameters"] = {
                "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": config.get("original_max_position_embeddings", 16384),
                "max_position_embeddings": config["max_position_embeddings"],
                "mscale": 1.0, "mscale_all_dim": 1.0,
            }  # fmt: skip
        return config

    def switches(self, config: Config) -> dict[str, int]:
        grows = {"the growth of queries": config["rope_parameters"].get("original_max_position_embeddings")}
        return super().switches(config) | {name: int(at) for name, at in grows.items() if at}

    def native_config(self, config: Config, native: str) -> Config:
        rope = {k: v for k, v in config["rope_parameters"].items() if k != _GROWTH}
        return {**config, "rope_parameters": rope}

    def parts_ways(self, config: Config, native: str) -> str | None:
        rope = config["rope_parameters"]
        if not rope.get(_GROWTH) or native not in self.natives:
            return None
        return (
            f"past {rope.get('original_max_position_embeddings', 16384):,} tokens ministral3 scales its "
            f"queries ({_GROWTH}) and {native} does not (moe.target = upcycled does as ministral3)"
        )

    def warnings(self, native: str) -> list[str]:
        return [
            f"mixtral has no {_GROWTH}: the function is kept up to original_max_position_embeddings places "
            f"(16,384 in the published models), and differs behind them"
        ]


_GROWTH = "llama_4_scaling_beta"

family = Ministral3()

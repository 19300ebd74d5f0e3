"""Gemma 1: embeddings scaled by sqrt(H), norms that multiply by 1 + w, GELU gates."""

import math
from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import Decoder, as_granite
from upcycle.families._gemma import DEFAULTS
from upcycle.tensors.computed import Affine
from upcycle.tensors.lazy import Lazy


class Gemma(Decoder):
    model_type = "gemma"
    architectures = ("GemmaForCausalLM",)
    summary = "Gemma 1 (1 + w of its norms is folded into the weights)"
    natives = ("granitemoe",)
    tokenizer = "GemmaTokenizer"
    reads = Decoder.reads | {"hidden_activation"}  # the later spelling, which its class ignores
    centred_norms = True
    exact_when_narrow = False  # 1 + w rounds
    defaults = {
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        **DEFAULTS,
        "use_bidirectional_attention": None,
        "num_key_value_heads": 16,
        "head_dim": 256,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        # The first releases said `gelu` and meant its tanh approximation, as transformers knows.
        if config["hidden_act"] == "gelu":
            config["hidden_act"] = "gelu_pytorch_tanh"
        return config

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        return {
            name: Affine(tensor, shift=1.0) if name.endswith("norm.weight") else tensor
            for name, tensor in super().backbone(config, native, tensors).items()
        }

    def refusal(self, config: Config, native: str) -> str | None:
        if config.get("use_bidirectional_attention"):
            return "it attends to both sides (use_bidirectional_attention) and granitemoe to the past only"
        return super().refusal(config, native)

    def native_config(self, config: Config, native: str) -> Config:
        return as_granite({**config, "embedding_multiplier": math.sqrt(config["hidden_size"])})

    def warnings(self, native: str) -> list[str]:
        if native not in self.natives:
            return []
        return [
            "the norms of gemma become 1 + w, which rounds in bfloat16 and float16 (exact in float32)",
        ]


family = Gemma()

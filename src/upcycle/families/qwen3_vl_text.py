"""Qwen3-VL, text: Qwen3 with positions on three axes, which are one if there is only text."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import Decoder, sizes
from upcycle.families.qwen3 import Qwen3


class Qwen3VLText(Qwen3):
    model_type = "qwen3_vl_text"
    architectures = ("Qwen3VLTextModel",)
    summary = "the text model within a Qwen3-VL"
    natives = ("qwen3_vl_moe_text",)
    tokenizer = ""  # its wrapper has the type that decides
    alone = "qwen3"
    numbers = ()
    theta = 500_000.0
    defaults = {
        key: value
        for key, value in Qwen3.defaults.items()
        if key not in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    } | {"max_position_embeddings": 128_000}
    assumed = sizes(151936, 4096, 22016, 32, 32)

    def config(self, raw: Mapping[str, Any]) -> Config:
        return Decoder.config(self, raw)

    def refusal(self, config: Config, native: str) -> str | None:
        return Decoder.refusal(self, config, native)

    def native_config(self, config: Config, native: str) -> Config:
        return config


family = Qwen3VLText()

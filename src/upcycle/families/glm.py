"""GLM-4-9B: Llama with a partial, interleaved rotation, biased queries and keys."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._glm import GlmDecoder
from upcycle.families._interleaved import Interleaved


class Glm(GlmDecoder, Interleaved):
    model_type = "glm"
    architectures = ("GlmForCausalLM",)
    summary = "GLM-4-9B, GLM-Edge (rows of queries and keys put in another order)"
    natives = ("glm4_moe",)
    tokenizer = "TokenizersBackend"

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        config["rope_parameters"].setdefault("partial_rotary_factor", 0.5)
        if config["eos_token_id"] is None:
            config["eos_token_id"] = [151329, 151336, 151338]
        return config


family = Glm()

"""Mistral: Llama with a sliding window."""

from collections.abc import Mapping
from typing import Any

from upcycle.families._decoder import Decoder, sizes


class Mistral(Decoder):
    model_type = "mistral"
    architectures = ("MistralForCausalLM",)
    summary = "Mistral 7B and its kin, sliding window kept"
    natives = ("mixtral",)
    tokenizer = "TokenizersBackend"
    inexact = {"granitemoe": "granitemoe has no sliding window"}
    assumed = sizes(32_000, 4096, 14336, 32, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
        "head_dim": None,
        "num_key_value_heads": 8,
    }

    def meant(self, raw: Mapping[str, Any]) -> str:
        """A mistral with kinds of layers is opened as ministral, whatever it calls itself."""
        return "ministral" if "layer_types" in raw else self.model_type


family = Mistral()

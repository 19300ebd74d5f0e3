"""Phi-3: Llama's computation with q, k, v in one matrix and gate, up in another."""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._decoder import FusedGate, outside_window
from upcycle.families._weights import Matrix
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Slice


class Phi3(FusedGate):
    model_type = "phi3"
    architectures = ("Phi3ForCausalLM",)
    summary = "Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, default and long rope"
    natives = ("mixtral", "glm4_moe")
    tokenizer = "TokenizersBackend"
    inexact = {"phimoe": "phimoe uses LayerNorm and sparse-mixer gates, which do not sum to one"}
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "num_key_value_heads": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        rope = config["rope_parameters"]
        if rope["rope_type"] == "su" and "original_max_position_embeddings" not in rope:
            raise UpcycleError(
                "config.json of a phi3 model: the type su of its rotary settings is an early name, and "
                "transformers no longer opens the model with it; write longrope in its place"
            )
        if rope["rope_type"] in ("su", "yarn"):  # early names of the same thing
            rope["rope_type"] = "longrope"
        if rope["rope_type"] == "longrope":
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        return config

    def attention(self, config: Config, layer: int) -> Weights:
        parts = super().attention(config, layer)
        rows = sum(weight.shape[0] for name, weight in parts.items() if "o_proj" not in name)
        return {
            "self_attn.qkv_proj.weight": Matrix((rows, config["hidden_size"])),
            "self_attn.o_proj.weight": parts["self_attn.o_proj.weight"],
        }

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        out: dict[str, Lazy] = {}
        parts = super().attention(config, 0)
        for name, tensor in super().backbone(config, native, tensors).items():
            if "qkv_proj" not in name:
                out[name] = tensor
                continue
            start = 0
            for p in "qkv":
                stop = start + parts[f"self_attn.{p}_proj.weight"].shape[0]
                out[name.replace("qkv_proj", f"{p}_proj")] = Slice(tensor, 0, start, stop)
                start = stop
        return out

    def parts_ways(self, config: Config, native: str) -> str | None:
        rope = config["rope_parameters"]
        if rope["rope_type"] != "longrope" or native not in self.natives:
            return None
        return (
            f"where a text grows past {rope['original_max_position_embeddings']:,} tokens while it is "
            f"generated, phi3 computes its cache anew with the long factors and {native} does not: the text "
            f"goes on differently (moe.target = upcycled does as phi3)"
        )

    def refusal(self, config: Config, native: str) -> str | None:
        if native == "glm4_moe":
            return outside_window(config, native) or super().refusal(config, native)
        if config["rope_parameters"].get("partial_rotary_factor", 1.0) != 1.0:
            return "it rotates a part of each head only (partial_rotary_factor) and mixtral the whole"
        return super().refusal(config, native)

    def native_config(self, config: Config, native: str) -> Config:
        # The class of glm4_moe assumes that half of each head is rotated.
        return {**config, "rope_parameters": {"partial_rotary_factor": 1.0, **config["rope_parameters"]}}


family = Phi3()

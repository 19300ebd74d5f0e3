"""Youtu-LLM: Llama with the latent attention of DeepSeek-V3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import Initial, Normal, Weight, linear, rms_norm
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Concat, Slice


class Youtu(Decoder):
    model_type = "youtu"
    architectures = ("YoutuForCausalLM",)
    summary = "Tencent Youtu-LLM 2B"
    natives = ("deepseek_v3",)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": None,
        "embedding_initializer_range": None,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "rope_interleave": True,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config({k: v for k, v in raw.items() if (k, v) != ("initializer_range", None)})
        config["head_dim"] = config["qk_rope_head_dim"]  # as its class calls what is rotated
        deviation = config["initializer_range"] or 2.0 / (5.0 * config["hidden_size"]) ** 0.5
        config["initializer_range"] = deviation
        config["embedding_initializer_range"] = config["embedding_initializer_range"] or 2.0 * deviation
        return config

    def attention(self, config: Config, layer: int) -> Weights:
        hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], config["attention_bias"]
        inner, keys = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, values = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if inner is None:
            out = linear("self_attn.q_proj", heads * (nope + rope), hidden, bias=False)
        else:
            out = linear("self_attn.q_a_proj", inner, hidden, bias=bias)
            out |= rms_norm("self_attn.q_a_layernorm", inner)
            out |= linear("self_attn.q_b_proj", heads * (nope + rope), inner, bias=False)
        out |= linear("self_attn.kv_a_proj_with_mqa", keys + rope, hidden, bias=bias)
        out |= rms_norm("self_attn.kv_a_layernorm", keys)
        out |= linear("self_attn.kv_b_proj", heads * (nope + values), keys, bias=False)
        return out | linear("self_attn.o_proj", hidden, heads * values, bias=bias)

    def as_opened(self, config: Config, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
        """Empty the row of the padding token, as its class does whenever it opens a checkpoint."""
        name, pad = "model.embed_tokens.weight", config["pad_token_id"]
        if pad is None or (table := tensors.get(name)) is None:
            return tensors
        rows, hidden = table.shape
        place = pad % rows
        parts: list[Lazy] = [Slice(table, 0, a, b) for a, b in ((0, place), (place + 1, rows)) if a < b]
        parts.insert(place > 0, Fill((1, hidden), table.dtype, 0.0))
        return {**tensors, name: Concat(tuple(parts), 0)}

    def cached(self, config: Config, layer: int) -> int:
        return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])  # from which it computes all heads

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        attention = config["num_attention_heads"] * config["v_head_dim"]
        return tuple(replace(stack, attention=attention) for stack in super().stacks(config))

    def scored(self, config: Config, stack: Stack, layer: int) -> int:
        queries = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        return int(config["num_attention_heads"] * (queries + config["v_head_dim"]) // 2)

    def initial(self, config: Config, name: str, weight: Weight) -> Initial | None:
        if name == "model.embed_tokens.weight":
            return Normal(float(config["embedding_initializer_range"]))
        return super().initial(config, name, weight)


family = Youtu()

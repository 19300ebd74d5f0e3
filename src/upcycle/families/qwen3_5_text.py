"""Qwen3.5, text: three layers of gated linear attention for each layer of gated full attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._decoder import Decoder, every_nth_full, sizes
from upcycle.families._further import Further
from upcycle.families._weights import Bias, Matrix, Norm, Scale, Weight, below

_FURTHER = Further()


class Qwen35Text(Decoder):
    model_type = "qwen3_5_text"
    architectures = ("Qwen3_5ForCausalLM",)
    base_class = "Qwen3_5TextModel"
    summary = "Qwen3.5 dense language models (hybrid linear attention)"
    natives = ("qwen3_5_moe_text",)
    further = _FURTHER
    tokenizer = "Qwen3_5Tokenizer"
    reads = Decoder.reads | {"full_attention_interval"}
    assumed = sizes(248_320, 4096, 12288, 32, 16)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "layer_types": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        config["rope_parameters"].setdefault("partial_rotary_factor", 0.25)
        interval = config.pop("full_attention_interval", 4)
        return {**config, "layer_types": every_nth_full(config, interval, "linear_attention")}

    def attention(self, config: Config, layer: int) -> Weights:
        if config["layer_types"][layer] == "linear_attention":
            return _linear_attention(config)
        out = super().attention(config, layer)
        rows, hidden = out["self_attn.q_proj.weight"].shape
        norm = Norm((config["head_dim"],))
        if "self_attn.q_proj.bias" in out:
            out["self_attn.q_proj.bias"] = Bias((2 * rows,))
        return {
            **out,
            "self_attn.q_proj.weight": Matrix((2 * rows, hidden)),  # queries and their output gate
            "self_attn.q_norm.weight": norm,
            "self_attn.k_norm.weight": norm,
        }

    def tidied(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**raw, _FURTHER.counted: 0} if raw.get(_FURTHER.counted) else raw

    def further_weights(self, config: Config, count: int) -> Weights:
        hidden, every = config["hidden_size"], {**config, "layer_types": ["full_attention"] * count}
        out: Weights = {"fc.weight": Matrix((hidden, 2 * hidden))}
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            out |= self.norm(name, hidden)
        for i in range(count):
            block = {**self.attention(every, i), **self.mlp(config)}
            for name in self.norms:
                block |= self.norm(name, hidden)
            out |= below(f"layers.{i}.", block)
        return below(_FURTHER.prefix, out)

    def ignored(self, name: str) -> str | None:
        if _FURTHER.owns(name):
            return "a block that predicts further tokens, which transformers never reads"
        return super().ignored(name)

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        linear = "layers.{i}.linear_attn.out_proj"
        return tuple(replace(stack, heads=(*stack.heads, linear)) for stack in super().stacks(config))


def _linear_attention(config: Config) -> Weights:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    out: Weights = {
        "dt_bias": Weight((heads,)),
        "A_log": Weight((heads,)),
        "conv1d.weight": Matrix((2 * keys + values, 1, config["linear_conv_kernel_dim"])),
        "norm.weight": Scale((config["linear_value_head_dim"],), 1.0),  # not centred
        "out_proj.weight": Matrix((hidden, values)),
        "in_proj_qkv.weight": Matrix((2 * keys + values, hidden)),
        "in_proj_z.weight": Matrix((values, hidden)),
        "in_proj_b.weight": Matrix((heads, hidden)),
        "in_proj_a.weight": Matrix((heads, hidden)),
    }
    return below("linear_attn.", out)


family = Qwen35Text()

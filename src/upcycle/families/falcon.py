"""Falcon: one matrix for queries, keys and values; attention and network in parallel in most sizes."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._rope import rope_parameters
from upcycle.families._weights import Table, linear, norm


class Falcon(PlainDecoder):
    model_type = "falcon"
    borders = False  # its own class of flash attention takes none
    architectures = ("FalconForCausalLM",)
    base_class = "FalconModel"
    summary = "Falcon 1 and 2, Falcon-RW"
    no_native = "no native MoE has its LayerNorms and plain networks"
    root = "transformer."
    tied = ("lm_head.weight", "transformer.word_embeddings.weight")
    before = ("word_embeddings.",)
    after = ("ln_f.",)
    blocks = "h"
    up, down_name = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    attention = "self_attention.dense"
    residual = ("self_attention", "mlp")
    keys = {"intermediate_size": "ffn_hidden_size", "hidden_act": "activation"}
    defaults = {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_ln_in_parallel_attn": None,
        "initializer_range": 0.02,
        "num_kv_heads": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "tie_word_embeddings": True,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        formerly = {"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        given = {now: raw[then] for now, then in formerly.items() if then in raw and now not in raw}
        return super().config({**raw, **given})

    def tells_apart(self, config: Config, length: int) -> str | None:
        # transformers multiplies places in the row by bfloat16 slopes, so that a bias depends on the place.
        if config["alibi"]:
            return "its biases (alibi) are rounded by the place in the row"
        return super().tells_apart(config, length)

    def cached(self, config: Config, layer: int) -> int:
        # Its class copies grouped keys to all heads before it keeps them.
        one = config["multi_query"] and not config["new_decoder_architecture"]
        return int(2 * (1 if one else config["num_attention_heads"]) * config["head_dim"])

    def rotation(self, config: Config) -> Config | None:
        return None if config["alibi"] else rope_parameters(config, 10_000.0)

    def outside(self, config: Config) -> Weights:
        table: Weights = {"word_embeddings.weight": Table((config["vocab_size"], config["hidden_size"]))}
        return table | norm("ln_f", config["hidden_size"])

    def block(self, config: Config) -> Weights:
        hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["bias"]
        heads, head = config["num_attention_heads"], config["head_dim"]
        grouped, two = config["new_decoder_architecture"], config["num_ln_in_parallel_attn"]
        keys = (config["num_kv_heads"] or heads) if grouped else 1 if config["multi_query"] else heads
        out: Weights = {}
        for name in _norms(config["parallel_attn"], (2 if grouped and two is None else two) == 2):
            out |= norm(name, hidden)
        out |= linear("self_attention.query_key_value", (heads + 2 * keys) * head, hidden, bias=bias)
        out |= linear("self_attention.dense", hidden, hidden, bias=bias)
        out |= linear("mlp.dense_h_to_4h", width, hidden, bias=bias)
        return out | linear("mlp.dense_4h_to_h", hidden, width, bias=bias)


def _norms(parallel: bool, two: bool) -> tuple[str, ...]:
    """Return the norms of a block."""
    if not parallel:
        return ("input_layernorm", "post_attention_layernorm")
    return ("ln_attn", "ln_mlp") if two else ("input_layernorm",)


family = Falcon()

"""A family that upcycle does not have, in one file, as a stranger writes it: Persimmon.

Little in it is as in Llama: biased LayerNorms, a plain network of squared ReLU, queries, keys and values in
one matrix, norms inside attention, other names for most of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._training import Trained
from upcycle.families._weights import Matrix, Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class Persimmon(Trained):
    model_type = "persimmon"
    architectures = ("PersimmonForCausalLM",)
    summary = "Persimmon 8B"
    defaults = {"hidden_act": "relu2", "initializer_range": 0.02, "tie_word_embeddings": False}
    before = ("embed_tokens.",)
    after = ("final_layernorm.",)

    def config(self, raw: Mapping[str, Any]) -> Config:
        return {**self.defaults, **raw}

    def weights(self, config: Config) -> Weights:
        h, i, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        head = h // config["num_attention_heads"]
        out: Weights = {"model.embed_tokens.weight": Table((rows, h)), "lm_head.weight": Matrix((rows, h))}
        out |= norm("model.final_layernorm", h)
        for layer in range(config["num_hidden_layers"]):
            block = linear("self_attn.query_key_value", 3 * h, h) | linear("self_attn.dense", h, h)
            block |= norm("self_attn.q_layernorm", head) | norm("self_attn.k_layernorm", head)
            block |= linear("mlp.dense_h_to_4h", i, h) | linear("mlp.dense_4h_to_h", h, i)
            block |= norm("input_layernorm", h) | norm("post_attention_layernorm", h)
            out |= below(f"model.layers.{layer}.", block)
        return out

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["hidden_size"],
                path="model.layers.{i}.mlp",
                owned=("model.layers.{i}.mlp.",),
                module="layers.{i}.mlp",
                down="layers.{i}.mlp.dense_4h_to_h",
                causal=True,
                activation=config["hidden_act"],
            ),
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        up, down = (f"model.layers.{layer}.mlp.dense_{name}." for name in ("h_to_4h", "4h_to_h"))
        return FeedForward(
            up=tensors[up + "weight"],
            up_bias=tensors[up + "bias"],
            down=tensors[down + "weight"],
            down_bias=tensors[down + "bias"],
        )


family = Persimmon()

"""A family that upcycle does not have, in one file, as a stranger writes it: GPT-NeoX (Pythia).

Nothing in it is as in the families that are there: parallel residuals, biased LayerNorms, a plain network,
queries, keys and values in one matrix, other names for everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._training import Trained
from upcycle.families._weights import Matrix, Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class GPTNeoX(Trained):
    model_type = "gpt_neox"
    architectures = ("GPTNeoXForCausalLM",)
    summary = "GPT-NeoX, Pythia"
    defaults = {"hidden_act": "gelu", "initializer_range": 0.02, "tie_word_embeddings": False}
    before = ("embed_in.",)
    after = ("final_layer_norm.",)

    def config(self, raw: Mapping[str, Any]) -> Config:
        return {**self.defaults, **raw}

    def weights(self, config: Config) -> Weights:
        h, i, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        out: Weights = {"gpt_neox.embed_in.weight": Table((rows, h)), "embed_out.weight": Matrix((rows, h))}
        out |= norm("gpt_neox.final_layer_norm", h)
        for layer in range(config["num_hidden_layers"]):
            block = linear("attention.query_key_value", 3 * h, h) | linear("attention.dense", h, h)
            block |= linear("mlp.dense_h_to_4h", i, h) | linear("mlp.dense_4h_to_h", h, i)
            block |= norm("input_layernorm", h) | norm("post_attention_layernorm", h)
            out |= below(f"gpt_neox.layers.{layer}.", block)
        return out

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["hidden_size"],
                path="gpt_neox.layers.{i}.mlp",
                owned=("gpt_neox.layers.{i}.mlp.",),
                module="layers.{i}.mlp",
                down="layers.{i}.mlp.dense_4h_to_h",
                causal=True,
                activation=config["hidden_act"],
            ),
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        up, down = (f"gpt_neox.layers.{layer}.mlp.dense_{name}." for name in ("h_to_4h", "4h_to_h"))
        return FeedForward(
            up=tensors[up + "weight"],
            up_bias=tensors[up + "bias"],
            down=tensors[down + "weight"],
            down_bias=tensors[down + "bias"],
        )


family = GPTNeoX()

"""Nomic BERT: rotary positions, post-norm blocks, gated networks; queries, keys and values stored as one."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._rope import rope_parameters
from upcycle.families._stacks import only_stack
from upcycle.families._weights import Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class NomicBert(Encoder):
    model_type = "nomic_bert"
    architectures = ("NomicBertModel",)
    prefix = "nomic_bert"
    over_classes = "classifier"
    summary = "nomic-embed-text v1 and v1.5"
    before = ("embeddings.",)
    after = ("pooler.",)
    sizes = (*Encoder.sizes, "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size")
    heads = (*Encoder.heads, "cls.")
    modules = {
        "layers.": "encoder.layers.",
        ".self_attn.o_proj": ".attn.out_proj",
        ".up_proj": ".fc11",
        ".gate_proj": ".fc12",
        ".down_proj": ".fc2",
    }
    defaults = {
        "vocab_size": 30528,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "head_dim": None,
        "tie_word_embeddings": True,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        # Configs of the hub also hold the keys of the code that came with it, which names the gate: swiglu.
        return super().config({key: value for key, value in raw.items() if key != "activation_function"})

    def finish(self, config: Config) -> Config:
        given = config["head_dim"]
        return super().finish(config) | ({"head_dim": given} if given else {})

    def rotation(self, config: Config) -> Config:
        return rope_parameters(config, 1000.0)

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        inner = config["num_attention_heads"] * config["head_dim"]
        out: Weights = {
            "embeddings.word_embeddings.weight": Table((config["vocab_size"], hidden)),
            "embeddings.token_type_embeddings.weight": Table((config["type_vocab_size"], hidden)),
        }
        out |= norm("emb_ln", hidden)
        for i in range(config["num_hidden_layers"]):
            block = linear("attn.Wqkv", 3 * inner, hidden, bias=False)
            block |= linear("attn.out_proj", hidden, inner, bias=False)
            block |= norm("norm1", hidden) | norm("norm2", hidden)
            for name in ("fc11", "fc12"):
                block |= linear(f"mlp.{name}", width, hidden, bias=False)
            block |= linear("mlp.fc2", hidden, width, bias=False)
            out |= below(f"encoder.layers.{i}.", block)
        return out

    def head(self, config: Config) -> Weights:
        return {}

    def unlisted(self, config: Config, name: str) -> bool:
        """Return whether a stored tensor is of an unlisted head; the one over classes has a pooler."""
        pools = config["architectures"][0].endswith("ForSequenceClassification")
        return super().unlisted(config, name) or (pools and name.startswith(f"{self.prefix}.pooler."))

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return only_stack(
            config,
            base=self.base(config) + "encoder.",
            block="layers.{i}.",
            network="mlp",
            down="mlp.down_proj",
            attention="self_attn.o_proj",
            norm="norm1",
            causal=False,
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network = f"{self.base(config)}encoder.layers.{layer}.mlp."
        parts = {"gate": "fc12", "up": "fc11", "down": "fc2"}
        return FeedForward(**{part: tensors[f"{network}{name}.weight"] for part, name in parts.items()})


family = NomicBert()

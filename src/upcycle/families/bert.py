"""BERT: the post-norm encoder of BERT itself, MiniLM and most sentence embeddings."""

from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder, num_labels
from upcycle.families._weights import Bias, Table, linear, norm, row_linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

_LANGUAGE = ("BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining")
_DECODER = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_POOLED = ("BertModel", "BertForPreTraining", "BertForSequenceClassification")


class Bert(Encoder):
    model_type = "bert"
    heads: ClassVar[tuple[str, ...]] = ("pooler.", "classifier.", "qa_outputs.", "cls.")
    pooler = "pooler."
    norm_before = "attention.output.LayerNorm"  # the norm that the network reads, by its name in a block
    attention_end = "attention.output.dense"  # the matrix that ends attention
    architectures: tuple[str, ...] = (
        "BertModel", "BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining",
        "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering",
    )  # fmt: skip
    prefix: ClassVar[str] = "bert"
    summary = "BERT, MiniLM, sentence embeddings"
    sizes: ClassVar[tuple[str, ...]] = (
        *Encoder.sizes,
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
    )
    defaults: Mapping[str, Any] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "is_decoder": False,
        "tie_word_embeddings": True,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        if raw.get("is_decoder") or raw.get("add_cross_attention"):
            raise UpcycleError("this bert checkpoint is a decoder (is_decoder); upcycle takes the encoder")
        if raw.get("chunk_size_feed_forward"):
            raise UpcycleError(
                "config.json: chunk_size_feed_forward cuts rows that routers want whole; set it to 0"
            )
        return super().config(raw)

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        tables = {
            "word": config["vocab_size"],
            "position": config["max_position_embeddings"],
            "token_type": config["type_vocab_size"],
        }
        out: Weights = {
            f"embeddings.{n}_embeddings.weight": Table((rows, hidden)) for n, rows in tables.items()
        }
        out |= norm("embeddings.LayerNorm", hidden)
        for i in range(config["num_hidden_layers"]):
            block = f"encoder.layer.{i}."
            for part in ("query", "key", "value"):
                out |= linear(f"{block}attention.self.{part}", hidden, hidden)
            out |= linear(f"{block}attention.output.dense", hidden, hidden)
            out |= norm(f"{block}attention.output.LayerNorm", hidden)
            out |= linear(f"{block}intermediate.dense", width, hidden)
            out |= linear(f"{block}output.dense", hidden, width) | norm(f"{block}output.LayerNorm", hidden)
        return out

    def head(self, config: Config) -> Weights:
        name, hidden = config["architectures"][0], config["hidden_size"]
        out: Weights = (
            row_linear(f"{self.base(config)}pooler.dense", hidden, hidden) if name in _POOLED else {}
        )
        if name in _LANGUAGE:
            out |= {"cls.predictions.bias": Bias((config["vocab_size"],))}
            out |= linear("cls.predictions.transform.dense", hidden, hidden)
            out |= norm("cls.predictions.transform.LayerNorm", hidden)
            if not config["tie_word_embeddings"]:
                out |= linear("cls.predictions.decoder", config["vocab_size"], hidden)
        if name == "BertForPreTraining":
            out |= row_linear("cls.seq_relationship", 2, hidden)
        if name == "BertForSequenceClassification":
            out |= row_linear("classifier", num_labels(config), hidden)
        if name == "BertForTokenClassification":
            out |= linear("classifier", num_labels(config), hidden)
        if name == "BertForQuestionAnswering":
            out |= linear("qa_outputs", num_labels(config), hidden)
        return out

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        block = self.base(config) + "encoder.layer.{i}."
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["num_attention_heads"] * config["head_dim"],
                path=block + "intermediate",
                owned=(block + "intermediate.", block + "output.dense."),
                module="encoder.layer.{i}.intermediate",
                replaced=("encoder.layer.{i}.output.dense",),
                norm_path=block + self.norm_before,
                down="encoder.layer.{i}.output.dense",
                heads=("encoder.layer.{i}." + self.attention_end,),
                causal=False,
                activation=config["hidden_act"],
            ),
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        block = f"{self.base(config)}encoder.layer.{layer}."
        return FeedForward(
            up=tensors[block + "intermediate.dense.weight"],
            up_bias=tensors[block + "intermediate.dense.bias"],
            down=tensors[block + "output.dense.weight"],
            down_bias=tensors[block + "output.dense.bias"],
        )

    def twins(self, config: Config) -> Mapping[str, str]:
        if config["architectures"][0] not in _LANGUAGE or not config["tie_word_embeddings"]:
            return {}
        table = f"{self.base(config)}embeddings.word_embeddings.weight"
        return dict(zip(_DECODER, (table, "cls.predictions.bias"), strict=True))

    def ignored(self, name: str) -> str | None:
        if name.endswith("embeddings.position_ids"):
            return "a buffer that transformers counts out"
        if name in _DECODER:
            return "tied to the word embeddings and to cls.predictions.bias"
        return super().ignored(name)


family = Bert()

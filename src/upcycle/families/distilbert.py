"""DistilBERT: half the layers of BERT, without token types."""

from collections.abc import Mapping

from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._stacks import only_stack
from upcycle.families._weights import Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class DistilBert(Encoder):
    model_type = "distilbert"
    architectures = ("DistilBertModel",)
    prefix = "distilbert"
    over_classes = "classifier"
    summary = "DistilBERT"
    counts = ("n_layers",)
    sizes = ("dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "max_position_embeddings")
    heads = (*Encoder.heads, "vocab_", "pre_classifier.")
    defaults = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "n_layers": 6,
        "n_heads": 12,
        "dim": 768,
        "hidden_dim": 3072,
        "activation": "gelu",
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }

    def finish(self, config: Config) -> Config:
        return super().finish(
            config
            | {
                "hidden_size": config["dim"],
                "intermediate_size": config["hidden_dim"],
                "num_hidden_layers": config["n_layers"],
                "num_attention_heads": config["n_heads"],
                "hidden_act": config["activation"],
            }
        )

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        tables = {"word": config["vocab_size"], "position": config["max_position_embeddings"]}
        out: Weights = {
            f"embeddings.{n}_embeddings.weight": Table((rows, hidden)) for n, rows in tables.items()
        }
        out |= norm("embeddings.LayerNorm", hidden)
        for i in range(config["num_hidden_layers"]):
            block = norm("sa_layer_norm", hidden) | norm("output_layer_norm", hidden)
            for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
                block |= linear(f"attention.{part}", hidden, hidden)
            block |= linear("ffn.lin1", width, hidden) | linear("ffn.lin2", hidden, width)
            out |= below(f"transformer.layer.{i}.", block)
        return out

    def head(self, config: Config) -> Weights:
        return {}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return only_stack(
            config,
            base=self.base(config),
            block="transformer.layer.{i}.",
            network="ffn",
            down="ffn.lin2",
            attention="attention.out_lin",
            norm="sa_layer_norm",
            causal=False,
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network = f"{self.base(config)}transformer.layer.{layer}.ffn."
        return FeedForward(
            up=tensors[network + "lin1.weight"],
            up_bias=tensors[network + "lin1.bias"],
            down=tensors[network + "lin2.weight"],
            down_bias=tensors[network + "lin2.bias"],
        )


family = DistilBert()

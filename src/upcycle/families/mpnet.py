"""MPNet: BERT with relative positions; all-mpnet-base-v2."""

from upcycle.families import Config, Weights
from upcycle.families._weights import Table, below, linear, norm, row_linear
from upcycle.families.bert import Bert


class MPNet(Bert):
    model_type = "mpnet"
    architectures = ("MPNetModel",)
    prefix = "mpnet"
    over_classes = "classifier.out_proj"
    summary = "MPNet, all-mpnet-base-v2"
    heads = (*Bert.heads, "lm_head.")
    norm_before = "attention.LayerNorm"
    attention_end = "attention.attn.o"
    sizes = tuple(size for size in Bert.sizes if size != "type_vocab_size")
    defaults = {
        **{
            key: value for key, value in Bert.defaults.items() if key not in ("type_vocab_size", "is_decoder")
        },
        "vocab_size": 30527,
        "relative_attention_num_buckets": 32,
        "pad_token_id": 1,
    }

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        out: Weights = {"embeddings.word_embeddings.weight": Table((config["vocab_size"], hidden))}
        positions = (config["max_position_embeddings"], hidden)
        out |= {"embeddings.position_embeddings.weight": Table(positions)} | norm(
            "embeddings.LayerNorm", hidden
        )
        buckets = (config["relative_attention_num_buckets"], config["num_attention_heads"])
        out["encoder.relative_attention_bias.weight"] = Table(buckets)
        for i in range(config["num_hidden_layers"]):
            block = norm("attention.LayerNorm", hidden) | norm("output.LayerNorm", hidden)
            for part in "qkvo":
                block |= linear(f"attention.attn.{part}", hidden, hidden)
            block |= linear("intermediate.dense", width, hidden) | linear("output.dense", hidden, width)
            out |= below(f"encoder.layer.{i}.", block)
        return out

    def head(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        return row_linear("pooler.dense", hidden, hidden)

    def length(self, config: Config) -> int:
        """Return the number of tokens of a row; positions begin behind the padding token."""
        padding = config["pad_token_id"]
        return super().length(config) - (padding if type(padding) is int and padding > 0 else 0) - 1


family = MPNet()

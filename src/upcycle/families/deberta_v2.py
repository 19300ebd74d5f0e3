"""DeBERTa v2 and v3, mDeBERTa: BERT with relative positions in every layer."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._weights import Table, below, linear, norm
from upcycle.families.bert import Bert

_OWN = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}  # by the kind of attention that they are for


class DebertaV2(Bert):
    model_type = "deberta-v2"
    architectures = ("DebertaV2Model",)
    prefix = "deberta"
    over_classes = "classifier"
    summary = "DeBERTa v2 and v3, mDeBERTa"
    pooler = ""
    heads = (*Bert.heads, "lm_predictions.", "mask_predictions.")
    defaults = {
        **{key: value for key, value in Bert.defaults.items() if key != "is_decoder"},
        "vocab_size": 128100,
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "type_vocab_size": 0,
        "relative_attention": False,
        "max_relative_positions": -1,
        "position_biased_input": True,
        "pos_att_type": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        # A type_vocab_size of 0, which is the default, means that there are no types.
        return super().config({k: v for k, v in raw.items() if (k, v) != ("type_vocab_size", 0)})

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        word = config.get("embedding_size") or hidden
        rows = {"word": config["vocab_size"], "token_type": config["type_vocab_size"]}
        rows["position"] = config["max_position_embeddings"] if config["position_biased_input"] else 0
        out: Weights = {f"embeddings.{n}_embeddings.weight": Table((r, word)) for n, r in rows.items() if r}
        out |= norm("embeddings.LayerNorm", hidden) | _positions(config)
        out |= linear("embeddings.embed_proj", hidden, word, bias=False) if word != hidden else {}
        heads = config["num_attention_heads"] * config.get("attention_head_size", config["head_dim"])
        block = norm("attention.output.LayerNorm", hidden) | norm("output.LayerNorm", hidden)
        for part in ("query_proj", "key_proj", "value_proj", *_own_positions(config)):
            block |= linear(f"attention.self.{part}", heads, hidden)
        block |= linear("attention.output.dense", hidden, heads)
        block |= linear("intermediate.dense", width, hidden) | linear("output.dense", hidden, width)
        for i in range(config["num_hidden_layers"]):
            out |= below(f"encoder.layer.{i}.", block)
        return out

    def head(self, config: Config) -> Weights:
        return {}

    def relative(self, config: Config) -> int:
        return 2 * _span(config) * len(_kinds(config)) if config["relative_attention"] else 0


def _positions(config: Config) -> Weights:
    """Return the tensors of the encoder outside its blocks."""
    out: Weights = {}
    hidden = config["hidden_size"]
    if config["relative_attention"]:
        out["encoder.rel_embeddings.weight"] = Table((2 * _span(config), hidden))
    out |= norm("encoder.LayerNorm", hidden) if "layer_norm" in config.get("norm_rel_ebd", "none") else {}
    if (kernel := config.get("conv_kernel_size", 0)) > 0:
        out |= linear("encoder.conv.conv", hidden, hidden) | norm("encoder.conv.LayerNorm", hidden)
        size = (hidden, hidden // config.get("conv_groups", 1), kernel)
        out["encoder.conv.conv.weight"] = Table(size)
    return out


def _span(config: Config) -> int:
    """Return the number of relative positions on either side of a token."""
    buckets, most = config.get("position_buckets", -1), config["max_relative_positions"]
    return int(buckets if buckets > 0 else most if most >= 1 else config["max_position_embeddings"])


def _own_positions(config: Config) -> list[str]:
    """Return the projections of relative positions that a block has, besides those of its tokens."""
    if not config["relative_attention"] or config.get("share_att_key", False):
        return []
    return [_OWN[kind] for kind in _kinds(config)]


def _kinds(config: Config) -> list[str]:
    """Return which of tokens and relative positions are scored against each other; text has `|` between."""
    return [kind for kind in _OWN if kind in (config["pos_att_type"] or [])]


family = DebertaV2()

"""RoBERTa: BERT with another head, and positions that begin behind the padding token."""

from collections.abc import Mapping

from upcycle.families import Config, Weights
from upcycle.families._weights import Bias, linear, norm, row_linear
from upcycle.families.bert import Bert

_DECODER = ("lm_head.decoder.weight", "lm_head.decoder.bias")


class Roberta(Bert):
    model_type = "roberta"
    architectures: tuple[str, ...] = ("RobertaModel", "RobertaForMaskedLM")
    prefix = "roberta"
    over_classes = "classifier.out_proj"
    summary = "RoBERTa, CodeBERT, sentence embeddings"
    heads = (*Bert.heads, "lm_head.")
    defaults = {**Bert.defaults, "vocab_size": 50265, "pad_token_id": 1}

    def head(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        if not self.base(config):
            return row_linear("pooler.dense", hidden, hidden)
        out: Weights = {"lm_head.bias": Bias((config["vocab_size"],))}
        out |= linear("lm_head.dense", hidden, hidden) | norm("lm_head.layer_norm", hidden)
        if not config["tie_word_embeddings"]:
            out |= linear("lm_head.decoder", config["vocab_size"], hidden)
        return out

    def unlisted(self, config: Config, name: str) -> bool:
        """Return whether a stored tensor is of the head of such a class; only one of them has a pooler."""
        chooses = config["architectures"][0].endswith("ForMultipleChoice")
        return super().unlisted(config, name) and (chooses or ".pooler." not in name)

    def twins(self, config: Config) -> Mapping[str, str]:
        if not self.base(config) or not config["tie_word_embeddings"]:
            return {}
        table = f"{self.prefix}.embeddings.word_embeddings.weight"
        return dict(zip(_DECODER, (table, "lm_head.bias"), strict=True))

    def ignored(self, name: str) -> str | None:
        if name in _DECODER:
            return "tied to the word embeddings and to lm_head.bias"
        return super().ignored(name)

    def length(self, config: Config) -> int:
        """Return the number of tokens of a row; positions begin behind the padding token."""
        padding = config["pad_token_id"]
        return super().length(config) - (padding if type(padding) is int and padding > 0 else 0) - 1


family = Roberta()

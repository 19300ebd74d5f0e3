"""ELECTRA: BERT with smaller embeddings that are projected, and other heads."""

from upcycle.families import Config, Weights
from upcycle.families._weights import Table, below, linear, norm
from upcycle.families.bert import Bert


class Electra(Bert):
    model_type = "electra"
    architectures = ("ElectraModel",)
    prefix = "electra"
    pooler = ""
    over_classes = "classifier.out_proj"
    summary = "ELECTRA"
    heads = (*Bert.heads, "discriminator_predictions.", "generator_predictions.", "generator_lm_head.")
    defaults = {
        **Bert.defaults,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }

    def body(self, config: Config) -> Weights:
        narrow, out = config["embedding_size"], super().body(config)
        if narrow == config["hidden_size"]:
            return out
        tables = {n: Table((w.shape[0], narrow)) for n, w in out.items() if n.endswith("embeddings.weight")}
        projected = below("", linear("embeddings_project", config["hidden_size"], narrow))
        return out | tables | norm("embeddings.LayerNorm", narrow) | projected

    def head(self, config: Config) -> Weights:
        return {}


family = Electra()

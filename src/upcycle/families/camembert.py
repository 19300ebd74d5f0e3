"""CamemBERT: RoBERTa in French."""

from upcycle.families.roberta import Roberta


class CamemBERT(Roberta):
    model_type = "camembert"
    architectures = ("CamembertModel", "CamembertForMaskedLM")
    summary = "CamemBERT"
    defaults = {**Roberta.defaults, "vocab_size": 30522}


family = CamemBERT()

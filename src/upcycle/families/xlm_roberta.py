"""XLM-RoBERTa: RoBERTa in many languages; bge-m3, multilingual-e5."""

from upcycle.families.roberta import Roberta


class XLMRoberta(Roberta):
    model_type = "xlm-roberta"
    architectures = ("XLMRobertaModel", "XLMRobertaForMaskedLM")
    summary = "XLM-RoBERTa, bge-m3, multilingual-e5"
    defaults = {**Roberta.defaults, "vocab_size": 30522}


family = XLMRoberta()

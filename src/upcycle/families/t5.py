"""T5 and T5 1.1, Flan-T5: the encoder-decoder of Sparse Upcycling."""

from upcycle.families._t5 import EncoderDecoder


class T5(EncoderDecoder):
    model_type = "t5"
    architectures = ("T5ForConditionalGeneration", "T5Model", "T5EncoderModel")
    renamed = {"T5WithLMHeadModel": "T5ForConditionalGeneration"}
    summary = "T5, T5 1.1, Flan-T5"


family = T5()

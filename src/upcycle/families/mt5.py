"""mT5: T5 1.1 trained on many languages."""

from upcycle.families._t5 import EncoderDecoder


class MT5(EncoderDecoder):
    model_type = "mt5"
    architectures = ("MT5ForConditionalGeneration", "MT5Model", "MT5EncoderModel")
    summary = "multilingual T5 1.1"
    defaults = {
        **EncoderDecoder.defaults,
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }


family = MT5()

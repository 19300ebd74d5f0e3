"""What Gemma's text models have in common."""

from upcycle.families._decoder import Decoder

# Part of the defaults of config.json, between those that differ from one version to another.
DEFAULTS = {
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
}


class FourNorms(Decoder):
    """A decoder with norms before and after attention and the network, as Gemma has since version 2."""

    natives = ()
    norms = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )  # fmt: skip
    network_norm = "pre_feedforward_layernorm"
    residual: tuple[str, ...] = ("post_attention_layernorm", "post_feedforward_layernorm")

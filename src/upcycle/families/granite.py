"""Granite: Llama with multipliers on embeddings, attention, residuals and logits."""

from upcycle.families._decoder import Decoder, sizes


class Granite(Decoder):
    model_type = "granite"
    architectures = ("GraniteForCausalLM",)
    summary = "IBM Granite 3 dense"
    natives = ("granitemoe",)
    tokenizer = "TokenizersBackend"
    assumed = sizes(32_000, 4096, 11008, 32, 32)
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_key_value_heads": None,
    }


family = Granite()

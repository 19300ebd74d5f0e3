"""GPT-NeoX: Pythia, Dolly; parallel residuals, biased LayerNorms, one matrix for queries, keys, values."""

from upcycle.families import Config, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._rope import rope_parameters
from upcycle.families._weights import Table, linear, norm


class GPTNeoX(PlainDecoder):
    model_type = "gpt_neox"
    architectures = ("GPTNeoXForCausalLM",)
    base_class = "GPTNeoXModel"
    summary = "GPT-NeoX, Pythia, Dolly"
    root = "gpt_neox."
    modules = {".lm_head": ".embed_out"}
    tied = ("embed_out.weight", "gpt_neox.embed_in.weight")
    before = ("embed_in.",)
    after = ("final_layer_norm.",)
    blocks = "layers"
    up, down_name = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    attention = "attention.dense"
    residual = ("attention", "mlp")
    defaults = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }

    def rotation(self, config: Config) -> Config:
        theta, share = config.get("rotary_emb_base"), config.get("rotary_pct", 0.25)
        return rope_parameters({"rope_theta": theta, "partial_rotary_factor": share, **config}, 10_000.0)

    def outside(self, config: Config) -> Weights:
        table: Weights = {"embed_in.weight": Table((config["vocab_size"], config["hidden_size"]))}
        return table | norm("final_layer_norm", config["hidden_size"])

    def block(self, config: Config) -> Weights:
        hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["attention_bias"]
        out = norm("input_layernorm", hidden) | norm("post_attention_layernorm", hidden)
        out |= linear("attention.query_key_value", 3 * hidden, hidden, bias=bias)
        out |= linear("attention.dense", hidden, hidden, bias=bias)
        return out | linear("mlp.dense_h_to_4h", width, hidden) | linear("mlp.dense_4h_to_h", hidden, width)

    def ignored(self, name: str) -> str | None:
        if name.endswith((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")):
            return "a mask or a buffer that transformers makes itself"
        return super().ignored(name)


family = GPTNeoX()

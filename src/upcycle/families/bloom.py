"""BLOOM: alibi, a norm behind the embeddings, networks that add the residual stream themselves."""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._weights import Table, linear, norm


class Bloom(PlainDecoder):
    model_type = "bloom"
    architectures = ("BloomForCausalLM",)
    base_class = "BloomModel"
    summary = "BLOOM, BLOOMZ"
    root = "transformer."
    tied = ("lm_head.weight", "transformer.word_embeddings.weight")
    before = ("word_embeddings.", "word_embeddings_layernorm.")
    after = ("ln_f.",)
    blocks = "h"
    up, down_name = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    # The network itself stays, because it adds the residual stream; its two matrices become the experts.
    module = "mlp.dense_h_to_4h"
    replaced = ("mlp.gelu_impl", "mlp.dense_4h_to_h")
    attention = "self_attention.dense"
    counts = ("n_layer", "num_hidden_layers")
    keys = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    reads = frozenset({"n_embed", "num_attention_heads", "num_hidden_layers"})
    defaults = {
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        if raw.get("slow_but_exact") and raw.get("pretraining_tp", 1) > 1:
            raise UpcycleError(
                "config.json: slow_but_exact = true cuts a network's last matrix into pretraining_tp pieces, "
                "which experts do not; set it to false, which computes the same but for rounding"
            )
        formerly = {"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        given = {now: raw[other] for now, other in formerly.items() if other in raw}
        kept = {key: value for key, value in raw.items() if key != "intermediate_size"}  # 4 x hidden_size
        fixed = {
            "hidden_act": "gelu_fast",  # the formula of its class
            "max_position_embeddings": 2048,  # that it was trained on; its class has no limit
        }
        return super().config({**kept, **given, **fixed})

    def tells_apart(self, config: Config, length: int) -> str | None:
        return "its biases (alibi) are rounded by the place in the row"

    def outside(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        table: Weights = {"word_embeddings.weight": Table((config["vocab_size"], hidden))}
        return table | norm("word_embeddings_layernorm", hidden) | norm("ln_f", hidden)

    def block(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        out = norm("input_layernorm", hidden) | norm("post_attention_layernorm", hidden)
        out |= linear("self_attention.query_key_value", 3 * hidden, hidden)
        out |= linear("self_attention.dense", hidden, hidden)
        out |= linear("mlp.dense_h_to_4h", 4 * hidden, hidden)
        return out | linear("mlp.dense_4h_to_h", hidden, 4 * hidden)


family = Bloom()

"""Gemma 4, the text model: embeddings for each layer, shared keys and values, heads of two sizes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._decoder import Decoder, every_nth_full, sizes
from upcycle.families._gemma import DEFAULTS, FourNorms
from upcycle.families._weights import Matrix, Norm, Scale, Table, linear

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0
    },
}  # fmt: skip


class Gemma4(FourNorms):
    model_type = "gemma4_text"
    architectures = ("Gemma4ForCausalLM",)
    base_class = "Gemma4TextModel"
    summary = "Gemma 4, text"
    no_native = (
        "the experts of its own class stand beside the network, and what both give is normalised once more, "
        "with an epsilon of its own"
    )
    residual = (*FourNorms.residual, "post_per_layer_input_norm")
    theta = 10_000.0
    before = ("embed_tokens.", "embed_tokens_per_layer.", "per_layer_")
    assumed = sizes(262_144, 2304, 9216, 30, 8)
    reads = Decoder.reads | {
        "global_head_dim",
        "num_global_key_value_heads",
        "per_layer_config",
    }
    defaults = {
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        **DEFAULTS,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        if raw.get("enable_moe_block"):
            raise UpcycleError(
                "config.json of a gemma4_text model: enable_moe_block = true, so it is a Mixture of Experts "
                "already; give a dense one"
            )
        # Rotary settings are a table for each kind of layer, which a plain decoder does not have.
        rope, given = raw.get("rope_parameters") or _ROPE, dict(raw)
        config = super().config({key: value for key, value in given.items() if key != "rope_parameters"})
        config["layer_types"] = every_nth_full(config, 6)
        config["layer_types"][-1] = "full_attention"  # as its class has it
        config["hidden_act"] = config["hidden_activation"]
        if not 0 <= config["num_kv_shared_layers"] < config["num_hidden_layers"]:
            raise UpcycleError(
                f"config.json of a gemma4_text model: num_kv_shared_layers = "
                f"{config['num_kv_shared_layers']}; some of its {config['num_hidden_layers']} layers must "
                f"have keys and values of their own"
            )
        return config | {"rope_parameters": {"rope_type": "default", "rope_theta": self.theta, **rope}}

    def compared(self, config: Config) -> Config:
        heads = [list(self.heads(config, layer)) for layer in range(config["num_hidden_layers"])]
        return super().compared(config) | {"per_layer_config": heads}

    def first_shared(self, config: Config) -> int:
        """Return the first layer that has no keys and values of its own."""
        return int(config["num_hidden_layers"] - config["num_kv_shared_layers"])

    def weights(self, config: Config) -> Weights:
        out, hidden = super().weights(config), config["hidden_size"]
        own, layers = config["hidden_size_per_layer_input"], config["num_hidden_layers"]
        for i in range(layers):
            layer = f"model.layers.{i}."
            out[f"{layer}layer_scalar"] = Scale((1,), 1.0)
            out |= self._network(config, i)
            if own:
                out |= linear(f"{layer}per_layer_input_gate", own, hidden, bias=False)
                out |= linear(f"{layer}per_layer_projection", hidden, own, bias=False)
                out[f"{layer}post_per_layer_input_norm.weight"] = Norm((hidden,))
        if own:
            table = (config["vocab_size_per_layer_input"], layers * own)
            out["model.embed_tokens_per_layer.weight"] = Table(table)
            out |= linear("model.per_layer_model_projection", layers * own, hidden, bias=False)
            out["model.per_layer_projection_norm.weight"] = Norm((own,))
        return out

    def mlp(self, config: Config) -> Weights:
        return {}  # their widths differ by layer

    def _network(self, config: Config, layer: int) -> Weights:
        hidden, width = config["hidden_size"], self.widths(config)[layer >= self.first_shared(config)]
        out: Weights = {f"model.layers.{layer}.mlp.down_proj.weight": Matrix((hidden, width))}
        for name in ("gate_proj", "up_proj"):
            out[f"model.layers.{layer}.mlp.{name}.weight"] = Matrix((width, hidden))
        return out

    def widths(self, config: Config) -> tuple[int, int]:
        """Return the neurons of networks in layers with keys of their own, and in the others."""
        width = int(config["intermediate_size"])
        return width, 2 * width if config["use_double_wide_mlp"] else width

    def attention(self, config: Config, layer: int) -> Weights:
        hidden, bias = config["hidden_size"], config["attention_bias"]
        full = config["layer_types"][layer] == "full_attention"
        head, keys = self.heads(config, layer)
        queries = config["num_attention_heads"] * head
        out = linear("self_attn.q_proj", queries, hidden, bias=bias)
        out |= linear("self_attn.o_proj", hidden, queries, bias=bias)
        out["self_attn.q_norm.weight"] = Norm((head,))
        if layer < self.first_shared(config):
            out["self_attn.k_norm.weight"] = Norm((head,))
            for name in ("k_proj",) if full and config["attention_k_eq_v"] else ("k_proj", "v_proj"):
                out |= linear(f"self_attn.{name}", keys * head, hidden, bias=bias)
        return out

    def heads(self, config: Config, layer: int) -> tuple[int, int]:
        """Return the size of a layer's heads, and how many of them are keys.

        transformers writes what is special of a layer as `per_layer_config`; configs of the hub have sizes
        for all layers of full attention.
        """
        own, head, keys = config.get("per_layer_config"), config["head_dim"], config["num_key_value_heads"]
        if isinstance(own, Mapping):
            mine = own.get(str(layer)) or {}
            return int(mine.get("head_dim") or head), int(mine.get("num_key_value_heads") or keys)
        if config["layer_types"][layer] != "full_attention":
            return head, keys
        other = config.get("num_global_key_value_heads") if config["attention_k_eq_v"] else None
        return config.get("global_head_dim") or 512, other or keys

    def scored(self, config: Config, stack: Stack, layer: int) -> int:
        head, _ = self.heads(config, layer)
        return stack.attention and int(config["num_attention_heads"] * head)

    def cached(self, config: Config, layer: int) -> int:
        head, keys = self.heads(config, layer)
        return 2 * keys * head if layer < self.first_shared(config) else 0

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        """Return one stack, or two if the layers that share keys and values have wider networks."""
        (stack,) = super().stacks(config)
        narrow, wide = self.widths(config)
        if narrow == wide or (first := self.first_shared(config)) == stack.count:
            return (stack,)
        total = stack.count
        return (
            replace(stack, having=tuple(range(first)), total=total),
            # The first stack counts the attention of all blocks.
            replace(
                stack,
                name="wide",
                width=wide,
                attention=0,
                having=tuple(range(first, total)),
                first=first,
                total=total,
            ),
        )

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        if config["hidden_size_per_layer_input"] or config["num_kv_shared_layers"]:
            raise UpcycleError(
                "a gemma4_text has a part of one embedding for each layer, or layers that take the keys and "
                "values of others, so its blocks cannot be repeated; give another moe.target"
            )
        out, own = super().repeated(config, raw, times), raw.get("per_layer_config")
        if not isinstance(own, Mapping):
            return out
        layers = {int(i) * times + n: special for i, special in own.items() for n in range(times)}
        return out | {"per_layer_config": {str(i): special for i, special in layers.items()}}

    def ignored(self, name: str) -> str | None:
        if ".self_attn.v_norm." in name or ".self_attn.k_" in name or ".self_attn.v_proj" in name:
            return "of a layer that takes the keys and values of another, or never read by transformers"
        return super().ignored(name)


family = Gemma4()

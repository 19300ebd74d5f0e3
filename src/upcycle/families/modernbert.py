"""ModernBERT: rotary positions, windows, gated networks whose two first matrices are one."""

import math
from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._stacks import only_stack
from upcycle.families._weights import Initial, Norm, Normal, Table, Weight, below, linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Slice


class ModernBert(Encoder):
    model_type = "modernbert"
    architectures = ("ModernBertModel",)
    prefix = "model"
    over_classes = "classifier"
    summary = "ModernBERT and embedding models made of it"
    after = ("final_norm.",)
    per_block = ("layer_types",)
    sizes = (*Encoder.sizes, "intermediate_size", "vocab_size")
    heads = (*Encoder.heads, "head.", "decoder.")
    defaults = {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }

    def finish(self, config: Config) -> Config:
        self.check_lengths(config)
        act = config["hidden_activation"] or "gelu"
        return super().finish({**config, "hidden_act": act})

    def rotation(self, config: Config) -> Config:
        whole, near = config.get("global_rope_theta", 160_000.0), config.get("local_rope_theta", 10_000.0)
        rope = config.get("rope_parameters") or {}
        return {
            kind: {"rope_type": "default", "rope_theta": theta, **rope.get(kind, {})}
            for kind, theta in {"full_attention": whole, "sliding_attention": near}.items()
        }

    def _norm(self, config: Config, name: str) -> Weights:
        size = (config["hidden_size"],)
        bias: Weights = {f"{name}.bias": Weight(size)} if config["norm_bias"] else {}
        return {f"{name}.weight": Norm(size), **bias}

    def body(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        out: Weights = {"embeddings.tok_embeddings.weight": Table((config["vocab_size"], hidden))}
        out |= self._norm(config, "embeddings.norm")
        for i in range(config["num_hidden_layers"]):
            block = self._norm(config, "attn_norm") if i else {}
            block |= linear("attn.Wqkv", 3 * hidden, hidden, bias=config["attention_bias"])
            block |= linear("attn.Wo", hidden, hidden, bias=config["attention_bias"])
            block |= self._norm(config, "mlp_norm")
            block |= linear("mlp.Wi", 2 * width, hidden, bias=config["mlp_bias"])
            block |= linear("mlp.Wo", hidden, width, bias=config["mlp_bias"])
            out |= below(f"layers.{i}.", block)
        return out | self._norm(config, "final_norm")

    def initial(self, config: Config, name: str, weight: Weight) -> Initial | None:
        """Return a normal of the deviation that is left after transformers cuts off the tails."""
        if name == "classifier.weight":
            cut = config.get("initializer_cutoff_factor", 2.0) or 3.0
            density = math.sqrt(2 / math.pi) * math.exp(-(cut**2) / 2)
            left = 1 - cut * density / math.erf(cut / math.sqrt(2))
            return Normal(math.sqrt(left / config["hidden_size"]))
        return super().initial(config, name, weight)

    def reach(self, config: Config, layer: int, length: int) -> int:
        kinds, every = config.get("layer_types"), config.get("global_attn_every_n_layers") or 3
        if kinds[layer] == "full_attention" if kinds else layer % every == 0:
            return length
        return min(length, config.get("local_attention", 128) // 2 * 2 + 1)  # half of it on either side

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        raise UpcycleError(
            "the first block of a modernbert lacks a norm that all others have, so its blocks cannot be "
            "repeated; give another moe.target"
        )

    def head(self, config: Config) -> Weights:
        return {}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return only_stack(
            config,
            base=self.base(config),
            block="layers.{i}.",
            network="mlp",
            down="mlp.Wo",
            attention="attn.Wo",
            norm="mlp_norm",
            causal=False,
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network, width = f"{self.base(config)}layers.{layer}.mlp.", config["intermediate_size"]
        parts: dict[str, Lazy] = {}
        for end, name in (("", "weight"), ("_bias", "bias")):
            if (both := tensors.get(f"{network}Wi.{name}")) is not None:
                parts[f"gate{end}"] = Slice(both, 0, 0, width)
                parts[f"up{end}"] = Slice(both, 0, width, 2 * width)
                parts[f"down{end}"] = tensors[f"{network}Wo.{name}"]
        return FeedForward(**parts)


family = ModernBert()

"""The decoder that most families are: Llama's names and shapes, with what differs left to each file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import PER_BLOCK, SIZES, Axes, Axis, Config, Family, Shapes, Stack, rope_parameters
from upcycle.families._checked import check
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy, Slice

LONGEST = 1024  # tokens of a sliding window that a comparison of two models reaches beyond
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class Decoder(Family):
    """A decoder with `model.layers.N.mlp.{gate,up,down}_proj` and separate q, k, v, o projections."""

    theta = 10_000.0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embeddings = ("embed_tokens.",)
    network_norm = "post_attention_layernorm"  # the norm that only the feed-forward network reads, if any
    branches: tuple[str, ...] = ("self_attn", "mlp")  # modules of a block that give to the residual stream

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        if missing := [key for key in REQUIRED if key not in raw]:
            raise UpcycleError(f"config.json of a {self.model_type} model lacks {', '.join(missing)}")
        # Only what this family reads: a stray key must not reach a target that would heed it.
        read = {k: v for k, v in raw.items() if k in self.defaults or k in SIZES}
        config: Config = {**self.defaults, **read}
        _check_lengths(config)
        config["use_cache"] = raw.get("use_cache", True)
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = config["num_attention_heads"]
        if config.get("head_dim") is None:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        config["rope_parameters"] = rope_parameters(raw, self.theta)
        return config

    def shapes(self, config: Config) -> Shapes:
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        out: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
        if not config["tie_word_embeddings"]:
            out["lm_head.weight"] = (vocabulary, hidden)
        for layer in range(config["num_hidden_layers"]):
            parts = {
                **self.attention(config, layer),
                **self.mlp(config),
                **{f"{norm}.weight": (hidden,) for norm in self.norms},
            }
            out |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
        return out

    def attention(self, config: Config, layer: int) -> Shapes:
        """The attention tensors of a layer, by their names within it."""
        hidden, head = config["hidden_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        out: Shapes = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        biases = {"q": queries, "k": keys, "v": keys, "o": hidden}
        return out | {f"self_attn.{p}_proj.bias": (biases[p],) for p in self.attention_biases(config)}

    def axes(self, config: Config) -> Axes:
        """Channels, neurons, and groups of query heads with their key head; of Llama's names alone."""
        channels, head = Axis("channels"), config["head_dim"]
        group = config["num_attention_heads"] // config["num_key_value_heads"] * head
        ends: Axes = {
            "model.embed_tokens.weight": (None, channels),
            "model.norm.weight": (channels,),
            "lm_head.weight": (None, channels),
        }
        out: Axes = {}
        for name, shape in self.shapes(config).items():
            number, _, part = name.removeprefix("model.layers.").partition(".")
            if name in ends:
                out[name] = ends[name]
                continue
            layer = int(number)
            queries, keys = (Axis("heads", layer=layer, unit=unit) for unit in (group, head))
            neurons = Axis("neurons", layer=layer)
            inside: Axes = {
                "self_attn.q_proj.weight": (queries, channels),
                "self_attn.k_proj.weight": (keys, channels),
                "self_attn.v_proj.weight": (keys, channels),
                "self_attn.o_proj.weight": (channels, queries),
                "self_attn.q_proj.bias": (queries,),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.bias": (keys,),
                "self_attn.o_proj.bias": (channels,),
                "mlp.gate_proj.weight": (neurons, channels),
                "mlp.up_proj.weight": (neurons, channels),
                "mlp.down_proj.weight": (channels, neurons),
                "mlp.gate_proj.bias": (neurons,),
                "mlp.up_proj.bias": (neurons,),
                "mlp.down_proj.bias": (channels,),
                # Of each head, or of all of them together.
                "self_attn.q_norm.weight": (None if shape == (head,) else queries,),
                "self_attn.k_norm.weight": (None if shape == (head,) else keys,),
                **{f"{norm}.weight": (channels,) for norm in self.norms},
            }
            if part not in inside:
                return super().axes(config)
            out[name] = inside[part]
        return out

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        share, rest = divmod(hidden["layers"] * config["num_key_value_heads"], config["hidden_size"])
        if rest or not share:
            raise UpcycleError(
                f"successor.hidden_size = {hidden['layers']} of {config['hidden_size']}: its share of the "
                f"{config['num_key_value_heads']} key heads is no whole number; heads are kept whole"
            )
        return {
            "hidden_size": hidden["layers"],
            "intermediate_size": width["layers"],
            "num_attention_heads": share * (config["num_attention_heads"] // config["num_key_value_heads"]),
            "num_key_value_heads": share,
            "head_dim": config["head_dim"],
        }

    def attention_biases(self, config: Config) -> str:
        """Which of the projections q, k, v, o have a bias."""
        return "qkvo" if config.get("attention_bias") else ""

    def mlp_biases(self, config: Config) -> bool:
        """Whether the projections of the feed-forward network have biases, which no native MoE's have."""
        return bool(config.get("mlp_bias"))

    def mlp(self, config: Config) -> Shapes:
        """The feed-forward tensors of a layer, by their names within it."""
        hidden, width = config["hidden_size"], config["intermediate_size"]
        out: Shapes = {
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
        }
        biases = {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in out.items()}
        return out | biases if self.mlp_biases(config) else out

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        # One long row where a sliding window is short enough to be looked past.
        window = config.get("sliding_window") or 0
        rows, length = (1, window + tokens // 4) if tokens // 4 <= window <= LONGEST else (4, tokens // 4)
        return {"input_ids": ("tokens", (rows, min(length, config["max_position_embeddings"])))}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                path="model.layers.{i}.mlp",
                owned=("model.layers.{i}.mlp.",),
                module="layers.{i}.mlp",
                down="layers.{i}.mlp.down_proj",
                heads=("layers.{i}.self_attn.o_proj",),
                causal=True,
                activation=config["hidden_act"],
                norm=f"layers.{{i}}.{self.network_norm}" if self.network_norm else "",
                branches=tuple(f"layers.{{i}}.{name}" for name in self.branches),
            ),
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        mlp = f"model.layers.{layer}.mlp."
        names = ("gate", "up", "down")
        biases = {f"{n}_bias": tensors[f"{mlp}{n}_proj.bias"] for n in names if self.mlp_biases(config)}
        return FeedForward(**{n: tensors[f"{mlp}{n}_proj.weight"] for n in names}, **biases)

    def is_feed_forward(self, name: str) -> bool:
        return ".mlp." in name

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        return {name: tensor for name, tensor in tensors.items() if not self.is_feed_forward(name)}

    def refusal(self, config: Config, native: str) -> str | None:
        if self.mlp_biases(config):
            return "its feed-forward networks have biases and no native MoE's experts do"
        return None


class FusedGate(Decoder):
    """A decoder that keeps gate and up in one matrix, `mlp.gate_up_proj` [2I, H]."""

    def mlp(self, config: Config) -> Shapes:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        return {"mlp.gate_up_proj.weight": (2 * width, hidden), "mlp.down_proj.weight": (hidden, width)}

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        mlp, width = f"model.layers.{layer}.mlp.", config["intermediate_size"]
        both = tensors[mlp + "gate_up_proj.weight"]
        return FeedForward(
            gate=Slice(both, 0, 0, width),
            up=Slice(both, 0, width, 2 * width),
            down=tensors[mlp + "down_proj.weight"],
        )


def _check_lengths(config: Config) -> None:
    """Refuse lists that do not have one entry a layer."""
    layers = config["num_hidden_layers"]
    for key in PER_BLOCK:
        value = config.get(key)
        if value is not None and len(value) != layers:
            raise UpcycleError(f"config.json: {key} must be a list of {layers}, one entry a layer")


def every_nth_full(config: Config, n: int | str, others: str = "sliding_attention") -> list[str]:
    """The kinds of the layers as config.json has them; where it is silent, each `n`th has full attention, or
    those that a pattern such as LLLG calls global (EXAONE 4)."""
    if config["layer_types"] is not None:
        return list(config["layer_types"])
    pattern = n if isinstance(n, str) else "L" * (n - 1) + "G"
    return [
        others if pattern[i % len(pattern)] == "L" else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


def attention_bias_refusal(config: Config, native: str) -> str | None:
    """mixtral has no biases in attention."""
    if native == "mixtral" and config.get("attention_bias"):
        return "its attention has biases (attention_bias) and mixtral's has none; use target granitemoe"
    return None


def as_granite(config: Config) -> Config:
    """A config without Granite's multipliers, in terms that have them."""
    neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    return {**neutral, "attention_multiplier": config["head_dim"] ** -0.5, **config}

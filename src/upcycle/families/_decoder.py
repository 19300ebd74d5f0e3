"""The decoder that most families share: Llama's names and shapes. Each family's file has what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack
from upcycle.families._checked import check
from upcycle.families._decoder_width import DecoderWidth
from upcycle.families._rope import LENGTHENED, rope_parameters
from upcycle.families._training import Trained
from upcycle.families._weights import Bias, Matrix, Table, Weights, below, linear, norm, rms_norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Slice

LONGEST = 1024  # the longest sliding window, in tokens, that a comparison of two models goes beyond
WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class Decoder(DecoderWidth, Trained):
    """A decoder with `model.layers.N.mlp.{gate,up,down}_proj` and separate q, k, v, o projections."""

    theta = 10_000.0
    root = "model."
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    reads = frozenset(REQUIRED) | {
        "head_dim", "num_key_value_heads", "partial_rotary_factor", "original_max_position_embeddings",
    }  # fmt: skip
    spellings = frozenset({"partial_rotary_factor"})
    rotated = 1.0  # the share of each head that is rotated if config.json does not say it
    per_block: tuple[str, ...] = ("layer_types",)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    before: tuple[str, ...] = ("embed_tokens.",)
    after = ("norm.",)
    network_norm = "post_attention_layernorm"  # the norm that only the feed-forward network reads, if any
    part = "mlp"  # the feed-forward network, by its name in a block
    network: Mapping[str, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}  # its matrices
    output = "o_proj"  # the matrix that ends attention
    final_norm = "norm"
    biased_norms = False
    residual: tuple[str, ...] = ("self_attn", "mlp")  # modules of a block that add to the residual stream

    @property
    def base_class(self) -> str:  # type: ignore[override]
        """The class without a head."""
        return self.architectures[0].replace("ForCausalLM", "Model")

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        if missing := [key for key in REQUIRED if key not in raw]:
            raise UpcycleError(f"config.json of a {self.model_type} model lacks {', '.join(missing)}")
        # Only the keys that this family reads: a stray key must not reach a target that would use it.
        read = {k: v for k, v in raw.items() if k in self.defaults or k in self.reads}
        config: Config = {**self.defaults, **read}
        self.check_lengths(config)
        config["use_cache"] = raw.get("use_cache", True)
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = config["num_attention_heads"]
        if config.get("head_dim") is None:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        config["rope_parameters"] = rope_parameters(raw, self.theta)
        return config

    def compared(self, config: Config) -> Config:
        kinds = config.get("layer_types")
        slides = kinds is None or "sliding_attention" in kinds
        return {k: v for k, v in super().compared(config).items() if slides or k not in WINDOWS}

    def rotation(self, config: Config) -> Config:
        rope = {"partial_rotary_factor": self.rotated, **config["rope_parameters"]}
        if rope["rope_type"] in LENGTHENED:
            rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        return rope

    def weights(self, config: Config) -> Weights:
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        out: Weights = {"model.embed_tokens.weight": Table((vocabulary, hidden))}
        out |= self.norm(f"model.{self.final_norm}", hidden)
        if not config["tie_word_embeddings"]:
            out["lm_head.weight"] = Matrix((vocabulary, hidden))
        for layer in range(config["num_hidden_layers"]):
            parts = {**self.attention(config, layer), **self.mlp(config)}
            for name in self.norms:
                parts |= self.norm(name, hidden)
            out |= below(f"model.layers.{layer}.", parts)
        return out

    def norm(self, name: str, size: int) -> Weights:
        """Return the tensors of a norm."""
        return norm(name, size) if self.biased_norms else rms_norm(name, size)

    def attention(self, config: Config, layer: int) -> Weights:
        """Return the attention tensors of a layer, by their names within it."""
        hidden, head = config["hidden_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        out: Weights = {
            "self_attn.q_proj.weight": Matrix((queries, hidden)),
            "self_attn.k_proj.weight": Matrix((keys, hidden)),
            "self_attn.v_proj.weight": Matrix((keys, hidden)),
            f"self_attn.{self.output}.weight": Matrix((hidden, queries)),
        }
        biases = {"q": queries, "k": keys, "v": keys, "o": hidden}
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": self.output}
        return out | {f"self_attn.{names[p]}.bias": Bias((biases[p],)) for p in self.attention_biases(config)}

    def attention_biases(self, config: Config) -> str:
        """Return which of the projections q, k, v, o have a bias."""
        return "qkvo" if config.get("attention_bias") else ""

    def mlp_biases(self, config: Config) -> bool:
        """Return whether the feed-forward projections have biases, which those of native MoEs never have."""
        return bool(config.get("mlp_bias"))

    def mlp(self, config: Config) -> Weights:
        """Return the feed-forward tensors of a layer, by their names within it."""
        hidden, width, bias = config["hidden_size"], self.width(config), self.mlp_biases(config)
        weights: Weights = {}
        for part, name in self.network.items():
            shape = (hidden, width) if part == "down" else (width, hidden)
            weights |= linear(f"{self.part}.{name}", *shape, bias=bias)
        return weights

    def width(self, config: Config) -> int:
        """Return the number of neurons of a feed-forward network."""
        return int(config["intermediate_size"])

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        # One long row if it can be made longer than a sliding window.
        window = config.get("sliding_window") or 0
        rows, length = (1, window + tokens // 4) if tokens // 4 <= window <= LONGEST else (4, tokens // 4)
        return {"input_ids": ("tokens", (rows, min(length, config["max_position_embeddings"])))}

    def reach(self, config: Config, layer: int, length: int) -> int:
        kinds, window = config.get("layer_types"), config.get("sliding_window") or length
        if kinds is None:
            return min(length, window)
        return {"full_attention": length, "sliding_attention": min(length, window)}.get(kinds[layer], 0)

    def switches(self, config: Config) -> dict[str, int]:
        rope, kinds = config["rope_parameters"], config.get("layer_types")
        slides = kinds is None or "sliding_attention" in kinds
        found = {"the sliding window": config.get("sliding_window") if slides else None}
        if rope["rope_type"] == "longrope":
            found["the change of long rope"] = rope.get("original_max_position_embeddings")
        if rope["rope_type"] == "dynamic":
            found["the change of dynamic rope"] = config["max_position_embeddings"]
        return {name: int(at) for name, at in found.items() if at}

    def tells_apart(self, config: Config, length: int) -> str | None:
        at = self.switches(config).get("the change of long rope", length)
        if length > at:
            return f"its long rope goes by the longest document of a batch if rows have more than {at} tokens"
        return super().tells_apart(config, length)

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=self.width(config),
                attention=config["num_attention_heads"] * config["head_dim"],
                path=f"model.layers.{{i}}.{self.part}",
                owned=(f"model.layers.{{i}}.{self.part}.",),
                module=f"layers.{{i}}.{self.part}",
                down=f"layers.{{i}}.{self.part}.{self.network['down']}",
                heads=(f"layers.{{i}}.self_attn.{self.output}",),
                causal=True,
                activation=config["hidden_act"],
            ),
        )

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return tuple(f"layers.{{i}}.{name}" for name in self.residual)

    def own_norm(self, config: Config, stack: Stack) -> str:
        return f"layers.{{i}}.{self.network_norm}" if self.network_norm else ""

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        mlp = f"model.layers.{layer}.{self.part}."
        parts = self.network.items()
        biases = {f"{part}_bias": tensors[f"{mlp}{n}.bias"] for part, n in parts if self.mlp_biases(config)}
        return FeedForward(**{part: tensors[f"{mlp}{name}.weight"] for part, name in parts}, **biases)

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        return {name: tensor for name, tensor in tensors.items() if f".{self.part}." not in name}

    def refusal(self, config: Config, native: str) -> str | None:
        if self.mlp_biases(config):
            return "its feed-forward networks have biases and no native MoE's experts do"
        return None


class FusedGate(Decoder):
    """A decoder that stores gate and up in one matrix, `both` [2I, H]."""

    both = "gate_up_proj"
    network = {"down": "down_proj"}

    def mlp(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], self.width(config)
        both = linear(f"{self.part}.{self.both}", 2 * width, hidden, bias=False)
        return both | linear(f"{self.part}.{self.network['down']}", hidden, width, bias=False)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network, width = f"model.layers.{layer}.{self.part}.", self.width(config)
        both = tensors[f"{network}{self.both}.weight"]
        return FeedForward(
            gate=Slice(both, 0, 0, width),
            up=Slice(both, 0, width, 2 * width),
            down=tensors[f"{network}{self.network['down']}.weight"],
        )


def sizes(vocabulary: int, hidden: int, width: int, layers: int, heads: int) -> Config:
    """Return what transformers assumes for the sizes that the config of a text model leaves out."""
    return dict(zip(REQUIRED, (vocabulary, hidden, width, layers, heads), strict=True))


def rotation_by_kind(config: Config, local_theta: float) -> Config:
    """Return the rotary settings for each kind of layer, for a class that has two tables.

    `local_theta` is the base in layers that slide. A single table in config.json is that of the others.
    """
    rope = config["rope_parameters"]
    sliding = {"rope_type": "default", "rope_theta": local_theta}
    kinds = {"full_attention": rope, "sliding_attention": sliding}
    return {kind: rope.get(kind, usual) for kind, usual in kinds.items()}


def every_nth_full(config: Config, n: int | str, others: str = "sliding_attention") -> list[str]:
    """Return the kinds of the layers that config.json lists, or those of a pattern if it lists none.

    Each `n`th layer then has full attention, or those that a pattern such as LLLG calls global (EXAONE 4).
    """
    if config["layer_types"] is not None:
        return list(config["layer_types"])
    pattern = n if isinstance(n, str) else "L" * (n - 1) + "G"
    return [
        others if pattern[i % len(pattern)] == "L" else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


def outside_window(config: Config, native: str) -> str | None:
    """Refuse a config whose rows grow longer than its sliding window, for a target without windows."""
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        return f"its attention has a sliding window and {native}'s has none"
    return None


def attention_bias_refusal(config: Config, native: str) -> str | None:
    """Refuse a config with biases in attention for mixtral, which has none."""
    if native == "mixtral" and config.get("attention_bias"):
        return "its attention has biases (attention_bias) and mixtral's has none; use target granitemoe"
    return None


def as_granite(config: Config) -> Config:
    """Return a config without Granite's multipliers in terms that have them."""
    neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    return {**neutral, "attention_multiplier": config["head_dim"] ** -0.5, **config}

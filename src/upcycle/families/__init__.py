"""Dense model types. One file here is one `model_type`: its tensors, its config, its native targets.

A file `MODEL_TYPE.py` binds a `Family` to the module name `family`. Nothing else has to be touched.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upcycle import registry
from upcycle.errors import UpcycleError, shown
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# Config keys that say nothing about the function the model computes.
SILENT = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path "
    "pretraining_tp auto_map id2label label2id return_dict output_attentions output_hidden_states "
    "rope_theta rope_scaling rope_parameters _attn_implementation is_encoder_decoder problem_type "
    "chunk_size_feed_forward _attn_implementation_autoset unsloth_version unsloth_fixed".split()
)

# Sizes, and keys that a family works other keys out from.
SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads partial_rotary_factor hidden_activation sliding_window_pattern "
    "full_attention_interval original_max_position_embeddings".split()
)

# Lists of config.json with one entry a block.
PER_BLOCK = ("layer_types", "no_rope_layers")

# Dense model types that have no exact native target and no file here, and why the first (each was run, or its
# block compared).
REFUSED = {
    "m2m_100": "nllb_moe calls only its first two experts in transformers 5.23",
    "phi": "no native MoE computes its parallel, biased block",
    "gpt2": "no native MoE has its biased, learned-position block",
    "gpt_neox": "no native MoE has its biased, parallel block",
}

# Native targets that look right for a family and are not.
INEXACT = {
    ("llama", "olmoe"): "olmoe normalises queries and keys; the norms have no source in llama",
    ("llama", "qwen3_moe"): "qwen3_moe normalises queries and keys; the norms have no source in llama",
    ("phi3", "phimoe"): "phimoe uses LayerNorm and sparse-mixer gates, which do not sum to one",
    ("olmo2", "olmoe"): "olmoe normalises before its blocks and olmo2 after them",
    ("smollm3", "mixtral"): "mixtral rotates every layer and smollm3 skips some",
    ("mistral", "granitemoe"): "granitemoe has no sliding window",
}


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of blocks of one kind, each with a feed-forward network. `{i}` stands for a block's number."""

    name: str = "layers"
    count: int
    first: int = 0  # number of its first block, where moe.layers counts on from stack to stack
    total: int = 0  # blocks that moe.layers counts over; 0: its own
    hidden: int  # channels of its blocks
    width: int  # neurons of its networks
    path: str  # of the network on disk, and of the MoE layer that takes its place
    owned: tuple[str, ...]  # how the names of its tensors on disk begin
    module: str  # of the network in memory, below the base model
    replaced: tuple[str, ...] = ()  # modules in memory that belong to the network as well
    down: str  # of the network's last matrix in memory, below the base model
    heads: tuple[str, ...] = ()  # of the matrix that ends self-attention, in memory; a block has one of them
    causal: bool
    activation: str
    dropout: float = 0.0  # between the activation and the last matrix
    norm: str = ""  # the norm in memory that only the network reads; none: there is no such norm
    norm_path: str = ""  # of that norm on disk
    branches: tuple[str, ...] = ()  # modules in memory whose output is added to the residual stream

    @property
    def blocks(self) -> str:
        """The list of its blocks in memory, below the base model."""
        return self.module.partition(".{i}")[0]

    def owns(self, name: str, i: int) -> bool:
        """Whether the tensor called `name` on disk is part of the network of block `i`."""
        return name.startswith(tuple(start.format(i=i) for start in self.owned))


@dataclass(frozen=True)
class Axis:
    """What an axis of a tensor is made of: channels or neurons of a stack, heads of a block."""

    kind: Literal["channels", "heads", "neurons"]
    stack: str = "layers"
    layer: int | None = None  # block of the stack, for heads and neurons
    unit: int = 1  # elements along the axis for each channel, head or neuron


Axes = dict[str, tuple[Axis | None, ...]]


class Family(abc.ABC):
    """A dense architecture of transformers."""

    model_type: str
    architectures: tuple[str, ...]  # the transformers classes, the one of a config that names none first
    summary: str
    natives: tuple[str, ...]  # native MoE model types, the default first
    defaults: Mapping[str, Any]  # what transformers assumes where config.json is silent
    class_tokens = 0  # tokens before the patches of an image, the first of which a head looks at
    centred_norms = False  # whether norms multiply by 1 + w
    exact_when_narrow = True  # whether the backbone keeps its bits in bfloat16 and float16
    block_paths: tuple[str, ...] = ("layers.*",)  # of the blocks in memory, below the base model
    embeddings: tuple[str, ...] = ("embeddings.",)  # how parameters before the blocks begin, likewise
    no_native = "no native MoE has its blocks"  # why `natives` is empty, where it is

    @abc.abstractmethod
    def config(self, raw: Mapping[str, Any]) -> Config:
        """config.json with every default in place and rotary settings in one form (`rope_parameters`)."""

    @abc.abstractmethod
    def shapes(self, config: Config) -> Shapes:
        """Every tensor of the dense checkpoint, by its name on disk, with its shape."""

    def optional(self, config: Config) -> Shapes:
        """Tensors that a checkpoint may have besides those of `shapes`."""
        return {}

    def length(self, config: Config) -> int:
        """Tokens of a row, where a number of them has to be assumed."""
        return int(config.get("max_position_embeddings") or 512)

    def lengths(self, config: Config) -> dict[str, int]:
        """Tokens of a row in each stack, likewise."""
        return {stack.name: self.length(config) for stack in self.stacks(config)}

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What its forward pass wants, to compare two models on: by name, `tokens` or `pixels`, and a shape
        of about so many tokens in four short rows."""
        return {"input_ids": ("tokens", (4, min(tokens // 4, self.length(config))))}

    @abc.abstractmethod
    def stacks(self, config: Config) -> tuple[Stack, ...]:
        """Where the feed-forward networks are."""

    def axes(self, config: Config) -> Axes:
        """By the name of every tensor, what each of its axes is made of; None where no width changes it."""
        raise UpcycleError(
            f"the width of {self.model_type} cannot be changed: upcycle does not know which axes of its "
            f"tensors are channels; leave [successor] out"
        )

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        """The keys of config.json that change with the channels and the neurons of the stacks."""
        heads, rest = divmod(hidden["layers"], config["head_dim"])
        if rest or not heads:
            raise UpcycleError(
                f"successor.hidden_size = {hidden['layers']} is no multiple of the {config['head_dim']} "
                f"channels of a head; whole heads are kept"
            )
        return {
            "hidden_size": hidden["layers"],
            "intermediate_size": width["layers"],
            "num_attention_heads": heads,
        }

    def depth(self, name: str, counts: Mapping[str, int]) -> int:
        """How deep in the model a parameter is, by its name in memory below the base model.

        Of N blocks: 0 before them, i + 1 in block i (from 0), N + 1 after them. `counts` has the lists of
        blocks (`Stack.blocks`) and how many each holds; they count on from one list to the next.
        """
        before = 0
        for blocks, count in counts.items():
            if name.startswith(f"{blocks}."):
                return before + int(name.removeprefix(f"{blocks}.").partition(".")[0]) + 1
            before += count
        return 0 if name.startswith(self.embeddings) else before + 1

    def stack_of(self, name: str) -> str:
        """The stack whose tokens meet the tensor called `name` in a matrix product."""
        return "layers"

    def deviation(self, config: Config, name: str) -> float:
        """The standard deviation that a matrix starts training from nothing with."""
        return float(config.get("initializer_range", 0.02))

    def constant(self, config: Config, name: str) -> float | None:
        """What a tensor starts training from nothing as, where its name does not say that it is a matrix, a
        norm or a bias."""
        return None

    @abc.abstractmethod
    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        """The feed-forward network of a block."""

    def is_feed_forward(self, name: str) -> bool:
        """Whether the tensor called `name` belongs to the feed-forward network of its layer."""
        raise AssertionError(f"{self.model_type} has no native MoE")

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Everything that is no feed-forward network, by its name in the native MoE."""
        raise AssertionError(f"{self.model_type} has no native MoE")

    def refusal(self, config: Config, native: str) -> str | None:
        """Why this config does not compute the same in `native`, or None where it does."""
        return None

    def native_config(self, config: Config, native: str) -> Config:
        """The dense config in the terms of `native`: fields that it spells or scales differently."""
        return config

    def warnings(self, native: str) -> list[str]:
        """What a person should know about this pair."""
        return []

    def ignored(self, name: str) -> str | None:
        """Why a stored tensor that `shapes` does not list may be left out, or None where it may not."""
        if name.endswith("rotary_emb.inv_freq"):
            return "a buffer that transformers computes from the config"
        return None


def find(model_type: str) -> Family:
    """The family of a dense `model_type`; others are refused with the reason."""
    package = sys.modules[__name__]
    if model_type in registry.names(package):
        return registry.find(package, model_type, "family", "family")
    if model_type in REFUSED:
        raise UpcycleError(f"{model_type} has no exact native MoE: {REFUSED[model_type]}")
    raise UpcycleError(f"unknown model_type {shown(model_type)}; known: {', '.join(names())}")


def names() -> list[str]:
    """The dense model types that have a file here."""
    return registry.names(sys.modules[__name__])


def rope_parameters(raw: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """The rotary settings of a config.json, in the old spelling or the new, as a new dict in the new."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta") or default_theta
    if not isinstance(given, Mapping) or not isinstance(theta, (int, float)):
        raise UpcycleError(
            f"config.json: rope_theta must be a number, rope_scaling and rope_parameters tables; they are "
            f"{theta!r} and {given!r}"
        )
    rope = dict(given)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", theta)
    if (share := raw.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", share)
    return rope

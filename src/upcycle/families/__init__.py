"""Dense model types. One file here is one `model_type`: its tensors, its config, its native targets.

A file `MODEL_TYPE.py` binds a `Family` to the module name `family`. Nothing else has to be touched.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from typing import Any

from upcycle import registry
from upcycle.errors import UpcycleError, shown
from upcycle.families._stacks import Grid as Grid
from upcycle.families._stacks import Stack as Stack
from upcycle.families._weights import Shapes as Shapes
from upcycle.families._weights import Weights as Weights
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

Config = dict[str, Any]

# Config keys that say nothing about the function the model computes.
SILENT = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path "
    "pretraining_tp auto_map id2label label2id return_dict output_attentions output_hidden_states "
    "rope_theta rope_scaling rope_parameters _attn_implementation is_encoder_decoder problem_type "
    "chunk_size_feed_forward _attn_implementation_autoset unsloth_version unsloth_fixed".split()
)

# Dense model types that have no exact native target and no file here, and why the first (each was run, or its
# block compared).
REFUSED = {
    "m2m_100": "nllb_moe calls only its first two experts in transformers 5.23",
    "phi": "no native MoE computes its parallel, biased block",
    "gpt2": "no native MoE has its biased, learned-position block",
    "gpt_neox": "no native MoE has its biased, parallel block",
}


class Family(abc.ABC):
    """A dense architecture of transformers: what a conversion asks of it.

    What only training asks is in `_training.py`, and what only a narrower successor asks in `_narrowing.py`.
    """

    model_type: str
    architectures: tuple[str, ...]  # the transformers classes, the one of a config that names none first
    summary: str
    natives: tuple[str, ...] = ()  # native MoE model types, the default first
    no_native = "no native MoE has its blocks"  # why `natives` is empty, where it is
    inexact: Mapping[str, str] = {}  # native targets that look right and are not, and why
    defaults: Mapping[str, Any]  # what transformers assumes where config.json is silent
    reads: frozenset[str] = frozenset()  # keys of config.json that it reads beside those of `defaults`
    counts: tuple[str, ...] = ("num_hidden_layers",)  # keys of config.json that are numbers of blocks
    numbers: tuple[str, ...] = ()  # keys of config.json that are the number of a block
    per_block: tuple[str, ...] = ()  # keys of config.json that are lists with an entry for each block
    tied: tuple[str, str] | None = None  # a head that config.json may tie, and the table it is tied to
    class_tokens = 0  # tokens before the patches of an image, the first of which a head looks at
    centred_norms = False  # whether norms multiply by 1 + w
    exact_when_narrow = True  # whether the backbone keeps its bits in bfloat16 and float16

    @property
    def norm_identity(self) -> float:
        """The weight of a norm that only normalises."""
        return 0.0 if self.centred_norms else 1.0

    @abc.abstractmethod
    def config(self, raw: Mapping[str, Any]) -> Config:
        """config.json with every default in place and rotary settings in one form (`rope_parameters`).

        Whatever the names in config.json, it has `vocab_size` (of texts), `hidden_size`, `intermediate_size`,
        `num_hidden_layers`, `num_attention_heads`, `hidden_act` and `tie_word_embeddings`. Raises
        `UpcycleError` for a config that does not fit.
        """

    @abc.abstractmethod
    def weights(self, config: Config) -> Weights:
        """Every tensor of the dense checkpoint, by its name on disk: its shape, and what it is for."""

    def optional(self, config: Config) -> Weights:
        """Tensors that a checkpoint may have besides those of `weights`."""
        return {}

    def shapes(self, config: Config) -> Shapes:
        """The shapes of the tensors of `weights`."""
        return {name: weight.shape for name, weight in self.weights(config).items()}

    def length(self, config: Config) -> int:
        """Tokens of a row, where a number of them has to be assumed."""
        return int(config.get("max_position_embeddings") or 512)

    def lengths(self, config: Config) -> dict[str, int]:
        """Tokens of a row in each stack, likewise."""
        return {stack.name: self.length(config) for stack in self.stacks(config)}

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid | None:
        """The patches of an image that the positions of a stack are, row by row, behind the class tokens;
        None: positions are tokens of a text."""
        return None

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What its forward pass wants, to compare two models on: by name, `tokens` or `pixels`, and a shape
        of about so many tokens in four short rows."""
        return {"input_ids": ("tokens", (4, min(tokens // 4, self.length(config))))}

    @abc.abstractmethod
    def stacks(self, config: Config) -> tuple[Stack, ...]:
        """Where the feed-forward networks are."""

    def stack_of(self, name: str) -> str:
        """The stack whose tokens meet the tensor called `name` in a matrix product."""
        return "layers"

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        """The keys of config.json that change where every block stands `times` times in a row."""
        out: Config = {}
        for key in (*self.counts, *self.numbers):
            count = raw.get(key)
            if count is None and key in self.defaults:
                count = config[key]
            if isinstance(count, int):
                out[key] = count * times
            elif isinstance(count, (list, tuple)):  # one a stage
                out[key] = [n * times for n in count]
        for key in self.per_block:
            # Written out where config.json gives an interval: of the deeper model it would mean other blocks.
            if (entries := config.get(key)) is not None:
                out[key] = [entry for entry in entries for _ in range(times)]
        return out

    @abc.abstractmethod
    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        """The feed-forward network of a block."""

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

"""Dense model types. Each file here is one `model_type`: its tensors, its config, its native targets.

A file `MODEL_TYPE.py` binds a `Family` to the module name `family`. No other file has to change.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Collection, Mapping
from typing import Any

from upcycle import registry
from upcycle.errors import UpcycleError, listed, nearest_of_many, shown
from upcycle.families._further import Further
from upcycle.families._stacks import Grid as Grid
from upcycle.families._stacks import Stack as Stack
from upcycle.families._weights import Shapes as Shapes
from upcycle.families._weights import Weights as Weights
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

Config = dict[str, Any]

_MASKED = {"full_attention", "sliding_attention"}  # kinds of layers that read nothing but what a mask shows

# Config keys that do not change the function that the model computes.
SILENT = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path "
    "pretraining_tp auto_map id2label label2id return_dict output_attentions output_hidden_states "
    "rope_theta rope_local_base_freq rope_scaling rope_parameters _attn_implementation "
    "is_encoder_decoder problem_type chunk_size_feed_forward _attn_implementation_autoset "
    "unsloth_version unsloth_fixed".split()
)

# Ends of the names of classes that predict the next token; other classes called LMHeadModel read both ways.
CAUSAL_HEADS = ("ForCausalLM", "GPT2LMHeadModel")

# Dense model types without a file here, and why (each was run, or its block compared).
REFUSED = {
    "m2m_100": "nllb_moe calls only its first two experts in transformers 5.23",
    "gemma4": "the multimodal model was never tried; --part-only text takes its text model out of it",
    "gemma3n": "its blocks predict and correct several streams (AltUp), which was never tried",
}

# Model types that are another one's class in transformers, under another name.
SAME = {"internlm3": "llama", "iquestcoder": "llama"}

# Model types with a hyphen, by the names of their files.
_HYPHENS = {"xlm_roberta": "xlm-roberta", "deberta_v2": "deberta-v2"}


class Family(abc.ABC):
    """A dense architecture of transformers, with everything that a conversion needs to know about it.

    What only training needs is in `_training.py`, and what only a narrower successor needs in
    `_narrowing.py`.
    """

    model_type: str
    architectures: tuple[str, ...]  # the transformers classes; the first is used for a config that names none
    summary: str
    natives: tuple[str, ...] = ()  # native MoE model types, the default first
    no_native = "no native MoE has its blocks"  # why `natives` is empty, if it is
    inexact: Mapping[str, str] = {}  # native targets that look right and are not, and why
    defaults: Mapping[str, Any]  # what transformers assumes for keys missing from config.json
    reads: frozenset[str] = frozenset()  # keys of config.json that it reads besides those of `defaults`
    spellings: frozenset[str] = frozenset()  # keys among them that say in other words what another key says
    counts: tuple[str, ...] = ("num_hidden_layers",)  # keys of config.json that are numbers of blocks
    numbers: tuple[str, ...] = ()  # keys of config.json that are the number of a block
    per_block: tuple[str, ...] = ()  # keys of config.json that are lists with one entry per block
    of_all_experts = ""  # a part of the network, by its name in tensors, that is no part of an expert
    tied: tuple[str, str] | None = None  # a head that config.json may tie, and the table it is tied to
    # The class by which transformers opens the tokenizer of this type, whatever tokenizer_config.json names;
    # empty if that file decides. `always` follows if the class goes before the one that the file names.
    tokenizer = ""
    former: Mapping[str, str] = {}  # ends of tensor names in older checkpoints, and what they are called now
    modules: Mapping[str, str] = {}  # parts of module names in today's class, and what files call them
    root = ""  # what the names of the base model's tensors begin with, in a class with a head
    base_class = ""  # the class without a head; empty if checkpoints of it are not taken
    alone = ""  # the family of such a text model when it is taken out of a wrapper; empty: the same
    assumed: Mapping[str, Any] = {}  # sizes that transformers assumes if the config of a part leaves them out
    positions_key = "max_position_embeddings"  # the key of a config with the most tokens that a text may have
    class_tokens = 0  # tokens before the patches of an image; a head reads the first of them
    further: Further | None = None  # blocks beside the model that predict further tokens
    sees = False  # True if its class without a head is a vision tower that multimodal models can hold
    centred_norms = False  # True if norms multiply by 1 + w
    # Kinds of layers that carry a state or a convolution along the row, and what their module is called in a
    # block. It is causal, and takes `hidden_states` [B, L, H] and nothing else that it needs.
    carriers: Mapping[str, str] = {}
    borders = True  # True if its class hands the borders of documents on to flash attention
    exact_when_narrow = True  # True if the backbone keeps its bits in bfloat16 and float16

    def meant(self, raw: Mapping[str, Any]) -> str:
        """Return the model_type that transformers reads this config.json as, which may be another one."""
        return self.model_type

    @property
    def norm_identity(self) -> float:
        """The weight of a norm that only normalises."""
        return 0.0 if self.centred_norms else 1.0

    @abc.abstractmethod
    def config(self, raw: Mapping[str, Any]) -> Config:
        """Return config.json with all defaults filled in and rotary settings in one form.

        Rotary settings are in `rope_parameters`. Whatever config.json calls them, the result has `vocab_size`
        (for models of text), `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
        `hidden_act` and `tie_word_embeddings`. Raises `UpcycleError` for a config that does not fit.
        """

    def compared(self, config: Config) -> Config:
        """Return the settings by which two models are told apart, in one form whatever spelling they had."""
        out = {key: value for key, value in config.items() if key not in self.spellings}
        return out | {"rope_parameters": self.rotation(config)}

    def rotation(self, config: Config) -> Config | None:
        """Return the rotary settings as transformers writes them when it saves a model; None without any."""
        return config.get("rope_parameters")

    @abc.abstractmethod
    def weights(self, config: Config) -> Weights:
        """Return every tensor of the dense checkpoint by its name on disk: its shape and its kind."""

    def as_opened(self, config: Config, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors with the values that they have once transformers has opened the checkpoint."""
        return tensors

    def optional(self, config: Config) -> Weights:
        """Return the tensors that a checkpoint may have besides those of `weights`."""
        return {}

    def may_lack(self, config: Config) -> frozenset[str]:
        """Return the tensors of `weights` that a checkpoint need not have."""
        return frozenset()

    def further_weights(self, config: Config, count: int) -> Weights:
        """Return the tensors of `count` blocks that predict further tokens, by their names on disk."""
        return {}

    def shapes(self, config: Config) -> Shapes:
        """Return the shapes of the tensors of `weights`."""
        return {name: weight.shape for name, weight in self.weights(config).items()}

    def length(self, config: Config) -> int:
        """Return the number of tokens of a row, for when one has to be assumed."""
        return int(config.get("max_position_embeddings") or 512)

    def lengths(self, config: Config) -> dict[str, int]:
        """Return the number of tokens of a row in each stack, for when one has to be assumed."""
        return {stack.name: self.length(config) for stack in self.stacks(config)}

    def row(self, config: Config, length: int) -> dict[str, int]:
        """Return the number of tokens in each stack of a row whose text has `length` tokens."""
        return {stack.name: length for stack in self.stacks(config)}

    def cached(self, config: Config, layer: int) -> int:
        """Return how many numbers a causal block keeps of a token for the tokens after it: keys and values.

        They are those of transformers' cache. Blocks that attend to nothing (`reach`) are not asked.
        """
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return int(2 * heads * config["head_dim"])

    def reach(self, config: Config, layer: int, length: int) -> int:
        """Return to how many tokens of a row of `length` a token in a block can attend, itself among them.

        That is all of the row, a window within it, or 0 in a block without attention.
        """
        return length

    def relative(self, config: Config) -> int:
        """Return the number of relative positions that a block scores each token against, by products."""
        return 0

    def scored(self, config: Config, stack: Stack, layer: int) -> int:
        """Return the channels of all heads of a block in a stack, as a mean of queries and values."""
        return stack.attention

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid | None:
        """Return the image patches that are the positions of a stack, row by row, after the class tokens.

        None means that positions are tokens of a text.
        """
        return None

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the inputs of a forward pass for a comparison of two models.

        Each name maps to `tokens`, `pixels` or `sound` and a shape of about so many tokens in four short
        rows. Inputs of other kinds are in `beside`.
        """
        return {"input_ids": ("tokens", (4, min(tokens // 4, self.length(config))))}

    def beside(self, config: Config) -> dict[str, list[list[int]]]:
        """Return the inputs of that forward pass that say what the others are: rows of whole numbers."""
        return {}

    def switches(self, config: Config) -> dict[str, int]:
        """Return the numbers of tokens from which on the model computes otherwise, by name."""
        return {}

    def tells_apart(self, config: Config, length: int) -> str | None:
        """Return why the documents in a row of `length` tokens cannot be kept apart; None if they can."""
        others = {*(config.get("layer_types") or ())} - _MASKED - {*self.carriers}
        return f"its layers of {listed(sorted(others))} read the whole row" if others else None

    def parts_ways(self, config: Config, native: str) -> str | None:
        """Return why `native` generates other texts past a switch, or None if it does not.

        A forward pass over a whole row is the same all the same.
        """
        return None

    @abc.abstractmethod
    def stacks(self, config: Config) -> tuple[Stack, ...]:
        """Return the stacks of blocks that hold the feed-forward networks."""

    def stack_of(self, name: str) -> str:
        """Return the stack whose tokens are multiplied by the tensor called `name`."""
        return "layers"

    def check_lengths(self, config: Config) -> None:
        """Refuse lists that do not have one entry per layer."""
        layers = config["num_hidden_layers"]
        for key in self.per_block:
            value = config.get(key)
            if value is not None and len(value) != layers:
                raise UpcycleError(f"config.json: {key} must be a list of {layers}, one entry a layer")

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        """Return the keys of config.json that change if every block is repeated `times` times in a row."""
        out: Config = {}
        for key in (*self.counts, *self.numbers):
            count = raw.get(key)
            if count is None and key in self.defaults:
                count = config[key]
            if isinstance(count, int):
                out[key] = count * times
            elif isinstance(count, (list, tuple)):  # one entry per stage
                out[key] = [n * times for n in count]
        for key in self.per_block:
            # A list replaces an interval of config.json, which in the deeper model would select other blocks.
            if (entries := config.get(key)) is not None:
                out[key] = [entry for entry in entries for _ in range(times)]
        return out

    @abc.abstractmethod
    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        """Return the feed-forward network of a block."""

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return every tensor outside the feed-forward networks, by its name in the native MoE."""
        raise AssertionError(f"{self.model_type} has no native MoE")

    def refusal(self, config: Config, native: str) -> str | None:
        """Return why this config does not compute the same in `native`, or None if it does."""
        return None

    def native_config(self, config: Config, native: str) -> Config:
        """Return the dense config in terms of `native`, which spells or scales some fields differently."""
        return config

    def warnings(self, native: str) -> list[str]:
        """Return what a user should know about this pair of family and native target."""
        return []

    def unlisted(self, config: Config, name: str) -> bool:
        """Return whether a stored tensor belongs to a head that `weights` does not list."""
        return False

    def class_options(self, config: Config, stored: Collection[str]) -> Mapping[str, Any]:
        """Return the arguments, besides the config, that make the class hold exactly the stored tensors."""
        return {}

    def tidied(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return config.json without what it says about tensors that are left out."""
        return raw

    def body_class(self, config: Config, stored: Collection[str]) -> str | None:
        """Return the class of the body if that alone is stored, and config.json names one with a head."""
        return None

    def twins(self, config: Config) -> Mapping[str, str]:
        """Return the tensors that may be left out if they are what another one is, with that one's name."""
        tied = self.tied if config["tie_word_embeddings"] else None
        return {tied[0]: tied[1]} if tied else {}

    def ignored(self, name: str) -> str | None:
        """Return why a stored tensor that `shapes` does not list may be left out, or None if it may not."""
        if name.endswith("rotary_emb.inv_freq"):
            return "a buffer that transformers computes from the config"
        return None


def find(model_type: str) -> Family:
    """Return the family of a dense `model_type`. Raises `UpcycleError`, with the reason, for other types."""
    package = sys.modules[__name__]
    file = SAME.get(model_type, model_type).replace("-", "_")
    if file in registry.names(package):
        found: Family = registry.find(package, file, "family", "family")
        return found
    if model_type in REFUSED:
        raise UpcycleError(f"upcycle does not take {model_type}: {REFUSED[model_type]}")
    raise UpcycleError(
        f"unknown model_type {shown(model_type)}{nearest_of_many(model_type, names(), 'upcycle list')}"
    )


def by_class(raw: Mapping[str, Any]) -> str | None:
    """Return the type of the family whose class a config.json names, if nobody knows its own model_type."""
    model_type, named = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or model_type in {*names(), *SAME, *REFUSED}:
        return None
    name = named[0] if isinstance(named, list) and named else None
    found = [known for known in names() if name in find(known).architectures]
    return found[0] if len(found) == 1 else None


def of(raw: Mapping[str, Any]) -> Family:
    """Return the family of a model's own config.json. Raises `UpcycleError` if nobody knows its type."""
    return find(find(by_class(raw) or str(raw.get("model_type"))).meant(raw))


def names() -> list[str]:
    """Return the dense model types that have a file here."""
    return [_HYPHENS.get(name, name) for name in registry.names(sys.modules[__name__])]

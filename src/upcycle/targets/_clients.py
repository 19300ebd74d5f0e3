"""The ways in which other programs treat an architecture differently, and the configs in which that shows.

The tests run llama.cpp and mlx-lm. vLLM and SGLang were read; `docs/clients.md` names versions and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from upcycle.families import Config


@dataclass(frozen=True)
class Gap:
    """Something that a program does not compute, or not open, as config.json says."""

    label: str  # as docs/clients.md calls it
    why: str  # what the program does; {name} stands for the architecture
    shows: Callable[[Config], bool]  # whether it makes a difference to a model of this config
    alone: bool = False  # it makes none to a model within a multimodal one
    untied: str = ""  # what to do about it, for a model that `moe.untie` is open to

    @property
    def everywhere(self) -> bool:
        """True if it shows in every config, so that the program has no use for the architecture."""
        return self.shows is _any


Clients = Mapping[str, tuple[Gap, ...]]


def reasons(
    clients: Clients, config: Config, name: str, *, within: bool = False, can_untie: bool = True
) -> dict[str, str]:
    """Return the programs that will not compute the function of a model of this config, and why.

    `within` says that it stands within a multimodal model, and `can_untie` that it can have `moe.untie`.
    """
    found = {
        client: [
            gap.why.format(name=name) + (gap.untied if can_untie else "")
            for gap in gaps
            if gap.shows(config) and not (within and gap.alone)
        ]
        for client, gaps in clients.items()
    }
    return {client: ", and it ".join(whys) for client, whys in found.items() if whys}


def _any(config: Config) -> bool:
    return True


def always(label: str, why: str) -> Gap:
    """Return a gap that shows in every config."""
    return Gap(label, why, _any)


def _slides(config: Config) -> bool:
    """Return whether any layer has a sliding window."""
    if (kinds := config.get("layer_types")) is not None:
        return "sliding_attention" in kinds
    return config.get("sliding_window") is not None and config.get("use_sliding_window", True)


def _scaling(config: Config) -> str:
    """Return the type of the rotary positions."""
    return str(config["rope_parameters"]["rope_type"])


ABSENT = always("no class", "has no {name}")

ACTIVATION = Gap(
    "activations other than SiLU", "hard-codes SiLU in {name}", lambda config: config["hidden_act"] != "silu"
)

# Attention.
HEAD_DIM = Gap(
    "`head_dim`",
    "ignores head_dim in {name}",
    lambda config: config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
)
BIASES = Gap(
    "attention biases",
    "has no biases in the attention of {name}",
    lambda config: bool(config.get("attention_bias")),
)
OUTPUT_BIAS = Gap(
    "the bias of `o_proj`",
    "has no bias on the o_proj of {name}",
    lambda config: bool(config.get("attention_bias")),
)
WINDOW = Gap("windows", "ignores sliding_window in {name}", _slides)
SOME_WINDOWS = Gap(
    "windows in some layers",
    "ignores sliding_window in {name} unless every layer slides",
    lambda config: len(set(config["layer_types"])) > 1,
)

# Rotary positions.
ROPE = Gap(
    "scaled rotary positions",
    "ignores the scaling of rotary positions in {name}",
    lambda config: _scaling(config) != "default",
)
LONG_ROPE = Gap("long rope", "ignores long rope in {name}", lambda config: _scaling(config) == "longrope")
LLAMA3_ROPE = Gap(
    "Llama 3's rotary positions",
    "has no place for the rotary positions of Llama 3 in {name}",
    lambda config: _scaling(config) == "llama3",
)
YARN_ONLY = Gap(
    "rotary positions scaled in another way than yarn's",
    "takes every scaling of rotary positions for yarn's in {name}",
    lambda config: _scaling(config) not in ("default", "yarn"),
)
INTERLEAVED = Gap(
    "`rope_interleave = false`",
    "always interleaves the halves that it rotates in {name}",
    lambda config: not config["rope_interleave"],
)

# Experts and the head.
DENSE_LAYERS = Gap(
    "dense layers",
    "has experts in every layer of {name}",
    lambda config: bool(config.get("mlp_only_layers")) or "dense" in config.get("mlp_layer_types", ()),
)
NEVER_RENORMALIZED = Gap(
    "`norm_topk_prob = true`",
    "never renormalises the top-k weights of {name}, whatever norm_topk_prob says",
    lambda config: bool(config["norm_topk_prob"]),
)
ALWAYS_RENORMALIZED = Gap(
    "`norm_topk_prob = false`",
    "always renormalises the top-k weights of {name}",
    lambda config: not config["norm_topk_prob"],
)
TIED = Gap(
    "tied heads",
    "never ties the head of {name} to its embeddings",
    lambda config: bool(config["tie_word_embeddings"]),
    untied=" (moe.untie = true stores a head)",
)
UNTIED = Gap(
    "heads that are not tied",
    "always ties the head of {name} to its embeddings",
    lambda config: not config["tie_word_embeddings"],
)

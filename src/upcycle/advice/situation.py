"""The question and its facts: the model, the MoE, the budget. They are read from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.cost import Plan, flops_per_row, plan_of
from upcycle.errors import UpcycleError, shown
from upcycle.families._wrappers import TEXT
from upcycle.init.drop import Drop
from upcycle.init.noise import NoisyCopy
from upcycle.system import gpus
from upcycle.system.gpus import Gpu
from upcycle.system.wording import number_in
from upcycle.tasks._positions import row_of

Kind = Literal["decoder", "encoder-decoder", "encoder", "vision transformer", "convolutional network"]
MOST_TOKENS = 10**18
SMALL_NOISE = 0.05  # standard deviations of a matrix: "small: negligible; large: hurts" (Sparse Upcycling)


def parse_tokens(text: str, option: str) -> int:
    """Return the number in a text such as `100B`, `1.5T`, `37_000_000` or `1e9`.

    Raises `UpcycleError`, which names `option`, if there is none.
    """
    number = number_in(text, {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12})
    if number is None or number >= MOST_TOKENS:
        raise UpcycleError(
            f"{option} {text!r}; give a number of tokens below {MOST_TOKENS:.0e}, such as 100B, 1.5T, 1e9 or "
            f"2_000_000"
        )
    return round(number)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget and the machines.

    `tokens` are those of the training that would come now, counted as a run's metrics.jsonl counts them: a
    row has the tokens of all its stacks (encoder and decoder, or stages) together.
    """

    tokens: int
    dense_tokens: int | None = None  # of the dense model's training; None: not known
    gpus: int | None = None
    gpu: str = "H100"
    context: int | None = None  # tokens of a row of text

    def __post_init__(self) -> None:
        for name in ("tokens", "dense_tokens"):  # people say 100B
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, parse_tokens(given, f"--{name.replace('_', '-')}"))
        for option, value in (
            ("tokens", self.tokens), ("dense-tokens", self.dense_tokens), ("gpus", self.gpus),
            ("context", self.context),
        ):  # fmt: skip
            if (value is not None or option == "tokens") and (type(value) is not int or value < 1):
                raise UpcycleError(f"--{option} {shown(value)}; it must be a whole number of 1 or more")
        gpus.find(self.gpu)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The question and the blueprint, from which every statement is made."""

    asked: Budget
    built: Blueprint

    def __post_init__(self) -> None:
        if not self.built.sites:
            raise UpcycleError(
                f"moe.target = {self.built.recipe.moe.target} makes a dense model; advise is about a Mixture "
                f"of Experts, so choose another target"
            )
        if (part := self.built.recipe.moe.part) != TEXT:
            raise UpcycleError(
                f"moe.part = {part}: advise is about training on texts, which never reach a vision tower; "
                f"set moe.part = text"
            )
        if self.asked.context is not None and self.of_images:
            raise UpcycleError(f"--context is for text; an image is {self.row} tokens here, leave it out")

    @cached_property
    def plan(self) -> Plan:
        """The plan: what the MoE costs."""
        return plan_of(self.built)

    @property
    def gpu(self) -> Gpu:
        """The kind of GPU."""
        return gpus.find(self.asked.gpu)

    @property
    def of_images(self) -> bool:
        """Return whether a row is an image. It then has as many tokens as the model cuts it into."""
        return "image_size" in self.built.dense.config

    @property
    def kind(self) -> Kind:
        """The kind of the model, by which published results are told apart."""
        causal = {stack.causal for stack in self.built.dense.stacks}
        if self.of_images:
            attends = self.built.dense.config["num_attention_heads"] > 0
            return "vision transformer" if attends else "convolutional network"
        if len(causal) == 2:
            return "encoder-decoder"
        return "decoder" if causal == {True} else "encoder"

    @cached_property
    def lengths(self) -> Mapping[str, int]:
        """The tokens of a row in each stack of blocks.

        Raises `UpcycleError` for a text that is longer than the model takes.
        """
        return row_of(self.built.dense, self.asked.context, setting="--context")

    @property
    def row(self) -> int:
        """The tokens of a row in all stacks together, as `--tokens` and a run's metrics.jsonl count them."""
        return sum(self.lengths.values())

    @property
    def row_said(self) -> str:
        """The number of tokens of a row or an image, in words."""
        parts = ", ".join(f"{length:,} in {stack}" for stack, length in self.lengths.items())
        what = "an image counts as" if self.of_images else "rows of"
        return f"{what} {self.row:,} tokens" + (f" ({parts})" if len(self.lengths) > 1 else "")

    @cached_property
    def dense_flops(self) -> float:
        """The FLOPs of training the dense model on a token."""
        return 3 * flops_per_row(self.built.dense, None, self.lengths) / self.row

    @cached_property
    def moe_flops(self) -> float:
        """The FLOPs of training the MoE on a token."""
        return 3 * flops_per_row(self.built.dense, self.built, self.lengths) / self.row

    @property
    def dense_tokens_for_the_same(self) -> float:
        """The tokens that the FLOPs of the MoE's budget pay for in training the dense model."""
        return self.asked.tokens * self.moe_flops / self.dense_flops

    @property
    def share_of_tokens(self) -> float | None:
        """The budget as a share of the dense model's training, in tokens; None if that is not known."""
        return self.asked.tokens / self.asked.dense_tokens if self.asked.dense_tokens else None

    @property
    def share_of_cost(self) -> float | None:
        """The budget as a share of the dense model's training, in FLOPs; None if that is not known."""
        return self.dense_tokens_for_the_same / self.asked.dense_tokens if self.asked.dense_tokens else None

    @property
    def trained(self) -> float | None:
        """The tokens of the dense model's training per parameter; None if they are not known.

        With a successor, these are the parameters of the narrower dense model, as if it had seen as many.
        """
        return self.asked.dense_tokens / self.plan.dense_parameters if self.asked.dense_tokens else None

    @property
    def grows(self) -> bool:
        """Return whether the source has experts already. No result that is known here is of such a model."""
        return self.built.recipe.grow is not None

    @property
    def before(self) -> str:
        """The model that the MoE is compared with, in words."""
        if self.grows:
            return "the source"
        return "the dense model" if self.plan.predecessor is None else "the narrower dense model"

    @property
    def copies(self) -> bool:
        """Return whether experts are whole copies of the dense network, up to noise of `SMALL_NOISE`."""
        init = self.built.recipe.init
        if isinstance(init, NoisyCopy):
            still = not init.sigma or not init.fraction
            return still or (init.relative and init.sigma <= SMALL_NOISE)
        return init.name == "copy" or (isinstance(init, Drop) and init.ratio == 0)

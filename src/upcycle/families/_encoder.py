"""The common part of the encoders: several classes with different heads, and checks of their sizes."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._checked import check
from upcycle.families._training import Trained
from upcycle.families._weights import below


class Encoder(Trained):
    """A family whose checkpoints are of one of several classes; it has no native MoE.

    A class with a head holds the base model below `prefix`; the base model itself has no prefix.
    """

    prefix: ClassVar[str]
    before: tuple[str, ...] = ("embeddings.",)
    after: tuple[str, ...] = ("pooler.",)
    sizes: ClassVar[tuple[str, ...]] = ("hidden_size", "num_hidden_layers", "num_attention_heads")

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        config: Config = {**self.defaults, **raw}
        if missing := [key for key in self.sizes if key not in config]:
            raise UpcycleError(f"config.json of a {self.model_type} model lacks {', '.join(missing)}")
        named = raw.get("architectures") or [self.architectures[0]]
        if named[0] not in self.architectures:
            raise UpcycleError(
                f"config.json names the class {named[0]}; of {self.model_type}, upcycle knows "
                f"{', '.join(self.architectures)}"
            )
        config["architectures"] = [named[0]]
        config.setdefault("tie_word_embeddings", False)
        return self.finish(config)

    def finish(self, config: Config) -> Config:
        """Add fields that follow from others, under the names that the rest of the project reads."""
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        return config

    def base(self, config: Config) -> str:
        """Return the prefix of the names of the base model's tensors."""
        return "" if config["architectures"][0] == self.architectures[0] else f"{self.prefix}."

    @abc.abstractmethod
    def body(self, config: Config) -> Weights:
        """Return the tensors of the base model without head and pooler, by their names in it."""

    @abc.abstractmethod
    def head(self, config: Config) -> Weights:
        """Return the tensors that the config's class has beyond those of `body`, by their full names."""

    def weights(self, config: Config) -> Weights:
        return below(self.base(config), self.body(config)) | self.head(config)


def num_labels(config: Config) -> int:
    """Return the number of classes of a head: as many as config.json names, or two if it names none."""
    return len(config["id2label"]) if config.get("id2label") else 2


def pair(value: Any) -> tuple[int, int]:
    """Return height and width, given as one number or two. Raises `UpcycleError` for anything else."""
    both = (
        (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    )
    if len(both) != 2 or not all(type(side) is int and side > 0 for side in both):
        raise UpcycleError(f"config.json has {value!r} for a height and a width; it must be a number or two")
    return both[0], both[1]

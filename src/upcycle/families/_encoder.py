"""What the encoders have in common: several classes with different heads, and sizes that must make sense."""

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

    A class with a head holds the base model below `prefix`, the base model itself holds it bare.
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
        """Fields that follow from others, under the names that the rest of the project reads."""
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        return config

    def base(self, config: Config) -> str:
        """What stands before the names of the base model's tensors."""
        return "" if config["architectures"][0] == self.architectures[0] else f"{self.prefix}."

    @abc.abstractmethod
    def body(self, config: Config) -> Weights:
        """The tensors of the base model without head and pooler, by their names in it."""

    @abc.abstractmethod
    def head(self, config: Config) -> Weights:
        """The tensors of the class that the config names beyond those of `body`, by their full names."""

    def weights(self, config: Config) -> Weights:
        return below(self.base(config), self.body(config)) | self.head(config)


def num_labels(config: Config) -> int:
    """Classes of a head: as many as config.json names, two where it names none."""
    return len(config["id2label"]) if config.get("id2label") else 2


def pair(value: Any) -> tuple[int, int]:
    """Height and width, given as one number or two. Raises `UpcycleError` for anything else."""
    both = (
        (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    )
    if len(both) != 2 or not all(type(side) is int and side > 0 for side in both):
        raise UpcycleError(f"config.json has {value!r} for a height and a width; it must be a number or two")
    return both[0], both[1]

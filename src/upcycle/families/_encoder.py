"""The common part of the encoders: several classes with different heads, and checks of their sizes."""

from __future__ import annotations

import abc
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._checked import check
from upcycle.families._training import Trained
from upcycle.families._weights import below, row_linear


class Encoder(Trained):
    """A family whose checkpoints are of one of several classes; it has no native MoE.

    A class with a head holds the base model below `prefix`; the base model itself has no prefix. A class that
    is not in `architectures` and whose name begins like them has a head of its own, of whatever tensors are
    stored beside the base model.
    """

    former = {".gamma": ".weight", ".beta": ".bias"}
    renamed: ClassVar[Mapping[str, str]] = {}  # classes that are called otherwise today
    # what the names of tensors begin with that some class has and another leaves out, below the class
    heads: ClassVar[tuple[str, ...]] = ("pooler.", "classifier.", "qa_outputs.")
    # the last layer of the head of its class ForSequenceClassification, if `head` does not list it
    over_classes: ClassVar[str] = ""
    pooler = ""  # the name of the pooler's matrix in the base model, if it may be missing

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
        name = self.renamed.get(named[0], named[0])
        if name not in self.architectures and not name.startswith(self.stem):
            raise UpcycleError(
                f"config.json names the class {named[0]}; of {self.model_type}, upcycle knows "
                f"{', '.join(self.architectures)} and others that begin with {self.stem}"
            )
        config["architectures"] = [name]
        config.setdefault("tie_word_embeddings", False)
        return self.finish(config)

    @property
    def stem(self) -> str:
        """The beginning of the names of its classes."""
        return re.split("For|EncoderModel|Model", self.architectures[0])[0] + "For"

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
        head = self.head(config) if config["architectures"][0] in self.architectures else {}
        return below(self.base(config), self.body(config)) | head

    def may_lack(self, config: Config) -> frozenset[str]:
        """Return the pooler of the base model, which self-supervised models and embedders do without."""
        if self.base(config) or not self.pooler:
            return frozenset()
        return frozenset(name for name in self.head(config) if name.startswith(self.pooler))

    def unlisted(self, config: Config, name: str) -> bool:
        """Return whether a stored tensor is of the head of a class that `architectures` does not list."""
        if config["architectures"][0] in self.architectures:
            return False
        base = self.base(config)
        return not name.startswith(base) or (
            bool(self.pooler) and name.removeprefix(base).startswith(self.pooler)
        )

    def body_class(self, config: Config, stored: Collection[str]) -> str | None:
        base = self.base(config)
        heads = tuple(start for start in self.heads if start != self.pooler)
        if not base or any(name.startswith((base, *heads)) for name in {*stored} - self.body(config).keys()):
            return None
        return self.architectures[0]

    def class_options(self, config: Config, stored: Collection[str]) -> Mapping[str, Any]:
        return {"add_pooling_layer": False} if self.may_lack(config) - set(stored) else {}

    def class_head(self, config: Config) -> Weights:
        name = config["architectures"][0]
        if name in self.architectures or not name.endswith("ForSequenceClassification"):
            return {}
        size = (num_labels(config), config["hidden_size"])
        return row_linear(self.over_classes, *size) if self.over_classes else {}

    def ignored(self, name: str) -> str | None:
        if name.removeprefix(f"{self.prefix}.").startswith(self.heads):
            return "of another head than that of the class in config.json"
        return super().ignored(name)


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

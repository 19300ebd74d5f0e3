"""The dense side: a checkpoint that was admitted as a dense model of a known family (`admission.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle import families
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense import fingerprint, places
from upcycle.dense.places import Place
from upcycle.families import CAUSAL_HEADS, Config, Family, Stack, Weights
from upcycle.families._weights import Weight
from upcycle.tensors.entries import Entry
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy, Stored


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense checkpoint, its family, and its config with every default in place."""

    checkpoint: Checkpoint
    family: Family
    config: Config
    left_out: Mapping[str, str]  # stored tensors that the model does not have, and why they may be left out
    place: Place = places.WHOLE  # where it stands in the checkpoint
    keeps_further: bool = False  # whether blocks that predict further tokens stay beside it

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of config, tensors and content, whatever the checkpoint is called."""
        return fingerprint.of(self)

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        """The model's tensors by the names of its family."""
        found = ((self.place.own(name), info) for name, info in self._kept())
        stored: dict[str, Lazy] = {
            own: Stored(self.checkpoint, info) for own, info in found if own is not None
        }
        return self.family.as_opened(self.config, stored)

    @cached_property
    def around(self) -> dict[str, Lazy]:
        """The tensors of the model around it, by their names on disk; empty if it stands alone."""
        found = ((name, info) for name, info in self._kept() if self.place.own(name) is None)
        return {name: Stored(self.checkpoint, info) for name, info in found}

    @cached_property
    def stored(self) -> dict[str, Lazy]:
        """All tensors of its class, by their names on disk: the model's own, and those around it."""
        return {self.place.stored(name): tensor for name, tensor in self.tensors.items()} | self.around

    @property
    def entries(self) -> dict[str, Entry]:
        """The same tensors, in the types in which they are stored."""
        return {name: Entry(tensor, tensor.dtype) for name, tensor in self.stored.items()}

    @property
    def outer(self) -> Mapping[str, Any]:
        """config.json of a checkpoint that holds `stored`."""
        return self.place.outer(self.family, self.checkpoint.config)

    def _kept(self) -> Iterator[tuple[str, TensorInfo]]:
        stored = self.checkpoint.tensors.items()
        return ((name, info) for name, info in stored if name not in self.left_out)

    @cached_property
    def weights(self) -> Weights:
        """The kind of each tensor."""
        listed = self.family.weights(self.config) | self.family.optional(self.config)
        return {name: listed.get(name) or Weight(tensor.shape) for name, tensor in self._in_order(listed)}

    def _in_order(self, listed: Weights) -> Iterator[tuple[str, Lazy]]:
        """Yield the tensors: those that the family lists in its order, and then the others."""
        for name in [
            *(n for n in listed if n in self.tensors),
            *(n for n in self.tensors if n not in listed),
        ]:
            yield name, self.tensors[name]

    @property
    def raw(self) -> Mapping[str, Any]:
        """The model's own config as config.json has it, without what is left out."""
        raw = self.place.config(self.checkpoint.config)
        return raw if self.keeps_further else self.family.tidied(raw)

    @property
    def others(self) -> tuple[Checkpoint, ...]:
        """The other checkpoints that its tensors come from."""
        return ()

    def left_aside(self, experts: set[tuple[str, int]]) -> dict[str, str]:
        """Return the stored tensors that are unused because another checkpoint has them, with the reason.

        `experts` has the blocks, by stack and number, whose networks become experts.
        """
        return {}

    @property
    def architecture(self) -> str:
        """The transformers class that opens the checkpoint."""
        return self.place.architecture(self.family, self._named)

    @property
    def own_class(self) -> str:
        """The transformers class of the model itself, without what is around it."""
        return self.place.own_class(self.family, self._named)

    @property
    def _named(self) -> str:
        named = self.config.get("architectures") or self.family.architectures
        return str(named[0])

    @property
    def has_language_head(self) -> bool:
        """True if it predicts tokens of a vocabulary."""
        return self.place.speaks and self.architecture.endswith(
            (*CAUSAL_HEADS, "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
        )

    @property
    def is_whole(self) -> bool:
        """True if it is all of its checkpoint, and has the head of its class."""
        return type(self.place) is Place

    @property
    def can_untie(self) -> bool:
        """True if a head that is tied to the embeddings can be stored on its own (`moe.untie`)."""
        return self.is_whole and self.has_language_head and self.family.tied is not None

    @property
    def tied_head(self) -> int:
        """The number of weights in a head that is tied to the embedding, and so is not among the tensors."""
        c, tied = self.config, self.family.tied
        if not c["tie_word_embeddings"] or not self.has_language_head or (tied and tied[0] in self.tensors):
            return 0
        return int(c["vocab_size"] * c["hidden_size"])

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks that hold its feed-forward networks."""
        return self.family.stacks(self.config)

    @cached_property
    def lengths(self) -> dict[str, int]:
        """The default number of tokens of a row in each stack, for when one has to be assumed."""
        return self.family.lengths(self.config)

    def stack(self, name: str) -> Stack:
        """Return the stack called `name`."""
        return next(stack for stack in self.stacks if stack.name == name)

    @cached_property
    def _networks(self) -> dict[tuple[str, int], FeedForward]:
        return {}

    def feed_forward(self, layer: int, stack: str = "layers") -> FeedForward:
        """Return the feed-forward network of a block."""
        place = stack, layer
        if place not in self._networks:
            self._networks[place] = self.family.feed_forward(self.config, layer, self.tensors, stack)
        return self._networks[place]

    def origin(self, layer: int, stack: str = "layers") -> FeedForward:
        """Return the network that the experts of a block are made from."""
        return self.feed_forward(layer, stack)

    def comparable(self, layer: int, stack: str = "layers") -> FeedForward | None:
        """Return the network that experts of a block can be compared with, or None if there is none."""
        return self.feed_forward(layer, stack)

    @property
    def whole(self) -> Dense:
        """The model as its checkpoint has it."""
        return self

    @property
    def idle(self) -> int:
        """The number of weights in products that a token does not meet, because experts have them."""
        return 0

    @property
    def called(self) -> str:
        """The word for such a model in a sentence."""
        return "dense"

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """The keys of config.json that the family does not know."""
        known = {*self.family.defaults, *families.SILENT, *self.family.reads}
        return tuple(sorted(key for key in self.raw if key not in known))

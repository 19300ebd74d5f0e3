"""The encoder of images of a CLIP or a SigLIP by itself, as it stands in most multimodal models."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.families import Config, Grid, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._dual import blocks, branches, counted_out, image, network, patches, positions, stack
from upcycle.families._training import Trained
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

VISION = "vision"


class ImageEncoder(Trained):
    """One half of a dual encoder, with the names that transformers gives it when it stands alone."""

    sees = True
    class_token: ClassVar[bool]  # whether a token stands before the patches of an image
    before = ("embeddings.", "pre_layrnorm.")
    after = ("post_layernorm.", "head.")

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        config: Config = {**self.defaults, **raw, "tie_word_embeddings": False}
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        config["architectures"] = [self.architectures[0]]
        return config

    @abc.abstractmethod
    def outside(self, config: Config) -> Weights:
        """Return the tensors outside the blocks."""

    def weights(self, config: Config) -> Weights:
        return self.outside(config) | blocks(config)

    def length(self, config: Config) -> int:
        return positions(config, class_token=self.class_token)

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid:
        return patches(config)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"pixel_values": ("pixels", (4, *image(config)))}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (stack(config, VISION, "", causal=False),)

    def stack_of(self, name: str) -> str:
        return VISION

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return branches(stack)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = VISION
    ) -> FeedForward:
        return network(tensors, "", layer)

    def ignored(self, name: str) -> str | None:
        return counted_out(name) or super().ignored(name)

"""Pixtral's encoder of images, as it stands in Mistral's multimodal models.

A row has all images of a batch one after the other, and a mask keeps them apart.
"""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Grid, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._dual import image, patches, positions
from upcycle.families._encoder import pair
from upcycle.families._training import Trained
from upcycle.families._weights import Matrix, below, rms_norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

_BLOCK = "transformer.layers.{i}."
_ROPE = "rope_parameters"  # positions in two axes, which are no setting


class Pixtral(Trained):
    model_type = "pixtral"
    architectures = ("PixtralVisionModel",)
    summary = "the encoder of images of Pixtral and Mistral Small 3"
    sees = True
    before = ("patch_conv.", "ln_pre.")
    after = ()
    reads = frozenset({"head_dim"})
    defaults = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_channels": 3, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
        "initializer_range": 0.02,
    }  # fmt: skip

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, {key: value for key, value in raw.items() if key != _ROPE})
        config: Config = {**self.defaults, **raw, "tie_word_embeddings": False}
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        config["architectures"] = [self.architectures[0]]
        return config

    def rotation(self, config: Config) -> Config:
        rope = config.get(_ROPE) or {}
        return {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0))}

    def weights(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        out: Weights = {
            "patch_conv.weight": Matrix((hidden, config["num_channels"], *pair(config["patch_size"])))
        }
        out |= rms_norm("ln_pre", hidden)
        block: Weights = rms_norm("attention_norm", hidden) | rms_norm("ffn_norm", hidden)
        block |= {f"attention.{part}_proj.weight": Matrix((hidden, hidden)) for part in "qkvo"}
        block |= {f"feed_forward.{part}_proj.weight": Matrix((width, hidden)) for part in ("gate", "up")}
        block["feed_forward.down_proj.weight"] = Matrix((hidden, width))
        for i in range(config["num_hidden_layers"]):
            out |= below(_BLOCK.format(i=i), block)
        return out

    def length(self, config: Config) -> int:
        return positions(config, class_token=False)

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid:
        return patches(config)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"pixel_values": ("pixels", (2, *image(config)))}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return (
            Stack(
                name="vision",
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["hidden_size"],
                path=_BLOCK + "feed_forward",
                owned=(_BLOCK + "feed_forward.",),
                module=_BLOCK + "feed_forward",
                norm_path=_BLOCK + "ffn_norm",
                down=_BLOCK + "feed_forward.down_proj",
                heads=(_BLOCK + "attention.o_proj",),
                causal=False,
                joined=True,
                activation=config["hidden_act"],
            ),
        )

    def stack_of(self, name: str) -> str:
        return "vision"

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return (_BLOCK + "attention", _BLOCK + "feed_forward")

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "vision"
    ) -> FeedForward:
        gate, up, down = (
            tensors[f"{_BLOCK.format(i=layer)}feed_forward.{part}_proj.weight"]
            for part in ("gate", "up", "down")
        )
        return FeedForward(gate=gate, up=up, down=down)


family = Pixtral()

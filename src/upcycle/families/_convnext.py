"""ConvNeXt as transformers stores it: four stages of blocks, each with its own number of channels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Grid, Stack, Weights
from upcycle.families._encoder import Encoder, num_labels, pair
from upcycle.families._weights import Bias, Matrix, below, linear, norm, row_linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

STAGES = 4  # the same in every published ConvNeXt
RATIO = 4  # neurons of a network per channel
KERNEL = 7  # size of the depthwise convolution
STRIDE = 2  # of the convolution between two stages


class ConvNeXt(Encoder):
    """Blocks of a depthwise convolution, a norm, and a network of two matrices on the channels.

    A place of the feature map is a token, and the places of an image form a row of tokens.
    """

    sizes = ("num_channels",)
    network: tuple[str, ...] = ("pwconv1", "pwconv2")  # modules of a block's network, in memory and on disk
    counts = ("depths",)
    after = ("layernorm.",)

    def finish(self, config: Config) -> Config:
        hidden = max(config["hidden_sizes"])
        return config | {
            "num_hidden_layers": sum(config["depths"]),
            "hidden_size": hidden,
            "intermediate_size": RATIO * hidden,
            "num_attention_heads": 0,
            "head_dim": 0,
        }

    def lengths(self, config: Config) -> dict[str, int]:
        """Return the places of the feature map per stage: 56^2, 28^2, 14^2 and 7^2 for a 224 x 224 image."""
        image, patch = pair(config["image_size"]), pair(config["patch_size"])
        grids = {f"stage_{s + 1}": self.grid(config, f"stage_{s + 1}") for s in range(STAGES)}
        found = {name: grid.rows * grid.columns for name, grid in grids.items()}
        if not all(found.values()):
            raise UpcycleError(
                f"config.json of a {self.model_type} model: an image of {image[0]} x {image[1]} in patches "
                f"of {patch[0]} x {patch[1]} leaves nothing for the last stage; it must be "
                f"{STRIDE ** (STAGES - 1)} patches high and wide"
            )
        return found

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid:
        """Return the patches of a stage; each later stage merges them two by two and drops any rest."""
        image, patch = pair(config["image_size"]), pair(config["patch_size"])
        merged = STRIDE ** self.number(stack)
        return Grid(
            rows=image[0] // patch[0] // merged,
            columns=image[1] // patch[1] // merged,
            height=patch[0] * merged,
            width=patch[1] * merged,
        )

    def length(self, config: Config) -> int:
        """Return the tokens of an image in the first stage, which has the most."""
        return self.lengths(config)["stage_1"]

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        images = max(1, tokens // self.length(config))
        return {"pixel_values": ("pixels", (images, config["num_channels"], *pair(config["image_size"])))}

    def body(self, config: Config) -> Weights:
        sizes = config["hidden_sizes"]
        patch = (sizes[0], config["num_channels"], *pair(config["patch_size"]))
        out: Weights = {
            "embeddings.patch_embeddings.weight": Matrix(patch),
            "embeddings.patch_embeddings.bias": Bias((sizes[0],)),
            **norm("embeddings.layernorm", sizes[0]),
        }
        for s, (hidden, depth) in enumerate(zip(sizes, config["depths"], strict=True)):
            stage = f"encoder.stages.{s}."
            if s:
                out |= norm(f"{stage}downsampling_layer.0", sizes[s - 1])
                out[f"{stage}downsampling_layer.1.weight"] = Matrix((hidden, sizes[s - 1], STRIDE, STRIDE))
                out[f"{stage}downsampling_layer.1.bias"] = Bias((hidden,))
            for i in range(depth):
                out |= below(f"{stage}layers.{i}.", self.block(config, hidden))
        return out | norm("layernorm", sizes[-1])

    def block(self, config: Config, hidden: int) -> Weights:
        """Return the tensors of a block with so many channels, by their names in it."""
        width = RATIO * hidden
        return {
            "dwconv.weight": Matrix((hidden, 1, KERNEL, KERNEL)),
            "dwconv.bias": Bias((hidden,)),
            **norm("layernorm", hidden),
            **linear("pwconv1", width, hidden),
            **linear("pwconv2", hidden, width),
        }

    def head(self, config: Config) -> Weights:
        if config["architectures"][0] == self.architectures[0]:
            return {}
        return row_linear("classifier", num_labels(config), config["hidden_sizes"][-1])

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        depths = config["depths"]
        begins = [0, *accumulate(depths)]
        out = []
        for s, (hidden, depth) in enumerate(zip(config["hidden_sizes"], depths, strict=True)):
            module = f"encoder.stages.{s}.layers.{{i}}."
            block = self.base(config) + module
            out.append(
                Stack(
                    name=f"stage_{s + 1}",
                    count=depth,
                    first=begins[s],
                    total=begins[-1],
                    hidden=hidden,
                    width=RATIO * hidden,
                    path=block + "pwconv1",
                    owned=tuple(f"{block}{name}." for name in self.network),
                    module=module + "pwconv1",
                    replaced=tuple(module + name for name in ("act", *self.network[1:])),
                    down=module + "pwconv2",
                    causal=False,
                    activation=config["hidden_act"],
                    norm_path=block + "layernorm",
                )
            )
        return tuple(out)

    def depth(self, name: str, counts: Mapping[str, int]) -> int:
        """Group parameters as timm does: those that lead into a stage learn with its first block."""
        blocks, _, rest = name.partition(".downsampling_layer.")
        return super().depth(f"{blocks}.layers.0." if rest else name, counts)

    def stack_of(self, name: str) -> str:
        return f"stage_{self.stage(name) + 1}"

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return (f"{stack.blocks}.{{i}}.drop_path",)  # an identity if config.json has no rate

    def own_norm(self, config: Config, stack: Stack) -> str:
        return f"{stack.blocks}.{{i}}.layernorm"

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        block = f"{self.base(config)}encoder.stages.{self.number(stack)}.layers.{layer}."
        return FeedForward(
            up=tensors[block + "pwconv1.weight"],
            up_bias=tensors[block + "pwconv1.bias"],
            down=tensors[block + "pwconv2.weight"],
            down_bias=tensors[block + "pwconv2.bias"],
        )

    @staticmethod
    def number(stack: str) -> int:
        """Return the number on disk of a stage by its name; stage_1 is 0."""
        return int(stack.removeprefix("stage_")) - 1

    @staticmethod
    def stage(name: str) -> int:
        """Return the stage, from 0, that gives the channels of a tensor; patches belong to the first one."""
        _, _, after = name.partition("encoder.stages.")
        return int(after[0]) if after else 0 if ".embeddings." in f".{name}" else STAGES - 1


DEFAULTS = {
    "num_channels": 3,
    "patch_size": 4,
    "num_stages": 4,
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "image_size": 224,
}

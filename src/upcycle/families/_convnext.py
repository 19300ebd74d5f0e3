"""ConvNeXt as transformers keeps it on disk: four stages of blocks, each with channels of its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from upcycle.errors import UpcycleError
from upcycle.families import Axes, Axis, Config, Shapes, Stack
from upcycle.families._encoder import Encoder, linear, norm, num_labels, pair
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

STAGES = 4  # of every ConvNeXt that was published
RATIO = 4  # neurons of a network for each of its channels
KERNEL = 7  # of the depthwise convolution
STRIDE = 2  # of the convolution between two stages


class ConvNeXt(Encoder):
    """Blocks of a depthwise convolution, a norm, and a network of two matrices on the channels of each place.

    A place of the feature map is a token, and the places of an image are a row of them.
    """

    sizes = ("num_channels",)
    block_paths = tuple(f"encoder.stages.{s}.layers.*" for s in range(STAGES))

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
        """Places of the feature map in each stage: 56^2, 28^2, 14^2 and 7^2 of an image of 224 x 224."""
        image, patch = pair(config["image_size"]), pair(config["patch_size"])
        height, width = image[0] // patch[0], image[1] // patch[1]
        found = {}
        for s in range(STAGES):
            found[f"stage_{s + 1}"] = (height // STRIDE**s) * (width // STRIDE**s)
        if not all(found.values()):
            raise UpcycleError(
                f"config.json of a {self.model_type} model: an image of {image[0]} x {image[1]} in patches "
                f"of {patch[0]} x {patch[1]} leaves nothing for the last stage; it must be "
                f"{STRIDE ** (STAGES - 1)} patches high and wide"
            )
        return found

    def length(self, config: Config) -> int:
        """Tokens of an image in the first stage, where there are most."""
        return self.lengths(config)["stage_1"]

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        images = max(1, tokens // self.length(config))
        return {"pixel_values": ("pixels", (images, config["num_channels"], *pair(config["image_size"])))}

    def body(self, config: Config) -> Shapes:
        sizes = config["hidden_sizes"]
        patch = (sizes[0], config["num_channels"], *pair(config["patch_size"]))
        out: Shapes = {
            "embeddings.patch_embeddings.weight": patch,
            "embeddings.patch_embeddings.bias": (sizes[0],),
            **norm("embeddings.layernorm", sizes[0]),
        }
        for s, (hidden, depth) in enumerate(zip(sizes, config["depths"], strict=True)):
            stage = f"encoder.stages.{s}."
            if s:
                out |= norm(f"{stage}downsampling_layer.0", sizes[s - 1])
                out[f"{stage}downsampling_layer.1.weight"] = (hidden, sizes[s - 1], STRIDE, STRIDE)
                out[f"{stage}downsampling_layer.1.bias"] = (hidden,)
            for i in range(depth):
                block = self.block(config, hidden).items()
                out |= {f"{stage}layers.{i}.{name}": shape for name, shape in block}
        return out | norm("layernorm", sizes[-1])

    def block(self, config: Config, hidden: int) -> Shapes:
        """The tensors of a block of so many channels, by their names in it."""
        width = RATIO * hidden
        return {
            "dwconv.weight": (hidden, 1, KERNEL, KERNEL),
            "dwconv.bias": (hidden,),
            **norm("layernorm", hidden),
            **linear("pwconv1", width, hidden),
            **linear("pwconv2", hidden, width),
        }

    def head(self, config: Config) -> Shapes:
        if config["architectures"][0] == self.architectures[0]:
            return {}
        return linear("classifier", num_labels(config), config["hidden_sizes"][-1])

    def axes(self, config: Config) -> Axes:
        of = [Axis("channels", f"stage_{s + 1}") for s in range(STAGES)]
        known: Axes = {"classifier.weight": (None, of[-1]), "classifier.bias": (None,)}
        base = self.base(config)
        for s, channels in enumerate(of):
            stage = f"{base}encoder.stages.{s}."
            if s:
                known |= dict.fromkeys(norm(f"{stage}downsampling_layer.0", 0), (of[s - 1],))
                known[f"{stage}downsampling_layer.1.weight"] = (channels, of[s - 1], None, None)
            for i in range(config["depths"][s]):
                neurons = Axis("neurons", f"stage_{s + 1}", i)
                block = f"{stage}layers.{i}."
                known[f"{block}pwconv1.weight"] = (neurons, channels)
                known[f"{block}pwconv1.bias"] = (neurons,)
                known[f"{block}pwconv2.weight"] = (channels, neurons)
        rest = {  # kernels, norms, layer scale, and biases of what gives channels
            name: (of[self._stage(name)], *(None,) * (len(shape) - 1))
            for name, shape in self.shapes(config).items()
        }
        return {name: known.get(name, axes) for name, axes in rest.items()}

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        stages = [f"stage_{s + 1}" for s in range(STAGES)]
        if any(width[name] != RATIO * hidden[name] for name in stages):
            raise UpcycleError(
                f"successor.intermediate_size: the networks of a {self.model_type} have {RATIO} neurons a "
                f"channel, and config.json has no other; leave it out (moe.expert_width is for experts)"
            )
        return {"hidden_sizes": [hidden[name] for name in stages]}

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
                    norm=module + "layernorm",
                    norm_path=block + "layernorm",
                    branches=(module + "drop_path",),  # an identity where config.json has no rate
                )
            )
        return tuple(out)

    def depth(self, name: str, counts: Mapping[str, int]) -> int:
        """As timm groups them: what leads into a stage learns with its first block."""
        blocks, _, rest = name.partition(".downsampling_layer.")
        return super().depth(f"{blocks}.layers.0." if rest else name, counts)

    def stack_of(self, name: str) -> str:
        return f"stage_{self._stage(name) + 1}"

    def constant(self, config: Config, name: str) -> float | None:
        if name.endswith("layer_scale_parameter"):
            return float(config["layer_scale_init_value"])
        return 1.0 if name.endswith("downsampling_layer.0.weight") else None  # a norm

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
        """The number on disk of the stage that is called so: stage_1 is 0."""
        return int(stack.removeprefix("stage_")) - 1

    network: tuple[str, ...] = (
        "pwconv1",
        "pwconv2",
    )  # what a block's network is made of, in memory and on disk

    @staticmethod
    def _stage(name: str) -> int:
        """The stage, from 0, that gives the channels of a tensor: patches are of the first one."""
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

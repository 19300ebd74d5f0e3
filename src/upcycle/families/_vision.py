"""The Vision Transformer as transformers keeps it on disk: ViT and DeiT, and in most of it DINOv2."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.families import Axes, Axis, Config, Shapes, Stack
from upcycle.families._encoder import Encoder, linear, norm, num_labels, pair
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class VisionTransformer(Encoder):
    """Pre-norm blocks with a plain network of two matrices; `tokens` are what stands before the patches."""

    sizes = (*Encoder.sizes, "intermediate_size")
    tokens: tuple[str, ...] = ("cls_token",)
    norms = ("layernorm_before", "layernorm_after")
    branches: tuple[str, ...] = ("attention", "mlp")  # modules of a block that give to the residual stream

    def patches(self, config: Config) -> int:
        """Tokens of an image, without those that stand before them."""
        image, patch = pair(config["image_size"]), pair(config["patch_size"])
        return (image[0] // patch[0]) * (image[1] // patch[1])

    def length(self, config: Config) -> int:
        """Tokens of an image in the blocks."""
        return self.patches(config) + len(self.tokens)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        images = max(1, tokens // self.length(config))
        return {"pixel_values": ("pixels", (images, config["num_channels"], *pair(config["image_size"])))}

    def body(self, config: Config) -> Shapes:
        hidden = config["hidden_size"]
        patch = (hidden, config["num_channels"], *pair(config["patch_size"]))
        out: Shapes = {f"embeddings.{token}": (1, 1, hidden) for token in self.tokens}
        out |= {
            "embeddings.position_embeddings": (1, self.length(config), hidden),
            "embeddings.patch_embeddings.projection.weight": patch,
            "embeddings.patch_embeddings.projection.bias": (hidden,),
        }
        for i in range(config["num_hidden_layers"]):
            out |= {f"encoder.layer.{i}.{name}": shape for name, shape in self.block(config).items()}
        return out | norm("layernorm", hidden)

    def block(self, config: Config) -> Shapes:
        """The tensors of a block, by their names in it."""
        hidden = config["hidden_size"]
        out: Shapes = {}
        for part in ("query", "key", "value"):
            out |= linear(f"attention.attention.{part}", hidden, hidden, bias=config["qkv_bias"])
        out |= linear("attention.output.dense", hidden, hidden)
        for name in self.norms:
            out |= norm(name, hidden)
        return out | self.network(config)

    def network(self, config: Config) -> Shapes:
        """The tensors of a block's feed-forward network, by their names in the block."""
        hidden, width = config["hidden_size"], config["intermediate_size"]
        return linear("intermediate.dense", width, hidden) | linear("output.dense", hidden, width)

    def head(self, config: Config) -> Shapes:
        hidden = config["hidden_size"]
        if config["architectures"][0] == self.architectures[0]:
            return linear("pooler.dense", config.get("pooler_output_size") or hidden, hidden)
        return linear("classifier", num_labels(config), hidden)

    def axes(self, config: Config) -> Axes:
        base, channels = self.base(config), Axis("channels")
        out: Axes = {name: (None, None, channels) for name in self.shapes(config) if name.endswith("_token")}
        out[f"{base}embeddings.position_embeddings"] = (None, None, channels)
        out[f"{base}embeddings.patch_embeddings.projection.weight"] = (channels, None, None, None)
        up, down = self.plain
        for i in range(config["num_hidden_layers"]):
            heads = Axis("heads", layer=i, unit=config["head_dim"])
            neurons = Axis("neurons", layer=i)
            block = f"{base}encoder.layer.{i}."
            for part in ("query", "key", "value"):
                out[f"{block}attention.attention.{part}.weight"] = (heads, channels)
                out[f"{block}attention.attention.{part}.bias"] = (heads,)
            out[f"{block}attention.output.dense.weight"] = (channels, heads)
            out[f"{block}{up}.weight"] = (neurons, channels)
            out[f"{block}{up}.bias"] = (neurons,)
            out[f"{block}{down}.weight"] = (channels, neurons)
        out["pooler.dense.weight"] = (channels, channels)
        shapes = self.shapes(config)
        for name in shapes:
            if "classifier" in name:
                out[name] = (None, channels)[: len(shapes[name])]
        return {
            name: out.get(name, (channels,)) for name in shapes
        }  # norms, and biases of what adds channels

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        block = self.base(config) + "encoder.layer.{i}."
        in_memory = self.block_paths[0].replace("*", "{i}.")
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                path=block + "mlp",
                owned=(block + "intermediate.", block + "output.", block + "mlp."),
                module=in_memory + "mlp",
                down=in_memory + "mlp.fc2",
                heads=(in_memory + "attention.o_proj",),
                causal=False,
                activation=config["hidden_act"],
                norm_path=block + self.norms[1],
                norm=self.block_paths[0].replace("*", f"{{i}}.{self.norms[1]}"),
                branches=tuple(self.block_paths[0].replace("*", f"{{i}}.{name}") for name in self.branches),
            ),
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        block = f"{self.base(config)}encoder.layer.{layer}."
        up, down = self.plain
        return FeedForward(
            up=tensors[f"{block}{up}.weight"],
            up_bias=tensors[f"{block}{up}.bias"],
            down=tensors[f"{block}{down}.weight"],
            down_bias=tensors[f"{block}{down}.bias"],
        )

    plain = ("intermediate.dense", "output.dense")  # names of up and down in a block


DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "initializer_range": 0.02,
}

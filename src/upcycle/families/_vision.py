"""The Vision Transformer as transformers stores it: ViT and DeiT, and most of DINOv2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Grid, Stack, Weights
from upcycle.families._encoder import Encoder, num_labels, pair
from upcycle.families._weights import Bias, Matrix, Table, below, linear, norm, row_linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class VisionTransformer(Encoder):
    """Pre-norm blocks with a plain network of two matrices; `tokens` are those before the patches."""

    sees = True
    sizes = (*Encoder.sizes, "intermediate_size")
    tokens: tuple[str, ...] = ("cls_token",)
    pooler = "pooler."
    heads = (*Encoder.heads, "decoder.", "embeddings.mask_token")
    norms: tuple[str, ...] = ("layernorm_before", "layernorm_after")
    residual: tuple[str, ...] = ("attention", "mlp")  # modules of a block that add to the residual stream
    blocks = "layers"  # the list of blocks in memory, below the base model
    after: tuple[str, ...] = ("layernorm.", "pooler.")
    plain = ("intermediate.dense", "output.dense")  # names of up and down in a block
    modules = {
        ".layers.": ".encoder.layer.",
        ".attention.q_proj": ".attention.attention.query",
        ".attention.k_proj": ".attention.attention.key",
        ".attention.v_proj": ".attention.attention.value",
        ".attention.o_proj": ".attention.output.dense",
        ".mlp.fc1": ".intermediate.dense",
        ".mlp.fc2": ".output.dense",
    }

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid:
        """Return the patches that the embeddings cut."""
        image, patch = pair(config["image_size"]), pair(config["patch_size"])
        return Grid(rows=image[0] // patch[0], columns=image[1] // patch[1], height=patch[0], width=patch[1])

    def length(self, config: Config) -> int:
        """Return the number of tokens of an image in the blocks."""
        grid = self.grid(config, "layers")
        return grid.rows * grid.columns + len(self.tokens)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        images = max(1, tokens // self.length(config))
        return {"pixel_values": ("pixels", (images, config["num_channels"], *pair(config["image_size"])))}

    def body(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        patch = (hidden, config["num_channels"], *pair(config["patch_size"]))
        out: Weights = {f"embeddings.{token}": Table((1, 1, hidden)) for token in self.tokens}
        out |= {
            "embeddings.position_embeddings": Table((1, self.length(config), hidden)),
            "embeddings.patch_embeddings.projection.weight": Matrix(patch),
            "embeddings.patch_embeddings.projection.bias": Bias((hidden,)),
        }
        for i in range(config["num_hidden_layers"]):
            out |= below(f"encoder.layer.{i}.", self.block(config))
        return out | norm("layernorm", hidden)

    def block(self, config: Config) -> Weights:
        """Return the tensors of a block, by their names in it."""
        hidden = config["hidden_size"]
        out: Weights = {}
        for part in ("query", "key", "value"):
            out |= linear(f"attention.attention.{part}", hidden, hidden, bias=config["qkv_bias"])
        out |= linear("attention.output.dense", hidden, hidden)
        for name in self.norms:
            out |= norm(name, hidden)
        return out | self.network(config)

    def network(self, config: Config) -> Weights:
        """Return the tensors of a block's feed-forward network, by their names in the block."""
        hidden, width = config["hidden_size"], config["intermediate_size"]
        return linear("intermediate.dense", width, hidden) | linear("output.dense", hidden, width)

    def optional(self, config: Config) -> Weights:
        """Return the token of a masked patch, which only models of masked images have."""
        masked = config["architectures"][0].endswith("ForMaskedImageModeling")
        token: Weights = {f"{self.base(config)}embeddings.mask_token": Table((1, 1, config["hidden_size"]))}
        return token if masked else {}

    def head(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        if config["architectures"][0] == self.architectures[0]:
            return row_linear("pooler.dense", config.get("pooler_output_size") or hidden, hidden)
        return row_linear("classifier", num_labels(config), hidden)

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        block = self.base(config) + "encoder.layer.{i}."
        in_memory = self.blocks + ".{i}."
        return (
            Stack(
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["num_attention_heads"] * config["head_dim"],
                path=block + "mlp",
                owned=(block + "intermediate.", block + "output.", block + "mlp."),
                module=in_memory + "mlp",
                down=in_memory + "mlp.fc2",
                heads=(in_memory + "attention.o_proj",),
                causal=False,
                activation=config["hidden_act"],
                norm_path=block + self.norms[1],
            ),
        )

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return tuple(f"{stack.blocks}.{{i}}.{name}" for name in self.residual)

    def own_norm(self, config: Config, stack: Stack) -> str:
        return f"{stack.blocks}.{{i}}.{self.norms[1]}"

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

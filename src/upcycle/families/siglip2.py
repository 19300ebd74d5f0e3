"""SigLIP 2 of any resolution: images are lists of patches, of as many rows and columns as each has."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Grid, Weights
from upcycle.families._dual import DualEncoder, attending_head
from upcycle.families._weights import Table, Weight, below, linear, norm, row_linear


class SigLIP2(DualEncoder):
    model_type = "siglip2"
    architectures = ("Siglip2Model",)
    summary = "SigLIP 2 of any resolution (naflex), both encoders"
    causal = False
    class_token = False
    towers = {
        "text": {
            "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
            "projection_size": None,
        },
        "vision": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_channels": 3, "num_patches": 256, "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True,
        },
    }  # fmt: skip
    defaults = {"initializer_factor": 1.0}

    def outside(self, config: Config) -> Weights:
        text, vision = config["text"], config["vision"]
        hidden, out = vision["hidden_size"], self.tables(config)
        out |= {"logit_scale": Weight((1,)), "logit_bias": Weight((1,))}
        out |= linear("vision_model.embeddings.patch_embedding", hidden, _patch(vision))
        out["vision_model.embeddings.position_embedding.weight"] = Table((vision["num_patches"], hidden))
        out |= norm("vision_model.post_layernorm", hidden)
        out |= norm("text_model.final_layer_norm", text["hidden_size"])
        joint = text["projection_size"] or text["hidden_size"]
        out |= row_linear("text_model.head", joint, text["hidden_size"])
        head = attending_head(vision) if vision["vision_use_head"] else {}
        return out | below("vision_model.head.", head)

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid | None:
        """Return the square of patches that the table of positions has rows for; images may have others."""
        if stack != "vision":
            return None
        side, patch = isqrt(count := config["vision"]["num_patches"]), config["vision"]["patch_size"]
        if side * side != count or not isinstance(patch, int):
            raise UpcycleError(
                f"config.json: num_patches = {count} and patch_size = {patch}; a siglip2 of transformers "
                f"takes a square number of square patches"
            )
        return Grid(rows=side, columns=side, height=patch, width=patch)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        vision = config["vision"]
        patches = (2, vision["num_patches"], _patch(vision))
        return {**self.words(config, tokens), "pixel_values": ("pixels", patches)}

    def beside(self, config: Config) -> dict[str, list[list[int]]]:
        """Return the shapes of two images, of which the second has fewer rows, and which places they fill."""
        grid = self.grid(config, "vision")
        assert grid is not None
        rows = max(1, grid.rows - 1)
        filled = rows * grid.columns
        whole = grid.rows * grid.columns
        return {
            "spatial_shapes": [[grid.rows, grid.columns], [rows, grid.columns]],
            "pixel_attention_mask": [[1] * whole, [1] * filled + [0] * (whole - filled)],
        }


def _patch(vision: Config) -> int:
    """Return how many numbers a patch has."""
    return int(vision["num_channels"] * vision["patch_size"] ** 2)


family = SigLIP2()

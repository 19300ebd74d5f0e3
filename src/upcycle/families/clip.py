"""CLIP: texts and images in one space."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._dual import DualEncoder, positions
from upcycle.families._encoder import pair
from upcycle.families._weights import Matrix, RowMatrix, Scale, Table, below, norm

VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
}  # fmt: skip


class CLIP(DualEncoder):
    model_type = "clip"
    architectures = ("CLIPModel",)
    summary = "CLIP, both encoders"
    causal = True
    class_token = True
    towers = {
        "text": {
            "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        },
        "vision": VISION,
    }  # fmt: skip
    defaults = {"projection_dim": 512, "initializer_factor": 1.0}

    def outside(self, config: Config) -> Weights:
        text, vision, joint = config["text"], config["vision"], config["projection_dim"]
        out = self.words(config) | below("vision_model.", around_blocks(vision))
        out |= {
            "logit_scale": Scale((), float(config.get("logit_scale_init_value", 2.6592))),
            "text_projection.weight": RowMatrix((joint, text["hidden_size"])),
            "visual_projection.weight": RowMatrix((joint, vision["hidden_size"])),
        }
        return out | norm("text_model.final_layer_norm", text["hidden_size"])


def around_blocks(vision: Mapping[str, Any]) -> Weights:
    """Return the tensors of the encoder of images outside its blocks, by their names in it."""
    hidden = vision["hidden_size"]
    out: Weights = {
        "embeddings.class_embedding": Table((hidden,)),
        "embeddings.patch_embedding.weight": Matrix(
            (hidden, vision["num_channels"], *pair(vision["patch_size"]))
        ),
        "embeddings.position_embedding.weight": Table((positions(vision, class_token=True), hidden)),
    }
    return out | norm("pre_layrnorm", hidden) | norm("post_layernorm", hidden)


family = CLIP()

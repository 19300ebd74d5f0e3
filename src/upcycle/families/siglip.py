"""SigLIP: CLIP with a sigmoid loss, and a head that attends to the patches."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config, Weights
from upcycle.families._dual import DualEncoder, positions
from upcycle.families._encoder import pair
from upcycle.families._weights import Bias, Matrix, RowMatrix, Table, Weight, below, norm, row_linear

VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": True,
}  # fmt: skip


class SigLIP(DualEncoder):
    model_type = "siglip"
    architectures = ("SiglipModel",)
    summary = "SigLIP and SigLIP 2 of one resolution, both encoders"
    causal = False
    class_token = False
    towers = {
        "text": {
            "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
            "projection_size": None,
        },
        "vision": VISION,
    }  # fmt: skip
    defaults = {"initializer_factor": 1.0}

    def outside(self, config: Config) -> Weights:
        text = config["text"]
        out = self.words(config) | below("vision_model.", around_blocks(config["vision"]))
        out |= {"logit_scale": Weight((1,)), "logit_bias": Weight((1,))}
        out |= norm("text_model.final_layer_norm", text["hidden_size"])
        joint = text["projection_size"] or text["hidden_size"]
        return out | row_linear("text_model.head", joint, text["hidden_size"])


def around_blocks(vision: Mapping[str, Any]) -> Weights:
    """Return the tensors of the encoder of images outside its blocks, by their names in it."""
    hidden = vision["hidden_size"]
    out: Weights = {
        "embeddings.patch_embedding.weight": Matrix(
            (hidden, vision["num_channels"], *pair(vision["patch_size"]))
        ),
        "embeddings.patch_embedding.bias": Bias((hidden,)),
        "embeddings.position_embedding.weight": Table((positions(vision, class_token=False), hidden)),
    }
    out |= norm("post_layernorm", hidden)
    return out | (below("head.", _head(vision)) if vision["vision_use_head"] else {})


def _head(vision: Mapping[str, Any]) -> Weights:
    """Return the tensors of the head that attends to the patches."""
    hidden, width = vision["hidden_size"], vision["intermediate_size"]
    out: Weights = {
        "probe": Table((1, 1, hidden)),
        "attention.in_proj_weight": RowMatrix((3 * hidden, hidden)),
        "attention.in_proj_bias": Bias((3 * hidden,)),
    }
    out |= row_linear("attention.out_proj", hidden, hidden) | norm("layernorm", hidden)
    return out | row_linear("mlp.fc1", width, hidden) | row_linear("mlp.fc2", hidden, width)


family = SigLIP()

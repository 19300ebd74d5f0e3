"""SigLIP: CLIP with a sigmoid loss, and a head that attends to the patches."""

from upcycle.families import Config, Weights
from upcycle.families._dual import DualEncoder, attending_head
from upcycle.families._encoder import pair
from upcycle.families._weights import Bias, Matrix, Weight, below, norm, row_linear


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
        "vision": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True,
        },
    }  # fmt: skip
    defaults = {"initializer_factor": 1.0}

    def outside(self, config: Config) -> Weights:
        text, vision = config["text"], config["vision"]
        hidden, out = vision["hidden_size"], self.tables(config)
        patch = (hidden, vision["num_channels"], *pair(vision["patch_size"]))
        out |= {
            "logit_scale": Weight((1,)),
            "logit_bias": Weight((1,)),
            "vision_model.embeddings.patch_embedding.weight": Matrix(patch),
            "vision_model.embeddings.patch_embedding.bias": Bias((hidden,)),
        }
        out |= norm("vision_model.post_layernorm", hidden)
        out |= norm("text_model.final_layer_norm", text["hidden_size"])
        joint = text["projection_size"] or text["hidden_size"]
        out |= row_linear("text_model.head", joint, text["hidden_size"])
        return out | (
            below("vision_model.head.", attending_head(vision)) if vision["vision_use_head"] else {}
        )


family = SigLIP()

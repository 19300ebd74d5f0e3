"""The encoder of images of a SigLIP."""

from upcycle.families import Config, Weights
from upcycle.families._image_encoder import ImageEncoder
from upcycle.families.siglip import VISION, around_blocks


class SigLIPVision(ImageEncoder):
    model_type = "siglip_vision_model"
    architectures = ("SiglipVisionModel",)
    summary = "the encoder of images of a SigLIP"
    class_token = False
    defaults = {**VISION, "initializer_range": 0.02}

    def outside(self, config: Config) -> Weights:
        return around_blocks(config)


family = SigLIPVision()

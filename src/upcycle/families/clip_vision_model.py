"""The encoder of images of a CLIP."""

from upcycle.families import Config, Weights
from upcycle.families._image_encoder import ImageEncoder
from upcycle.families.clip import VISION, around_blocks


class CLIPVision(ImageEncoder):
    model_type = "clip_vision_model"
    architectures = ("CLIPVisionModel",)
    summary = "the encoder of images of a CLIP"
    class_token = True
    defaults = {**VISION, "initializer_range": 0.02}

    def outside(self, config: Config) -> Weights:
        return around_blocks(config)


family = CLIPVision()

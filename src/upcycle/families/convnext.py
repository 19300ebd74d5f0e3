"""ConvNeXt: a convolutional network of four stages; MoE Jetpack's C-JetMoE-F is made from it."""

from upcycle.families import Config, Shapes
from upcycle.families._convnext import DEFAULTS, ConvNeXt


class ConvNextV1(ConvNeXt):
    model_type = "convnext"
    architectures = ("ConvNextModel", "ConvNextForImageClassification")
    prefix = "convnext"
    summary = "ConvNeXt"
    defaults = {**DEFAULTS, "layer_scale_init_value": 1e-6}

    def block(self, config: Config, hidden: int) -> Shapes:
        scale: Shapes = {"layer_scale_parameter": (hidden,)}
        return super().block(config, hidden) | (scale if config["layer_scale_init_value"] > 0 else {})


family = ConvNextV1()

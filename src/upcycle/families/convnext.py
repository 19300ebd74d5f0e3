"""ConvNeXt: a convolutional network of four stages, from which MoE Jetpack's C-JetMoE-F is made."""

from upcycle.families import Config, Weights
from upcycle.families._convnext import DEFAULTS
from upcycle.families._convnext_width import NarrowableConvNeXt
from upcycle.families._weights import Scale


class ConvNextV1(NarrowableConvNeXt):
    model_type = "convnext"
    architectures = ("ConvNextModel", "ConvNextForImageClassification")
    prefix = "convnext"
    summary = "ConvNeXt"
    defaults = {**DEFAULTS, "layer_scale_init_value": 1e-6}

    def block(self, config: Config, hidden: int) -> Weights:
        start = float(config["layer_scale_init_value"])
        scale: Weights = {"layer_scale_parameter": Scale((hidden,), start)}
        return super().block(config, hidden) | (scale if start > 0 else {})


family = ConvNextV1()

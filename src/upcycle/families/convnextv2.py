"""ConvNeXt V2: ConvNeXt with a global response norm in its networks instead of layer scale."""

from collections.abc import Mapping
from dataclasses import replace

from upcycle.families import Config, Weights
from upcycle.families._convnext import DEFAULTS, RATIO
from upcycle.families._convnext_width import NarrowableConvNeXt
from upcycle.families._narrowing import Axes, Axis
from upcycle.families._weights import Bias, Scale
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Pick


class ConvNextV2(NarrowableConvNeXt):
    model_type = "convnextv2"
    architectures = ("ConvNextV2Model", "ConvNextV2ForImageClassification")
    prefix = "convnextv2"
    summary = "ConvNeXt V2, with response norms inside the experts"
    defaults = DEFAULTS
    network = ("pwconv1", "grn", "pwconv2")

    def block(self, config: Config, hidden: int) -> Weights:
        shape = (1, 1, 1, RATIO * hidden)
        return super().block(config, hidden) | {"grn.weight": Scale(shape, 0.0), "grn.bias": Bias(shape)}

    def axes(self, config: Config) -> Axes:
        out = super().axes(config)
        for name in out:
            if ".grn." in name:
                layer = int(name.partition(".layers.")[2].partition(".")[0])
                out[name] = (None, None, None, Axis("neurons", self.stack_of(name), layer))
        return out

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network = super().feed_forward(config, layer, tensors, stack)
        norm = f"{self.base(config)}encoder.stages.{self.number(stack)}.layers.{layer}.grn."
        weight, bias = (tensors[norm + part] for part in ("weight", "bias"))
        return replace(network, grn_weight=_vector(weight), grn_bias=_vector(bias))


def _vector(tensor: Lazy) -> Lazy:
    """Return [1, 1, 1, I] as [I]."""
    for _ in range(3):
        tensor = Pick(tensor, 0)
    return tensor


family = ConvNextV2()

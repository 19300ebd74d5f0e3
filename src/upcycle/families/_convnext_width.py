"""The axes of a ConvNeXt's tensors: which are channels of a stage, and which are neurons."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.families._convnext import RATIO, STAGES, ConvNeXt
from upcycle.families._narrowing import Axes, Axis, Narrowable
from upcycle.families._weights import norm


class NarrowableConvNeXt(ConvNeXt, Narrowable):
    """A ConvNeXt from which a narrower one can be chosen."""

    def axes(self, config: Config) -> Axes:
        of = [Axis("channels", f"stage_{s + 1}") for s in range(STAGES)]
        known: Axes = {"classifier.weight": (None, of[-1]), "classifier.bias": (None,)}
        base = self.base(config)
        for s, channels in enumerate(of):
            stage = f"{base}encoder.stages.{s}."
            if s:
                known |= dict.fromkeys(norm(f"{stage}downsampling_layer.0", 0), (of[s - 1],))
                known[f"{stage}downsampling_layer.1.weight"] = (channels, of[s - 1], None, None)
            for i in range(config["depths"][s]):
                neurons = Axis("neurons", f"stage_{s + 1}", i)
                block = f"{stage}layers.{i}."
                known[f"{block}pwconv1.weight"] = (neurons, channels)
                known[f"{block}pwconv1.bias"] = (neurons,)
                known[f"{block}pwconv2.weight"] = (channels, neurons)
        rest = {  # kernels, norms, layer scale, and biases of layers that output channels
            name: (of[self.stage(name)], *(None,) * (len(shape) - 1))
            for name, shape in self.shapes(config).items()
        }
        return {name: known.get(name, axes) for name, axes in rest.items()}

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        stages = [f"stage_{s + 1}" for s in range(STAGES)]
        if any(width[name] != RATIO * hidden[name] for name in stages):
            raise UpcycleError(
                f"successor.intermediate_size: the networks of a {self.model_type} have {RATIO} neurons a "
                f"channel, and config.json has no other; leave it out (moe.expert_width is for experts)"
            )
        return {"hidden_sizes": [hidden[name] for name in stages]}

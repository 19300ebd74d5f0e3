"""The axes of a Vision Transformer's tensors: which are channels, heads and neurons."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.families._narrowing import Axes, Axis, Narrowable
from upcycle.families._vision import VisionTransformer


class NarrowableVision(VisionTransformer, Narrowable):
    """A Vision Transformer from which a narrower one can be chosen."""

    def axes(self, config: Config) -> Axes:
        base, channels = self.base(config), Axis("channels")
        out: Axes = {name: (None, None, channels) for name in self.shapes(config) if name.endswith("_token")}
        out[f"{base}embeddings.position_embeddings"] = (None, None, channels)
        out[f"{base}embeddings.patch_embeddings.projection.weight"] = (channels, None, None, None)
        up, down = self.plain
        for i in range(config["num_hidden_layers"]):
            heads = Axis("heads", layer=i, unit=config["head_dim"])
            neurons = Axis("neurons", layer=i)
            block = f"{base}encoder.layer.{i}."
            for part in ("query", "key", "value"):
                out[f"{block}attention.attention.{part}.weight"] = (heads, channels)
                out[f"{block}attention.attention.{part}.bias"] = (heads,)
            out[f"{block}attention.output.dense.weight"] = (channels, heads)
            out[f"{block}{up}.weight"] = (neurons, channels)
            out[f"{block}{up}.bias"] = (neurons,)
            out[f"{block}{down}.weight"] = (channels, neurons)
        out["pooler.dense.weight"] = (channels, channels)
        shapes = self.shapes(config)
        for name in shapes:
            if "classifier" in name:
                out[name] = (None, channels)[: len(shapes[name])]
        return {
            name: out.get(name, (channels,)) for name in shapes
        }  # norms, and biases of layers that output channels

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        heads, rest = divmod(hidden["layers"], config["head_dim"])
        if rest or not heads:
            raise UpcycleError(
                f"successor.hidden_size = {hidden['layers']} is no multiple of the {config['head_dim']} "
                f"channels of a head; whole heads are kept"
            )
        return {
            "hidden_size": hidden["layers"],
            "intermediate_size": width["layers"],
            "num_attention_heads": heads,
        }

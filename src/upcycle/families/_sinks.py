"""Decoders that become granitemoe_swa: windows in some layers, and attention sinks that weigh nothing."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.families import Config
from upcycle.families._decoder import Decoder, as_granite
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy

NO_SINK = -1e4  # an attention sink that weighs nothing; finite, because exp(-inf) is NaN in some kernels


class WithoutSinks(Decoder):
    """A decoder whose native target has a sink in every head."""

    natives = ("granitemoe_swa",)

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        out = super().backbone(config, native, tensors)
        for layer in range(config["num_hidden_layers"]):
            attention = f"model.layers.{layer}.self_attn."
            dtype = tensors[attention + "q_proj.weight"].dtype
            out[attention + "sinks"] = Fill((config["num_attention_heads"],), dtype, NO_SINK)
        return out

    def native_config(self, config: Config, native: str) -> Config:
        theta = config["rope_parameters"]["rope_theta"]
        return as_granite({**config, "layer_rope_theta": [theta] * config["num_hidden_layers"]})

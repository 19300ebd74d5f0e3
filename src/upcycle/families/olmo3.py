"""OLMo 3: OLMo 2 with sliding windows in three of four layers."""

from collections.abc import Mapping
from typing import Any

from upcycle.families import Config
from upcycle.families._decoder import every_nth_full, rotation_by_kind
from upcycle.families.olmo2 import Olmo2


class Olmo3(Olmo2):
    model_type = "olmo3"
    architectures = ("Olmo3ForCausalLM",)
    summary = "OLMo 3"
    natives = ()
    inexact: Mapping[str, str] = {}
    no_native = "flex_olmo has no sliding-window layers"
    theta = 500_000.0
    defaults = {**Olmo2.defaults, "sliding_window": 4096, "layer_types": None}

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        return {**config, "layer_types": every_nth_full(config, 4)}

    def rotation(self, config: Config) -> Config:
        return rotation_by_kind(config, self.theta)


family = Olmo3()

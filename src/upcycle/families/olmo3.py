"""OLMo 3: OLMo 2 with sliding windows in three of four layers."""

from upcycle.families.olmo2 import Olmo2


class Olmo3(Olmo2):
    model_type = "olmo3"
    architectures = ("Olmo3ForCausalLM",)
    summary = "OLMo 3"
    natives = ()
    no_native = "flex_olmo has no sliding-window layers"
    theta = 500_000.0
    defaults = {**Olmo2.defaults, "sliding_window": 4096, "layer_types": None}


family = Olmo3()

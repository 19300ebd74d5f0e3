"""DINOv2 with registers: tokens that stand before the patches and mean nothing."""

from upcycle.families import Config, Weights
from upcycle.families._weights import Table
from upcycle.families.dinov2 import DINOv2


class DINOv2WithRegisters(DINOv2):
    model_type = "dinov2_with_registers"
    architectures = ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")
    prefix = "dinov2_with_registers"
    summary = "DINOv2 with registers"
    defaults = {
        **{key: value for key, value in DINOv2.defaults.items() if key != "use_mask_token"},
        "patch_size": 16,
        "num_register_tokens": 4,
    }

    def finish(self, config: Config) -> Config:
        return super().finish({**config, "use_mask_token": True})

    def body(self, config: Config) -> Weights:
        registers = Table((1, config["num_register_tokens"], config["hidden_size"]))
        return {**super().body(config), "embeddings.register_tokens": registers}


family = DINOv2WithRegisters()

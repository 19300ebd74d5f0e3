"""DeiT: ViT with a distillation token."""

from upcycle.families import Config, Weights
from upcycle.families._encoder import num_labels
from upcycle.families._vision import DEFAULTS
from upcycle.families._vision_width import NarrowableVision
from upcycle.families._weights import row_linear


class DeiT(NarrowableVision):
    model_type = "deit"
    architectures = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
    prefix = "deit"
    class_tokens = 2
    summary = "DeiT, with or without its teacher's head"
    defaults = DEFAULTS
    tokens = ("cls_token", "distillation_token")

    def head(self, config: Config) -> Weights:
        if not config["architectures"][0].endswith("WithTeacher"):
            return super().head(config)
        labels, hidden = num_labels(config), config["hidden_size"]
        return row_linear("cls_classifier", labels, hidden) | row_linear(
            "distillation_classifier", labels, hidden
        )


family = DeiT()

"""DeiT: ViT with a distillation token."""

from upcycle.families import Config, Shapes
from upcycle.families._encoder import linear, num_labels
from upcycle.families._vision import DEFAULTS, VisionTransformer


class DeiT(VisionTransformer):
    model_type = "deit"
    architectures = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
    prefix = "deit"
    class_tokens = 2
    summary = "DeiT, with or without its teacher's head"
    defaults = DEFAULTS
    tokens = ("cls_token", "distillation_token")

    def head(self, config: Config) -> Shapes:
        if not config["architectures"][0].endswith("WithTeacher"):
            return super().head(config)
        labels, hidden = num_labels(config), config["hidden_size"]
        return linear("cls_classifier", labels, hidden) | linear("distillation_classifier", labels, hidden)


family = DeiT()

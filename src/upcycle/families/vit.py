"""ViT: the Vision Transformer of Sparse Upcycling and V-MoE."""

from upcycle.families._vision import DEFAULTS
from upcycle.families._vision_width import NarrowableVision


class ViT(NarrowableVision):
    model_type = "vit"
    architectures = ("ViTModel", "ViTForImageClassification")
    prefix = "vit"
    class_tokens = 1
    summary = "Vision Transformer"
    defaults = DEFAULTS


family = ViT()

"""DINOv2: ViT with layer scale, and SwiGLU in its largest size."""

from collections.abc import Mapping
from dataclasses import replace

from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import num_labels
from upcycle.families._vision import DEFAULTS, Encoder, VisionTransformer
from upcycle.families._weights import Scale, Table, linear, row_linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Slice


class DINOv2(VisionTransformer):
    model_type = "dinov2"
    architectures = ("Dinov2Model", "Dinov2ForImageClassification")
    prefix = "dinov2"
    summary = "DINOv2, plain or SwiGLU"
    sizes = Encoder.sizes
    blocks = "encoder.layer"
    norms = ("norm1", "norm2")
    residual = ("drop_path",)  # both branches pass through it
    plain = ("mlp.fc1", "mlp.fc2")
    defaults = {
        **{k: v for k, v in DEFAULTS.items() if k != "intermediate_size"},
        "patch_size": 14,
        "mlp_ratio": 4,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
    }

    def finish(self, config: Config) -> Config:
        width = int(config["hidden_size"] * config["mlp_ratio"])
        if config["use_swiglu_ffn"]:
            width = (int(width * 2 / 3) + 7) // 8 * 8
            config["hidden_act"] = "silu"
        return super().finish({**config, "intermediate_size": width})

    def body(self, config: Config) -> Weights:
        mask: Weights = {"embeddings.mask_token": Table((1, config["hidden_size"]))}
        return (mask if config["use_mask_token"] else {}) | super().body(config)

    def block(self, config: Config) -> Weights:
        scale = Scale((config["hidden_size"],), float(config.get("layerscale_value", 1.0)))
        return super().block(config) | {"layer_scale1.lambda1": scale, "layer_scale2.lambda1": scale}

    def network(self, config: Config) -> Weights:
        hidden, width = config["hidden_size"], config["intermediate_size"]
        if config["use_swiglu_ffn"]:
            return linear("mlp.weights_in", 2 * width, hidden) | linear("mlp.weights_out", hidden, width)
        return linear("mlp.fc1", width, hidden) | linear("mlp.fc2", hidden, width)

    def head(self, config: Config) -> Weights:
        if config["architectures"][0] == self.architectures[0]:
            return {}
        return row_linear("classifier", num_labels(config), 2 * config["hidden_size"])

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        stacks = super().stacks(config)
        if not config["use_swiglu_ffn"]:
            return stacks
        return tuple(replace(stack, down=stack.module + ".down_proj") for stack in stacks)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        if not config["use_swiglu_ffn"]:
            return super().feed_forward(config, layer, tensors, stack)
        mlp, width = f"{self.base(config)}encoder.layer.{layer}.mlp.", config["intermediate_size"]
        both, bias = tensors[mlp + "weights_in.weight"], tensors[mlp + "weights_in.bias"]
        return FeedForward(
            gate=Slice(both, 0, 0, width),
            gate_bias=Slice(bias, 0, 0, width),
            up=Slice(both, 0, width, 2 * width),
            up_bias=Slice(bias, 0, width, 2 * width),
            down=tensors[mlp + "weights_out.weight"],
            down_bias=tensors[mlp + "weights_out.bias"],
        )


family = DINOv2()

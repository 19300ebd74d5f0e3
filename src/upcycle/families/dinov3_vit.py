"""DINOv3: rotary positions, registers, layer scale; plain or gated networks."""

from collections.abc import Mapping

from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import pair
from upcycle.families._stacks import only_stack
from upcycle.families._vision import DEFAULTS, VisionTransformer
from upcycle.families._weights import Bias, Matrix, Scale, Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy


class DINOv3(VisionTransformer):
    model_type = "dinov3_vit"
    architectures = ("DINOv3ViTModel",)
    prefix = "model"
    summary = "DINOv3 ViT, plain or gated"
    pooler = ""
    norms = ("norm1", "norm2")
    residual = ("drop_path",)  # both branches pass through it
    blocks = "layer"
    after = ("norm.",)
    defaults = {
        **{key: value for key, value in DEFAULTS.items() if key != "qkv_bias"},
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": False,
        "num_register_tokens": 0,
        "layerscale_value": 1.0,
    }

    def length(self, config: Config) -> int:
        """Return the number of tokens of an image in the blocks."""
        return super().length(config) + int(config["num_register_tokens"])

    def body(self, config: Config) -> Weights:
        hidden, out = config["hidden_size"], norm("norm", config["hidden_size"])
        out |= {f"embeddings.{token}": Table((1, 1, hidden)) for token in ("cls_token", "mask_token")}
        out |= {
            "embeddings.register_tokens": Table((1, config["num_register_tokens"], hidden)),
            "embeddings.patch_embeddings.weight": Matrix(
                (hidden, config["num_channels"], *pair(config["patch_size"]))
            ),
            "embeddings.patch_embeddings.bias": Bias((hidden,)),
        }
        for i in range(config["num_hidden_layers"]):
            out |= below(f"layer.{i}.", self.block(config))
        return out

    def block(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        biases = {"q": "query_bias", "k": "key_bias", "v": "value_bias", "o": "proj_bias"}
        out = norm("norm1", hidden) | norm("norm2", hidden) | self.network(config)
        for part, key in biases.items():
            out |= linear(f"attention.{part}_proj", hidden, hidden, bias=config[key])
        scale = Scale((hidden,), float(config["layerscale_value"]))
        return out | {"layer_scale1.lambda1": scale, "layer_scale2.lambda1": scale}

    def network(self, config: Config) -> Weights:
        hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["mlp_bias"]
        out = linear("mlp.down_proj", hidden, width, bias=bias)
        for name in ("gate_proj", "up_proj") if config["use_gated_mlp"] else ("up_proj",):
            out |= linear(f"mlp.{name}", width, hidden, bias=bias)
        return out

    def head(self, config: Config) -> Weights:
        return {}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return only_stack(
            config,
            base="",
            block="layer.{i}.",
            network="mlp",
            down="mlp.down_proj",
            attention="attention.o_proj",
            norm="norm2",
            causal=False,
        )

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        parts = ("gate", "up", "down") if config["use_gated_mlp"] else ("up", "down")
        network = {part: f"layer.{layer}.mlp.{part}_proj." for part in parts}
        biases = {f"{part}_bias": tensors[n + "bias"] for part, n in network.items() if config["mlp_bias"]}
        return FeedForward(**{part: tensors[n + "weight"] for part, n in network.items()}, **biases)


family = DINOv3()

"""wav2vec 2.0: waves of sound, convolutions, and an encoder of their frames."""

from collections.abc import Collection, Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._weights import Bias, Matrix, Norm, Table, Weight, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

_SECONDS, _RATE = 10, 16_000  # of sound, if a length has to be assumed, and its samples per second


class Wav2Vec2(Encoder):
    model_type = "wav2vec2"
    architectures = ("Wav2Vec2Model",)
    prefix = "wav2vec2"
    summary = "wav2vec 2.0, XLS-R, MMS"
    sizes = (*Encoder.sizes, "intermediate_size")
    heads = (
        "lm_head.", "quantizer.", "project_q.", "project_hid.", "projector.", "classifier.", "layer_weights",
        "tdnn.", "feature_extractor.weight", "objective.",
    )  # fmt: skip
    former = {
        ".weight_g": ".parametrizations.weight.original0",
        ".weight_v": ".parametrizations.weight.original1",
    }
    before = ("feature_extractor.", "feature_projection.", "encoder.pos_conv_embed.", "masked_spec_embed")
    after = ("encoder.layer_norm.", "adapter.")
    defaults = {
        "vocab_size": 32,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "activation_dropout": 0.1,
        "initializer_range": 0.02,
        "feat_extract_norm": "group",
        "conv_dim": (512,) * 7,
        "conv_stride": (5, 2, 2, 2, 2, 2, 2),
        "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
        "conv_bias": False,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
        "do_stable_layer_norm": False,
        "mask_time_prob": 0.05,
        "mask_feature_prob": 0.0,
        "add_adapter": False,
        "adapter_kernel_size": 3,
        "num_adapter_layers": 3,
        "output_hidden_size": None,
        "adapter_attn_dim": None,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        keys = ("conv_dim", "conv_stride", "conv_kernel")
        for key in keys:
            if not isinstance(config[key], (list, tuple)):
                raise UpcycleError(f"config.json: {key} = {config[key]}; it must be a list of sizes")
        lengths = {key: len(config[key]) for key in keys}
        if len({*lengths.values()}) > 1:
            said = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise UpcycleError(f"config.json: lists of convolutions must be of one length; they have {said}")
        return config

    def length(self, config: Config) -> int:
        """Return the number of frames of ten seconds of sound."""
        frames = _SECONDS * _RATE
        for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
            frames = (frames - kernel) // stride + 1
        return int(frames)

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        samples = max(2, tokens // 4)  # as many frames, and the samples that give them
        for kernel, stride in zip(config["conv_kernel"][::-1], config["conv_stride"][::-1], strict=True):
            samples = (samples - 1) * stride + kernel
        return {"input_values": ("sound", (2, samples))}

    def body(self, config: Config) -> Weights:
        hidden, out = config["hidden_size"], self._convolutions(config)
        out |= norm("feature_projection.layer_norm", config["conv_dim"][-1])
        out |= linear("feature_projection.projection", hidden, config["conv_dim"][-1])
        if config["mask_time_prob"] > 0 or config["mask_feature_prob"] > 0:
            out["masked_spec_embed"] = Table((hidden,))
        kernel, groups = config["num_conv_pos_embeddings"], config["num_conv_pos_embedding_groups"]
        places = "encoder.pos_conv_embed.conv"
        out |= {
            f"{places}.bias": Bias((hidden,)),
            f"{places}.parametrizations.weight.original0": Weight((1, 1, kernel)),
            f"{places}.parametrizations.weight.original1": Matrix((hidden, hidden // groups, kernel)),
        }
        out |= norm("encoder.layer_norm", hidden)
        for i in range(config["num_hidden_layers"]):
            out |= below(f"encoder.layers.{i}.", self._block(config))
        return out | (_adapter(config) if config["add_adapter"] else {})

    def _convolutions(self, config: Config) -> Weights:
        """Return the tensors of the convolutions that turn samples into frames."""
        out: Weights = {}
        sizes = (1, *config["conv_dim"])
        for i, kernel in enumerate(config["conv_kernel"]):
            layer, size = f"feature_extractor.conv_layers.{i}", sizes[i + 1]
            out[f"{layer}.conv.weight"] = Matrix((size, sizes[i], kernel))
            out |= {f"{layer}.conv.bias": Bias((size,))} if config["conv_bias"] else {}
            if config["feat_extract_norm"] == "layer" or i == 0:
                out |= {
                    f"{layer}.layer_norm.weight": Norm((size,)),
                    f"{layer}.layer_norm.bias": Bias((size,)),
                }
        return out

    def _block(self, config: Config) -> Weights:
        """Return the tensors of a block, by their names in it."""
        hidden, width, inner = config["hidden_size"], config["intermediate_size"], config["adapter_attn_dim"]
        out = norm("layer_norm", hidden) | norm("final_layer_norm", hidden)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"attention.{part}", hidden, hidden)
        out |= linear("feed_forward.intermediate_dense", width, hidden)
        out |= linear("feed_forward.output_dense", hidden, width)
        if inner is not None and config["do_stable_layer_norm"]:
            out |= norm("adapter_layer.norm", hidden)
            out |= linear("adapter_layer.linear_1", inner, hidden)
            out |= linear("adapter_layer.linear_2", hidden, inner)
        return out

    def may_lack(self, config: Config) -> frozenset[str]:
        """Return the vector in place of masked frames, which only training reads."""
        return frozenset({f"{self.base(config)}masked_spec_embed"}) & self.shapes(config).keys()

    def class_options(self, config: Config, stored: Collection[str]) -> Mapping[str, Any]:
        return {}

    def head(self, config: Config) -> Weights:
        return {}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        base, network = self.base(config), "encoder.layers.{i}.feed_forward."
        act, drop, down = (
            f"{network}{name}" for name in ("intermediate_act_fn", "intermediate_dropout", "output_dense")
        )
        return (
            Stack(
                name="encoder",
                count=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=config["hidden_size"],
                path=f"{base}{network}intermediate_dense",
                owned=(f"{base}{network}intermediate_dense.", f"{base}{network}output_dense."),
                module=f"{network}intermediate_dense",
                replaced=(act, drop, down),
                down=down,
                heads=("encoder.layers.{i}.attention.out_proj",),
                causal=False,
                activation=config["hidden_act"],
                dropout=config["activation_dropout"],
            ),
        )

    def stack_of(self, name: str) -> str:
        return "encoder"

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return ("encoder.layers.{i}.dropout", "encoder.layers.{i}.feed_forward")

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "encoder"
    ) -> FeedForward:
        network = f"{self.base(config)}encoder.layers.{layer}.feed_forward."
        return FeedForward(
            up=tensors[network + "intermediate_dense.weight"],
            up_bias=tensors[network + "intermediate_dense.bias"],
            down=tensors[network + "output_dense.weight"],
            down_bias=tensors[network + "output_dense.bias"],
        )


def _adapter(config: Config) -> Weights:
    """Return the tensors of the convolutions behind the encoder."""
    hidden, size = config["hidden_size"], config["output_hidden_size"] or config["hidden_size"]
    out: Weights = {}
    if size != hidden:
        out |= linear("adapter.proj", size, hidden) | norm("adapter.proj_layer_norm", size)
    for i in range(config["num_adapter_layers"]):
        conv = f"adapter.layers.{i}.conv"
        out[f"{conv}.weight"] = Matrix((2 * size, size, config["adapter_kernel_size"]))
        out[f"{conv}.bias"] = Bias((2 * size,))
    return out


family = Wav2Vec2()

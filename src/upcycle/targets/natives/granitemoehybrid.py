"""GraniteMoE hybrid: attention and Mamba layers; the MoE that Granite 4 without experts becomes."""

from dataclasses import dataclass

from upcycle.targets._clients import ACTIVATION, HEAD_DIM, LLAMA3_ROPE, ROPE, Gap
from upcycle.targets._layouts import Fused, Shared
from upcycle.targets.native import Config, Native
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Concat


@dataclass(frozen=True, kw_only=True)
class _Shared(Shared):
    """A shared expert whose gate and up are one matrix."""

    def write(self, network: FeedForward) -> dict[str, Lazy]:
        """Return the shared expert by its names on disk."""
        assert network.gate is not None
        both = Concat((network.gate, network.up), 0)
        return {
            f"{self.path}.input_linear.weight": both,
            f"{self.path}.output_linear.weight": network.down,
        }


_ON_THE_HUB = {"linear_attention": "mamba", "full_attention": "attention"}


def _as_on_the_hub(config: Config) -> Config:
    """Return the config in the hub's words, which transformers reads as well.

    llama.cpp and mlx-lm know no others, and mlx-lm rotates if it is not told `nope`.
    """
    return {
        **config,
        "layer_types": [_ON_THE_HUB[kind] for kind in config["layer_types"]],
        "position_embedding_type": config["position_embedding_type"] or "nope",
    }


def _rotates(config: Config) -> bool:
    """Return whether the attention layers have rotary positions."""
    return bool(config["position_embedding_type"] == "rope")


def _has_mamba(config: Config) -> bool:
    """Return whether any layer is one of Mamba."""
    return "mamba" in config["layer_types"]


_ROTATED_MAMBA = Gap(
    "rotary positions beside Mamba layers",
    "does not rotate in a {name} that has Mamba layers",
    lambda config: _rotates(config) and _has_mamba(config),
)
_STILL_ATTENTION = Gap(
    "attention alone without rotary positions",
    "always rotates in a {name} without Mamba layers",
    lambda config: not _rotates(config) and not _has_mamba(config),
)
_MAMBA_BIASES = Gap(
    "`mamba_proj_bias = true`",
    "has no biases on the projections of Mamba in {name}",
    lambda config: _has_mamba(config) and bool(config["mamba_proj_bias"]),
)
_NO_CONVOLUTION_BIAS = Gap(
    "`mamba_conv_bias = false`",
    "cannot open {name} without biases of Mamba's convolutions",
    lambda config: _has_mamba(config) and not config["mamba_conv_bias"],
)
_LIMIT = Gap(
    "`time_step_limit`",
    "ignores time_step_limit in {name}",
    lambda config: _has_mamba(config) and "time_step_limit" in config,
)
_GROUPS = Gap(
    "`mamba_n_groups` other than 1",
    "is wrong in {name} if Mamba has several groups",
    lambda config: _has_mamba(config) and config["mamba_n_groups"] != 1,
)
_ROPE = Gap(ROPE.label, ROPE.why, lambda config: _rotates(config) and ROPE.shows(config))

native = Native(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    summary="softmax over the chosen experts; experts in two tensors, shared expert",
    layout=Fused(
        gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"
    ),
    reader="TokenizersBackend",
    router="block_sparse_moe.router.layer.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier", "position_embedding_type", "layer_types",
        "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
        "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
    ),
    num_experts_field="num_local_experts",
    renormalizes="always",
    shared=_Shared(
        path="shared_mlp",
        combine="sum",
        config=lambda width, _: {"shared_intermediate_size": width},
        mandatory="narrow",
    ),
    finish=_as_on_the_hub,
    clients={
        "llama.cpp": (
            HEAD_DIM, _ROTATED_MAMBA, _STILL_ATTENTION, LLAMA3_ROPE, _MAMBA_BIASES, _NO_CONVOLUTION_BIAS,
            _LIMIT, ACTIVATION,
        ),
        "mlx-lm": (HEAD_DIM, _ROPE, _GROUPS, ACTIVATION),
        "vLLM": (HEAD_DIM, ACTIVATION),
        "SGLang": (HEAD_DIM, ACTIVATION),
    },
)  # fmt: skip

"""GraniteMoE hybrid: attention and Mamba layers; the MoE that Granite 4 without experts becomes."""

from dataclasses import dataclass

from upcycle.targets._clients import ACTIVATION, HEAD_DIM, always
from upcycle.targets._layouts import Fused, Shared
from upcycle.targets.native import Native
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Concat, Lazy


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


_KINDS = always(
    "other names of layers",
    "knows the layers of {name} as mamba and attention, and not by the names that transformers has now",
)

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
    clients={
        "llama.cpp": (_KINDS,),
        "mlx-lm": (_KINDS,),
        "vLLM": (HEAD_DIM, ACTIVATION),
        "SGLang": (HEAD_DIM, ACTIVATION),
    },
)  # fmt: skip

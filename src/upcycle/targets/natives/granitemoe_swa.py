"""GraniteMoE-SWA: rotation and window per layer, attention sinks; the MoE that SmolLM3 becomes."""

from upcycle.targets._clients import ABSENT, ACTIVATION, BIASES, HEAD_DIM, ROPE, always
from upcycle.targets._layouts import Fused
from upcycle.targets.native import Native

_OFF = always(
    "some per cent off", "stops where no layer of {name} slides, and is some per cent off elsewhere"
)

native = Native(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    summary="softmax over the chosen experts; experts in two tensors",
    layout=Fused(
        gate_up="block_sparse_moe.experts.gate_up_proj", down="block_sparse_moe.experts.down_proj"
    ),
    router="block_sparse_moe.router.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier", "sliding_window", "layer_types", "layer_rope_theta",
    ),
    num_experts_field="num_local_experts",
    renormalizes="always",
    constants={"shared_intermediate_size": 0},
    clients={
        "llama.cpp": (_OFF,),
        "mlx-lm": (ABSENT,),
        "vLLM": (HEAD_DIM, BIASES, ACTIVATION),
        "SGLang": (HEAD_DIM, ROPE, BIASES, ACTIVATION),
    },
)  # fmt: skip

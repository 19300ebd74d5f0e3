"""GraniteMoE: the MoE for Granite and for other models that fit (Gemma 1, biased attention)."""

from upcycle.targets._clients import ACTIVATION, BIASES, HEAD_DIM, LLAMA3_ROPE, ROPE
from upcycle.targets._layouts import Fused
from upcycle.targets.native import Growing, Native

native = Native(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    reader="TokenizersBackend",
    summary="softmax over the chosen experts; experts in two tensors",
    layout=Fused(
        gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"
    ),
    router="block_sparse_moe.router.layer.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier",
    ),
    num_experts_field="num_local_experts",
    renormalizes="always",
    clients={
        "llama.cpp": (HEAD_DIM, LLAMA3_ROPE, ACTIVATION),
        "mlx-lm": (HEAD_DIM, ACTIVATION),
        "vLLM": (HEAD_DIM, BIASES, ACTIVATION),
        "SGLang": (HEAD_DIM, ROPE, BIASES, ACTIVATION),
    },
    growing=Growing(
        like="granite",
        assumed={"num_local_experts": 8, "num_experts_per_tok": 2},
        held=Fused(
            gate_up="block_sparse_moe.experts.gate_up_proj", down="block_sparse_moe.experts.down_proj"
        ),
        held_router="block_sparse_moe.router.weight",
    ),
)  # fmt: skip

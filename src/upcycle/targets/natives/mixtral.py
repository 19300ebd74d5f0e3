"""Mixtral: the MoE that Llama, Mistral and Phi-3 become."""

from upcycle.targets._clients import ACTIVATION, HEAD_DIM, LONG_ROPE, ROPE, TIED, WINDOW
from upcycle.targets._layouts import Fused, PerExpert
from upcycle.targets.native import Growing, Native

native = Native(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    reader="TokenizersBackend",
    summary="softmax over all experts, top-k renormalised",
    layout=PerExpert(path="block_sparse_moe.experts.{e}", gate="w1", up="w3", down="w2"),
    router="block_sparse_moe.gate.weight",
    fields=("rms_norm_eps", "head_dim", "sliding_window", "original_max_position_embeddings"),
    num_experts_field="num_local_experts",
    renormalizes="always",
    constants={"router_jitter_noise": 0.0},
    clients={
        "llama.cpp": (WINDOW, LONG_ROPE, ACTIVATION),
        "mlx-lm": (WINDOW, HEAD_DIM, ROPE, ACTIVATION),
        "vLLM": (ACTIVATION,),
        "SGLang": (WINDOW, HEAD_DIM, ROPE, TIED, ACTIVATION),
    },
    growing=Growing(
        like="mistral",
        assumed={
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
        },
        other_names={"num_experts": "num_local_experts"},
        held=Fused(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
        held_router="mlp.gate.weight",
    ),
)

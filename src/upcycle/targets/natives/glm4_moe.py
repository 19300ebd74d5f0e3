"""GLM-4 MoE: rotates a part of each head; the MoE that GLM-4 and Phi-4-mini become."""

from upcycle.targets._clients import ACTIVATION, LONG_ROPE, ROPE, TIED, Gap
from upcycle.targets.native import Native
from upcycle.targets.natives._deepseek import CONSTANTS, SHARED, bias, dense_layers
from upcycle.targets.natives._qwen import LAYOUT

_KEYS = Gap(
    "configs without `rope_scaling` or `attention_bias`",
    "cannot open {name} without rope_scaling and attention_bias in its config",
    lambda config: not {"rope_scaling", "attention_bias"} <= config.keys(),
)

native = Native(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    summary="sigmoid, top-k renormalised, correction bias, shared network",
    layout=LAYOUT,
    reader="TokenizersBackend",
    router="mlp.gate.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias", "original_max_position_embeddings"),
    num_experts_field="n_routed_experts",
    width_field="moe_intermediate_size",
    renormalizes="always",
    shared=SHARED,
    dense_layers=dense_layers,
    constants={**CONSTANTS, "use_qk_norm": False},
    clients={
        "llama.cpp": (LONG_ROPE, ACTIVATION),
        "mlx-lm": (_KEYS, ROPE, ACTIVATION),
        "vLLM": (TIED, ACTIVATION),
        "SGLang": (TIED, ACTIVATION),
    },
    extra=bias,
)

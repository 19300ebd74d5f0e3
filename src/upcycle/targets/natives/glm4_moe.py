"""GLM-4 MoE: rotates a part of each head; the MoE that GLM-4 and Phi-4-mini become."""

from upcycle.targets._clients import ACTIVATION, LONG_ROPE, ROPE, TIED
from upcycle.targets.native import Native
from upcycle.targets.natives._deepseek import CONSTANTS, SHARED, bias, dense_layers
from upcycle.targets.natives._qwen import LAYOUT

# transformers assumes these; mlx-lm cannot open a config without them, and the hub's configs have them.
_WRITTEN = {"rope_scaling": None, "attention_bias": False}

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
    least_experts=2,
    renormalizes="always",
    shared=SHARED,
    dense_layers=dense_layers,
    constants={**CONSTANTS, "use_qk_norm": False},
    finish=lambda config: {**_WRITTEN, **config},
    clients={
        "llama.cpp": (LONG_ROPE, ACTIVATION),
        "mlx-lm": (ROPE, ACTIVATION),
        "vLLM": (TIED, ACTIVATION),
        "SGLang": (TIED, ACTIVATION),
    },
    extra=bias,
)

"""DeepSeek-V3: latent attention; the MoE that Youtu-LLM becomes."""

from upcycle.targets.native import Native, client_limits
from upcycle.targets.natives._deepseek import CONSTANTS, SHARED, bias, dense_layers
from upcycle.targets.natives._qwen import LAYOUT

native = Native(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    summary="sigmoid, top-k renormalised, correction bias, shared network; latent attention",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
        "v_head_dim", "qk_nope_head_dim", "rope_interleave",
    ),
    num_experts_field="n_routed_experts",
    width_field="moe_intermediate_size",
    renormalizes="always",
    shared=SHARED,
    dense_layers=dense_layers,
    constants=CONSTANTS,
    clients=client_limits,
    extra=bias,
)  # fmt: skip

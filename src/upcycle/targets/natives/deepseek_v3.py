"""DeepSeek-V3: latent attention; the MoE that Youtu-LLM becomes."""

from upcycle.targets._clients import ACTIVATION, BIASES, INTERLEAVED, TIED, YARN_ONLY, Gap
from upcycle.targets.native import Native
from upcycle.targets.natives._deepseek import CONSTANTS, SHARED, bias, dense_layers
from upcycle.targets.natives._qwen import LAYOUT

_OWN_ROPE = Gap(
    "scaled rotary positions",
    "scales rotary positions of {name} in another way",
    lambda config: config["rope_parameters"]["rope_type"] != "default",
)
_QUERIES = Gap(
    "queries without `q_lora_rank`",
    "cannot open {name} without q_lora_rank",
    lambda config: config["q_lora_rank"] is None,
)

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
    least_experts=2,
    renormalizes="always",
    shared=SHARED,
    dense_layers=dense_layers,
    # transformers reads neither; vLLM and SGLang stop without them, and the hub's configs have them.
    constants={**CONSTANTS, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    clients={
        "llama.cpp": (_OWN_ROPE, INTERLEAVED, _QUERIES, BIASES, ACTIVATION),
        "mlx-lm": (TIED, INTERLEAVED, ACTIVATION),
        "vLLM": (TIED, YARN_ONLY, INTERLEAVED, BIASES, ACTIVATION),
        "SGLang": (YARN_ONLY, BIASES, ACTIVATION),
    },
    extra=bias,
)  # fmt: skip

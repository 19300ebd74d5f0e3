"""Hunyuan V1 MoE: the MoE that Hunyuan V1 dense becomes; it always has a full-size shared network."""

from upcycle.natives import Native, Shared
from upcycle.natives._qwen import LAYOUT

native = Native(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    summary="softmax over all experts, top-k renormalised, shared network",
    layout=LAYOUT,
    router="mlp.gate.wg.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias", "eod_token_id"),
    top_k_field="moe_topk",
    renormalizes="always",
    shared=Shared(path="mlp.shared_mlp", combine="sum", config=lambda *_: {}, mandatory="full"),
    constants={"use_qk_norm": True, "use_mixed_mlp_moe": True, "num_shared_expert": 1},
    clients={"mlx-lm": "knows the type as `hunyuan` and not as hunyuan_v1_moe"},
)

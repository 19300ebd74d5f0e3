"""Qwen3-VL-MoE, text: the text model within a qwen3_vl_moe; the hub stores its matrices transposed."""

from upcycle.families import Config
from upcycle.targets._clients import ACTIVATION, BIASES, DENSE_LAYERS, OUTPUT_BIAS
from upcycle.targets._layouts import FusedAcross
from upcycle.targets.native import Native
from upcycle.targets.natives._qwen import dense_layers


def _without_class(config: Config) -> Config:
    """Return the config without its class, as the hub has it; llama.cpp stops at a class it cannot know."""
    return {key: value for key, value in config.items() if key != "architectures"}


native = Native(
    model_type="qwen3_vl_moe_text",
    architecture="Qwen3VLMoeTextModel",
    summary="softmax over all experts, top-k renormalised; only within a qwen3_vl_moe",
    layout=FusedAcross(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
    router="mlp.gate.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias"),
    width_field="moe_intermediate_size",
    renormalizes="always",
    dense_layers=dense_layers,
    # transformers does not read it; vLLM stops without it, and the hub's configs have it.
    constants={"norm_topk_prob": True},
    finish=_without_class,
    clients={
        "llama.cpp": (DENSE_LAYERS, BIASES, ACTIVATION),
        "mlx-lm": (BIASES, ACTIVATION),
        "vLLM": (OUTPUT_BIAS, ACTIVATION),
        "SGLang": (DENSE_LAYERS, ACTIVATION),
    },
)

"""FlexOlmo: the MoE that OLMo 2 becomes."""

from upcycle.targets._clients import ABSENT, ACTIVATION
from upcycle.targets.native import Native
from upcycle.targets.natives._qwen import LAYOUT

native = Native(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    reader="TokenizersBackend",
    summary="softmax over all experts, norm_topk_prob",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias"),
    renormalizes="optional",
    clients={"llama.cpp": (ABSENT,), "mlx-lm": (ABSENT,), "vLLM": (ACTIVATION,), "SGLang": (ACTIVATION,)},
)

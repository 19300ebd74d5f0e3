"""FlexOlmo: the MoE that OLMo 2 becomes."""

from upcycle.targets._clients import ABSENT, ACTIVATION
from upcycle.targets.native import Growing, Native
from upcycle.targets.natives._qwen import HELD, LAYOUT

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
    growing=Growing(
        like="olmo2",
        assumed={"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False, "rms_norm_eps": 1e-6},
        other_names={"num_local_experts": "num_experts"},
        held=HELD,
        held_router="mlp.gate.weight",
    ),
)

"""Hunyuan V1 MoE: the MoE that Hunyuan V1 dense becomes; it always has a full-size shared network."""

from upcycle.targets._clients import ACTIVATION, BIASES, Gap, always
from upcycle.targets._layouts import Shared
from upcycle.targets.native import Config, Native
from upcycle.targets.natives._qwen import LAYOUT


def _per_layer(config: Config) -> Config:
    """Return the fields as lists with one entry per layer, as the hub's configs have them for llama.cpp."""
    values = {
        "moe_topk": config["moe_topk"],
        "moe_intermediate_size": config["intermediate_size"],
        "num_shared_expert": 1,
    }
    return config | {name: [value] * config["num_hidden_layers"] for name, value in values.items()}


_TYPE = always("another name of the type", "knows the type as `hunyuan` and not as {name}")
_ONE = Gap(
    "top-1 routing",
    "does not renormalise the weight of a single expert in {name}",
    lambda config: 1 in config["moe_topk"],
)

native = Native(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    summary="softmax over all experts, top-k renormalised, shared network",
    layout=LAYOUT,
    router="mlp.gate.wg.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias", "eod_token_id", "sep_token_id"),
    top_k_field="moe_topk",
    renormalizes="always",
    shared=Shared(
        path="mlp.shared_mlp",
        combine="sum",
        config=lambda *_: {},
        mandatory="full",
        experts_wide=lambda _: 1,
    ),
    constants={"use_qk_norm": True, "use_mixed_mlp_moe": True},
    finish=_per_layer,
    wide_router={"bfloat16": (".mlp.gate.",)},  # with autocast, its product is one of bfloat16
    clients={
        "llama.cpp": (BIASES, ACTIVATION),
        "mlx-lm": (_TYPE,),
        "vLLM": (ACTIVATION,),
        "SGLang": (_ONE, ACTIVATION),
    },
)

"""Nemotron-H with experts: layers of plain experts, with a sigmoid router and a shared network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.families.nemotron_h import holds_experts
from upcycle.targets._layouts import PlainPerExpert, Shared
from upcycle.targets.native import Config, Native
from upcycle.targets.natives._deepseek import CONSTANTS
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy


@dataclass(frozen=True, kw_only=True)
class _NemotronH(Native):
    """A class whose layers are a network, experts, attention or Mamba, one of them each."""

    root = "backbone."

    def has(self, tensors: Mapping[str, Lazy]) -> bool:
        """Return whether a layer is a network or experts."""
        return any(name.startswith(("mixer.up_proj.", "mixer.experts.")) for name in tensors)

    def holds_experts(self, config: Mapping[str, Any]) -> bool:
        """Return whether a layer has experts, whatever the number of experts is."""
        return holds_experts(config)


def _kinds(dense: Config, moe_layers: frozenset[int]) -> Config:
    kinds = ["moe" if i in moe_layers else kind for i, kind in enumerate(dense["layers_block_type"])]
    return {"layers_block_type": kinds, "intermediate_size": dense["intermediate_size"]}


def _as_its_class_reads(config: Config) -> Config:
    """Return the config without positions, which it has none of, and with its name of the activation."""
    kept = {k: v for k, v in config.items() if not k.startswith("rope_") and k != "hidden_act"}
    return kept | {"mlp_hidden_act": config["hidden_act"]}


def _bias(num_experts: int, dtype: str) -> dict[str, Lazy]:
    return {"mixer.gate.e_score_correction_bias": Fill((num_experts,), "F32", 0.0)}


native = _NemotronH(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    summary="sigmoid, norm_topk_prob, correction bias, shared network; plain experts in layers of their own",
    layout=PlainPerExpert(path="mixer.experts"),
    router="mixer.gate.weight",
    blocks="backbone.layers.",
    part="mixer",
    fields=(
        "head_dim", "sliding_window", "ssm_state_size", "mamba_num_heads", "mamba_head_dim",
        "mamba_hidden_act", "n_groups", "conv_kernel", "expand", "time_step_min", "time_step_max",
        "time_step_floor", "use_conv_bias", "chunk_size", "use_bias", "layer_norm_epsilon",
        "residual_in_fp32", "mlp_bias", "rescale_prenorm_residual", "hidden_dropout", "num_logits_to_keep",
        "mamba_ssm_cache_dtype",
    ),
    num_experts_field="n_routed_experts",
    width_field="moe_intermediate_size",
    scores="sigmoid",
    least_experts=2,
    renormalizes="optional",
    shared=Shared(
        path="mixer.shared_experts",
        combine="sum",
        config=lambda width, _: {"moe_shared_expert_intermediate_size": width, "n_shared_experts": 1},
        mandatory="narrow",
    ),
    dense_layers=_kinds,
    constants={key: value for key, value in CONSTANTS.items() if key != "norm_topk_prob"},
    finish=_as_its_class_reads,
    extra=_bias,
)  # fmt: skip

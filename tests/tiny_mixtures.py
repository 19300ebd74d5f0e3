"""Tiny random Mixtures of Experts of every architecture that can grow, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from upcycle.targets import natives

NAMES = natives.growing()

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "flex_olmo": {"num_experts": 4, "norm_topk_prob": True},
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12, "norm_topk_prob": True},
}  # fmt: skip


def make_mixture(folder: Path, model_type: str, *, as_hub: bool = True, **changes: Any) -> Path:
    """A Mixture of Experts with weights large enough that a missing or misplaced one shows.

    `as_hub` writes the names of the hub's checkpoints, and otherwise those that transformers has in memory.
    """
    config = CONFIG_MAPPING[model_type](**{**SMALL, **SPECIAL.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.3 * noise + 1.0 if "norm" in name else noise * p.shape[-1] ** -0.5)
    model.save_pretrained(folder, save_original_format=as_hub)
    return folder

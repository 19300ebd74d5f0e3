"""Adapters that `peft` itself made, merged here and by `peft`: the same matrices to a rounding of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from upcycle import Recipe, blueprint

peft = pytest.importorskip("peft", reason="peft is not installed")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "LlamaForCausalLM",
        {
            "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {r".*\.2\.mlp\.gate_proj": 5},
        },
    ),
    "a pattern for targets": (
        "LlamaForCausalLM",
        {"target_modules": r".*layers\.(0|2)\.mlp\.(up|down)_proj"},
    ),
    "some layers": ("LlamaForCausalLM", {"target_modules": ["up_proj"], "layers_to_transform": [1, 2]}),
    "turned": ("GPT2LMHeadModel", {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True}),
    "names of today's class": ("ViTForImageClassification", {"target_modules": ["fc1", "fc2", "q_proj"]}),
    "fused": ("Phi3ForCausalLM", {"target_modules": ["gate_up_proj", "down_proj"]}),
    "encoder-decoder": ("T5ForConditionalGeneration", {"target_modules": ["wi", "wo"]}),
}


def trained(base: Path, out: Path, architecture: str, settings: dict[str, Any]) -> tuple[Path, Path]:
    """An adapter that peft saved, and the model that peft merged it into."""
    cls = getattr(transformers, architecture)
    model = peft.get_peft_model(
        cls.from_pretrained(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out / "adapter")
    merged = peft.PeftModel.from_pretrained(cls.from_pretrained(base), out / "adapter").merge_and_unload()
    merged.save_pretrained(out / "merged")
    return out / "adapter", out / "merged"


def same(base: Path, adapter: Path, merged: Path, backbone: str, target: str) -> None:
    """The blueprint of an adapter is that of the merged model, to the last bit but one."""
    made = []
    for table in ({"adapter": str(adapter)}, {"source": str(merged)}):
        init = {"name": "experts", "expert": [table], "backbone": backbone}
        recipe = Recipe.of(moe={"num_experts": 2, "target": target}, init=init)
        made.append({name: e.lazy.all("F32") for name, e in blueprint(base, recipe).entries.items()})
    mine, theirs = made
    for name, wanted in theirs.items():
        largest = float(np.abs(wanted).max(initial=0.0))
        assert np.abs(mine[name] - wanted).max(initial=0.0) <= 2**-22 * largest, name


@pytest.mark.parametrize("backbone", ["base", "average"])
@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case, backbone, tmp_path):
    architecture, settings = CASES[case]
    base = tiny.make(tmp_path / "base", architecture)
    adapter, merged = trained(base, tmp_path, architecture, settings)
    same(base, adapter, merged, backbone, "upcycled")


def test_stories(stories, tmp_path):
    settings = {"r": 16, "target_modules": ["gate_proj", "up_proj", "down_proj", "v_proj"]}
    adapter, merged = trained(stories, tmp_path, "LlamaForCausalLM", settings)
    for backbone in ("base", "average"):
        same(stories, adapter, merged, backbone, "native")

"""The rate and the weight decay of every parameter, by name, against lists written down by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from ranks import trainee_of
from upcycle.training import optimizer
from upcycle.training.optimizers.adamw import AdamW
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.trainee import Trainee

HERE = Ranks(device=torch.device("cpu"))
UPCYCLED = {"moe": {"num_experts": 4, "layers": "last_half", "target": "upcycled"}}


def trainee(source: Path, **changes: Any) -> Trainee:
    made = {
        "source": str(source),
        "out": "unused",
        "data": {"sources": [{"path": "unused"}]},
        "train": {"steps": 1, "batch_size": 4, "weight_decay": 0.05, "layer_decay": 0.5},
        "schedule": {"name": "constant", "peak": 1.0},
        **changes,
    }
    return trainee_of(Run.of(made), HERE)


def groups(found: Trainee) -> dict[str, tuple[float, float]]:
    """The part of the rate, and the weight decay, by name."""
    names = {parameter: name for name, parameter in found.model.named_parameters()}
    return {
        names[p]: (group["scale"], group["weight_decay"])
        for group in found.optimizer.param_groups
        for p in group["params"]
    }


def leaves(*paths: str) -> set[str]:
    return {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}


ATTENTION = [f"attention.{part}_proj" for part in "qkvo"]


def test_rates_of_an_upcycled_vit(tmp_path: Path) -> None:
    """MoE Jetpack's numbers with N = 4: attention of block i has decay^(5 - (i + 1)), patches decay^5."""
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification")
    found = groups(trainee(source, **UPCYCLED, router={"name": "soft"}))
    wanted: dict[float, set[str]] = {
        0.5**5: {
            "vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
            *leaves("vit.embeddings.patch_embeddings.projection"),
        },
        1.0: leaves("vit.layernorm", "classifier"),
    }  # fmt: skip
    for i in range(4):
        block = [f"vit.layers.{i}.{name}" for name in (*ATTENTION, "layernorm_before")]
        mlp = f"vit.layers.{i}.mlp"
        if i < 2:
            block += [f"{mlp}.fc1", f"{mlp}.fc2", f"vit.layers.{i}.layernorm_after"]
        else:
            experts = {f"{mlp}.experts.{m}_proj{bias}" for m in ("up", "down") for bias in ("", "_bias")}
            wanted[1.0] |= experts | {f"{mlp}.router.weight", f"{mlp}.router.scale"}
            wanted[1.0] |= leaves(f"vit.layers.{i}.layernorm_after")
        wanted[0.5 ** (4 - i)] = leaves(*block)
    assert {scale: {n for n, (s, _) in found.items() if s == scale} for scale in wanted} == wanted
    assert set(found) == set().union(*wanted.values())


def test_no_weight_decay(tmp_path: Path) -> None:
    """Of an upcycled ViT: nothing but matrices, of experts, router, attention, patches and head."""
    source = tiny.make(tmp_path / "deit", "DeiTForImageClassification")
    found = groups(trainee(source, **UPCYCLED, router={"name": "soft"}))
    decayed = {name for name, (_, decay) in found.items() if decay == 0.05}
    wanted = {"deit.embeddings.patch_embeddings.projection.weight", "classifier.weight"}
    for i in range(4):
        wanted |= {f"deit.layers.{i}.{name}.weight" for name in ATTENTION}
        mlp = f"deit.layers.{i}.mlp."
        if i < 2:
            wanted |= {mlp + "fc1.weight", mlp + "fc2.weight"}
        else:
            wanted |= {mlp + "router.weight", mlp + "experts.up_proj", mlp + "experts.down_proj"}
    assert decayed == wanted
    assert {decay for _, decay in found.values()} == {0.0, 0.05}
    left = {name.removeprefix("deit.") for name in found if name not in decayed}
    assert {f"embeddings.{n}" for n in ("cls_token", "distillation_token", "position_embeddings")} <= left
    assert {f"layers.3.mlp.experts.{n}_proj_bias" for n in ("up", "down")} <= left
    assert {"layers.3.mlp.router.scale", "layers.0.layernorm_before.weight", "layernorm.bias"} <= left


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("embeddings.mask_token", (1, 8), False),
        ("embeddings.position_embeddings.weight", (40, 8), True),  # a table, as in Google's BERT
        (
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (32, 4),
            True,
        ),  # in spite of its name
        ("layers.0.mlp.experts.gate_up_proj_bias", (4, 16), False),
        ("layers.0.mlp.e_score_correction_bias", (1, 4), False),
        ("layers.0.layer_scale1.lambda1", (8,), False),
        ("layers.0.linear_attn.conv1d.weight", (8, 1, 4), True),
    ],
)
def test_names_that_mislead(name: str, shape: tuple[int, ...], decays: bool) -> None:
    assert optimizer.decays(name, torch.empty(shape)) == decays


def test_a_native_moe(dense: Any) -> None:
    """Mixtral in memory: every block has an MoE layer, and what stays decayed is attention and its norm."""
    found = groups(trainee(dense("llama"), moe={"num_experts": 4}, train={"steps": 1, "layer_decay": 0.5}))
    slow = {name: scale for name, (scale, _) in found.items() if scale < 1}
    wanted = {"model.embed_tokens.weight": 0.5**5}
    for i in range(4):
        block = f"model.layers.{i}."
        names = [f"self_attn.{part}_proj" for part in "qkvo"]
        wanted |= {f"{block}{name}.weight": 0.5 ** (4 - i) for name in (*names, "input_layernorm")}
    assert slow == wanted


def test_depth_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Blocks of the decoder count on from the encoder's."""
    source = tiny.make(tmp_path / "t5", "T5ForConditionalGeneration")  # four blocks and two
    router = {"name": "top_k", "capacity_factor": 2.0}
    found = {n: s for n, (s, _) in groups(trainee(source, **UPCYCLED, router=router)).items()}
    assert found["shared.weight"] == 0.5**7
    for number, block in enumerate(
        ["encoder.block.0", "encoder.block.3", "decoder.block.0", "decoder.block.1"]
    ):
        depth = (1, 4, 5, 6)[number]
        assert found[f"{block}.layer.0.SelfAttention.q.weight"] == 0.5 ** (7 - depth)
        assert found[f"{block}.layer.0.layer_norm.weight"] == 0.5 ** (7 - depth)
    assert found["encoder.final_layer_norm.weight"] == 0.5**3
    assert found["decoder.final_layer_norm.weight"] == 1
    assert found["decoder.block.0.layer.2.DenseReluDense.wi.weight"] == 0.5**2
    for name in ("encoder.block.3.layer.1", "decoder.block.1.layer.2"):
        assert found[f"{name}.layer_norm.weight"] == found[f"{name}.DenseReluDense.router.weight"] == 1


def test_the_schedule_moves_all_groups() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    scales = {"a.weight": 0.25, "a.bias": 0.25, "b.weight": 1.0, "b.bias": 1.0}
    adam = optimizer.make(model, AdamW(), scales)
    assert len(adam.param_groups) == 4
    for lr in (1.0, 0.5):
        optimizer.set_rate(adam, lr)
        assert sorted(group["lr"] for group in adam.param_groups) == [lr / 4] * 2 + [lr] * 2
    (one,) = {group["scale"] for group in optimizer.make(model, AdamW()).param_groups}
    assert one == 1.0


def parameters(source: Path, decay: float) -> dict[str, Tensor]:
    """After one update of a ViT."""
    from ranks import batch_of
    from upcycle.training import step

    found = trainee(source, train={"steps": 1, "batch_size": 4, "layer_decay": decay, "weight_decay": 0.0})
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    step.train_step(found, batch_of(found.run, found.task), 0, 1e-3)
    return {name: (p - before[name]).detach() for name, p in found.model.named_parameters()}


def test_updates_are_scaled(tmp_path: Path) -> None:
    """Adam's first step is as long as the rate says."""
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification", num_hidden_layers=2)
    plain, decayed = parameters(source, 1.0), parameters(source, 0.25)
    wanted = {
        "vit.embeddings.cls_token": 1 / 64,
        "vit.layers.0.mlp.fc1.weight": 1 / 16,
        "vit.layers.1.attention.q_proj.weight": 1 / 4,
        "classifier.weight": 1,
    }
    for name, scale in wanted.items():
        torch.testing.assert_close(decayed[name], plain[name] * scale, rtol=2e-2, atol=1e-6)


def test_every_family_says_where_its_parameters_are(dense: Any) -> None:
    """Blocks by their numbers, what makes their inputs at 0, the rest behind the blocks."""
    for model_type in (*tiny.DECODERS, *tiny.OTHERS):
        found = trainee(dense(model_type), train={"steps": 1, "layer_decay": 0.5})
        for name, (scale, _) in groups(found).items():
            parts = name.split(".")
            first = re.search("embed_tokens|embeddings[.]|per_layer_", name)
            depth = int(parts[2]) + 1 if parts[1] == "layers" else 0 if first else 5
            assert scale == 0.5 ** (5 - depth), (model_type, name)

"""Blocks that are passed by, and dropout in experts: what is drawn, where, when, and drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import tiny
from marks import sampled
from ranks import batch_of, trainee_of
from upcycle import UpcycleError, families
from upcycle.nn.experts import Experts
from upcycle.training import drop_path, dropout, step
from upcycle.training.parallel import Ranks
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run
from upcycle.training.trainee import Trainee

HERE = Ranks(device=torch.device("cpu"))
UPCYCLED = {"moe": {"num_experts": 4, "target": "upcycled"}}
OTHER_ATTENTION = ("qwen3_5_text", "lfm2", "granitemoehybrid")  # in some of their blocks
CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "convnext": "ConvNextForImageClassification",
    "t5": "T5ForConditionalGeneration",
}


def trainee(source: Path, train: dict[str, Any], **changes: Any) -> Trainee:
    made = {
        "source": str(source),
        "out": "unused",
        "data": {"sources": [{"path": "unused"}]},
        "train": {"steps": 1, "batch_size": 4, **train},
        "schedule": {"name": "constant", "peak": 1e-3},
        **changes,
    }
    return trainee_of(Run.of(made), HERE)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "vit", CLASSES["vit"])


def test_samples_are_dropped_whole_and_the_mean_is_kept() -> None:
    torch.manual_seed(0)
    branch = torch.rand(4000, 3, 2) + 1
    found = drop_path.dropped(branch, 0.3)
    gone = (found == 0).flatten(1)
    assert torch.equal(gone.any(1), gone.all(1))
    assert abs(gone.all(1).float().mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    kept = ~gone.all(1)
    torch.testing.assert_close(found[kept], branch[kept] / 0.7)
    assert drop_path.dropped(torch.ones(2, 3, 4, 4), 0.5).flatten(1).std(1).eq(0).all()  # maps as well


def test_rates_are_linear_over_depth(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's linspace: nothing at the first block, the whole rate at the last; both branches of a block."""
    seen: list[float] = []

    def look(branch: Tensor, rate: float) -> Tensor:
        seen.append(rate)
        return branch

    monkeypatch.setattr(drop_path, "dropped", look)
    found = trainee(vit, {"drop_path": 0.3})
    pixels = torch.rand(2, 3, 12, 12)
    trained = found.model(pixels).logits
    assert seen == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert torch.equal(found.model.eval()(pixels).logits, trained)
    assert len(seen) == 6  # none when it does not train


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.rand(2, 3, 12, 12)}
    ids = torch.randint(3, 60, (2, 7))
    both = model.config.is_encoder_decoder
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


def passes_by(found: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every branch is left out, a stack of blocks gives what its first block gives."""
    monkeypatch.setattr(drop_path, "dropped", lambda branch, rate: torch.zeros_like(branch))
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return hook

    base, dense = found.model.base_model, found.start.dense
    stacks = [stack.blocks for stack in dense.family.stacks(dense.config)]
    for path in stacks:
        blocks = list(base.get_submodule(path).children())
        blocks[0].register_forward_hook(keep(f"{path} first"))
        blocks[-1].register_forward_hook(keep(f"{path} last"))
    for module in found.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found.model(**inputs(found.model))
    first, last = (states[f"{stacks[0]} {place}"] for place in ("first", "last"))
    torch.testing.assert_close(first, last)
    for path in stacks[1:]:  # a later stack drops in its first block as well
        torch.testing.assert_close(states[f"{path} first"], states[f"{path} last"])


@pytest.mark.parametrize("target", ["dense", "upcycled"])
@pytest.mark.parametrize("model_type", sampled([*CLASSES, *tiny.DECODERS, *tiny.OTHERS], 4))
def test_the_branches_of_every_family(
    model_type: str, target: str, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.make(tmp_path / "x", CLASSES[model_type]) if model_type in CLASSES else dense(model_type)
    changes = UPCYCLED if target == "upcycled" else {}
    if model_type in OTHER_ATTENTION:
        with pytest.raises(UpcycleError, match="have no place where a branch can be left out"):
            trainee(source, {"drop_path": 0.1}, **changes)
        return
    passes_by(trainee(source, {"drop_path": 0.1}, **changes), monkeypatch)


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_the_branches_of_native_targets(model_type: str, dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for native in families.find(model_type).natives:
        options = {"moe": {"num_experts": 4, "target": native}}
        if (model_type, native) == ("phi3", "glm4_moe"):
            continue  # that is for a Phi-4-mini, and this one has a window
        if native.startswith("granitemoe") or model_type in OTHER_ATTENTION:
            with pytest.raises(UpcycleError, match=r"train\.drop_path = 0\.1: the blocks of .* no place"):
                trainee(dense(model_type), {"drop_path": 0.1}, **options)
            trainee(dense(model_type), {"drop_path": 0.0}, **options)
        else:
            passes_by(trainee(dense(model_type), {"drop_path": 0.1}, **options), monkeypatch)


def test_a_dry_run_steps_with_it(dense: Any) -> None:
    table = {"source": str(dense("llama")), "out": "unused", "data": {"sources": [{"path": "unused"}]}}
    train = {"steps": 1, "batch_tokens": 64, "sequence_length": 16, "drop_path": 0.1}
    run = Run.of({**table, "train": train, "schedule": {"name": "constant", "peak": 1e-3}})
    assert rehearse(run).stepped == 2


def test_the_rate_of_config_json_gives_way(tmp_path: Path) -> None:
    """DINOv2 has a place of its own, with one rate for all blocks."""
    source = tiny.make(tmp_path / "dinov2", CLASSES["dinov2"], drop_path_rate=0.6)
    pixels = torch.rand(4, 3, 12, 12)
    for train, same in (({}, False), ({"drop_path": 0.0}, True), ({"drop_path": 0.5}, False)):
        model = trainee(source, train).model
        wanted = model.eval()(pixels).logits
        torch.manual_seed(0)
        assert torch.allclose(model.train()(pixels).logits, wanted) == same
    first = model.base_model.encoder.layer[0]
    states = torch.rand(4, 5, 16)
    assert torch.equal(first.train()(states), first.eval()(states))


def gradients(source: Path, train: dict[str, Any]) -> dict[str, Tensor]:
    found = trainee(source, train, **UPCYCLED, router={"name": "soft"})
    kept: dict[str, Tensor] = {}
    names = {p: n for n, p in found.model.named_parameters()}

    def keep(*_: Any) -> None:
        kept.update({n: p.grad.clone() for p, n in names.items() if p.grad is not None})

    found.optimizer.register_step_pre_hook(keep)
    step.train_step(found, batch_of(found.run, found.task), 0, 1e-3)
    return kept


def test_recomputed_blocks_draw_the_same(vit: Path) -> None:
    """Gradients with activation checkpointing are those without, and the step's seed says what they are."""
    random = {"drop_path": 0.5, "expert_dropout": 0.4, "expert_output_dropout": 0.4, "clip_grad_norm": 0.0}
    whole = gradients(vit, random)
    again = gradients(vit, random)
    recomputed = gradients(vit, {**random, "activation_checkpointing": True})
    other = gradients(vit, {**random, "seed": 1})
    certain = gradients(vit, {"clip_grad_norm": 0.0})
    for name, gradient in whole.items():
        assert torch.equal(again[name], gradient)
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)
    for different in (other, certain):
        assert not torch.allclose(different["classifier.weight"], whole["classifier.weight"])


# --- dropout in experts


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("built", [0.0, 0.1])
def test_dropout_of_experts(gated: bool, built: float) -> None:
    """After the activation and on what an expert gives, as drawn by torch's own dropout."""
    options = {"hidden_size": 8, "intermediate_size": 12, "activation": "gelu", "gated": gated, "bias": True}
    experts = Experts(PreTrainedConfig(), num_experts=1, dropout=built, **options)
    experts.reset_parameters(0.5)
    experts.set_dropout(0.4, 0.3)
    hidden, index, weights = torch.randn(50, 8), torch.zeros(50, 1, dtype=torch.long), torch.ones(50, 1)
    torch.manual_seed(0)
    found = experts.train()(hidden, index, weights)
    torch.manual_seed(0)
    inner = F.linear(
        hidden, getattr(experts, experts.up_name)[0], getattr(experts, f"{experts.up_name}_bias")[0]
    )
    inner = F.gelu(inner[:, :12]) * inner[:, 12:] if gated else F.gelu(inner)
    down = F.linear(F.dropout(inner, 0.4), experts.down_proj[0], experts.down_proj_bias[0])
    torch.testing.assert_close(found, F.dropout(down, 0.3))
    assert abs((found == 0).float().mean() - 0.3) < 0.1
    certain = experts.eval()(hidden, index, weights)
    torch.testing.assert_close(certain, F.linear(inner, experts.down_proj[0], experts.down_proj_bias[0]))
    # None leaves what the config said.
    experts.set_dropout(None, 0.0)
    dropouts = [m.p for m in experts.modules() if isinstance(m, nn.Dropout) and m.p]
    assert dropouts == [0.4]


def test_dropout_reaches_all_experts_and_no_config(vit: Path) -> None:
    options = {"moe": {**UPCYCLED["moe"], "shared_experts": 1}}
    model = trainee(vit, {"expert_dropout": 0.4, "expert_output_dropout": 0.2}, **options).model
    found = [m for m in model.modules() if isinstance(m, Experts)]
    assert len(found) == 8  # of four layers, with a shared one each
    for experts in found:
        assert sorted(m.p for m in experts.modules() if isinstance(m, nn.Dropout) and m.p) == [0.2, 0.4]
    assert [entry["dropout"] for entry in model.config.moe] == [0.0]
    assert {"expert_dropout", "drop_path"}.isdisjoint(model.config.to_dict())
    pixels = torch.rand(2, 3, 12, 12)
    plain = trainee(vit, {}, **options).model.eval()(pixels).logits
    assert torch.equal(model.eval()(pixels).logits, plain)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(pixels).logits, plain, atol=1e-3)


ALL_DROPOUT = {
    "t5": ("T5ForConditionalGeneration", {}),
    "bert": ("BertForMaskedLM", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "vit": ("ViTForImageClassification", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
}


@pytest.mark.parametrize("moe", [None, {**UPCYCLED["moe"], "layers": [1]}], ids=["dense", "experts"])
@pytest.mark.parametrize("name", ALL_DROPOUT)
def test_dropout_of_the_whole_model(name: str, moe: dict[str, Any] | None, tmp_path: Path) -> None:
    """At 0, training draws nothing; at another rate, the rates of all modules are that one."""
    architecture, changes = ALL_DROPOUT[name]
    source = tiny.make(tmp_path / name, architecture, **changes)
    options = {} if moe is None else {"moe": moe}
    plain = trainee(source, {}, **options)
    inputs = plain.model.dummy_inputs
    if name == "vit":
        inputs = {"pixel_values": torch.rand(2, 3, 12, 12)}
    elif name == "t5":
        inputs = {"input_ids": torch.arange(5, 25)[None], "decoder_input_ids": torch.arange(5, 15)[None]}
    else:
        inputs = {"input_ids": torch.arange(5, 25)[None]}
    wanted = plain.model.eval()(**inputs).logits
    assert not torch.allclose(plain.model.train()(**inputs).logits, wanted, atol=1e-4)
    none = trainee(source, {"dropout": 0.0}, **options)
    assert torch.equal(none.model.train()(**inputs).logits, wanted)
    some = trainee(source, {"dropout": 0.35}, **options).model
    rates = {m.p for m in some.modules() if isinstance(m, nn.Dropout) and "output_dropout" not in str(m)}
    assert rates - {0.0} == {0.35}
    given = dict(none.start.config)
    assert given == dict(plain.start.config)  # what an export writes


def test_dropout_of_a_class_without_any(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "convnext", CLASSES["convnext"])
    trainee(source, {"dropout": 0.0})
    with pytest.raises(UpcycleError, match=r"train\.dropout = 0\.1: config\.json of ConvNext.* has no rate"):
        trainee(source, {"dropout": 0.1})


def test_dropout_may_be_what_the_config_says(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "bert", "BertForMaskedLM", hidden_dropout_prob=0.1)
    plain = trainee(source, {"dropout": 0.1}).start
    told = dropout.set_in(plain.config, "BertForMaskedLM", 0.1)
    assert dropout.set_in(told, "BertForMaskedLM", 0.1) == told

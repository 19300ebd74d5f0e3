"""A training step queues its work and waits for nothing: one transfer to the host a step, read later.

A step runs on tensors without data (`FakeTensorMode`), on which everything that needs a number on the host is
an error: `item`, `tolist`, and shapes that depend on values. They are on another device than the host, so
that copies between the two can be counted. A second test runs a real step, for code that asks whether tensors
have data before it waits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
import tiny
from marks import quick, sampled
from upcycle import UpcycleError, families
from upcycle.nn import routers
from upcycle.training import ledger, optimizer, start, step, teacher
from upcycle.training.kept_logits import IDS, LOGS, KeptLogits
from upcycle.training.loop import train
from upcycle.training.parallel import ranks as world
from upcycle.training.run import Run
from upcycle.training.seeds import Seeds
from upcycle.training.trainee import Trainee

# Operators that wait on an accelerator, whatever their arguments. Indexing by a mask is `nonzero` too, and
# `torch.tensor(list, device=...)` calls `lift_fresh`.
WAITS = {
    "_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "argwhere", "lift_fresh",
}  # fmt: skip
UP = {"moe": {"target": "upcycled"}}


class Watch(TorchDispatchMode):
    """Notes copies between devices, and operators that would wait on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, str]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [a for a in args if isinstance(a, torch.Tensor)]
        made = out.device.type if isinstance(out, torch.Tensor) else None
        copied = [a.device.type for a in given if made and a.device.type != made]
        if copied and name in ("_to_copy", "copy_", "_copy_from"):
            self.copies.append((copied[0], str(made)))
        index = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in index):
            self.waits.append(name)
        return out


def batch_of(run: Any, task: Any) -> dict[str, torch.Tensor]:
    """A batch of the task with random numbers; texts of several lengths where rows are texts."""
    size = (run.train.rows, run.train.sequence_length)
    ids = torch.randint(3, 60, size, generator=torch.Generator().manual_seed(0))
    if task.name == "masked_lm":
        return {"inputs": ids, "labels": ids.where(ids % 5 == 0, -100)}
    if task.name == "text_classification":
        mask = (torch.arange(size[1]) < torch.arange(5, 5 + size[0])[:, None]).long()
        return {"ids": ids, "mask": mask, "types": torch.zeros_like(ids), "labels": ids[:, 0] % 2}
    return ranks.batch_of(run, task)


def without_data(trainee: Trainee, device: str) -> Trainee:
    """The same with parameters and buffers that have no data. Call it inside a FakeTensorMode."""
    for module in trainee.model.modules():
        for name, old in [*module._parameters.items()]:
            if old is not None:
                made = torch.empty(old.shape, dtype=old.dtype, device=device)
                module._parameters[name] = nn.Parameter(made, requires_grad=old.requires_grad)
        for name, old in [*module._buffers.items()]:
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)
    return replace(
        trainee,
        optimizer=optimizer.make(trainee.model, trainee.run.optimizer),
        ranks=replace(trainee.ranks, device=torch.device(device)),
    )


def two_steps(source: Path, changes: dict[str, Any], device: str = "meta") -> list[tuple[str, str]]:
    """Take two steps on tensors without data; returns the copies between devices.

    There is no meta kernel for grouped products in float32, so the weights are bfloat16.
    """
    run = ranks.run_of(str(source), {}, changes)
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here, "bfloat16")
    batch = batch_of(run, trainee.task)
    # Events and fused optimizers are for accelerators, and `meta` is none.
    fused = "torch.optim.adam._device_dtype_check_for_fused"
    with FakeTensorMode(), mock.patch("torch.Event"), mock.patch(fused):
        trainee = without_data(trainee, device)
        given = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in batch.items()}
        with Watch() as watch:
            for number in range(2):
                step.queue_step(trainee, given, number, 1e-3)
    return watch.copies


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """A function that makes a tiny dense model of a family or class, once."""
    home = tmp_path_factory.mktemp("dense")

    def make(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            (tiny.make if name.startswith("Bert") else tiny.make_dense)(folder, name)
        return folder

    return make


def test_waits_are_seen():
    """Or the other tests would say nothing."""
    with FakeTensorMode(), Watch() as watch:
        there = torch.empty(4, device="meta", dtype=torch.long)
        for wait in (lambda: there.sum().item(), lambda: there.tolist(), lambda: bool(there.any())):
            with pytest.raises(DataDependentOutputException):
                wait()
        for shape in (lambda: there.nonzero(), lambda: torch.bincount(there), lambda: there[there > 0]):
            with pytest.raises(DynamicOutputShapeException):
                shape()
        torch.tensor([1, 2]).to("meta")
        there.cpu()
    assert watch.copies == [("cpu", "meta"), ("meta", "cpu")]
    with Watch() as watch:
        here = torch.arange(4)
        assert int(here.sum()) == 6
        assert len(here[here > 1]) == 2
        torch.bincount(here)
        torch.tensor([1, 2])
    assert watch.waits == ["_local_scalar_dense", "index", "bincount", "lift_fresh"]


BERT = "BertForMaskedLM"
TEXTS = "BertForSequenceClassification"
ROUTERS = {
    "top_k": ("llama", {"router": {"name": "top_k", "noise_std": 1.0, "load_loss_coef": 0.1}}),
    "top_k, places": ("llama", {"router": {"name": "top_k", "capacity_factor": 1.0}}),
    "top_k, surest first": (BERT, {"router": {"capacity_factor": 0.5, "batch_priority": True}}),
    "top_k, texts": (TEXTS, {"router": {"capacity_factor": 0.5, "rounding": "vmoe"}}),
    "sigmoid": ("llama", {"router": {"name": "sigmoid", "bias_update_rate": 0.01}}),
    "analytic": ("llama", {"router": {"name": "analytic", "bias_update_rate": 0.001}}),
    "sigmoid, texts": (TEXTS, {"router": {"name": "sigmoid"}}),
    "expert_choice": (BERT, {"router": {"name": "expert_choice"}}),
    "expert_choice, texts": (TEXTS, {"router": {"name": "expert_choice"}}),
    "soft, texts": (TEXTS, {"router": {"name": "soft"}}),
    "spherical": (BERT, {"router": {"name": "spherical", "preset": "repo", "branch_dropout": 0.1}}),
    "accumulated": ("llama", {"train": {"micro_batch": 2, "clip_grad_norm": 1.0}}),
    "muon": ("llama", {"optimizer": {"name": "muon"}}),
    "adafactor": ("llama", {"optimizer": {"name": "adafactor"}}),
    "documents apart": ("llama", {"data": {"isolate": True}}),
    "buffered": ("llama", {"train": {"micro_batch": 2}, "router": {"balance_counts": "buffered"}}),
}


def test_every_router_is_here():
    tables = [changes.get("router", {}) for _, changes in ROUTERS.values()]
    assert {table.get("name", "top_k") for table in tables} == {*routers.names()}


QUICK = ("top_k", "sigmoid", "spherical", "expert_choice, texts", "buffered")


@pytest.mark.parametrize("name", quick(ROUTERS, *QUICK))
def test_no_router_waits(name, source):
    """The only copy of a step is that of its numbers."""
    model, changes = ROUTERS[name]
    assert two_steps(source(model), {**UP, **changes}) == [("meta", "cpu")] * 2


def test_jitter_waits_for_nothing(source):
    """It has a generator of its own, which there is none of on `meta`."""
    assert two_steps(source("llama"), {"router": {"jitter": 0.1}}, "cpu") == []


NATIVES = {native: name for name in reversed(tiny.DECODERS) for native in families.find(name).natives}
"""A causal language model that becomes each native; natives of wrapped models have none."""


@pytest.mark.parametrize("name", sampled(NATIVES, 9))
def test_no_native_waits(name, source):
    """With grouped products. Looped experts (`eager`) wait in transformers' own code, once an expert."""
    changes = {"moe": {"target": name}, "train": {"experts_implementation": "grouped_mm"}}
    assert two_steps(source(NATIVES[name]), changes) == [("meta", "cpu")] * 2


@pytest.mark.parametrize(
    ("model", "changes", "waits"),
    [
        (BERT, {**UP, "router": {"name": "expert_choice"}}, []),
        (TEXTS, {**UP, "router": {"name": "expert_choice"}}, ["_local_scalar_dense"]),
        ("llama", UP, []),
        ("llama", {"optimizer": {"name": "sgd"}}, []),
    ],
)
def test_a_real_step_waits_for_nothing(model, changes, waits, source):
    """transformers itself asks once in a forward pass whether a mask of texts masks anything."""
    run = ranks.run_of(str(source(model)), {}, changes)
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    batch = batch_of(run, trainee.task)
    with Watch() as watch:
        queued = step.queue_step(trainee, batch, 0, 1e-3)
    assert watch.waits == waits
    assert queued.outcome().loss > 0


@pytest.mark.parametrize("top", [None, 4])
def test_a_teacher_waits_for_nothing(top, source):
    """Neither one that runs beside the step, nor its logits, which travel with the batch."""
    teaches = {"source": str(source("llama")), "temperature": 2.0, **({"top_logits": top} if top else {})}
    run = ranks.run_of(str(source("llama")), {}, {**UP, "teacher": teaches, "data": {"isolate": True}})
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(replace(run, teacher=None), here)
        batch = batch_of(run, trainee.task)
        if top:
            batch[LOGS] = torch.full((*batch["rows"][:, 1:].shape, top), 0.1).log()
            batch[IDS] = torch.arange(top).expand_as(batch[LOGS])
        beside = teacher.Beside(model=teacher.model_of(start.start_of(run).teacher, here, "float32"))
    trainee = replace(trainee, run=run, teacher=KeptLogits(segments=(), places={}) if top else beside)
    with Watch() as watch:
        queued = step.queue_step(trainee, batch, 0, 1e-3)
    assert watch.waits == []
    assert queued.outcome().divergence > 0


def test_looped_experts_wait(source):
    run = ranks.run_of(str(source("llama")), {}, {"train": {"experts_implementation": "eager"}})
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    with Watch() as watch:
        step.queue_step(trainee, batch_of(run, trainee.task), 0, 1e-3)
    assert watch.waits


def test_numbers_that_are_read_late_are_the_same(trainable, tmp_path, monkeypatch):
    """As on an accelerator: lines, scores, and checkpoints are those of a run that reads at once."""
    found = []
    for steps_behind in (0, 1):
        monkeypatch.setattr(ledger, "lag", lambda _, steps=steps_behind: steps)
        out = tmp_path / f"run{steps_behind}"
        table = {
            "source": str(trainable[0]),
            "out": str(out),
            "moe": {"num_experts": 4, "top_k": 2},
            "data": {"sources": [{"path": str(trainable[1])}], "held_out": 0.1},
            "train": {
                "steps": 5, "batch_tokens": 128, "sequence_length": 32, "eval_every": 3, "eval_examples": 4,
            },
            "schedule": {"name": "constant", "peak": 1e-3},
            "checkpoint": {"every": 4, "keep": 3},
        }  # fmt: skip
        train(Run.of(table))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        timed = ("seconds", "tokens_per_s", "active_flops_per_s", "peak_memory")
        states = [json.loads(file.read_text()) for file in sorted(out.glob("**/state.json"))]
        kept = ("step", "loss", "held_out_loss", "held_out_accuracy", "held_out_start", "batches")
        states = [{name: state[name] for name in kept} for state in states]
        found.append(([{k: v for k, v in line.items() if k not in timed} for line in lines], states))
    assert [line["step"] for line in found[0][0]] == [1, 2, 3, 4, 5]
    assert len(found[0][1]) == 2
    assert found[0] == found[1]


def test_a_step_that_is_not_finite_changes_nothing_on_the_device(source):
    """The host learns of it later, so the device has to skip the update."""
    for changes in ({"optimizer": {"name": name}} for name in ranks.optimizers_here()):
        run = ranks.run_of(str(source("llama")), {}, changes)
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here)
        batch = batch_of(run, trainee.task)
        step.train_step(trainee, batch, 0, 1e-3)
        bad = next(p for n, p in trainee.model.named_parameters() if n.endswith("lm_head.weight"))
        with torch.no_grad():
            bad[3, 0] = float("inf")
        before = [p.detach().clone() for p in trainee.model.parameters()]
        with pytest.raises(UpcycleError, match=r"step 2: the loss is"):
            step.queue_step(trainee, batch, 1, 1e-3).outcome()
        for old, new in zip(before, trainee.model.parameters(), strict=True):
            assert torch.equal(old, new)


def test_seeds_of_a_run_do_not_meet():
    """Every rank, micro batch and layer of two thousand steps; rank 0 keeps the numbers that it had."""
    steps = [Seeds(run=3, step=s, rank=r).of_step for s in range(2000) for r in (0, 1, 997, 1023)]
    assert len({*steps}) == len(steps)
    jitter = [
        Seeds(run=3, step=s, rank=r, micro=m).of_layer(layer)
        for s in range(20) for r in (0, 1, 257, 512) for m in (0, 1, 300) for layer in (0, 1, 79)
    ]  # fmt: skip
    assert len({*jitter}) == len(jitter)
    assert Seeds(run=3, step=5).of_step == 3 * 1_000_003 + 5 * 997
    assert Seeds(run=3, step=5).of_layer(2) == ((3 * 1_000_003 + 5) * 4099) * 4099 + 2

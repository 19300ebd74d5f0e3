"""Continued training on one process: against transformers and torch, stopped anywhere, and gone on with."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import ranks
import tiny
import tiny_wrappers
import upcycle
from files import toml
from marks import quick
from upcycle import Recipe, UpcycleError, cli, convert, inspect, load, verify
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.data.batches import Batches
from upcycle.data.corpus import prepare
from upcycle.system import memory
from upcycle.training import fit, held_out, moments, router_losses, routing, saving, start, transfer
from upcycle.training.export import export
from upcycle.training.exports._on_disk import on_disk
from upcycle.training.held_out import HeldOut
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.schedules.constant import Constant
from upcycle.training.schedules.cosine import Cosine
from upcycle.training.schedules.inverse_sqrt import InverseSqrt
from upcycle.training.schedules.warmup_stable_decay import WarmupStableDecay

HERE = Ranks(device=torch.device("cpu"))
MOE = {"moe": {"num_experts": 4, "top_k": 2}, "init": {"name": "drop", "ratio": 0.5}}


@pytest.fixture
def source(trainable) -> Path:
    return trainable[0]


@pytest.fixture
def table(trainable, tmp_path):
    """A function that gives a run file on real weights and real text, as a table."""

    def make(**changes) -> dict:
        made = {
            "source": str(trainable[0]),
            "out": str(tmp_path / "run"),
            "data": {"sources": [{"path": str(trainable[1]), "separator": "<|endoftext|>"}], "held_out": 0.1},
            "train": {
                "steps": 6,
                "batch_tokens": 512,
                "sequence_length": 64,
                "eval_every": 3,
                "eval_tokens": 1024,
            },
            "schedule": {"peak": 1e-3, "warmup": 2},
            "checkpoint": {"every": 2, "keep": 3},
        }
        for key, value in changes.items():
            made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
        return made

    return make


def losses(out: Path) -> list[float]:
    return [record.loss for record in read(out)]


# --- the learning rate ---


def test_schedules_are_their_formulas():
    cosine = Cosine(peak=2.0, floor=1.0, warmup=4)
    assert [cosine.at(i, 20) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    for i in range(4, 20):
        assert cosine.at(i, 20) == pytest.approx(1 + (1 + math.cos(math.pi * (i - 4) / 16)) / 2)
    stable = WarmupStableDecay(peak=1.0, warmup=2, decay=4)
    assert [stable.at(i, 10) for i in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    constant = Constant(peak=3.0, warmup=1)
    assert {constant.at(i, 9) for i in range(9)} == {3.0}
    down = Cosine(peak=2.0, floor=1.0, warmup=4, warmup_from=6.0)
    assert [down.at(i, 20) for i in range(5)] == [5.0, 4.0, 3.0, 2.0, 2.0]
    assert Constant(peak=3.0, warmup=2, warmup_from=1.0).at(0, 9) == 2.0


def test_inverse_sqrt_goes_on_where_the_dense_run_stopped():
    dense = InverseSqrt(peak=0.01, warmup=100)
    upcycled = InverseSqrt(peak=0.01, warmup=100, start_step=5000)
    whole = [dense.at(i, 10_000) for i in range(4998, 5010)]
    assert [upcycled.at(i - 5000, 10_000) for i in range(5000, 5010)] == whole[2:]
    assert dense.at(9999, 10_000) == pytest.approx(
        0.01 * math.sqrt(100 / 10_000)
    )  # T5: 1e-2 at 1e2, 1e-3 at 1e4


def test_the_warm_up_of_the_dense_run_brings_no_warnings():
    """Of a warm-up of 100 steps, none is left after 1000 steps of the dense run, and 60 after 40."""

    def said(start_step, total, **keys):
        return " ".join(InverseSqrt(peak=0.01, warmup=100, start_step=start_step, **keys).warnings(total))

    assert said(1000, 6) == said(1000, 500, decay=450) == said(40, 61) == ""
    assert "inside its warm-up of 60" in said(40, 60)
    assert "the warm-up and the decay take 60 and 50 steps and the run is 100" in said(40, 100, decay=50)
    assert InverseSqrt(peak=0.01, warmup=100, start_step=99, warmup_from=0.5).at(0, 9) == pytest.approx(0.01)
    over = InverseSqrt(peak=0.01, warmup=100, start_step=100, warmup_from=0.5)
    (told,) = over.warnings(100)
    assert "warmup_from = 0.5 is not heeded" in told


# --- balance ---


def collapsed(layers: int, experts: int, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every layer sends all tokens to two experts, another pair in each layer."""
    logits = []
    for layer in range(layers):
        chosen = torch.full((tokens, experts), -20.0)
        chosen[:, 2 * layer : 2 * layer + 2] = 0.0
        logits.append(chosen)
    counts = torch.stack([torch.bincount(x.topk(2).indices.flatten(), minlength=experts) for x in logits])
    return logits, counts


def tally(counts: torch.Tensor, tokens: int) -> routing.Tally:
    return routing.Tally(counts=counts, tokens=tokens, left_behind=0, groups=1, top_k=2, balanced=False)


def balance(logits: list[torch.Tensor], counts: torch.Tensor, tokens: int) -> torch.Tensor:
    """The loss of each layer."""
    rows = zip(logits, counts, strict=True)
    return torch.stack([router_losses.load_balancing_loss(x.softmax(-1), row, tokens) for x, row in rows])


def test_the_collapse_that_the_pooled_loss_cannot_see():
    logits, counts = collapsed(layers=4, experts=8, tokens=64)
    assert float(router_losses.pooled_loss(logits, 2)) == pytest.approx(
        2.0, abs=1e-6
    )  # its value for balance
    per_layer = balance(logits, counts, 64)
    assert per_layer.tolist() == pytest.approx([8.0] * 4, abs=1e-4)  # E / K times the value for balance
    health = [routing.health(tally(row, 64), "layers", 0) for row in counts]
    assert [h.collapsed for h in health] == [True] * 4
    assert [h.dead for h in health] == [6] * 4


def test_perfect_balance_is_top_k():
    logits = [torch.zeros(64, 8)] * 3
    counts = torch.full((3, 8), 16)
    assert balance(logits, counts, 64).tolist() == pytest.approx([2.0] * 3)
    for layer in [routing.health(tally(row, 64), "layers", 0) for row in counts]:
        assert (layer.entropy, layer.busiest, layer.idlest, layer.dead) == (1.0, 0.125, 0.125, 0)
        assert not layer.collapsed


def test_the_loss_is_that_of_switch_token_by_token():
    """Against loops over tokens and experts; and each layer alone is what transformers computes of one."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(40, 6, generator=generator, requires_grad=True) for _ in range(3)]
    counts = torch.stack([torch.bincount(x.topk(2).indices.flatten(), minlength=6) for x in logits])
    found = balance(logits, counts, 40)
    for layer, value in zip(logits, found.detach(), strict=True):
        naive = 0.0
        for e in range(6):
            f = sum(e in row.topk(2).indices for row in layer) / 40
            p = sum(float(row.detach().softmax(-1)[e]) for row in layer) / 40
            naive += 6 * float(f) * p
        assert float(value) == pytest.approx(naive, rel=1e-5)
        assert float(value) == pytest.approx(float(router_losses.pooled_loss([layer], 2)), rel=1e-5)
    # Parts of the batch add up, and so do their gradients, when the counts are those of the whole.
    (whole,) = torch.autograd.grad(found.mean(), logits[0], retain_graph=True)
    halves = [balance([x[part] for x in logits], counts, 40) for part in (slice(25), slice(25, 40))]
    assert torch.allclose(halves[0] + halves[1], found, rtol=1e-6)
    (parts,) = torch.autograd.grad((halves[0] + halves[1]).mean(), logits[0])
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-9)


def test_z_loss_is_its_formula():
    logits = [torch.randn(10, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    naive = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for x in logits for row in x.tolist()) / 20
    found = sum(float(router_losses.z_loss(x, 10)) for x in logits) / 2
    assert found == pytest.approx(naive, rel=1e-5)


def test_biases_move_towards_the_idle():
    bias = torch.tensor([[0.5, 0.0, 0.0, 0.0]])
    routing.update_biases([bias], [tally(torch.tensor([10, 2, 4, 4]), 10)], 0.01)
    assert bias.tolist() == [pytest.approx([0.49, 0.01, 0.01, 0.01])]


# --- a run ---


def reference(run: Run, source: Path, folder: Path) -> list[float]:
    """The losses of transformers' own model and loss, torch's own AdamW and clipping, on the same rows."""
    tokens = prepare(run.data, source, folder / "tokens", vocab_size=512)
    batches = Batches(
        tokens, [1.0], length=run.train.sequence_length, held_out=run.data.held_out, seed=run.train_seed
    )
    if run.recipe:
        convert(source, folder / "moe", run.recipe)
    model = AutoModelForCausalLM.from_pretrained(folder / "moe" if run.recipe else source).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": run.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(run.optimizer.beta1, run.optimizer.beta2), eps=run.optimizer.eps)
    out = []
    for step in range(run.train.total_steps):
        rows = torch.from_numpy(batches.next(run.train.rows))
        options = {"output_router_logits": True} if run.recipe else {}
        found = model(
            input_ids=rows[:, :-1], labels=rows[:, 1:], shift_labels=rows[:, 1:].contiguous(), **options
        )
        entropy = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), rows[:, 1:].flatten())
        loss = entropy + run.router.balance_loss_coef * (found.aux_loss if run.recipe else 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_grad_norm)
        for group in adam.param_groups:
            group["lr"] = run.schedule.at(step, run.train.total_steps)
        adam.step()
        adam.zero_grad()
        out.append(float(entropy.detach()))
    return out


@pytest.mark.parametrize("kind", ["dense", "moe", "gpt2"])
def test_a_run_is_what_transformers_and_torch_compute(kind, table, source, tmp_path):
    """With the pooled loss, which transformers has as well. GPT-2's class is no ForCausalLM."""
    changes: dict = {}
    if kind == "moe":
        changes = {**MOE, "router": {"balance_loss": "pooled", "balance_loss_coef": 0.05}}
    if kind == "gpt2":
        still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        source = tiny.make(tmp_path / "gpt2", "GPT2LMHeadModel", vocab_size=512, n_positions=64, **still)
        tiny.make_bytes_tokenizer(source)
        changes = {"source": str(source)}
    run = Run.of(table(**changes))
    train(run)
    wanted = reference(run, source, tmp_path)
    assert losses(Path(run.out)) == pytest.approx(wanted, abs=2e-5)
    assert max(wanted) - min(wanted) > 0.01  # the weights do change


def test_metrics_say_what_happened(table, tmp_path):
    run = Run.of(table(**MOE, log={"peak_flops": 1e9}))
    result = train(run)
    records = read(tmp_path / "run")
    begun, length = start.start_of(run), run.train.sequence_length
    scores = sum(stack.count * stack.attention for stack in begun.dense.stacks) * 2 * length**2
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [(r.held_out_loss is not None) for r in records] == [False, False, True, False, False, True]
    assert result.held_out_loss == records[-1].held_out_loss
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    for r in records:
        assert r.tokens == r.step * 512
        assert 0 < r.peak_memory <= memory.peak()
        assert r.lr == run.schedule.at(r.step - 1, 6)
        assert r.tokens_per_s == pytest.approx(512 / r.seconds, rel=1e-3)
        flops = about["training_flops_per_row"] * r.tokens_per_s / length
        assert r.active_flops_per_s == pytest.approx(flops, rel=1e-3)
        # MFU counts the other half of the scores, too, as forecasts do.
        assert r.mfu == pytest.approx(
            (flops + 3 * scores * r.tokens_per_s / length) / 1e9, abs=2e-5, rel=1e-3
        )
        assert [layer.layer for layer in r.layers] == [0, 1, 2, 3, 4]
        for layer in r.layers:
            assert sum(layer.load) == pytest.approx(1.0, abs=1e-4)
            assert layer.busiest == max(layer.load)
            assert layer.router_grad_norm > 0
        shares = torch.tensor([layer.load for layer in r.layers])
        assert 2.0 - 0.2 < r.balance_loss < 2 * 4 / 2 + 0.1
        assert shares.shape == (5, 4)


def test_a_run_resumed_is_the_run(table, tmp_path):
    """Stopped after step 4 of 6, with jitter and accumulation: the same losses and weights, bit for bit."""
    changes = {**MOE, "router": {"jitter": 0.1, "z_loss_coef": 1e-3}, "train": {"micro_batch": 3}}
    train(Run.of(table(**changes, out=str(tmp_path / "whole"))))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-6")
    train(Run.of(table(**changes, out=str(tmp_path / "again"))), resume=True)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    made = [
        ranks.restored(table(**changes), str(tmp_path / name / "checkpoints" / "step-6"))
        for name in ("whole", "again")
    ]
    assert made[0] == made[1]
    # And a step does change every parameter, so that the comparison says something.
    before = ranks.restored(table(**changes), str(tmp_path / "whole" / "checkpoints" / "step-4"))[
        "parameters"
    ]
    assert all(before[name] != after for name, after in made[0]["parameters"].items())
    # A finished run has nothing to go on with.
    assert train(Run.of(table(**changes, out=str(tmp_path / "again"))), resume=True).steps == 6
    assert len(losses(tmp_path / "again")) == 6


def test_a_score_has_no_jitter(table, tmp_path):
    """At a rate of 0 the weights stay, and so does the held-out loss after steps with noise."""
    still = {"train": {"steps": 1, "eval_every": 1}, "schedule": {"peak": 0.0, "warmup": 0}}
    train(Run.of(table(**MOE, **still, router={"jitter": 0.5})))
    (record,) = read(tmp_path / "run")
    assert record.held_out_loss == record.held_out_start


@pytest.mark.slow
def test_killed_three_times_and_terminated_once(table, server, tmp_path):
    """SIGKILL at three random moments, saving after every step, then SIGTERM: the losses are those of a run
    that nobody disturbed. Checkpoints are written before the next step, and beside it, by turns."""
    out, steps = tmp_path / "run", {"train": {"steps": 40, "batch_tokens": 1024}, "checkpoint": {"every": 1}}
    for name in ("run", "calm"):
        text = toml(table(**MOE, **steps, out=str(tmp_path / name)))
        (tmp_path / f"{name}.toml").write_text(text)

    def begin(name: str, asynchronous: bool = False) -> int:
        run_file, how = tmp_path / f"{name}.toml", f"checkpoint.asynchronous={str(asynchronous).lower()}"
        command = ["train", str(run_file), "--resume", "--set", how]
        return server.start(command, run_file.with_suffix(".said"))

    calm, drawn = begin("calm"), random.Random(0)
    for goal in (5, 12, 20):
        process = begin("run", asynchronous=goal != 12)
        assert server.wait(process, lambda goal=goal: len(read(out)) >= goal) is None
        time.sleep(drawn.random() * 0.2)
        os.kill(process, signal.SIGKILL)
        assert server.wait(process) == -signal.SIGKILL
        done = saving.latest(out)
        assert done is not None
        # At most one interval, and one more while a checkpoint is written beside the steps.
        assert int(done.name.removeprefix("step-")) >= len(read(out)) - 1 - (goal != 12)
    process = begin("run", asynchronous=True)
    assert server.wait(process, lambda: len(read(out)) >= 26) is None
    os.kill(process, signal.SIGTERM)
    assert server.wait(process) == 0
    said = (tmp_path / "run.said").read_text()
    assert "stopped by SIGTERM after step" in said
    assert "steps, loss" in said
    saved = saving.latest(out)
    assert saved is not None
    assert int(saved.name.removeprefix("step-")) == len(read(out)) < 40
    assert server.wait(begin("run")) == 0
    assert server.wait(calm) == 0
    assert losses(out) == losses(tmp_path / "calm")
    assert len(losses(out)) == 40
    assert not list((out / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("asynchronous", quick([False, True], True))
@pytest.mark.usefixtures("on_screen")
def test_a_full_disk_stops_nothing_but_the_last_save(asynchronous, table, tmp_path, monkeypatch, capsys):
    real = saving.write

    def limited(out, tensors, state, *rest):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if state.step in full:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (100_000, before[1])
            )  # writing more fails, as on a full disk
        try:
            return real(out, tensors, state, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(saving, "write", limited)
    changes, full = {**MOE, "checkpoint": {"asynchronous": asynchronous}}, {4}
    assert train(Run.of(table(**changes))).finished
    said = " ".join(capsys.readouterr().err.split())
    assert "step 4 could not be saved (" in said
    assert "step-2 is kept; training goes on" in said
    assert [step for step, _ in saving.checkpoints(tmp_path / "run")] == [2, 6]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    full = {4, 6}
    with pytest.raises(
        UpcycleError, match=r"step 6 could not be saved .*step-2 is kept.*go on with --resume"
    ):
        train(Run.of(table(**changes, out=str(tmp_path / "other"))))
    full = set()
    assert train(Run.of(table(**changes, out=str(tmp_path / "other"))), resume=True).finished
    assert losses(tmp_path / "other") == losses(tmp_path / "run")


def out_of_memory(monkeypatch):
    """No memory for the tensors of the second checkpoint."""
    real, calls = saving.tensors_of, itertools.count(1)

    def limited(*args):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args)

    monkeypatch.setattr(saving, "tensors_of", limited)


def out_of_names(monkeypatch):
    """The second checkpoint cannot get its name."""
    real = Path.rename

    def limited(path, target):
        if path.name == "step-4.partial":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", limited)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("fails", "why"), [(out_of_memory, "no memory for a copy"), (out_of_names, "Disk quota exceeded")]
)
@pytest.mark.usefixtures("on_screen")
def test_what_fails_before_and_after_writing_stops_nothing(
    fails, why, asynchronous, table, tmp_path, monkeypatch, capsys
):
    fails(monkeypatch)
    assert train(Run.of(table(checkpoint={"asynchronous": asynchronous}))).finished
    said = " ".join(capsys.readouterr().err.split())
    assert "step 4 could not be saved (" in said
    assert why in said
    assert [step for step, _ in saving.checkpoints(tmp_path / "run")] == [2, 6]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_a_file_system_that_syncs_no_folders_keeps_checkpoints(table, tmp_path, monkeypatch):
    def unsupported(folder):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(saving.whole_file, "sync_folder", unsupported)
    assert train(Run.of(table())).finished
    assert [step for step, _ in saving.checkpoints(tmp_path / "run")] == [2, 4, 6]


def test_a_loss_that_is_no_number_stops_before_the_weights_change(table, tmp_path):
    made = table(**MOE, schedule={"name": "constant", "peak": 1e30, "warmup": 0}, checkpoint={"every": 1})
    with pytest.raises(UpcycleError, match=r"step \d+: the loss is .*not finite is that of model\.") as error:
        train(Run.of(made))
    step = int(str(error.value).split(":")[0].removeprefix("step "))
    assert saving.latest(tmp_path / "run").name == f"step-{step - 1}"


@pytest.mark.slow
def test_activation_checkpointing_and_bfloat16_train(table, tmp_path):
    whole = train(Run.of(table(**MOE, out=str(tmp_path / "a"))))
    changes = {"activation_checkpointing": True, "precision": "mixed"}
    mixed = train(Run.of(table(**MOE, train=changes, out=str(tmp_path / "b"))))
    pure = train(Run.of(table(**MOE, train={"precision": "bfloat16"}, out=str(tmp_path / "c"))))
    assert mixed.loss == pytest.approx(whole.loss, rel=2e-2)
    assert mixed.loss != whole.loss
    assert pure.loss == pytest.approx(whole.loss, rel=5e-2)


@pytest.mark.slow
def test_a_compiled_run_is_the_run(table, tmp_path, monkeypatch):
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for compiled in (False, True):
        train(
            Run.of(table(out=str(tmp_path / str(compiled)), **MOE, train={"steps": 3, "compile": compiled}))
        )
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-6)


def test_the_bias_of_a_router_that_has_one(dense, table, source, tmp_path):
    ernie = dense("ernie4_5", vocab_size=512)
    made = table(**MOE, source=str(ernie), router={"bias_update_rate": 0.01, "balance_loss_coef": 0.0})
    made["data"] = {**made["data"], "tokenizer": str(source)}
    train(Run.of(made))
    out = export(tmp_path / "run", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out.out)
    biases = [b for n, b in model.state_dict().items() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 4
    for bias in biases:
        steps = (bias / 0.01).round()
        assert torch.allclose(bias, steps * 0.01, atol=1e-6)
        assert bias.abs().max() > 0
        assert bias.abs().max() <= 0.06 + 1e-6
    # It stays where it is after the steps that it moves in.
    router = {**made["router"], "bias_update_steps": 2}
    train(Run.of({**made, "router": router, "out": str(tmp_path / "frozen")}))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path / "frozen", tmp_path / "still").out)
    largest = max(b.abs().max() for n, b in model.state_dict().items() if n.endswith("correction_bias"))
    assert 0 < largest <= 0.02 + 1e-6
    with pytest.raises(UpcycleError, match="the routers of this architecture have no correction bias"):
        train(Run.of(table(**MOE, router={"bias_update_rate": 0.01}, out=str(tmp_path / "mixtral"))))


@pytest.mark.parametrize(
    ("moe", "router", "source", "bias"),
    [
        ({"target": "upcycled"}, {"name": "sigmoid"}, "llama", "mlp.router.e_score_correction_bias"),
        ({"target": "lfm2_moe"}, {}, "lfm2", "feed_forward.expert_bias"),  # in the block, not in its router
    ],
    ids=["sigmoid", "lfm2"],
)
def test_a_bias_takes_its_steps_in_bfloat16_too(moe, router, source, bias, dense, table, tmp_path):
    """It stays in float32 in training, in an export, and in a model that is opened from one."""
    made = table(moe=MOE["moe"] | moe, router=router | {"bias_update_rate": 1e-4})
    made["train"] |= {"steps": 1, "eval_every": 0, "precision": "bfloat16"}
    if source != "llama":
        made["data"] |= {"tokenizer": made["source"]}
        made["source"] = str(dense(source, vocab_size=512))
    train(Run.of(made))
    (line,) = read(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", dtype="bfloat16").out
    for tensors in (load_file(out / "model.safetensors"), upcycle.open(out).state_dict()):
        assert {t.dtype for name, t in tensors.items() if not name.endswith(bias)} == {torch.bfloat16}
        for layer in line.layers:
            (found,) = [t for name, t in tensors.items() if name.endswith(f".{layer.layer}.{bias}")]
            load = torch.tensor(layer.load)
            assert torch.equal(found, 1e-4 * torch.sign(1 / len(load) - load))
            assert found.any()


UPCYCLED = {**MOE, "moe": {**MOE["moe"], "target": "upcycled"}}


@pytest.mark.parametrize(
    ("moe", "router", "refused"),
    [
        (MOE, {"importance_loss_coef": 1.0}, r"importance_loss_coef = 1\.0 .* those of mixtral"),
        (UPCYCLED, {"name": "sigmoid", "importance_loss_coef": 1.0}, r"computes \(sigmoid\)"),
        (UPCYCLED, {"load_loss_coef": 1.0}, r"load_loss_coef = 1\.0 .* with router\.noise_std above 0"),
        (UPCYCLED, {"importance_loss_coef": 1.0}, None),
        (UPCYCLED, {"noise_std": 1.0, "importance_loss_coef": 1.0, "load_loss_coef": 1.0}, None),
    ],
)
def test_a_weight_on_a_loss_that_no_router_computes(moe, router, refused, table):
    run = Run.of(table(**moe, router=router))
    found = fit.without_loss(run, start.start_of(run).built)
    assert found is None if refused is None else re.search(refused, found)


@pytest.mark.usefixtures("on_screen")
def test_a_run_with_such_a_weight_may_only_go_on(table, tmp_path, monkeypatch, capsys):
    """Also if a stage alone has it. Earlier versions began such runs."""
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "router": {"load_loss_coef": 1.0}}]
    made = table(**MOE, stage=stages, schedule={"warmup": 0})
    del made["train"]["steps"]
    with pytest.raises(UpcycleError, match="that no router of this run computes"):
        train(Run.of(made))
    assert not (tmp_path / "run" / "run.json").exists()
    with monkeypatch.context() as earlier:
        earlier.setattr(fit, "without_loss", lambda run, built: None)
        train(Run.of(made))
    capsys.readouterr()
    assert train(Run.of(made), resume=True).finished
    assert "that no router of this run computes" in capsys.readouterr().err


# --- held-out rows ---


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_rank_keeps_its_share_of_the_held_out_rows(world):
    """Every row counts once; all ranks run as many passes, of whole groups, and keep no more than these."""
    for rows, whole, size in itertools.product((1, 3, 10, 16), (1, 2, 3), (1, 2, 5)):
        batch, counted, passes = {"row": torch.arange(rows)}, [], set()
        for rank in range(world):
            here = Ranks(device=torch.device("cpu"), dp_rank=rank, dp_size=world)
            held = HeldOut.of(batch, here, whole)
            assert len(held.mine["row"]) <= min(rows, -(-rows // world) + whole)
            found = [(micro["row"].tolist(), count) for micro, count in held.parts(size)]
            assert all(len(each) % whole == 0 and count <= size for each, count in found)
            counted += [row for each, count in found for row in each[:count]]
            passes.add(len(found))
        assert counted == list(range(rows))
        assert len(passes) == 1


def test_held_out_rows_go_to_the_device_a_micro_batch_at_a_time(table, monkeypatch):
    moved, real = [], transfer.to_device
    monkeypatch.setattr(
        held_out.transfer, "to_device", lambda batch, device: moved.append(batch) or real(batch, device)
    )
    result = train(Run.of(table(**MOE, train={"steps": 1, "eval_every": 1, "micro_batch": 3})))
    assert result.held_out_loss is not None
    sizes = [len(batch["rows"]) for batch in moved]
    assert sizes == [3, 3, 3, 3, 3, 1, 8, 3, 3, 3, 3, 3, 1]  # 16 rows before and after a step on 8


# --- from scratch ---

# How their other blocks start is said by nobody.
NOT_FROM_SCRATCH = ("qwen3_5_text", "granitemoehybrid", "nemotron_h")


@pytest.mark.parametrize("model_type", [m for m in tiny.DECODERS if m not in NOT_FROM_SCRATCH])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_from_scratch_starts_as_transformers_does(model_type, moe, dense):
    """Every tensor has the mean and deviation that transformers' own initialisation gives it."""
    run = ranks.run_of(str(dense(model_type)), {}, {"from_scratch": True} | ({} if moe else {"router": {}}))
    if not moe:
        made = run.as_table()
        run = Run.of({k: v for k, v in made.items() if k not in ("moe", "init", "dtype", "router")})
    begun = start.start_of(run)
    model = start.model_of(begun, run, HERE, "float32")
    torch.manual_seed(0)
    wanted = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        theirs = wanted[name]
        if float(theirs.std(correction=0)) == 0 or "sinks" in name:
            if "sinks" not in name and "shared" not in name:
                assert torch.equal(parameter, theirs), name
            continue
        error = 5 / math.sqrt(2 * parameter.numel())
        assert float(parameter.std(correction=0) / theirs.std(correction=0)) == pytest.approx(
            1, abs=2 * error
        ), name
        assert abs(float(parameter.mean())) < 5 * float(theirs.std()) / math.sqrt(parameter.numel()), name
    flat = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert len(flat.unique()) > 0.5 * len(flat)  # no two tensors from the same stream


# --- export and the optimizer's state ---


def test_export_is_what_convert_writes_and_every_client_opens(table, source, tmp_path):
    run = Run.of(table(**MOE))
    result = train(run)
    made = export(tmp_path / "run", tmp_path / "out")
    convert(source, tmp_path / "converted", run.recipe)
    with Checkpoint.open(tmp_path / "out") as a, Checkpoint.open(tmp_path / "converted") as b:
        assert {n: (t.shape, t.dtype) for n, t in a.tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in b.tensors.items()
        }
        assert a.config == {**b.config, "router_aux_loss_coef": 0.01}  # what the run balanced with
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token_id == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = prepare(run.data, source, tmp_path / "run" / "tokens", vocab_size=512)
    batches = Batches(tokens, [1.0], length=64, held_out=0.1, seed=0)
    rows = torch.from_numpy(batches.held_out(1024 // 64))
    with torch.inference_mode():
        logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert float(loss) == pytest.approx(result.held_out_loss, rel=1e-5)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["recipe"] == run.recipe.as_table()
    assert record["training"][0]["step"] == made.step == 6
    assert record["training"][0]["held_out_loss"] == result.held_out_loss
    with pytest.raises(UpcycleError, match="was trained for 6 steps since it was built"):
        verify(source, tmp_path / "out")
    earlier = export(tmp_path / "run", tmp_path / "earlier", step=2, dtype="bfloat16")
    assert earlier.step == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "earlier").dtype == torch.bfloat16


WRAPPERS = [kind for kind in tiny_wrappers.KINDS if kind != "gemma3"]  # it has no native


@pytest.mark.parametrize(
    "kind",
    quick([*tiny.DECODERS, *WRAPPERS], "qwen3_vl", "qwen3_5", "qwen3_5_text", "nemotron_h", "llama"),
)
def test_an_export_before_the_first_step_has_the_tensors_of_the_conversion(kind, dense, tmp_path):
    """The same names, shapes, types and bits, although the class holds experts in another form."""
    wrapped = kind in tiny_wrappers.KINDS
    source = tiny_wrappers.make(tmp_path / "source", kind) if wrapped else dense(kind, dtype="bfloat16")
    same_as_the_conversion(source, tmp_path)


def test_an_export_spells_names_as_the_source_does(tmp_path):
    """A llava with the names of today's class; transformers would write those of older versions."""
    made = tiny_wrappers.make(tmp_path / "made", "llava")
    model = AutoModelForImageTextToText.from_pretrained(made)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    found = same_as_the_conversion(tmp_path / "source", tmp_path)
    assert "model.language_model.norm.weight" in found


def test_experts_of_several_types_keep_them_in_an_export(dense, tmp_path):
    """The matrices of an expert are one tensor in memory, and several on disk."""
    source = Path(shutil.copytree(dense("llama", dtype="bfloat16"), tmp_path / "source"))
    torch.manual_seed(0)
    changed(source, "up_proj", lambda tensor: torch.randn(tensor.shape))
    found = same_as_the_conversion(source, tmp_path)
    prefix = "model.layers.0.block_sparse_moe.experts.1"
    assert [found[f"{prefix}.{w}.weight"].dtype for w in ("w1", "w3")] == [torch.bfloat16, torch.float32]


def same_as_the_conversion(source: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What an export of a run that has taken no step writes, compared with the conversion."""
    run = ranks.run_of(str(source), {}, {})
    begun = start.start_of(run)
    types = {name: entry.dtype for name, entry in begun.planned.items()}
    found = on_disk(start.plain_model(begun), begun, types)
    convert(source, tmp_path / "converted", run.recipe)
    wanted = load_file(tmp_path / "converted" / "model.safetensors")
    assert kinds(found) == kinds(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    return found


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def changed(folder: Path, part: str, change: Any) -> None:
    """Change the tensors of a checkpoint whose names contain `part`."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if part in name]:
        tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_export_has_the_types_and_the_limits_of_a_conversion(dense, table, trainable, tmp_path):
    """Tensors that the source keeps wide stay wide, and nothing becomes infinite, on trained weights too."""
    source = tmp_path / "source"
    shutil.copytree(dense("qwen3_5_text", vocab_size=520, dtype="bfloat16"), source)
    changed(source, "A_log", lambda tensor: tensor.float() + 1e-3)
    data = {"tokenizer": str(trainable[0])}
    made = table(moe=MOE["moe"], source=str(source), data=data, train={"steps": 2})
    run = Run.of(made)
    train(run)
    for dtype in ("source", "float16", "float32"):
        export(run.out, tmp_path / f"out {dtype}", dtype=dtype)
        told = {} if dtype == "source" else {"dtype": dtype}
        convert(source, tmp_path / f"converted {dtype}", {"moe": MOE["moe"], **told})
        a, b = (
            load_file(tmp_path / f"{what} {dtype}" / "model.safetensors") for what in ("out", "converted")
        )
        assert kinds(a) == kinds(b)
    config = json.loads((tmp_path / "out source" / "config.json").read_text())
    assert (config["dtype"], a["model.layers.0.linear_attn.A_log"].dtype) == ("bfloat16", torch.float32)
    assert {layer["num_experts"] for layer in inspect(tmp_path / "out source").table["layers"]} == {4}


def test_an_export_of_values_beyond_a_dtype(dense, table, trainable, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense("llama", vocab_size=520), source)
    unused = torch.zeros(520, 1)
    unused[-1] = 1e5  # the row of a token that no text has
    changed(source, "embed_tokens", lambda tensor: tensor + unused)
    train(Run.of(table(source=str(source), data={"tokenizer": str(trainable[0])}, train={"steps": 2})))
    limit = "holds values beyond float16's 65504; use dtype bfloat16 or float32$"
    with pytest.raises(UpcycleError, match=rf"^model\.embed_tokens\.weight {limit}"):
        export(tmp_path / "run", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    with pytest.raises(UpcycleError, match=limit):
        convert(source, tmp_path / "converted", {"moe": MOE["moe"], "dtype": "float16"})


def test_a_dense_export_has_the_types_of_its_source(dense, table, trainable, tmp_path):
    """Also if config.json names no dtype."""
    source = tmp_path / "source"
    shutil.copytree(dense("llama", vocab_size=512, dtype="bfloat16"), source)
    changed(source, "norm", torch.Tensor.float)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    train(Run.of(table(source=str(source), data={"tokenizer": str(trainable[0])}, train={"steps": 2})))
    made = export(tmp_path / "run", tmp_path / "out")
    assert kinds(load_file(made.out / "model.safetensors")) == kinds(load_file(source / "model.safetensors"))
    written = json.loads((made.out / "config.json").read_text())
    assert (made.dtype, written["dtype"], written["torch_dtype"]) == ("bfloat16",) * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe": {"num_experts": 4, "shared_experts": 1}}, "with moe.shared_experts the experts"),
        (
            {"moe": {"num_experts": 4}, "router": {"normalize": False}},
            "without router.normalize the experts are scaled",
        ),
    ],
)
def test_moments_of_scaled_experts_are_refused(changes, said, table, tmp_path):
    train(Run.of(table(out=str(tmp_path / "dense"))))
    export(tmp_path / "dense", tmp_path / "trained", with_optimizer=True)
    changes["moe"]["target"] = "upcycled"
    made = table(source=str(tmp_path / "trained"), optimizer={"carry_state": True}, **changes)
    with pytest.raises(UpcycleError, match=said):
        train(Run.of(made))


@pytest.mark.usefixtures("on_screen")
def test_carried_moments_are_those_of_the_dense_run_tiled(table, tmp_path, capsys):
    """A dense run, exported with its optimizer, upcycled: experts have its moments, routers none."""
    flat = {"schedule": {"name": "inverse_sqrt", "peak": 1e-3, "warmup": 3}}
    train(Run.of(table(out=str(tmp_path / "dense"), **flat)))
    export(tmp_path / "dense", tmp_path / "trained", with_optimizer=True)
    changes = {"moe": MOE["moe"], "init": {"name": "copy"}, "optimizer": {"carry_state": True}}
    later = {"schedule": {**flat["schedule"], "start_step": 6}}
    made = table(source=str(tmp_path / "trained"), **changes, **later)
    run = Run.of(made)
    trainee = ranks.trainee_of(run, HERE)
    begun = start.start_of(run)
    assert moments.carry_state(begun, run, HERE, trainee.model, trainee.optimizer) == 6
    for moment in run.optimizer.moments:
        with Checkpoint.open(tmp_path / "trained" / "optimizer" / moment) as opened:
            tensor = {
                n: torch.frombuffer(
                    bytearray(opened.pread(t, 0, t.nbytes).tobytes()), dtype=torch.float32
                ).view(t.shape)
                for n, t in opened.tensors.items()
            }
        found = {n: trainee.optimizer.state[p] for n, p in trainee.model.named_parameters()}
        prefix = "model.layers.2.mlp."
        gate_up = torch.cat([tensor[f"{prefix}{n}_proj.weight"] for n in ("gate", "up")])
        assert gate_up.abs().max() > 0
        for e in range(4):
            assert torch.equal(found[f"{prefix}experts.gate_up_proj"][moment][e], gate_up)
            assert torch.equal(
                found[f"{prefix}experts.down_proj"][moment][e], tensor[f"{prefix}down_proj.weight"]
            )
        assert not found[f"{prefix}gate.weight"][moment].any()
        attention = "model.layers.2.self_attn.q_proj.weight"
        assert torch.equal(found[attention][moment], tensor[attention])
        assert {float(s["step"]) for s in found.values()} == {6.0}
    assert train(run).finished
    assert read(tmp_path / "run")[0].lr == pytest.approx(1e-3 * math.sqrt(3 / 7))
    assert "start_step" not in capsys.readouterr().err
    other = table(out=str(tmp_path / "other"), source=str(tmp_path / "trained"), **changes, **flat)
    assert train(Run.of(other)).finished
    said = " ".join(capsys.readouterr().err.split())
    assert "the moments are of step 6 and schedule.start_step = 0" in said
    # The dense run goes on as well, as if it had never stopped.
    on = table(
        source=str(tmp_path / "trained"), optimizer={"carry_state": True}, out=str(tmp_path / "on"), **later
    )
    assert train(Run.of(on)).finished
    # And a deeper one, with each block's moments.
    train(Run.of({**on, "moe": {"target": "depth_tiled"}, "out": str(tmp_path / "deep")}))
    card = export(tmp_path / "deep", tmp_path / "deeper").out / "README.md"
    assert "deeper dense model made from" in card.read_text()
    assert "mixture" not in card.read_text()


def test_a_mean_of_checkpoints(table, tmp_path):
    """Plain and exponential, against the weights that each checkpoint has by itself."""
    train(Run.of(table(**MOE, checkpoint={"every": 2, "keep": 3})))
    parts = []
    for step in (2, 4, 6):
        export(tmp_path / "run", tmp_path / str(step), step=step, dtype="float32")
        parts.append(load_file(tmp_path / str(step) / "model.safetensors"))
    cases = {"mean": ({"average": 3}, (1 / 3, 1 / 3, 1 / 3)), "ema": ({"decay": 0.8}, (0.64, 0.16, 0.2))}
    cases["two"] = ({"average": 2, "step": 4}, (0.5, 0.5, 0.0))
    for name, (given, factors) in cases.items():
        made = export(tmp_path / "run", tmp_path / name, dtype="float32", **{"average": 3, **given})
        found = load_file(made.out / "model.safetensors")
        assert found.keys() == parts[0].keys()
        for tensor, value in found.items():
            wanted = sum(f * part[tensor].double() for f, part in zip(factors, parts, strict=True))
            torch.testing.assert_close(value, wanted.float(), rtol=1e-6, atol=1e-7)
    told = json.loads((tmp_path / "ema" / "upcycle.json").read_text())["training"][0]
    assert (told["averaged_steps"], told["average_decay"], told["step"]) == ([2, 4, 6], 0.8, 6)
    assert not {"loss", "held_out_loss", "held_out_accuracy"} & told.keys()
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "average (0.8) of those after steps 2, 4, 6. Nobody has measured their loss yet" in card
    assert "|" not in card
    alone = "which leaves nothing to average; .* needs a higher checkpoint.keep"
    for given, message in (
        ({"average": 4}, r"average = 4, and .* has 3 checkpoints to take \(step-2, step-4, step-6\)"),
        ({"average": 1}, "give a number from 2"),
        ({"average": 2, "step": 2}, rf"has one checkpoint \(step-2\) up to step 2, {alone}"),
        ({"decay": 0.5}, "decay is for a mean of checkpoints"),
        ({"average": 2, "decay": 1.0}, r"decay = 1\.0; it must be between 0 and 1"),
        ({"average": 2, "with_optimizer": True}, "a mean of checkpoints has no optimizer's moments"),
    ):
        with pytest.raises(UpcycleError, match=message):
            export(tmp_path / "run", tmp_path / "no", **given)
    for name in ("step-2", "step-4"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    with pytest.raises(UpcycleError, match=rf"has one checkpoint \(step-6\), {alone}"):
        export(tmp_path / "run", tmp_path / "no", average=2)
    assert not (tmp_path / "no").exists()


# --- mistakes ---

BAD_RUNS = {
    "train.steps": ({"train": {"tokens": 5000}}, "give one of train.steps, train.tokens and train.examples"),
    "batch": ({"train": {"batch_tokens": 500}}, "batch_tokens = 500 is no multiple"),
    "unknown": ({"train": {"stps": 5}}, r"unknown key train\.stps.*did you mean steps"),
    "schedule": (
        {"schedule": {"name": "linear"}},
        r"unknown schedule linear.*Known: constant, cosine, inverse_sqrt, warmup",
    ),
    "floor": ({"schedule": {"floor": 1.0}}, "0 <= floor <= peak"),
    "wsd": ({"schedule": {"name": "warmup_stable_decay"}}, r"needs schedule\.decay"),
    "warmup_from": ({"schedule": {"warmup": 0, "warmup_from": 1e-4}}, r"set schedule\.warmup"),
    "bias steps": ({"router": {"bias_update_steps": 5}}, r"set router\.bias_update_rate"),
    "spread of zeros": (
        {**MOE, "router": {"logit_normalization": 1.0, "init": "zeros"}},
        "take another init",
    ),
    "spread and scale": (
        {**MOE, "router": {"logit_normalization": 1.0, "normalize": False}},
        r"set router\.rescale = false",
    ),
    "start_step": ({"schedule": {"start_step": 5}}, "start_step is for inverse_sqrt"),
    "layer decay": ({"train": {"layer_decay": 0.0}}, r"train\.layer_decay = 0\.0; it must be in \(0, 1\]"),
    "drop path": ({"train": {"drop_path": 1.0}}, r"train\.drop_path = 1\.0; it must be in \[0, 1\)"),
    "dropout": ({"train": {"expert_dropout": -0.1}}, r"train\.expert_dropout = -0\.1"),
    "sink": ({"log": {"sinks": ["tensorboard"]}}, "allowed: wandb, trackio"),
    "jitter": ({"router": {"jitter": 1.0}}, r"router\.jitter = 1\.0"),
    "init": ({"init": {"name": "drop"}}, r"init is for a Mixture of Experts; add a \[moe\]"),
    "router": ({"router": {"std": 0.1}}, r"router\.std is for a Mixture of Experts"),
    "keep": ({"checkpoint": {"keep": 0}}, r"checkpoint\.keep = 0; it must be 1 or more"),
    "sources": ({"data": {"sources": []}}, r"data\.sources is empty"),
    "carry": ({"optimizer": {"carry_state": True}, "from_scratch": True}, "from_scratch has none"),
    "carry drop": ({"optimizer": {"carry_state": True}, **MOE}, r"init\.name = drop makes other neurons"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run_files(name, table):
    changes, message = BAD_RUNS[name]
    with pytest.raises(UpcycleError, match=message):
        Run.of(table(**changes))


BAD_LAYOUTS = {
    "world": ({"fsdp": 2}, "fsdp x tp ask for 2 process.* and there are 1; start as many"),
    "ep": ({"ep": 2}, "ep must be a multiple of tp and divide fsdp x tp"),
    "zero": ({"tp": 0}, "each must be 1 or more"),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_layouts_that_do_not_fit(name, table, tmp_path):
    layout, message = BAD_LAYOUTS[name]
    with pytest.raises(UpcycleError, match=message):
        train(Run.of(table(**MOE, parallel=layout)))
    assert not (tmp_path / "run").exists()


def test_experts_that_cannot_be_shared_out(table, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UpcycleError, match="ep must divide the 4 experts"):
        train(Run.of(table(**MOE, parallel={"ep": 3})))
    with pytest.raises(UpcycleError, match="a dense model has no experts"):
        train(Run.of(table(parallel={"ep": 3})))


def test_other_peoples_folders(table, tmp_path):
    train(Run.of(table(**MOE)))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(UpcycleError, match="holds a run already; go on with it with --resume"):
        train(Run.of(table(**MOE)))
    other = table(moe=MOE["moe"], init={"name": "drop", "ratio": 0.25})
    with pytest.raises(
        UpcycleError, match=r"is of another run: it differs in init\.ratio \(0\.5 there, 0\.25 here\)"
    ):
        train(Run.of(other), resume=True)
    with pytest.raises(UpcycleError, match="step-6 is of another run"):
        train(Run.of(table()), resume=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UpcycleError, match="is a file; `out` must be a folder"):
        train(Run.of(table(out=str(tmp_path / "file"))))


def test_exports_of_nothing(table, tmp_path):
    with pytest.raises(UpcycleError, match=r"has no run\.json; give a folder that `upcycle train` made"):
        export(tmp_path, tmp_path / "out")
    train(Run.of(table()))
    with pytest.raises(UpcycleError, match="has no checkpoint of step 5; there are 2, 4, 6"):
        export(tmp_path / "run", tmp_path / "out", step=5)
    with pytest.raises(UpcycleError, match="dtype = 'int8'; allowed: source, float64"):
        export(tmp_path / "run", tmp_path / "out", dtype="int8")
    (tmp_path / "run" / "checkpoints" / "step-6" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UpcycleError, match="step-6 cannot be read"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    export(tmp_path / "run", tmp_path / "out", step=4)
    with pytest.raises(UpcycleError, match="exists already"):
        export(tmp_path / "run", tmp_path / "out")


def test_the_command_line(table, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(toml(table(**MOE)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.toml"), "--set", "train.steps=2", "--set", "parallel.tp=3"])
    assert ended.value.code == 2
    assert "upcycle: error: parallel.fsdp" in capsys.readouterr().err
    cli.main(["train", str(tmp_path / "run.toml"), "--set", "train.steps=2"])
    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "2 steps, loss" in out
    assert "step 2, 844" in out or "step 2, " in out
    cli.main(["inspect", str(tmp_path / "out")])
    assert "trained for 2 steps, 1.02 k tokens" in capsys.readouterr().out
    assert (
        Recipe.of(json.loads((tmp_path / "out" / "upcycle.json").read_text())["recipe"]).moe.num_experts == 4
    )


def test_a_dense_export_is_admitted_as_a_source(table, tmp_path, capsys):
    train(Run.of(table()))
    export(tmp_path / "run", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "moe", Recipe.of(MOE))
    assert verify(tmp_path / "out", tmp_path / "moe", logits=False).holds
    cli.main(["inspect", str(tmp_path / "out")])
    assert "trained for 6 steps" in capsys.readouterr().out


# --- what a person sees ---


def test_sinks_get_every_step(table, monkeypatch):
    seen: list[tuple[str, object]] = []
    pictures: list[np.ndarray] = []

    class Trackio:
        init = staticmethod(lambda **options: seen.append(("init", options["name"])))
        Image = staticmethod(lambda array: pictures.append(array))
        log = staticmethod(lambda values, step: seen.append(("log", (step, values["loss"]))))
        finish = staticmethod(lambda: seen.append(("finish", None)))

    monkeypatch.setitem(sys.modules, "trackio", Trackio)
    run = Run.of(table(**MOE, log={"sinks": ["trackio"], "pictures": 4}))
    train(run)
    # A picture of the routers after steps 4 and 6: a row a layer, a column an expert, darker with its load.
    assert [picture.shape for picture in pictures] == [(5 * 16, 4 * 16, 3)] * 2
    loads = np.array([layer.load for layer in read(Path(run.out))[-1].layers])
    shades = pictures[-1][8::16, 8::16, 0].astype(float)
    assert np.allclose(shades, 255 - (255 - 8) * np.clip(2 * loads, 0, 1), atol=0.51)
    wanted = list(enumerate(losses(Path(run.out)), start=1))
    assert seen == [("init", "run"), *(("log", pair) for pair in wanted), ("finish", None)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UpcycleError, match=r"log\.sinks names wandb, which is not installed: pip install wandb"
    ):
        train(Run.of(table(log={"sinks": ["wandb"]}, out=run.out + "2")))


def test_a_wandb_run_keeps_its_id(table, tmp_path, monkeypatch):
    """Over a resume; a run that begins has another one."""
    seen: list[dict[str, Any]] = []

    class Wandb:
        Image = log = finish = staticmethod(lambda *_, **__: None)

        @staticmethod
        def init(**options: Any) -> Any:
            seen.append(options)
            return SimpleNamespace(id=options.get("id", "abc123"))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run = table(log={"sinks": ["wandb"]}, train={"steps": 1})
    for table_of, resume in ((run, False), ({**run, "train": {**run["train"], "steps": 2}}, True)):
        train(Run.of(table_of), resume=resume)
    assert [(each.get("id"), each.get("resume")) for each in seen] == [(None, None), ("abc123", "allow")]


@pytest.mark.usefixtures("on_screen")
def test_a_collapsed_layer_is_said_once(table, capsys):
    """A router that cannot be moved sends everything to its two favourites in every layer."""
    changes = {"router": {"init": "zeros", "balance_loss_coef": 0.0}, "schedule": {"peak": 0.0}}
    run = Run.of(table(moe=MOE["moe"], init={"name": "copy"}, **changes))
    train(run)
    said = " ".join(capsys.readouterr().err.split())
    for layer in range(5):
        assert (
            said.count(f"layer {layer} collapsed; its busiest expert takes 50% of the slots, 2 take none")
            == 1
        )
    assert all(layer.collapsed for record in read(Path(run.out)) for layer in record.layers)


BAD_LOADS = {
    "world": ({"fsdp_size": 2}, "ask for 2 process.* and there are 1; start as many with torchrun"),
    "ep": ({"tp_size": 2, "ep_size": 3}, "distributed_config does not fit: .*ep_size"),
    "nothing": ({"enable_expert_parallel": True}, "enable_expert_parallel alone does nothing; set ep_size"),
    "key": ({"fsdp": 2}, "distributed_config does not fit"),
}


@pytest.mark.parametrize("name", BAD_LOADS)
def test_layouts_that_load_refuses(name, source):
    layout, message = BAD_LOADS[name]
    with pytest.raises(UpcycleError, match=message):
        load(source, Recipe.of(MOE), distributed_config=layout)


def test_load_refuses_experts_that_cannot_be_shared_out(source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UpcycleError, match="ep_size must divide the 4 experts"):
        load(source, Recipe.of(MOE), distributed_config={"fsdp_size": 3, "ep_size": 3})
    with pytest.raises(UpcycleError, match="dtype = 'int5'; allowed: "):
        load(source, Recipe.of(MOE), dtype="int5")

"""Optimizers, schedules, routers with a loss and export formats: a file each, ours and a stranger's."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pins
import ranks
from tiny import make_bytes_tokenizer
from upcycle import UpcycleError, cli
from upcycle.nn import routers
from upcycle.training import exports, moments, optimizers, schedules
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.optimizers.sgd import SGD
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run, train_of

HERE = Ranks(device=torch.device("cpu"))
MOE = {"moe": {"num_experts": 4, "top_k": 2, "target": "upcycled"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model and a text."""
    folder: Path = tmp_path_factory.mktemp("rooms")
    pins._with_vocabulary(folder / "dense", "llama")
    make_bytes_tokenizer(folder / "dense")
    (folder / "text.txt").write_text(
        "".join(f"The {i * i % 97}th word of {i} is {chr(97 + i % 26)}. " for i in range(300))
    )
    return folder


@pytest.fixture
def table(home, tmp_path):
    """A function that gives a run of few steps as a table."""

    def make(**changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "source": str(home / "dense"),
            "out": str(tmp_path / "run"),
            "data": {"sources": [{"path": str(home / "text.txt")}], "append_eos": False},
            "train": {"steps": 2, "batch_tokens": 64, "sequence_length": 16, "eval_every": 0},
            "schedule": {"name": "constant", "peak": 1e-2},
        }
        for key, value in changes.items():
            made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
        return made

    return make


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A function that puts a file of this test into a room, for as long as the test runs."""
    added: list[tuple[ModuleType, str]] = []

    def add(room: ModuleType, name: str, text: str) -> None:
        folder = tmp_path / "strangers" / room.__name__
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(folder)])
        importlib.invalidate_caches()
        added.append((room, name))

    yield add
    for room, name in added:
        sys.modules.pop(f"{room.__name__}.{name}", None)
        vars(room).pop(name, None)


def losses(out: Path) -> list[float]:
    return [record.loss for record in read(out)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a stranger's files ---

OPTIMIZER = '''
"""Steps of one size, against the sign of a running mean of gradients."""

from dataclasses import dataclass

import torch

from upcycle.training.optimizers import Optimizer


class Steps(torch.optim.Optimizer):
    def __init__(self, groups, memory):
        super().__init__(groups, {"lr": 0.0, "memory": memory})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["memory"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean.sign())


@dataclass(frozen=True, kw_only=True)
class Signed(Optimizer):
    summary = "steps of one size"

    memory: float = 0.9

    @property
    def moments(self):
        return ("mean",)

    def make(self, groups):
        return Steps([dict(group) for group in groups], self.memory)


optimizer = Signed
'''


def test_a_strangers_optimizer_trains_resumes_and_is_carried(stranger, table, tmp_path):
    stranger(optimizers, "signed", OPTIMIZER)
    signed = {"optimizer": {"name": "signed", "memory": 0.5}}
    train(Run.of(table(**signed, train={"steps": 4})))
    cut = table(**signed, out=str(tmp_path / "cut"))
    train(Run.of(cut))
    train(Run.of(table(**signed, out=str(tmp_path / "cut"), train={"steps": 4})), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    assert len(set(losses(tmp_path / "run"))) == 4
    for name in ("run", "cut"):
        export(tmp_path / name, tmp_path / f"{name}-out", with_optimizer=True)
    assert same(weights(tmp_path / "run-out"), weights(tmp_path / "cut-out"))
    mean = weights(tmp_path / "run-out" / "optimizer" / "mean")
    assert mean.keys() == weights(tmp_path / "run-out").keys()
    assert same(mean, weights(tmp_path / "cut-out" / "optimizer" / "mean"))
    carried = {"optimizer": {**signed["optimizer"], "carry_state": True}, "source": str(tmp_path / "run-out")}
    assert train(Run.of(table(**carried, **MOE, out=str(tmp_path / "moe")))).finished
    assert Run.of(Run.of(cut).as_table()) == Run.of(cut)
    with pytest.raises(UpcycleError, match=r"train\.beta1 is for optimizer\.name = adamw, and it is signed"):
        Run.of(table(**signed, train={"beta1": 0.5}))


SCHEDULE = '''
"""Down from peak to nothing, again and again."""

from dataclasses import dataclass

from upcycle.training.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Saw(Schedule):
    summary = "a saw"

    teeth: int = 2  # steps of one tooth

    def after_warmup(self, step, total):
        return self.peak * (1 - step % self.teeth / self.teeth)

    def warnings(self, total):
        return ["saws cut"]


schedule = Saw
'''


@pytest.mark.usefixtures("on_screen")
def test_a_strangers_schedule_sets_the_rate(stranger, table, tmp_path, capsys):
    stranger(schedules, "saw", SCHEDULE)
    run = Run.of(table(schedule={"name": "saw", "teeth": 4}, train={"steps": 5}))
    train(run)
    assert [r.lr for r in read(tmp_path / "run")] == [1e-2 * x for x in (1, 0.75, 0.5, 0.25, 1)]
    assert "saws cut" in capsys.readouterr().err
    assert Run.of(run.as_table()) == run


ROUTER = '''
"""Softmax over experts, and a loss on how unlike the scores of a token are."""

from dataclasses import dataclass

from upcycle.nn.routers import Router


@dataclass(frozen=True, kw_only=True)
class Alike(Router):
    summary = "scores that should be alike"

    alike_coef: float = 0.5

    def gate_sum(self, num_experts, top_k):
        return 1.0

    def reaches_all(self, num_experts, top_k):
        return True

    def experts_per_token(self, num_experts, top_k, length):
        return float(top_k)

    def loss_coefs(self):
        return {"alike": self.alike_coef}

    def route(self, tokens):
        import torch

        from upcycle.nn.dispatch import Choices
        from upcycle.nn.routing import Routing

        logits = torch.nn.functional.linear(tokens.hidden, tokens.tensors["weight"])
        weights, index = logits.softmax(-1).topk(tokens.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(tokens.real_of(index).flatten(), minlength=tokens.num_experts)
        return Routing(
            dispatch=Choices(
                index=index.flatten(0, 1), weights=weights.flatten(0, 1), length=tokens.length
            ),
            logits=tokens.real_of(logits),
            probabilities=tokens.real_of(logits.softmax(-1)),
            counts=counts,
            left_behind=counts.new_zeros(()),
            losses={"alike": logits.var(-1).mean(1).sum()},
            groups=tokens.groups,
        )


router = Alike
'''


def test_a_strangers_router_brings_its_loss(stranger, table, tmp_path):
    stranger(routers, "alike", ROUTER)
    found = {}
    for name, changes in {
        "off": {"alike_coef": 0.0},
        "on": {"alike_coef": 50.0},
        "parts": {"alike_coef": 50.0},
    }.items():
        settings = {"name": "alike", "std": 0.5, "balance_loss_coef": 0.0, **changes}
        micro = {"train": {"steps": 3, **({"micro_batch": 1} if name == "parts" else {})}}
        train(Run.of(table(**MOE, router=settings, out=str(tmp_path / name), **micro)))
        found[name] = [record.router_losses["alike"] for record in read(tmp_path / name)]
    assert found["on"][0] == found["off"][0] > 0
    assert found["on"][2] < 0.9 * found["on"][0]  # it is trained down
    assert found["on"][2] < 0.9 * found["off"][2]
    assert found["parts"] == pytest.approx(found["on"], rel=1e-4)  # parts of a batch add up
    export(tmp_path / "on", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["moe"][0]["router"]["alike_coef"] == 50
    train(Run.of(table(**MOE, out=str(tmp_path / "plain"))))
    assert read(tmp_path / "plain")[0].router_losses is None


FORMAT = '''
"""One file of numpy arrays."""

import numpy as np
import torch

from upcycle.training.exports import Format


class Arrays(Format):
    summary = "weights.npz"

    def write(self, trained, folder, dtype):
        found = trained.model.state_dict()
        np.savez(folder / "weights.npz", **{n: t.to(getattr(torch, dtype)).numpy() for n, t in found.items()})
        (folder / "step").write_text(str(trained.step))


format = Arrays
'''


def test_a_strangers_format_is_exported(stranger, table, tmp_path, capsys):
    train(Run.of(table()))
    stranger(exports, "arrays", FORMAT)
    made = cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "arrays"])
    assert not made
    export(tmp_path / "run", tmp_path / "usual")
    with np.load(tmp_path / "out" / "weights.npz") as arrays:
        for name, tensor in weights(tmp_path / "usual").items():
            assert np.array_equal(arrays[name], tensor.numpy())
    assert (tmp_path / "out" / "step").read_text() == "2"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"weights.npz", "step"}
    with pytest.raises(UpcycleError, match="format = arrays has no place for the optimizer's moments"):
        export(tmp_path / "run", tmp_path / "other", format="arrays", with_optimizer=True)
    with pytest.raises(UpcycleError, match=r"unknown format huggingfase.*huggingface"):
        export(tmp_path / "run", tmp_path / "other", format="huggingfase")
    assert not (tmp_path / "other").exists()


# --- ours ---


@pytest.mark.parametrize("name", sorted({*ranks.optimizers_here()} - {"adamw"}))
def test_other_optimizers_resume_to_the_bit(name, table, tmp_path):
    peak = {"sgd": 0.3, "adafactor": 0.05, "muon": 0.02, "adamw_8bit": 0.01}[name]
    own = {"least": 1} if name == "adamw_8bit" else {}
    changes: dict[str, Any] = {"optimizer": {"name": name, **own}, "schedule": {"peak": peak}, **MOE}
    train(Run.of(table(**changes, train={"steps": 6})))
    train(Run.of(table(**changes, train={"steps": 3}, out=str(tmp_path / "cut"))))
    train(Run.of(table(**changes, train={"steps": 6}, out=str(tmp_path / "cut"))), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.05
    for run in ("run", "cut"):
        export(tmp_path / run, tmp_path / f"{run}-out")
    assert same(weights(tmp_path / "run-out"), weights(tmp_path / "cut-out"))


def test_momentum_is_tiled_to_experts(table, tmp_path):
    sgd = {"name": "sgd", "momentum": 0.8}
    train(Run.of(table(optimizer=sgd)))
    export(tmp_path / "run", tmp_path / "dense", with_optimizer=True)
    stored = weights(tmp_path / "dense" / "optimizer" / "momentum_buffer")
    later = table(source=str(tmp_path / "dense"), optimizer={**sgd, "carry_state": True}, **MOE)
    later["out"] = str(tmp_path / "moe")
    run = Run.of(later)
    trainee = ranks.trainee_of(run, HERE)
    assert moments.carry_state(trainee.start, run, HERE, trainee.model, trainee.optimizer) == 2
    states = {n: trainee.optimizer.state[p] for n, p in trainee.model.named_parameters()}
    down = "model.layers.1.mlp.down_proj.weight"
    assert stored[down].abs().max() > 0
    for e in range(4):
        tiled = states["model.layers.1.mlp.experts.down_proj"]["momentum_buffer"][e]
        assert torch.equal(tiled, stored[down])
    assert train(run).finished
    for name, message in {
        "adamw": r"has momentum_buffer, and optimizer\.name = adamw takes exp_avg, exp_avg_sq",
        "adafactor": r"optimizer\.name = adafactor, as it is set, has no moments",
    }.items():
        other = {**later, "optimizer": {"name": name, "carry_state": True}, "out": str(tmp_path / name)}
        with pytest.raises(UpcycleError, match=message):
            train(Run.of(other))


def test_moments_of_muon_are_tiled_to_experts_and_adamws_to_the_rest(table, tmp_path):
    muon = {"name": "muon"}
    train(Run.of(table(optimizer=muon)))
    export(tmp_path / "run", tmp_path / "dense", with_optimizer=True)
    kept = {m: weights(tmp_path / "dense" / "optimizer" / m) for m in ("momentum_buffer", "exp_avg")}
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    found = [[bool(kept[moment][name].any()) for name in (down, norm)] for moment in kept]
    assert found == [[True, False], [False, True]]
    changes = {"optimizer": {**muon, "carry_state": True}, "out": str(tmp_path / "moe"), **MOE}
    run = Run.of(table(source=str(tmp_path / "dense"), **changes))
    trainee = ranks.trainee_of(run, HERE)
    assert moments.carry_state(trainee.start, run, HERE, trainee.model, trainee.optimizer) == 2
    states = {n: trainee.optimizer.state[p] for n, p in trainee.model.named_parameters()}
    for e in range(4):
        tiled = states["model.layers.1.mlp.experts.down_proj"]["momentum_buffer"][e]
        assert torch.equal(tiled, kept["momentum_buffer"][down])
    assert torch.equal(states[norm]["exp_avg"], kept["exp_avg"][norm])
    assert float(states[norm]["step"]) == 2
    assert {*states["model.layers.1.mlp.router.weight"]} == {"step", "exp_avg", "exp_avg_sq"}
    assert train(run).finished


def test_an_optimizer_without_moments_exports_none(table, tmp_path):
    train(Run.of(table(optimizer={"name": "sgd", "momentum": 0.0})))
    with pytest.raises(UpcycleError, match=r"optimizer\.name = sgd, whose state has no moments"):
        export(tmp_path / "run", tmp_path / "out", with_optimizer=True)
    assert export(tmp_path / "run", tmp_path / "out").step == 2


def test_sgd_is_its_formula():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    made = SGD(momentum=0.5, weight_decay=0.1).make([{"params": [p], "weight_decay": 0.1, "lr": 0.2}])
    value, buffer = np.array([1.0, -2.0]), np.zeros(2)
    for gradient in ([0.3, 0.1], [-1.0, 0.5]):
        p.grad = torch.tensor([gradient])
        made.step()
        buffer = 0.5 * buffer + gradient + 0.1 * value
        value = value - 0.2 * buffer
    assert p.tolist()[0] == pytest.approx(value, rel=1e-6)


# --- run files and records as they were ---

RECORDED = {
    "train": {
        "steps": 2, "batch_tokens": 64, "sequence_length": 16, "weight_decay": 0.2, "layer_decay": 1.0,
        "expert_output_dropout": 0.0, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7, "clip_grad_norm": 1.0,
        "precision": "auto", "activation_checkpointing": False, "compile": False, "eval_every": 0,
        "eval_tokens": 262144,
    },
    "schedule": {"name": "constant", "peak": 0.01, "floor": 0.0, "warmup": 0, "decay": 0, "start_step": 0},
    "optimizer": {"carry_state": False},
}  # fmt: skip


def test_records_of_runs_are_what_they_were(table):
    """The tables that earlier versions wrote are read, and written again."""
    given = table()
    del given["train"], given["schedule"]
    run = Run.of({**given, **RECORDED})
    assert {key: run.as_table()[key] for key in RECORDED} == RECORDED
    assert (run.optimizer.weight_decay, run.optimizer.name) == (0.2, "adamw")
    assert train_of(run.as_table()) == run.train
    own = {"name": "adamw", "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7}
    of_train = {k: v for k, v in RECORDED["train"].items() if k not in own}
    schedule = {"name": "constant", "peak": 0.01}
    assert Run.of({**given, "train": of_train, "optimizer": own, "schedule": schedule}) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "adam"}}, r"unknown optimizer adam.*Known: adafactor, adamw.*muon.*sgd"),
        ({"optimizer": {"momentum": 0.5}}, r"unknown key optimizer \(adamw\)\.momentum"),
        ({"optimizer": {"name": "sgd", "momentum": 1.0}}, r"optimizer\.momentum = 1\.0; it must be in"),
        ({"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": True}}, "needs a momentum"),
        ({"optimizer": {"beta1": 0.5}, "train": {"beta1": 0.6}}, r"train\.beta1 = 0\.6 and optimizer\.beta1"),
        ({"optimizer": {"name": "sgd"}, "train": {"eps": 0.1}}, r"train\.eps is for optimizer\.name = adamw"),
        ({"schedule": {"decay": 5}}, r"schedule\.decay is for inverse_sqrt and warmup_stable_decay"),
        ({"router": {"init": "orthogonl"}, **MOE}, r"router\.init orthogonl; did you mean orthogonal"),
    ],
)  # fmt: skip
def test_mistakes(changes, message, table):
    with pytest.raises(UpcycleError, match=message):
        Run.of(table(**changes))

"""`train.compile`: blocks are compiled one by one, each whole, and no routing makes torch compile again.

What a graph contains does not depend on its backend, so the backend here is the one that only runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedConfig

import ranks
import tiny
from marks import quick
from upcycle.nn import MoE
from upcycle.nn.shape import Shape
from upcycle.training import step
from upcycle.training.parallel import ranks as world

LAYERS = {
    "top_k": ({"name": "top_k"}, True),
    "top_k, places": ({"name": "top_k", "capacity_factor": 1.0}, True),
    "expert_choice": ({"name": "expert_choice"}, False),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def layer(router: dict[str, Any], causal: bool) -> MoE:
    config = PreTrainedConfig()
    config._experts_implementation = "grouped_mm"
    shape = Shape(
        stack="layers", layers=(0,), module="unused", num_experts=4, top_k=2, hidden_size=16,
        intermediate_size=24, activation="silu", gated=True, bias=False, causal=causal, router=router,
    )  # fmt: skip
    return tiny.shake(MoE(config, shape)).train()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_graph(name):
    """With and without autocast, with the outputs and gradients that it has without a graph."""
    moe = layer(*LAYERS[name])
    for narrow in (False, True):
        graph = torch.compile(moe, backend="eager", fullgraph=True)
        counters.clear()
        for seed in range(3):
            hidden = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                found, wanted = graph(hidden), moe(hidden)
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
            weight = moe.router.weight
            gradients = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (found, wanted)]
            assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1


def losses(source: Any, changes: dict[str, Any], compiled: bool, **options: Any) -> list[float]:
    """The losses of four steps on rows that differ."""
    train = {**changes.get("train", {}), "compile": compiled}
    run = ranks.run_of(str(source), {}, {**changes, "train": train})
    compile_module = nn.Module.compile

    def chosen(module: nn.Module) -> None:
        compile_module(module, **options)

    with world(run.parallel) as here, mock.patch.object(nn.Module, "compile", chosen):
        trainee = ranks.trainee_of(run, here)
    batch = ranks.batch_of(run, trainee.task)
    batches = [batch | {"rows": batch["rows"] * (i + 1) % 96} for i in range(4)]
    return [step.train_step(trainee, each, i, 1e-2).loss for i, each in enumerate(batches)]


CASES = {
    "native": {},
    "places": {"moe": {"target": "upcycled"}, "router": {"capacity_factor": 1.0}},
    "documents apart": {"data": {"isolate": True}},
    "recomputed": {"moe": {"target": "upcycled"}, "train": {"activation_checkpointing": True}},
}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", quick(CASES, "places", "documents apart", "recomputed"))
def test_blocks_share_one_graph_and_no_routing_makes_another(name, tmp_path):
    """Ten blocks, more than torch compiles of one function (8) before it gives up."""
    source = tiny.make_dense(tmp_path / "dense", "llama", num_hidden_layers=10)
    plain = losses(source, CASES[name], False)
    assert losses(source, CASES[name], True, backend="eager") == pytest.approx(plain, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_jitter_breaks_graphs_but_makes_no_new_ones(tmp_path):
    """It draws with a generator of its own, which torch.compile knows nothing of."""
    source = tiny.make_dense(tmp_path / "dense", "llama")
    changes = {"router": {"jitter": 0.1}}
    plain = losses(source, changes, False)
    made = []
    original = step.train_step

    def counting(*given: Any) -> Any:
        out = original(*given)
        made.append(counters["stats"]["unique_graphs"])
        return out

    with mock.patch.object(step, "train_step", counting):
        assert losses(source, changes, True, backend="eager") == pytest.approx(plain, rel=1e-5)
    assert made[1:] == [made[0]] * 3


@pytest.mark.inductor
def test_the_usual_backend_gives_the_same_losses(tmp_path):
    source = tiny.make_dense(tmp_path / "dense", "llama")
    for changes in CASES.values():
        plain = losses(source, changes, False)
        assert losses(source, changes, True) == pytest.approx(plain, rel=1e-4)

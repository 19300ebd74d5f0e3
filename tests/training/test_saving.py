"""What a rank hands to torch.distributed.checkpoint, at layouts of many ranks that are not there."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tiny import make_dense
from upcycle.training import optimizer, saving, start
from upcycle.training.fake_rank import as_rank
from upcycle.training.run import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dense(
        tmp_path_factory.mktemp("saving") / "llama", "llama", num_hidden_layers=1, num_attention_heads=4
    )


def moved(source, tmp_path, world: int, **layout: int) -> tuple[set[str], int, float]:
    """The parameters that are moved for a checkpoint, the collectives of that, and the bytes that it adds."""
    (tmp_path / "train.txt").write_text("It is a text.\n" * 64)
    run = Run.of(
        {
            "source": str(source),
            "out": str(tmp_path / "run"),
            "moe": {"num_experts": 16, "top_k": 2},
            "data": {"sources": [{"path": str(tmp_path / "train.txt")}]},
            "train": {"steps": 1, "batch_tokens": world * 64, "sequence_length": 64},
            "schedule": {"name": "constant", "peak": 1e-3},
            "parallel": layout,
        }
    )
    begun = start.start_of(run)
    with as_rank(run, begun, 0, world, "float32") as here:
        model = start.model_of(begun, run, here, "float32")
        made = optimizer.make(model, run.optimizer)
        with CommDebugMode() as collectives:
            tensors = saving.tensors_of(model, made)
        own = storages(
            [*model.parameters(), *(each for state in made.state.values() for each in state.values())]
        )
        parameters = dict(model.named_parameters())
        names = {n for n, p in parameters.items() if tensors["model"][n].placements != p.placements}
        added = storages([*tensors["model"].values(), *tensors["optimizer"].values()])
        more = sum(size for place, size in added.items() if place not in own)
    return names, collectives.get_total_counts(), more / sum(own.values())


def storages(values: list[object]) -> dict[int, int]:
    """The bytes of the storages of tensors, by their place in memory."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in values]
    found = [each.untyped_storage() for each in local if isinstance(each, torch.Tensor)]
    return {each.data_ptr(): each.nbytes() for each in found}


@pytest.mark.parametrize(
    ("world", "layout"),
    [(8, {"fsdp": 8, "ep": 8}), (8, {"fsdp": 8, "ep": 4}), (16, {"replicate": 2, "fsdp": 8, "ep": 4})],
)
def test_experts_are_saved_where_they_are(world, layout, source, tmp_path):
    """A copy of them, gathered over expert parallelism, would not fit beside a model that fills a device."""
    assert moved(source, tmp_path, world, **layout) == (set(), 0, 0.0)


def test_packed_gate_and_up_under_tensor_parallelism_are_moved(source, tmp_path):
    """A rank has a slice of each half, which are two rectangles."""
    names, collectives, _ = moved(source, tmp_path, 4, fsdp=2, tp=2)
    assert names
    assert all("gate_up" in name for name in names)
    assert collectives

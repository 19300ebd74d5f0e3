"""The documents of rows, counted on the host, and layers that read each of them by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ranks
import tiny
from upcycle.hf import carriers, packing
from upcycle.hf.documents import Documents
from upcycle.training import step
from upcycle.training.parallel import ranks as world

CPU = torch.device("cpu")


def test_documents_are_those_of_a_loop():
    """Random rows; documents of like lengths take less than twice their tokens, and each token one place."""
    for seed in range(20):
        drawn = np.random.default_rng(seed)
        rows, length = int(drawn.integers(1, 5)), int(drawn.integers(1, 40))
        begins = drawn.random((rows, length)) < drawn.random()
        begins[:, 0] = True
        positions, lengths = np.zeros((rows, length), np.int64), []
        for row in range(rows):
            for place in range(length):
                if begins[row, place]:
                    lengths.append(0)
                else:
                    positions[row, place] = positions[row, place - 1] + 1
                lengths[-1] += 1
        found = Documents.of(torch.from_numpy(positions), CPU)
        assert found.lengths.tolist() == lengths
        assert found.longest == max(lengths)
        assert found.borders.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert sorted(torch.cat([alike.tokens for alike in found.alike]).tolist()) == [*range(rows * length)]
        for alike in found.alike:
            taken = positions.reshape(-1)[alike.tokens]
            assert (alike.places.numpy() % alike.longest == taken).all()
            assert len(set(alike.places.tolist())) == len(alike.tokens)
            assert int(alike.places.max()) < alike.count * alike.longest < 2 * len(alike.tokens)


class Summing(nn.Module):
    """A layer that adds up everything before a token in its row."""

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states.cumsum(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Summing()

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states=hidden, mask=None)


def test_a_layer_reads_documents_only_while_it_is_told_to():
    """Whole rows before and after, and a block that is recomputed reads what it read."""
    model, hidden = Model(), torch.ones(2, 6, 1)
    carriers.install(model, [model.layer])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    layers = carriers.of(model)
    assert layers is not None
    with layers.told(Documents.of(positions, CPU)):
        assert torch.equal(model(hidden)[..., 0], positions + 1.0)
    assert torch.equal(model.layer(hidden_states=hidden)[..., 0], positions + 1.0)
    assert torch.equal(model(hidden)[..., 0], torch.arange(1.0, 7).expand(2, 6))
    assert carriers.of(Model()) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_blocks_read_documents_as_well(tmp_path, monkeypatch):
    source = tiny.make_dense(tmp_path / "dense", "lfm2")
    compile_module, found = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    for compiled in (False, True):
        run = ranks.run_of(str(source), {}, {"data": {"isolate": True}, "train": {"compile": compiled}})
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here)
        rows = ranks.rows_of(run)
        batches = [{"rows": r, "positions": ranks.positions_of(r)} for r in (rows, rows.flip(0)[:, :9])]
        found.append([step.train_step(trainee, each, n, 1e-3).loss for n, each in enumerate(batches)])
        assert packing.way(trainee.model).endswith("and one by one in layers that carry a state")
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    torch._dynamo.reset()

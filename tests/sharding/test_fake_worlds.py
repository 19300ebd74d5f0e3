"""One rank of a world that is not there, through torch's fake process group: what `load` gives it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_placement import layouts
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny
import upcycle
from upcycle import Recipe, UpcycleError, convert, loading
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.sharding import placement
from upcycle.sharding.layout import OF_TRANSFORMERS, Layout
from upcycle.system.progress import Unheard, reporting_to

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}


@contextmanager
def rank_of(world: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as one rank of a world; collectives move nothing."""
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % 8}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        monkeypatch.undo()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make_dense(
        tmp_path_factory.mktemp("dense") / "llama", "llama", head_dim=8, num_key_value_heads=2, **SIZES
    )


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The tensors in memory of every model, read from the folder that `convert` writes."""
    folder, found = tmp_path_factory.mktemp("converted"), {}

    def of(target: str, experts: int) -> dict[str, np.ndarray]:
        if (target, experts) not in found:
            out = folder / f"{target}{experts}"
            convert(source, out, recipe(target, experts))
            model = upcycle.open(out)
            found[target, experts] = {n: p.detach().numpy() for n, p in model.named_parameters()}
        return found[target, experts]

    return of


def recipe(target: str, experts: int) -> Recipe:
    return Recipe.of(
        moe={"num_experts": experts, "top_k": 2, "target": target}, init={"name": "drop", "ratio": 0.5}
    )


def loaded(source, target: str, experts: int, layout: Layout) -> torch.nn.Module:
    sizes = {OF_TRANSFORMERS[name]: getattr(layout, name) for name in OF_TRANSFORMERS}
    return upcycle.load(source, recipe(target, experts), distributed_config=sizes)


def ranks_of(layout: Layout) -> list[int]:
    """A few ranks that differ in every coordinate."""
    return sorted({0, layout.world - 1, layout.world // 2 + 1 if layout.world > 2 else 0})


FSDP, EP, TP, REPLICATE = range(4)  # places in `layouts`
CASES = [
    (1, 8, FSDP, "mixtral"), (1, 12, FSDP, "upcycled"),
    (8, 8, EP, "mixtral"), (8, 12, FSDP, "upcycled"), (8, 64, TP, "mixtral"), (8, 8, REPLICATE, "upcycled"),
    (16, 12, FSDP, "mixtral"), (16, 8, EP, "upcycled"), (16, 12, TP, "mixtral"),
    (16, 64, REPLICATE, "mixtral"),
    (64, 8, FSDP, "mixtral"), (64, 12, EP, "upcycled"), (64, 8, TP, "mixtral"),
    (128, 12, REPLICATE, "mixtral"), (128, 64, EP, "upcycled"),
    (512, 8, EP, "mixtral"), (512, 12, REPLICATE, "upcycled"),
    (4096, 8, EP, "mixtral"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "experts", "place", "target"), CASES)
def test_a_rank_holds_the_slices_of_what_convert_writes(
    world, experts, place, target, source, converted, monkeypatch
):
    """fsdp, fsdp x ep, fsdp x tp x ep and replicate x fsdp x ep, each with another number of experts."""
    layout = layouts(world, experts)[place]
    whole = converted(target, experts)
    rank = ranks_of(layout)[(world + place) % len(ranks_of(layout))]
    with rank_of(world, rank, monkeypatch):
        parts: dict[str, placement.Part] = {}
        write = loading.write_part

        def noted(entry, part, memory):
            write(entry, part, memory)
            parts[memory.data_ptr()] = part

        monkeypatch.setattr(loading, "write_part", noted)
        model = loaded(source, target, experts, layout)
        assert {name for name, _ in model.named_parameters()} == set(whole)
        for name, parameter in model.named_parameters():
            assert tuple(parameter.shape) == whole[name].shape
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not local.numel():
                continue
            indices = [np.concatenate([np.arange(a, b) for a, b in axis]) for axis in parts[local.data_ptr()]]
            wanted = whole[name][np.ix_(*indices)]
            assert np.array_equal(local.detach().numpy(), wanted), (name, layout, rank)


@pytest.mark.parametrize("layout", [Layout(replicate=2, fsdp=4, ep=4), Layout(fsdp=4, tp=2, ep=4)], ids=str)
def test_the_parts_of_all_ranks_are_those_that_torch_knows(layout, source, monkeypatch):
    """DTensor's own account of a rank's part is ours, so that a checkpoint is written as it is held."""
    write, seen = loading.write_part, {}
    monkeypatch.setattr(
        loading,
        "write_part",
        lambda entry, part, memory: (write(entry, part, memory), seen.update({memory.data_ptr(): part}))[0],
    )
    for rank in range(layout.world):
        with monkeypatch.context() as patch, rank_of(layout.world, rank, patch):
            model = loaded(source, "mixtral", 12, layout)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor), name
                # Not the coordinates of its mesh: DTensor remembers meshes, and not whose rank they were.
                place, mesh = layout.at(rank), parameter.device_mesh
                coordinates = [getattr(place, name.removeprefix("dp_")) for name in mesh.mesh_dim_names]
                shape, offset = _compute_local_shape_and_global_offset(
                    parameter.shape, mesh.shape, coordinates, parameter.placements
                )
                assert tuple(shape) == tuple(parameter.to_local().shape)
                part = seen[parameter.to_local().data_ptr()]
                if parameter.to_local().numel():
                    assert [axis[0][0] for axis in part] == list(offset), (name, rank)


def test_what_a_rank_reads_is_what_it_holds(source, monkeypatch):
    """Bytes read from the source: those of the rank's parts, and at most a page more a slice."""
    read = []
    original = Checkpoint.read_into

    def counted(self, info, start, out):
        read.append(out.size)
        original(self, info, start, out)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    copies = Recipe.of(moe={"num_experts": 8, "top_k": 2}, init={"name": "copy"})
    with rank_of(16, 13, monkeypatch):
        model = upcycle.load(source, copies, distributed_config={"fsdp_size": 16, "ep_size": 8})
        held = sum(p.to_local().nbytes for n, p in model.named_parameters() if not n.endswith("gate.weight"))
    assert sum(read) == held  # each of these parts is rows
    assert max(read) == 128 * 64 * 4  # half of gate and up is one of them; half of down is less


def test_a_layout_that_is_uneven_says_so(source, monkeypatch):
    """8 experts on 24 ranks: no axis of theirs divides, and with three copies of eight ranks all do."""
    monkeypatch.setattr(loading, "_LARGE", 0)
    said: list[str] = []
    listener = Unheard()
    listener.warn = said.append  # type: ignore[method-assign]
    for layout in (Layout(fsdp=24), Layout(replicate=3, fsdp=8)):
        with monkeypatch.context() as patch, rank_of(24, 0, patch), reporting_to(listener):
            loaded(source, "mixtral", 8, layout)
    (only,) = said
    assert only.startswith("fsdp 24: the most loaded process holds 2.")
    assert "let replicate take the other factors" in only


def test_layouts_that_load_refuses(source, monkeypatch):
    with rank_of(16, 3, monkeypatch):
        for layout, message in {
            (("fsdp_size", 8),): "fsdp_size x tp_size ask for 8 process.* and there are 16",
            (
                ("fsdp_size", 8),
                ("dp_replicate_size", 4),
            ): "dp_replicate_size x fsdp_size x tp_size ask for 32",
            (("tp_size", 16),): "tp_size must divide the 8 heads",
            (("fsdp_size", 4), ("tp_size", 4)): "tp_size must divide the 2 heads",
            (("fsdp_size", 16), ("ep_size", 16)): "ep_size must divide the 8 experts",
            (("fsdp_size", 8), ("pp_size", 2)): "distributed_config does not fit|no pipeline parallelism",
        }.items():
            with pytest.raises(UpcycleError, match=message):
                upcycle.load(source, recipe("mixtral", 8), distributed_config=dict(layout))


@pytest.mark.true_size
def test_a_rank_of_512_holds_an_even_share_of_llama_3_8b(tmp_path, monkeypatch):
    """Llama 3 8B in 8 experts on 512 ranks, as published; the weights are a sparse file of zeros."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128256,
        "tie_word_embeddings": False, "max_position_embeddings": 8192,
    }  # fmt: skip
    folder = tiny.make_headers(tmp_path / "llama", config)
    for sizes in ({"fsdp_size": 512, "ep_size": 8}, {"fsdp_size": 128, "dp_replicate_size": 4, "ep_size": 8}):
        with monkeypatch.context() as patch, rank_of(512, 100, patch):
            model = upcycle.load(
                folder, Recipe.of(moe={"num_experts": 8, "top_k": 2}), distributed_config=sizes
            )
            held = sum(p.to_local().numel() for p in model.parameters())
            share = sum(p.numel() for p in model.parameters()) / sizes["fsdp_size"]
        assert held <= 1.05 * share, json.dumps(sizes)
        assert math.isclose(held, share, rel_tol=0.05)

"""The arithmetic of placements: every element once, no rank with more than it must have, in any world."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle import UpcycleError
from upcycle.sharding import placement
from upcycle.sharding.layout import Layout
from upcycle.sharding.placement import Sharded, Split

WORLDS = (1, 8, 16, 64, 128, 512, 4096)


def layouts(world: int, experts: int) -> list[Layout]:
    """fsdp, fsdp x ep, fsdp x tp x ep and replicate x fsdp x ep, for a world of this size."""
    ep = math.gcd(experts, min(world, 8))
    found = [Layout(fsdp=world)]
    if world > 1:
        found += [
            Layout(fsdp=world, ep=ep),
            Layout(fsdp=world // 2, tp=2, ep=ep),
            Layout(replicate=2, fsdp=world // 2, ep=math.gcd(ep, world // 2)),
        ]
    return found


def llama(experts: int, *, layers: int = 32, hidden: int = 4096, inner: int = 14336) -> dict[str, Sharded]:
    """The parameters of Llama 3 8B with so many experts in every layer, in the cuts of a Mixtral."""
    heads, vocabulary = hidden // 4, 128256
    out = {
        "embed": Sharded(shape=(vocabulary, hidden), tp=Split(0)),
        "head": Sharded(shape=(vocabulary, hidden), tp=Split(0)),
        "norm": Sharded(shape=(hidden,)),
    }
    for i in range(layers):
        out |= {
            f"{i}.q": Sharded(shape=(hidden, hidden), tp=Split(0)),
            f"{i}.k": Sharded(shape=(heads, hidden), tp=Split(0)),
            f"{i}.v": Sharded(shape=(heads, hidden), tp=Split(0)),
            f"{i}.o": Sharded(shape=(hidden, hidden), tp=Split(1)),
            f"{i}.norm_1": Sharded(shape=(hidden,)),
            f"{i}.norm_2": Sharded(shape=(hidden,)),
            f"{i}.router": Sharded(shape=(experts, hidden)),
            f"{i}.gate_up": Sharded(shape=(experts, 2 * inner, hidden), expert=True),
            f"{i}.down": Sharded(shape=(experts, hidden, inner), expert=True),
        }
    return out


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("experts", [8, 12, 64])
def test_the_most_loaded_rank_holds_an_even_share(world, experts):
    """At the size of Llama 3 8B, whatever the layout. 12 experts do not divide any world but 1."""
    for layout in layouts(world, experts):
        parameters = placement.planned(llama(experts), layout)
        assert 1 <= placement.unevenness(parameters.values(), layout) <= 1.05, layout
        # Columns of a matrix on disk are read with what lies between them.
        assert all(each.fsdp < 2 and (each.expert or not each.fsdp) for each in parameters.values())


@pytest.mark.parametrize("world", [8, 64, 512, 4096])
@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("tp", [2, 8])
def test_tensor_parallel_ranks_hold_little_twice(world, experts, tp):
    """Norms and routers alone, at the sizes of Llama 3.2 1B (with small experts) and Llama 3 8B."""
    for size in ({"layers": 16, "hidden": 2048, "inner": 8192 * 8 // experts}, {}):
        for ep in (1, 8):
            layout, given = Layout(fsdp=world // tp, tp=tp, ep=ep), llama(experts, **size)
            if ep == 1:  # tensor parallelism cuts experts inside
                cuts = {"gate_up": Split(1, 2), "down": Split(2)}
                for name, each in given.items():
                    if each.expert:
                        given[name] = Sharded(shape=each.shape, tp=cuts[name.partition(".")[2]])
            parameters = placement.planned(given, layout)
            assert placement.unevenness(parameters.values(), layout) <= 1.05, layout
            total = sum(each.size for each in parameters.values())
            whole = [n for n, each in parameters.items() if each.tp is None and not each.expert]
            assert all("norm" in name or "router" in name for name in whole)
            assert sum(parameters[name].size for name in whole) < 4e-4 * total


def test_no_rank_holds_more_than_the_first():
    for layout in layouts(512, 12):
        parameters = list(placement.planned(llama(12, layers=1), layout).values())
        held = [
            sum(placement.elements(placement.part(each, layout, rank)) for each in parameters)
            for rank in range(layout.world)
        ]
        assert max(held) == held[0] == placement.most(parameters, layout)


@pytest.mark.parametrize("world", [8, 16, 64, 128])
def test_every_rank_of_a_replica_together_holds_everything_once(world):
    """Tensors that tensor parallelism does not cut are the same on its ranks, so they count as one."""
    small = [
        Sharded(shape=(12, 7, 16), expert=True),
        Sharded(shape=(12, 16, 32), tp=Split(1, groups=2)),
        Sharded(shape=(10, 3), tp=Split(0)),
        Sharded(shape=(6, 10), tp=Split(1)),
        Sharded(shape=(5,)),
    ]
    for layout, each in product(layouts(world, 12), small):
        (each,) = placement.planned({"": each}, layout).values()
        for copy in range(layout.replicate):
            times: dict[tuple[int, ...], int] = {}
            for rank in range(copy * layout.replica, (copy + 1) * layout.replica):
                part = placement.part(each, layout, rank)
                for index in product(*([i for a, b in axis for i in range(a, b)] for axis in part)):
                    times[index] = times.get(index, 0) + 1
            cut = (each.expert and layout.ep > 1) or each.tp is not None
            assert set(times.values()) == {1 if cut else layout.tp}, (layout, each)
            assert len(times) == each.size, (layout, each)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    axis=st.integers(0, 2),
    groups=st.integers(1, 3),
)
def test_pieces_make_up_a_part_and_parts_the_whole(shape, sizes, axis, groups):
    replicate, fsdp, tp = sizes
    layout = Layout(replicate=replicate, fsdp=fsdp, tp=tp)
    each = Sharded(shape=tuple(shape), tp=Split(axis % len(shape), groups))
    seen = 0
    (each,) = placement.planned({"": each}, layout).values()
    for rank in range(layout.replica):
        part = placement.part(each, layout, rank)
        blocks = list(placement.pieces(part))
        sizes_of = [math.prod(b - a for a, b in whole) for whole, _ in blocks]
        assert sum(sizes_of) == placement.elements(part)
        assert [math.prod(b - a for a, b in own) for _, own in blocks] == sizes_of
        seen += placement.elements(part)
    assert seen == each.size


def axis_of(each: Sharded, layout: Layout) -> int:
    return placement.planned({"": each}, layout)[""].fsdp


def test_a_small_tensor_costs_no_more_than_a_copy_of_it():
    router = Sharded(shape=(8, 4096))
    for world in WORLDS:
        planned = placement.planned({"": router}, Layout(fsdp=world)).values()
        assert placement.most(planned, Layout(fsdp=world)) == router.size // world
    assert placement.most([Sharded(shape=(3,))], Layout(fsdp=512)) == 1


def test_a_small_tensor_stays_on_its_first_axis_beside_large_ones():
    parameters = {"router": Sharded(shape=(8, 4096)), "matrix": Sharded(shape=(1 << 14, 1 << 14))}
    planned = placement.planned(parameters, Layout(fsdp=64))
    assert planned["router"].fsdp == 0
    assert placement.unevenness(planned.values(), Layout(fsdp=64)) <= placement.BUDGET


def test_experts_are_whole_on_a_rank_where_their_number_allows_it():
    """Along the first axis FSDP2 copies nothing, so it is taken if it is as even."""
    experts = Sharded(shape=(64, 256, 128), expert=True)
    assert axis_of(experts, Layout(fsdp=8)) == 0
    assert axis_of(experts, Layout(fsdp=128)) == 1
    assert axis_of(experts, Layout(fsdp=64, ep=8)) == 0
    assert axis_of(experts, Layout(fsdp=128, ep=8)) == 1


BAD = {
    "product": (
        Layout(replicate=2, fsdp=4),
        {},
        "replicate x fsdp x tp ask for 8 process.* and there are 16",
    ),
    "zero": (Layout(fsdp=16, tp=0), {}, "each must be 1 or more"),
    "no copy": (Layout(replicate=0, fsdp=16), {}, "^replicate = 0, fsdp = 16.*each must be 1 or more"),
    "ep": (Layout(fsdp=16, ep=3), {}, "ep must be a multiple of tp and divide fsdp x tp"),
    "ep over replicas": (Layout(replicate=2, fsdp=8, ep=16), {}, "ep must be a multiple of tp and divide"),
    "beyond": (Layout(fsdp=16, ep=16), {"experts": [8]}, "ep must divide the 8 experts of a layer"),
    "dense": (Layout(fsdp=16, ep=2), {"experts": []}, "a dense model has no experts to share out"),
    "heads": (Layout(tp=16), {"heads": [32, 8]}, "tp must divide the 8 heads of attention"),
}


@pytest.mark.parametrize("name", BAD)
def test_layouts_that_are_refused(name):
    layout, model, message = BAD[name]
    with pytest.raises(UpcycleError, match=message):
        layout.refuse(16, **model)

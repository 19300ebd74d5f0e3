"""The part of a parameter that a rank holds.

Expert parallelism gives a rank whole experts, tensor parallelism a part of an axis. FSDP then cuts what is
left along one axis (`planned`). Along the first, ranks get whole rows, some of them a row less or none.
Another axis must divide, because FSDP2 asks for that; it costs a copy of what is gathered, and reading
columns of a file. So it is taken only where the first is uneven: a matrix of an expert is cut inside where
ranks outnumber experts, as torchtitan does. Small tensors stay on their first axis as long as all of them
together cost the most loaded rank little; that is never more than copies of them would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from upcycle.sharding.layout import Layout

SLACK = 1.05  # even shares that the most loaded rank may hold of one tensor on its first axis
BUDGET = 1.04  # even shares that it may hold of all, so that small tensors stay on their first axis

Ranges = tuple[tuple[int, int], ...]  # parts of an axis: start and stop of each, in order
Part = tuple[Ranges, ...]  # the part of a tensor: parts of each axis


@dataclass(frozen=True)
class Split:
    """A cut of one axis. A packed axis (gate above up) has several `groups`, each of which is cut."""

    axis: int
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A parameter, and how it is cut before FSDP."""

    shape: tuple[int, ...]
    expert: bool = False  # whether axis 0 counts experts that expert parallelism shares out
    tp: Split | None = None
    fsdp: int = 0  # the axis along which FSDP cuts it

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def planned(parameters: Mapping[str, Sharded], layout: Layout) -> dict[str, Sharded]:
    """Return the parameters of a model with the axis along which FSDP cuts each; it is the same on every
    rank.

    Where no axis divides, the most loaded rank holds more than an even share (`unevenness`).
    """
    out = {name: replace(each, fsdp=_axis(each, layout)) for name, each in parameters.items()}
    even = sum(each.size for each in out.values()) / layout.replica
    spare = BUDGET * even - most(out.values(), layout)
    costs = {
        name: elements(part(parameters[name], layout, 0)) - elements(part(each, layout, 0))
        for name, each in out.items()
        if each.fsdp and not _closed(each, layout)
    }
    for name, cost in sorted(costs.items(), key=lambda pair: pair[1]):
        if (spare := spare - cost) < 0:
            break
        out[name] = replace(out[name], fsdp=0)
    return out


def unevenness(parameters: Iterable[Sharded], layout: Layout) -> float:
    """Return how many even shares of the parameters the most loaded rank holds."""
    every = list(parameters)
    return most(every, layout) * layout.replica / max(1, sum(each.size for each in every))


def _axis(sharded: Sharded, layout: Layout) -> int:
    """Return the first axis along which a tensor is cut evenly enough, or else the most even one."""
    shape, size = _lengths(_before_fsdp(sharded, layout, 0)), _shards(sharded, layout)
    if not shape:
        return 0
    closed = _closed(sharded, layout)
    shares = {0: -(-shape[0] // size) * size / shape[0]} if 0 not in closed else {}
    shares |= {axis: 1.0 for axis, n in enumerate(shape) if axis and axis not in closed and n % size == 0}
    least = min(shares.values(), default=1.0)
    return next((axis for axis, share in shares.items() if share <= max(SLACK, least)), 0)


def part(sharded: Sharded, layout: Layout, rank: int) -> Part:
    """Return the part of a parameter that a rank holds."""
    if not sharded.shape:
        return ()
    place = layout.at(rank)
    number = place.efsdp if sharded.expert and layout.ep > 1 else place.fsdp
    held, axis = _before_fsdp(sharded, layout, rank), sharded.fsdp
    return (*held[:axis], _cut(held[axis], _shards(sharded, layout), number), *held[axis + 1 :])


def whole(shape: tuple[int, ...]) -> Part:
    """Return the part of a tensor that no rank shares, as buffers are."""
    return tuple(((0, n),) for n in shape)


def shape_of(held: Part) -> tuple[int, ...]:
    """Return the shape of a part."""
    return _lengths(held)


def elements(held: Part) -> int:
    """Return the number of elements of a part."""
    return math.prod(_lengths(held))


def most(parameters: Iterable[Sharded], layout: Layout) -> int:
    """Return the number of elements that the most loaded rank holds.

    That is the first rank: every cut gives the first ranks as much as any other, or more.
    """
    return sum(elements(part(each, layout, 0)) for each in parameters)


def pieces(held: Part) -> Iterator[tuple[Ranges, Ranges]]:
    """Yield the blocks that make up a part: where each lies in the whole tensor, and where in the part."""
    axes = []
    for ranges in held:
        stops = list(itertools.accumulate(stop - start for start, stop in ranges))
        axes.append([(r, (stop - (r[1] - r[0]), stop)) for r, stop in zip(ranges, stops, strict=True)])
    for block in itertools.product(*axes):
        yield tuple(whole for whole, _ in block), tuple(own for _, own in block)


def _before_fsdp(sharded: Sharded, layout: Layout, rank: int) -> Part:
    """Return the part of a parameter that a rank would hold if FSDP did not cut it."""
    place = layout.at(rank)
    held: list[Ranges] = list(whole(sharded.shape))
    if sharded.expert:
        held[0] = _cut(held[0], layout.ep, place.ep)
    elif sharded.tp is not None:
        axis, groups = sharded.tp.axis, sharded.tp.groups
        width = -(-sharded.shape[axis] // groups)
        starts = range(0, sharded.shape[axis], width)
        cuts = (_cut(((a, min(sharded.shape[axis], a + width)),), layout.tp, place.tp) for a in starts)
        held[axis] = tuple(itertools.chain.from_iterable(cuts))
    return tuple(held)


def _closed(sharded: Sharded, layout: Layout) -> set[int]:
    """Return the axes that FSDP cannot cut evenly, or that DTensor cannot describe when cut again."""
    split = sharded.tp
    if split is None or layout.tp == 1:
        return set()
    uneven = split.axis > 0 and sharded.shape[split.axis] % layout.tp
    return {split.axis} if split.groups > 1 or uneven else set()


def _shards(sharded: Sharded, layout: Layout) -> int:
    """Return the number of ranks among which FSDP shards a parameter."""
    return layout.efsdp if sharded.expert and layout.ep > 1 else layout.fsdp


def _cut(ranges: Ranges, size: int, number: int) -> Ranges:
    """Return part `number` of `size` parts of an axis; the last ones may be shorter, or empty."""
    total = sum(stop - start for start, stop in ranges)
    step = -(-total // size)
    first, last = number * step, (number + 1) * step
    out, before = [], 0
    for start, stop in ranges:
        a, b = max(start, start + first - before), min(stop, start + last - before)
        if a < b:
            out.append((a, b))
        before += stop - start
    return tuple(out)


def _lengths(held: Part) -> tuple[int, ...]:
    return tuple(sum(stop - start for start, stop in ranges) for ranges in held)

"""The layout of the output's tensors in safetensors shards, decided before any is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.checkpoint import WEIGHTS
from upcycle.errors import UpcycleError, shown
from upcycle.system.wording import number_in
from upcycle.tensors.entries import Entry

DEFAULT_SHARD = 5_000_000_000  # bytes, as on the hub
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Extent:
    """The place of a tensor: `nbytes` from byte `offset` of shard number `shard`."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of the output: their names, headers and sizes, and the place of every tensor."""

    names: tuple[str, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    places: Mapping[str, Extent]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all files, headers included."""
        return sum(self.sizes)

    @property
    def index(self) -> dict[str, object] | None:
        """The content of the index file, or None if one file holds everything."""
        if len(self.names) == 1:
            return None
        total = sum(p.nbytes for p in self.places.values())
        where = {name: self.names[p.shard] for name, p in self.places.items()}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def lay_out(entries: Mapping[str, Entry], shard_size: int = DEFAULT_SHARD) -> Shards:
    """Fill shards of at most `shard_size` bytes with tensors in order; a larger tensor gets its own shard.

    Raises `UpcycleError` for a size that is no number of bytes.
    """
    if type(shard_size) is not int or shard_size < 1:
        raise UpcycleError(f"shard_size = {shown(shard_size)}; it must be a whole number of bytes, 1 or more")
    groups: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += entry.nbytes
    headers, sizes, places = [], [], {}
    for number, group in enumerate(groups):
        header, ends = tensor_file.header(group, {"format": "pt"})
        start = len(header)
        for (name, entry), end in zip(group.items(), ends, strict=True):
            places[name] = Extent(number, start + end - entry.nbytes, entry.nbytes)
        headers.append(header)
        sizes.append(start + (ends[-1] if ends else 0))
    count = len(groups)
    names = (
        [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    return Shards(names=tuple(names), headers=tuple(headers), sizes=tuple(sizes), places=places)


def parse_size(text: str) -> int:
    """Parse `5GB`, `500MB`, `1GiB` or a number of bytes."""
    size = number_in(text.upper(), _UNITS)
    if size is None:
        raise UpcycleError(f"shard size {text!r} is not understood; write 5GB, 500MB or 1GiB")
    if size < 1:
        raise UpcycleError(f"shard size {text!r} must be above zero")
    return int(size)

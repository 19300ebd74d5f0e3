"""The header of a safetensors file: the place of each tensor. It is checked before a byte of it is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
MAX_DIMENSIONS = 64  # of a tensor; numpy's own limit
_SMALL_HEADER = 1 << 20  # bytes; a smaller header is read quickly, whatever it holds
_PER_BRACKET = 16  # bytes; a tensor has three brackets, and its entry takes at least 51 bytes
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The place of one tensor: `nbytes` from byte `offset` of `file`, row-major, little-endian."""

    name: str
    dtype: str  # safetensors name: F32, BF16, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, after checking the header against the file's size."""
    refuse_special(file)
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise UpcycleError(
                f"{file}: the header claims {length} bytes, the file has {size}; it is truncated or "
                f"not safetensors. Download it again"
            )
        raw = handle.read(length)
    if length > _SMALL_HEADER and raw.count(b"[") + raw.count(b"{") > length // _PER_BRACKET:
        raise UpcycleError(f"{file}: the header of {length} bytes is no list of tensors")
    try:
        # json.loads(bytes) would also take UTF-16 and halves of surrogate pairs, which other readers refuse
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\u" in raw:  # half of a surrogate pair, which other readers refuse
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{file}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise UpcycleError(f"{file}: the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UpcycleError(f"{file}: __metadata__ of the header holds a value that is not text")
    data = 8 + length
    tensors = {name: _tensor(file, name, entry, data) for name, entry in header.items()}
    end = 0
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != data + end:
            raise UpcycleError(
                f"{file}: tensor {info.name} starts at byte {info.offset - data} of the data and not "
                f"at byte {end}; tensors overlap or leave a hole"
            )
        end += info.nbytes
    if data + end != size:
        raise UpcycleError(
            f"{file}: the tensors end at byte {data + end} and the file at {size}; it is truncated "
            f"or has bytes that belong to no tensor. Download it again"
        )
    return tensors


def refuse_special(path: Path) -> None:
    """Refuse a pipe, a device or a socket, because reading it may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UpcycleError(f"{path} is a pipe, a device or a socket; give a plain file")


def read_metadata(file: Path) -> dict[str, Any]:
    """Return `__metadata__` of a safetensors file that `read_header` accepted; empty if it has none."""
    with file.open("rb") as handle:
        found = json.loads(handle.read(int.from_bytes(handle.read(8), "little"))).get("__metadata__")
    return found if isinstance(found, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _tensor(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, end]
        if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in whole):
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise UpcycleError(f"{file}: the header entry of {name} is malformed") from None
    if dtype not in _BITS:
        raise UpcycleError(f"{file}: {name} has the unknown dtype {dtype}")
    if len(shape) > MAX_DIMENSIONS:
        raise UpcycleError(f"{file}: {name} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise UpcycleError(
            f"{file}: {name} of shape {shape} and dtype {dtype} does not fit its {end - begin} bytes"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), file=file, offset=data + begin, nbytes=end - begin
    )

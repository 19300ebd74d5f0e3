"""A dense or MoE checkpoint on disk: config, tensor headers, and bytes read on demand.

It takes a folder of safetensors files in Hugging Face form, and gives names, shapes, dtypes and slices. Every
header is checked before a byte of it is used, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoints import mistaken
from upcycle.checkpoints.dtypes import FLOATS, is_finite
from upcycle.errors import UpcycleError, listed, shown
from upcycle.system.open_files import OpenFiles

MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
MAX_DIMENSIONS = 64  # of a tensor; numpy's own limit
_SMALL_HEADER = 1 << 20  # bytes; a smaller header is read quickly, whatever it holds
_PER_BRACKET = 16  # bytes; a tensor has three brackets, and its entry takes at least 51 bytes
CHUNK = 8 << 20  # bytes of a stored tensor that are read at once
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(
    r"(.+)-\d+-of-(\d+)\.safetensors"
)  # one of several files: its stem, and how many there are
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
_PIECE = 1 << 20  # bytes that are read and looked through at once; a multiple of any element's size
_HASHED = 1 << 20  # bytes of a file that are hashed at once
_REMEMBERED = 1 << 20  # bytes; smaller ranges are scanned each time instead of being remembered
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


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
        raise UpcycleError(f"{file}: __metadata__ of the header holds what is no text")
    data = 8 + length
    tensors = {name: _tensor(file, name, entry, data) for name, entry in header.items()}
    end = 0
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != data + end:
            raise UpcycleError(
                f"{file}: tensor {info.name} starts at byte {info.offset - data} of the data where "
                f"{end} is due; tensors overlap or leave a hole"
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


class ChangedError(UpcycleError):
    """A file has changed since it was read."""

    def __init__(self, file: Path) -> None:
        super().__init__(f"{file} has changed while it was read; keep it as it is, and start again")


Stamp = tuple[int, ...]


def stamp(file: Path) -> Stamp:
    """Return what changes when the content of a file does: device, inode, size, times of the last changes."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Checkpoint:
    """An open checkpoint folder. Reads are thread-safe; files stay open until `close`."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        *,
        allow_nonfinite: bool = False,
        label: str = "source",
        stamps: Mapping[Path, Stamp] | None = None,
    ) -> None:
        """`stamps` are those of the files before anything was read of them."""
        self.label = label  # its role in a blueprint
        self.name = folder.resolve().name  # its name for users; a hub id if it came from the hub
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.allow_nonfinite = allow_nonfinite
        self.files = sorted({info.file for info in tensors.values()})
        self.stamps = stamps or {file: stamp(file) for file in self.files if file.is_file()}
        self._opened = OpenFiles(os.O_RDONLY)
        self._scanned: set[tuple[str, int, int]] = set()

    @classmethod
    def open(cls, folder: str | Path, *, allow_nonfinite: bool = False, label: str = "source") -> Checkpoint:
        """Open the folder, reading config.json and the header of every file. No tensor is read."""
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise UpcycleError(f"{folder} {what}; give a checkpoint folder or a hub id (owner/name)")
        other = None if (folder / WEIGHTS).exists() or (folder / INDEX).exists() else mistaken.folder(folder)
        no_config = f"{folder} {other}" if other else f"{folder} has no config.json; it is not a checkpoint"
        config = read_json(folder / "config.json", no_config)
        stamps = {file: stamp(file) for file in folder.iterdir() if file.is_file()}
        tensors = _headers(folder)
        return cls(folder, config, tensors, allow_nonfinite=allow_nonfinite, label=label, stamps=stamps)

    def pread(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Return bytes `start` to `stop` of a tensor as uint8. Raises `UpcycleError` for NaN or inf."""
        out = np.empty(stop - start, np.uint8)
        self.read_into(info, start, out)
        return out

    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with the bytes of a tensor from byte `start`.

        Raises `UpcycleError` for NaN or inf.
        """
        place = (info.name, start, out.size)
        scan = not self.allow_nonfinite and info.dtype in FLOATS and place not in self._scanned
        with self._opened.use(info.file) as descriptor:
            for first in range(0, out.size, _PIECE):
                piece = out[first : first + _PIECE]
                self._fill(descriptor, info, start + first, piece)
                if scan:  # while the bytes are in the processor's cache
                    _refuse_nonfinite(piece, info)
        if scan and out.size >= _REMEMBERED:
            self._scanned.add(place)

    def _fill(self, descriptor: int, info: TensorInfo, start: int, out: np.ndarray) -> None:
        view, position = out.data, info.offset + start
        while view:
            count = os.preadv(descriptor, [view], position)
            if not count:
                raise UpcycleError(f"{info.file} ended while {info.name} was read; it has changed")
            view, position = view[count:], position + count

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every weight file by name; for a hub file it is the hub's own LFS id."""
        with ThreadPoolExecutor(2) as pool:
            return dict(zip((f.name for f in self.files), pool.map(file_hash, self.files), strict=True))

    def hash_read(self, file: Path, stop: threading.Event | None = None) -> str:
        """Return the SHA-256 of a file as it was when it was opened.

        Raises `ChangedError` if the file has changed since.
        """
        digest = file_hash(file, stop)
        if stamp(file) != self.stamps[file]:
            raise ChangedError(file)
        return digest

    def refuse_changed(self, file: Path, sha256: str) -> None:
        """Refuse a file that has changed since it had this hash. It is read only if it was touched."""
        if stamp(file) != self.stamps[file] and file_hash(file) != sha256:
            raise ChangedError(file)

    def close(self) -> None:
        """Close the files that reads have opened."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_nonfinite(raw: np.ndarray, info: TensorInfo) -> None:
    if not is_finite(raw, info.dtype):
        raise UpcycleError(
            f"{info.name} in {info.file} holds NaN or inf; the checkpoint is damaged "
            f"(--allow-nonfinite takes it as it is)"
        )


def file_hash(file: Path, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Setting `stop` ends it early; the result is then useless.
    """
    digest, buffer = hashlib.sha256(), bytearray(_HASHED)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(view[:count])
            if stop is not None and stop.is_set():
                break
    return digest.hexdigest()


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object in `path`; `missing` is the error message if there is no such file."""
    refuse_special(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UpcycleError(missing) from None
    except UnicodeDecodeError as error:
        raise UpcycleError(
            f"{path} is no UTF-8 text ({error.reason}), which JSON is; save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        why = "it begins with a byte order mark; save it without one" if "BOM" in str(error) else error
        raise UpcycleError(f"{path} is not valid JSON: {why}") from None
    if not isinstance(value, dict):
        raise UpcycleError(f"{path} holds {shown(value)}, not a JSON object; give the file as it was made")
    return value


class TwoSetsError(UpcycleError):
    """A folder holds two sets of weights, and some readers take one and some the other."""


def _headers(folder: Path) -> dict[str, TensorInfo]:
    if (folder / INDEX).exists() and (folder / WEIGHTS).exists():
        _refuse_two_sets(folder)
    if (folder / INDEX).exists():
        return _sharded(folder)
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UpcycleError(
            f"{folder} has its weights in {listed(pickles)}, a format that can run code when opened; "
            f"load it once with transformers and save_pretrained, which writes safetensors"
        )
    other = mistaken.folder(folder)
    raise UpcycleError(f"{folder} {other}" if other else f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _refuse_two_sets(folder: Path) -> None:
    """Refuse a single file and an index with different weights.

    transformers takes the single file if there is one, and other readers the index.
    """
    index = read_json(folder / INDEX, f"{folder / INDEX} is gone").get("weight_map")
    if not isinstance(index, dict) or any(file != WEIGHTS for file in index.values()):
        raise TwoSetsError(
            f"{folder} holds {WEIGHTS} and an {INDEX} of other files, two sets of weights of which "
            f"transformers takes the first; move away the one that is not meant"
        )


def _refuse_shards_of_two(folder: Path, names: Collection[str]) -> None:
    """Refuse an index that names files of two sets, as `a-00001-of-00002` and `a-00001-of-00003` are."""
    sets: dict[str, set[str]] = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            sets.setdefault(found[1], set()).add(found[2])
    for stem, totals in sets.items():
        if len(totals) > 1:
            raise UpcycleError(
                f"{folder / INDEX} names files of two sets, {stem}-...-of-{' and '.join(sorted(totals))}; "
                f"give the index and the files of one"
            )


def _sharded(folder: Path) -> dict[str, TensorInfo]:
    index = read_json(folder / INDEX, f"{folder / INDEX} is gone").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise UpcycleError(f"{folder / INDEX} has no weight_map of names to files")
    _refuse_shards_of_two(folder, set(index.values()))
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(index.values())):
        # A hub cache links files to a store outside the folder, but the name itself must not leave the
        # folder.
        if Path(name).name != name or name in ("", ".", ".."):
            raise UpcycleError(f"{folder / INDEX} names {name!r}, a path outside the folder")
        if not (folder / name).is_file():
            raise UpcycleError(f"{folder / INDEX} names {name}, which is missing; download it again")
        for tensor, info in read_header(folder / name).items():
            if index.get(tensor) != name:
                raise UpcycleError(
                    f"{folder / name} holds {tensor}, which {INDEX} "
                    + (f"places in {index[tensor]}" if tensor in index else "does not know")
                )
            tensors[tensor] = info
    if missing := sorted(set(index) - set(tensors)):
        raise UpcycleError(f"{folder / INDEX} lists {listed(missing)}, which no file holds")
    return tensors

"""A dense or MoE checkpoint on disk: config, tensor headers, and bytes read on demand.

It takes a folder of safetensors files in Hugging Face form, and gives names, shapes, dtypes and slices.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoints import mistaken
from upcycle.checkpoints.dtypes import FLOATS, is_finite
from upcycle.checkpoints.header import TensorInfo, read_header, refuse_special
from upcycle.errors import UpcycleError, listed, shown
from upcycle.system.open_files import OpenFiles

CHUNK = 8 << 20  # bytes of a stored tensor that are read at once
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# one of several files: its stem, and how many there are
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
_PIECE = 1 << 20  # bytes that are read and looked through at once; a multiple of any element's size
_HASHED = 1 << 20  # bytes of a file that are hashed at once
_REMEMBERED = 1 << 20  # bytes; smaller ranges are scanned each time instead of being remembered
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


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
        config_file: str = CONFIG,
    ) -> None:
        """`stamps` are those of the files before anything was read of them."""
        self.label = label  # its role in a blueprint
        self.name = folder.resolve().name  # its name for users; a hub id if it came from the hub
        self.folder = folder
        self.config = config
        self.config_file = config_file  # the name of the file that has the config
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

    @property
    def given(self) -> str:
        """Its hub id, or its folder if it did not come from the hub."""
        return self.name if "/" in self.name else str(self.folder)  # no name of a folder has a slash

    @property
    def headers_only(self) -> bool:
        """True if its files are not on this machine, so that nothing but config and headers is known."""
        return not any(file in self.stamps for file in self.files)

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
        """Return the SHA-256 of every weight file by name."""
        return dict(zip((file.name for file in self.files), file_hashes(self.files), strict=True))

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


def file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hexadecimal; two are read at once."""
    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(file_hash, files)]


def _whole_number(digits: str) -> int:
    """Convert a whole number of a JSON file. Raises `ValueError` for one that no float can hold."""
    if len(digits) > sys.float_info.max_10_exp:
        raise ValueError(f"a whole number of {len(digits)} digits, which no setting has")
    return int(digits)


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object in `path`; `missing` is the error message if there is no such file."""
    refuse_special(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole_number)
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

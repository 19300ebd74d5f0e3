"""Reads DCP checkpoints without executing code in them.

DCP pickles its `.metadata`, and stores values other than tensors as torch pickles. Both are read with an
allowlist of the few classes that they consist of; any other name in a pickle is refused before it is looked
up.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from upcycle.errors import UpcycleError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of a run has")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """A reader for a checkpoint folder from an untrusted source.

    Raises `UpcycleError` if its `.metadata` is damaged, or contains more than a description of tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known = _metadata(folder / ".metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        assert self._known.storage_meta is not None
        self._known.storage_meta.load_id = self.load_id
        return self._known


class Planner(DefaultLoadPlanner):
    """The default plan, except that values other than tensors may only be numbers and text.

    A checkpoint has each of its few values many times, so every pickle is examined once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._examined: dict[bytes, bytes] = {}  # by a pickle, one of the same value that torch has written

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        given = value.getvalue()
        if given not in self._examined:
            plain = io.BytesIO()
            torch.save(torch.load(value, weights_only=True), plain)
            self._examined[given] = plain.getvalue()
        super().load_bytes(read_item, io.BytesIO(self._examined[given]))


def _metadata(path: Path) -> Metadata:
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise ValueError("it describes no tensors")
        for place in found.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it names {place.relative_path!r}, a path outside the folder")
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(
            f"{path.parent} cannot be read: {path.name}: {reason}; delete that folder to go on from an older "
            f"one"
        ) from None
    if not isinstance(found.storage_meta, StorageMeta):
        found.storage_meta = StorageMeta()
    return found

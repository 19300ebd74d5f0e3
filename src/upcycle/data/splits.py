"""The splits of a set: which one is scored, and which are read together."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from upcycle.data.documents import (
    PLAIN,
    Source,
    files,
    hub_name,
    is_dataset,
    kind,
    refuse_other_split,
    saved_splits,
)
from upcycle.errors import UpcycleError, listed, shown

_SPLITS = {"train", "test", "val", "valid", "validation"}
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}(-[0-9a-f]+)?(\.\w+)+")  # a file of a split in parts


def to_score(path: str | Path, split: str | None = None) -> Source:
    """Return the source of a set to score on: all of it, or one split if it is a data set that has splits.

    That is `split`, or else `test`, or else the only one. Raises `UpcycleError` if it is not there.
    """
    source, there = Source(path=str(path)), saved_splits(Path(path))
    if hub_name(source) is not None:
        return replace(source, split=split or "test")
    if there is None:
        if split is not None:
            raise UpcycleError(f"{path} has no splits to choose {split} from; give one that has, or no split")
        return source
    chosen = split or ("test" if len(there) != 1 else there[0])
    refuse_other_split(str(path), chosen, there)
    return replace(source, path=str(Path(path) / chosen), split=chosen)


def unread(source: Source, key: str = "data.sources {}") -> str | None:
    """Return a sentence about a key of a source that is set and does nothing there; None if all are read.

    `key` is how the user writes a key, with `{}` for its name.
    """
    path = source.path
    kinds = set() if is_dataset(source) else {kind(each) for each in files(source)}
    if (why := mixed(source)) is not None:
        return why
    if source.split != Source.split and not (hub_name(source) or saved_splits(Path(path))):
        return f"{key.format('split')} = {source.split}, and {path} is no dataset with splits; take split out"
    if source.separator is not None and kinds.isdisjoint(PLAIN):
        return (
            f"{key.format('separator')} = {shown(source.separator)} is for text files, and {path} has none, "
            f"so each row is a document; take separator out"
        )
    if source.field != Source.field and kinds and kinds <= {*PLAIN}:
        return (
            f"{key.format('field')} = {source.field} is for JSON lines, parquet and datasets, and {path} is "
            f"text alone; take field out"
        )
    return None


def mixed(source: Source) -> str | None:
    """Return a sentence about a folder with files of training and of other splits; None if it is none."""
    folder = Path(source.path)
    if is_dataset(source) or not folder.is_dir():
        return None
    splits = {name for each in files(source) if (name := _split_of(each.relative_to(folder)))}
    if len(splits) < 2 or not any("train" in _words(name) for name in splits):
        return None
    return (
        f"{folder} has files of the splits {listed(sorted(splits))}, and a folder is read whole, whatever "
        f"split says; give a file of one of them, or a folder that holds only that"
    )


def _split_of(path: Path) -> str | None:
    """Return the split that a file is of, if its name or that of a folder says so.

    Hugging Face datasets are cloned as `train.jsonl`, `train-00000-of-00001.parquet` or `train/ANY.parquet`.
    """
    shard = _SHARD.fullmatch(path.name)
    name = shard["split"] if shard else path.name[: -len(str(kind(path)))]
    if name.lower() in _SPLITS or (shard and _words(name) & _SPLITS):
        return name
    return next((folder for folder in reversed(path.parts[:-1]) if folder.lower() in _SPLITS), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))

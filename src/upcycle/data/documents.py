"""Reads the documents of a training source: text, JSON lines, parquet or Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from upcycle.errors import UpcycleError, listed, shown
from upcycle.settings import Above, Settings, Verbatim

_PIECE = 1 << 20  # characters to read from a text file at once
_LINE = 1 << 28  # maximum length of a line of JSON, in characters
_PLAIN = {".txt", ".text"}  # files of text without rows
_SPLITS = {"train", "test", "val", "valid", "validation"}
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}(-[0-9a-f]+)?(\.\w+)+")  # a file of a split in parts
_ROWS = 256  # rows of a parquet file in memory at a time; rows may be of any length


@dataclass(frozen=True, kw_only=True)
class Source(Settings):
    """One `[[data.sources]]`: a file, a folder of files, or a Hugging Face dataset (`hf:owner/name`)."""

    section: ClassVar[str] = "data.sources"

    path: str  # a file or a folder of text, JSON lines or parquet (or images), or hf:owner/name
    weight: Annotated[float, Above(0)] = 1.0  # how often it is drawn, relative to the others
    field: str = "text"  # the text field of JSON lines, parquet and datasets
    # separates the documents of a text file; None: a file is one document
    separator: Annotated[str | None, Verbatim()] = None
    split: str = "train"  # split of a Hugging Face dataset that has splits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "":
            raise UpcycleError(
                f'data.sources separator = "" of {self.path}; leave it out for one document a file'
            )


def files(source: Source) -> list[Path]:
    """Return the files of a source in order; empty for a dataset that has no local files."""
    if _hub_name(source) is not None:
        return []
    path = Path(source.path)
    if path.is_dir():
        if _saved_dataset(path):
            return sorted(p for p in path.rglob("*") if p.is_file())
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) is not None)
        if not found:
            raise UpcycleError(f"{path} holds no {', '.join(_READERS)} files")
        return found
    if not path.is_file():
        raise UpcycleError(f"no data at {path}")
    if _kind(path) is None:
        raise UpcycleError(
            f"{path} is of no known kind; allowed: {', '.join(_READERS)}, a folder, hf:owner/name"
        )
    return [path]


def documents(source: Source) -> Iterator[tuple[str, bool]]:
    """Yield pieces of text, and whether each begins a document. Long documents come in several pieces."""
    if is_dataset(source):
        for where, row in dataset_rows(source):
            yield _field(row, source, where), True
        return
    for path in files(source):
        yield from _READERS[str(_kind(path))](path, source)


def to_score(path: str | Path, split: str | None = None) -> Source:
    """Return the source of a set to score on: all of it, or one split if it is a data set that has splits.

    That is `split`, or else `test`, or else the only one. Raises `UpcycleError` if it is not there.
    """
    source, there = Source(path=str(path)), saved_splits(Path(path))
    if _hub_name(source) is not None:
        return replace(source, split=split or "test")
    if there is None:
        if split is not None:
            raise UpcycleError(f"{path} has no splits to choose {split} from; give one that has, or no split")
        return source
    chosen = split or ("test" if len(there) != 1 else there[0])
    _refuse_other_split(str(path), chosen, there)
    return replace(source, path=str(Path(path) / chosen), split=chosen)


def saved_splits(path: Path) -> list[str] | None:
    """Return the splits of a data set that is saved in a folder; None if that has no splits."""
    about = path / "dataset_dict.json"
    if not about.is_file():
        return None
    try:
        return [str(name) for name in json.loads(about.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UpcycleError(f"{about} is damaged; save the data set anew") from None


def _refuse_other_split(path: str, split: str, there: Collection[str]) -> None:
    if split not in there:
        raise UpcycleError(
            f"{path} has no split {split!r}; it has {listed(sorted(there))}: name one of them, or give its "
            f"folder below {path}"
        )


def unread(source: Source) -> str | None:
    """Return a sentence about a key of a source that is set and does nothing there; None if all are read."""
    path = source.path
    kinds = set() if is_dataset(source) else {_kind(each) for each in files(source)}
    if (why := mixed(source)) is not None:
        return why
    if source.split != Source.split and not (_hub_name(source) or saved_splits(Path(path))):
        return f"data.sources split = {source.split}, and {path} is no dataset with splits; take split out"
    if source.separator is not None and kinds.isdisjoint(_PLAIN):
        return (
            f"data.sources separator = {shown(source.separator)} is for text files, and {path} has none, so "
            f"each row is a document; take separator out"
        )
    if source.field != Source.field and kinds and kinds <= _PLAIN:
        return (
            f"data.sources field = {source.field} is for JSON lines, parquet and datasets, and {path} is "
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
    name = shard["split"] if shard else path.name.removesuffix(str(_kind(path)))
    if name.lower() in _SPLITS or (shard and _words(name) & _SPLITS):
        return name
    return next((folder for folder in reversed(path.parts[:-1]) if folder.lower() in _SPLITS), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def overlap(one: Source, other: Source) -> bool:
    """Return whether two sources have data in common: the same file, folder or split, or one in the other."""
    names = [each.path for each in (one, other) if _hub_name(each) is not None]
    if names:
        return one.path == other.path and one.split == other.split
    here, there = _place(one), _place(other)
    return here == there or here in there.parents or there in here.parents


def _place(source: Source) -> Path:
    """Return the file or the folder that is read."""
    path = Path(source.path)
    return (path / source.split if saved_splits(path) else path).resolve()


def is_dataset(source: Source) -> bool:
    """Return whether a source is a Hugging Face dataset, on the hub or saved in a folder."""
    return _hub_name(source) is not None or _saved_dataset(Path(source.path))


def _hub_name(source: Source) -> str | None:
    return source.path.removeprefix("hf:") if source.path.startswith("hf:") else None


def _saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _kind(path: Path) -> str | None:
    return next((ending for ending in _READERS if path.name.endswith(ending)), None)


def _text(path: Path, source: Source) -> Iterator[tuple[str, bool]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rest, begins = "", True
        while True:
            try:
                more = file.read(_PIECE)
            except UnicodeDecodeError as error:
                raise UpcycleError(not_utf8(path, error)) from None
            rest += more
            if source.separator:
                *whole, rest = rest.split(source.separator)
                for document in whole:
                    yield document.strip("\n") if begins else document.rstrip("\n"), begins
                    begins = True
                rest = rest.lstrip("\n") if begins else rest
            if not more:
                yield rest.rstrip("\n") if source.separator else rest, begins
                return
            # Cut at a line break or at whitespace, so that no word is split.
            cut = max(rest.rfind("\n", 0, -1), rest.rfind(" ", 0, -1) if "\n" not in rest else -1)
            if source.separator and cut > 0:  # line breaks that may be the last of a document stay
                cut = len(rest[:cut].rstrip("\n"))
            keep = len(source.separator or "")
            if len(rest) > _PIECE and 0 < cut < len(rest) - keep:
                yield rest[:cut], begins
                rest, begins = rest[cut:], False


def _json_lines(path: Path, source: Source) -> Iterator[tuple[str, bool]]:
    for where, row in json_lines(path):
        yield _field(row, source, where), True


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each object in a file of JSON lines, for messages, and the object."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(_LINE), ""), start=1):
                where = f"{path}, line {number}"
                if len(line) == _LINE:
                    raise UpcycleError(
                        f"{where} is longer than {_LINE:,} characters; one document of that length cannot be "
                        f"read, cut it"
                    )
                if line.strip():
                    yield where, json_row(line, where)
        except UnicodeDecodeError as error:
            raise UpcycleError(not_utf8(path, error)) from None
        except (OSError, EOFError, zlib.error) as error:
            raise UpcycleError(f"{path} cannot be read: {error}") from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return the error message for a file that is not UTF-8 text."""
    return (
        f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8, or convert it with "
        f"`iconv -f ENCODING -t utf-8`"
    )


def json_row(line: str, where: str) -> dict[str, Any]:
    """Parse a line of JSON as an object; `where` is for the error message."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UpcycleError(f"{where} is not a JSON object")
    return row


def _field(row: dict[str, Any], source: Source, where: str) -> str:
    if source.field not in row:
        raise UpcycleError(f"{where} has no {source.field!r}; it has {listed(sorted(row))}: set `field`")
    if not isinstance(row[source.field], str):
        raise UpcycleError(f"{where}: {source.field!r} is no string but {type(row[source.field]).__name__}")
    text: str = row[source.field]
    return text


def _parquet(path: Path, source: Source) -> Iterator[tuple[str, bool]]:
    for row in parquet_rows(path, source.field):
        yield _field(row, source, str(path)), True


def parquet_rows(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, of one column or of all, with few rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UpcycleError(f"{path}: parquet needs pyarrow: pip install 'upcycle[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                names = listed(file.schema_arrow.names)
                raise UpcycleError(f"{path} has no column {column!r}; it has {names}: set `field`")
            for batch in file.iter_batches(_ROWS, columns=None if column is None else [column]):
                yield from batch.to_pylist()
    except (MemoryError, pyarrow.ArrowMemoryError):
        raise UpcycleError(
            f"{path} has rows that do not fit into memory, {_ROWS} at a time; cut its texts into shorter ones"
        ) from None
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{path} has a text that is not UTF-8 ({error.reason}); write it anew") from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(f"{path} is no whole parquet file: {reason}") from None


def dataset_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row of a Hugging Face dataset, for messages, and the row."""
    name = _hub_name(source)
    try:
        import datasets
    except ModuleNotFoundError:
        raise UpcycleError(f"{source.path} needs datasets: pip install 'upcycle[data]'") from None
    try:
        if name is not None:
            rows = datasets.load_dataset(name, split=source.split, streaming=True)
        else:
            rows = datasets.load_from_disk(source.path)
            if isinstance(rows, datasets.DatasetDict):
                _refuse_other_split(source.path, source.split, rows)
                rows = rows[source.split]
    except UpcycleError:
        raise
    except Exception as error:  # the hub or the folder can raise anything; its message is passed on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(f"{source.path} cannot be opened: {reason}") from None
    for number, row in enumerate(_rows_of(rows, source)):
        yield f"{source.path}, row {number}", row


def _rows_of(dataset: Any, source: Source) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set, which may come over a network."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        except (UpcycleError, MemoryError):
            raise
        except Exception as error:  # network, files or dataset code can raise anything; pass it on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UpcycleError(f"{source.path} cannot be read to its end: {reason}") from None
        if row is None:
            return
        yield row


_READERS: dict[str, Callable[[Path, Source], Iterator[tuple[str, bool]]]] = {
    ".txt": _text,
    ".text": _text,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
}

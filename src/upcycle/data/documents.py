"""Reads the documents of a training source: text, JSON lines, parquet or Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from upcycle.data.folders import files_below
from upcycle.errors import UpcycleError, listed, shown
from upcycle.settings import Above, Settings, Verbatim
from upcycle.system import progress

_PIECE = 1 << 20  # characters to read from a text file at once
_LINE = 1 << 28  # maximum length of a line of JSON, in characters
PLAIN = (".txt", ".text")  # files of text without rows
WITH_ROWS = (".jsonl", ".jsonl.gz", ".parquet")  # files whose rows have fields
_KNOWN = (*PLAIN, *WITH_ROWS)
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
        if not self.path:
            raise UpcycleError(
                'data.sources path = "" names no data; give a file, a folder, or hf:owner/name'
            )
        if self.separator == "":
            raise UpcycleError(
                f'data.sources separator = "" of {self.path}; leave it out for one document a file'
            )


def files(source: Source) -> list[Path]:
    """Return the files of a source in order; empty for a dataset that has no local files.

    Of a folder, these are the files of a known ending in it and below it, hidden ones among them.
    """
    if hub_name(source) is not None:
        return []
    path = Path(source.path)
    if _saved_dataset(path):
        return files_below(path)
    return files_at(path, _KNOWN, "hf:owner/name")


def files_at(path: Path, endings: Collection[str], *others: str) -> list[Path]:
    """Return the file at `path`, or the files of a folder that have one of the endings, in order.

    `others` is what the user may give instead, for the message. Raises `UpcycleError` if there are none.
    """
    if path.is_dir():
        found = [p for p in files_below(path) if kind(p) in endings]
        if not found:
            raise UpcycleError(f"{path} holds no {', '.join(endings)} files")
        return found
    allowed = ", ".join((*endings, "a folder", *others))
    if not path.is_file():
        raise UpcycleError(f"no data at {path}; allowed: {allowed}")
    if kind(path) not in endings:
        raise UpcycleError(f"{path} is of no known kind; allowed: {allowed}")
    return [path]


def documents(source: Source) -> Iterator[tuple[str, bool]]:
    """Yield pieces of text, and whether each begins a document. Long documents come in several pieces.

    Warns at the end if the separator of the source is in none of its text files.
    """
    if is_dataset(source):
        for where, row in dataset_rows(source):
            yield _field(row, source, where), True
        return
    say_left_out(source)
    most = 0  # documents of a text file
    for path in files(source):
        count = 0
        for text, begins in _READERS[str(kind(path))](path, source):
            yield text, begins
            count += begins
        most = max(most, count if kind(path) in PLAIN else 0)
    if source.separator is not None and most == 1:
        progress.warn(_without_separator(source.path, source.separator))


def say_left_out(source: Source, endings: Collection[str] = _KNOWN) -> None:
    """Say how many files of a folder have none of the endings and are not read; hidden ones do not count."""
    path = Path(source.path)
    if not path.is_dir() or is_dataset(source):
        return
    below = [each.relative_to(path) for each in files_below(path)]
    left = [
        each
        for each in below
        if not each.name.lower().endswith(tuple(endings)) and not any(p[0] == "." for p in each.parts)
    ]
    if left:
        theirs = sorted({each.suffix or "none" for each in left})
        progress.say(
            f"{path}: {len(left)} files are not read, because of their endings ({listed(theirs)}); those "
            f"with {', '.join(endings)} are"
        )


def _without_separator(path: str, separator: str) -> str:
    ends = (
        "; line ends in it may be \\r\\n and not \\n" if "\n" in separator and "\r" not in separator else ""
    )
    return f"{path} has no separator {shown(separator)} in it, so each text file is one document{ends}"


def saved_splits(path: Path) -> list[str] | None:
    """Return the splits of a data set that is saved in a folder; None if that has no splits."""
    about = path / "dataset_dict.json"
    if not about.is_file():
        return None
    try:
        return [str(name) for name in json.loads(about.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UpcycleError(f"{about} is damaged; save the data set anew") from None


def refuse_other_split(path: str, split: str, there: Collection[str]) -> None:
    """Raise `UpcycleError` if a data set has no such split."""
    if split not in there:
        raise UpcycleError(
            f"{path} has no split {split!r}; it has {listed(sorted(there))}: name one of them, or give its "
            f"folder below {path}"
        )


def is_dataset(source: Source) -> bool:
    """Return whether a source is a Hugging Face dataset, on the hub or saved in a folder."""
    return hub_name(source) is not None or _saved_dataset(Path(source.path))


def hub_name(source: Source) -> str | None:
    """Return the name of a data set on the hub; None for a source on this machine."""
    return source.path.removeprefix("hf:") if source.path.startswith("hf:") else None


def _saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def kind(path: Path) -> str | None:
    """Return the ending that says how a file is read, in small letters; None for a file of no known kind."""
    return next((ending for ending in _KNOWN if path.name.lower().endswith(ending)), None)


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
            if not more:
                if source.separator:
                    rest = rest.strip("\n") if begins else rest.rstrip("\n")
                yield rest, begins
                return
            # Cut at a line break or at whitespace, so that no word is split.
            cut = max(rest.rfind("\n", 0, -1), rest.rfind(" ", 0, -1) if "\n" not in rest else -1)
            if source.separator and cut > 0:  # line breaks that may be the last of a document stay
                cut = len(rest[:cut].rstrip("\n"))
            keep = len(source.separator or "")
            if len(rest) > _PIECE and 0 < cut < len(rest) - keep:
                yield rest[:cut].lstrip("\n") if source.separator and begins else rest[:cut], begins
                rest, begins = rest[cut:], False


def _json_lines(path: Path, source: Source) -> Iterator[tuple[str, bool]]:
    for where, row in json_lines(path):
        yield _field(row, source, where), True


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each object in a file of JSON lines, for messages, and the object."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
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
    with opened_parquet(path) as file:
        if column is not None and column not in file.schema_arrow.names:
            names = listed(file.schema_arrow.names)
            raise UpcycleError(f"{path} has no column {column!r}; it has {names}: set `field`")
        for batch in file.iter_batches(_ROWS, columns=None if column is None else [column]):
            yield from batch.to_pylist()


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """Open a parquet file with pyarrow. Raises `UpcycleError` for what goes wrong while it is open."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UpcycleError(f"{path}: parquet needs pyarrow: pip install 'upcycle[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
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
    name = hub_name(source)
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
                refuse_other_split(source.path, source.split, rows)
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

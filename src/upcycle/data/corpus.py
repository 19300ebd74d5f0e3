"""Token files: each source is tokenised once, into a file that is memory-mapped and never parsed again.

`KEY.bin` holds the ids, little endian, and `KEY.starts` the number of the first id of each document.
`KEY.json`, written last, describes them. The key is a hash of
everything that the ids depend on, with the text by name, size and time. Existing files are checked: the ids
by their hash, which costs a thousandth of tokenising; the text by its stamp and, if that differs, by its hash
(`stamps.py`). A long document is tokenised in pieces, cut where the ids stay the same as for the whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from upcycle.checkpoints.checkpoint import file_hash
from upcycle.data.documents import Source, documents, files
from upcycle.data.stamps import is_as_it_was, stamps
from upcycle.errors import UpcycleError
from upcycle.settings import Settings, Within
from upcycle.system import panics, progress, whole_file
from upcycle.system.progress import Work

FORMAT = 2
_STARTS = np.dtype("<i8")
_PIECE = 1 << 18  # maximum number of characters of a document tokenised as one string
_BATCH = 1 << 20  # number of characters given to the tokenizer at once
_MOST_IDS = 1 << 24  # upper limit for a tokenizer's ids; no vocabulary comes near it
_NEAR = 256  # number of characters compared on either side of a cut


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """The `[data]` table."""

    section: ClassVar[str] = "data"

    sources: tuple[Source, ...]
    held_out: Annotated[float, Within("[0, 1)")] = 0.0  # share of each source held out, from its end
    tokenizer: str | None = None  # None: the tokenizer of the run's source
    # whether the documents of a packed row do not see each other: positions and attention start anew at each
    # (causal_lm, sft)
    isolate: bool = False
    append_eos: bool = True  # end a document with EOS, if there is one and the tokenizer did not add it
    cache: str | None = None  # folder of token files; None: RUN/tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UpcycleError("data.sources is empty; name at least one [[data.sources]] with a path")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A token file: `count` ids of `dtype`, little endian; `documents` documents, `bytes` of text."""

    path: Path
    count: int
    dtype: str
    documents: int
    bytes: int
    name: str  # name of the source, for messages
    sha256: str | None = None  # hash of the file
    starts: Path | None = None  # file of the first ids of documents; files of older versions have none

    def ids(self) -> np.memmap:
        """Return all ids, memory-mapped, [count]."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def first_ids(self) -> np.ndarray:
        """Return the numbers of the first ids of all documents, in order, int64."""
        assert self.starts is not None
        return np.fromfile(self.starts, _STARTS)


@dataclass(frozen=True)
class Piece:
    """A part of a document, and the bytes of text that it covers (a cut may swallow a blank)."""

    text: str
    begins: bool
    ends: bool
    bytes: int


def prepare(data: Data, source_folder: Path, cache: Path, *, vocab_size: int) -> list[Tokens]:
    """Return the token file of each source; make it in the folder `cache` if it does not exist.

    One process must call this first; the others then find the files. Raises `UpcycleError` for data or a
    tokenizer that cannot be used.
    """
    words = tokenizer(data, source_folder)
    if len(words) > vocab_size:
        raise UpcycleError(
            f"the tokenizer has {len(words)} tokens and the embedding {vocab_size} rows, which do not "
            f"belong together; set data.tokenizer to that of the model"
        )
    made = []
    for source in data.sources:
        path = cache / f"{_key(source, data, words, vocab_size)}.bin"
        tokens = _found(path, source, vocab_size)
        if tokens is not None and data.isolate and tokens.starts is None:
            progress.say(
                f"{path} does not say where documents begin, which data.isolate needs; it is made anew"
            )
            tokens = None
        made.append(tokens or _make(source, data, words, path, vocab_size))
    return made


def tokenizer(data: Data, source_folder: Path) -> Any:
    """Return the tokenizer for the data. Raises `UpcycleError` if there is none."""
    return read_tokenizer(data.tokenizer or source_folder)


def read_tokenizer(where: str | Path) -> Any:
    """Return the tokenizer in a folder. Raises `UpcycleError` if there is none."""
    from transformers import AutoTokenizer

    try:
        with panics.caught():
            found = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            found("a")  # some damaged files only fail when they are first used
        # Without files, some classes make a tokenizer of special tokens alone.
        if found.get_vocab().keys() <= {*found.get_added_vocab(), *found.all_special_tokens}:
            raise ValueError("its vocabulary is empty")
        word, largest = max(found.get_vocab().items(), key=lambda item: item[1])
        if largest >= _MOST_IDS:  # the tokenizers library allocates a list of that length
            raise ValueError(f"{word!r} has the id {largest}; ids must be less than {_MOST_IDS:,}")
    except Exception as error:  # tokenizers raises plain Exception for an unreadable file
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(": ")
        raise UpcycleError(
            f"{where} has no tokenizer that can be read ({reason}); put its files there or set data.tokenizer"
        ) from None
    found.model_max_length = 1 << 60  # rows are packed, so that no document is too long
    return found


def _key(source: Source, data: Data, tokenizer: Any, vocab_size: int) -> str:
    """Hash what the ids depend on: the tokenizer, its use, and the files by name, size and time."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer.get_vocab())
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files(source)]
    where = source.path if not stats else str(Path(source.path).resolve())
    how = [where, source.field, source.separator, source.split, data.append_eos, _dtype(vocab_size)]
    digest = hashlib.sha256(backend.encode()).hexdigest()
    text = json.dumps([FORMAT, digest, tokenizer.eos_token_id, stats, how])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _found(path: Path, source: Source, vocab_size: int) -> Tokens | None:
    """Return an existing token file; None if it is missing or damaged."""
    try:
        known = json.loads(path.with_suffix(".json").read_text())
        count, number, size = (int(known[key]) for key in ("count", "documents", "bytes"))
        tokens = Tokens(
            path=path,
            name=source.path,
            count=count,
            dtype=_dtype(vocab_size),
            documents=number,
            bytes=size,
        )
        largest = int(known["largest_id"])
        if known["dtype"] != tokens.dtype:
            return None
        if path.stat().st_size != tokens.count * np.dtype(tokens.dtype).itemsize:
            return None
        if not _is_of(known.get("files", {}), source):
            return None
        digest = file_hash(path)
        starts = _starts_of(path, known)
        # Files of older versions have no hash; their largest id detects the worst damage.
        whole = digest == known["sha256"] if "sha256" in known else int(tokens.ids().max()) == largest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if not whole:
        progress.say(f"{path} is damaged; it is made anew")
        return None
    _refuse(largest, vocab_size, source)
    return replace(tokens, sha256=digest, starts=starts)


def _starts_of(path: Path, known: dict[str, Any]) -> Path | None:
    """Return the file of the first ids of documents, if it is there and as it was written."""
    starts = path.with_suffix(".starts")
    whole = starts.is_file() and file_hash(starts) == known.get("starts_sha256")
    return starts if whole else None


def _is_of(made_from: dict[str, Any], source: Source) -> bool:
    """Return whether a token file was made from the current text."""
    known = {name: (stamp, digest) for name, (stamp, digest) in made_from.items()}
    return all(
        is_as_it_was(path, *known[name]) for path in files(source) if (name := str(path.resolve())) in known
    )


def _make(source: Source, data: Data, tokenizer: Any, path: Path, vocab_size: int) -> Tokens:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs that share a cache may make the same file at the same time: each writes its own, and the last one
    # stays.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    dtype = _dtype(vocab_size)
    count = number = size = largest = 0
    read = [p.resolve() for p in files(source)]
    starts, begins = path.with_suffix(".starts"), []
    before, digest = stamps(read), hashlib.sha256()
    try:
        with whole_file.named(path), partial.open("wb") as file, _tokenising(source) as work:
            for batch in _batches(pieces(documents(source), tokenizer, source)):
                for piece, ids in zip(batch, _encode(batch, tokenizer, data.append_eos), strict=True):
                    if piece.begins:
                        begins.append(count)
                    largest = max(largest, int(ids.max(initial=0)))
                    _refuse(largest, vocab_size, source)
                    raw = ids.astype(dtype).tobytes()
                    file.write(raw)
                    digest.update(raw)
                    count += len(ids)
                number += sum(piece.ends for piece in batch)
                done = sum(piece.bytes for piece in batch)
                size += done
                work.advance(done)
            _sync(file)
        if not count:
            raise UpcycleError(
                f"{source.path} holds no text; give one that does, or take it out of data.sources"
            )
        text = {str(p): [before[str(p)], file_hash(p)] for p in read}
        if stamps(read) != before:
            raise UpcycleError(f"{source.path} changed while it was read; begin again")
        first_ids = np.array(begins, _STARTS).tobytes()
        whole_file.write(starts, first_ids)
        partial.rename(path)
        known: dict[str, Any] = {"count": count, "dtype": dtype, "documents": number, "bytes": size}
        known |= {"sha256": digest.hexdigest(), "files": text}
        known["starts_sha256"] = hashlib.sha256(first_ids).hexdigest()
        made_from = {"format": FORMAT, "source": asdict(source), "append_eos": data.append_eos}
        about = {**known, "largest_id": largest, "made_from": made_from}
        whole_file.write_json(path.with_suffix(".json"), about)
    finally:
        partial.unlink(missing_ok=True)
    return Tokens(
        path=path,
        name=source.path,
        count=count,
        dtype=dtype,
        documents=number,
        bytes=size,
        sha256=digest.hexdigest(),
        starts=starts,
    )


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _refuse(largest: int, vocab_size: int, source: Source) -> None:
    if largest >= vocab_size:
        raise UpcycleError(
            f"the tokenizer gives id {largest} in {source.path} and the embedding has {vocab_size} rows; "
            f"set data.tokenizer to that of the model"
        )


def _tokenising(source: Source) -> AbstractContextManager[Work]:
    found = files(source)
    # Other files are compressed, so their size is not that of their text.
    plain = bool(found) and all(p.suffix in (".txt", ".text", ".jsonl") for p in found)
    total = sum(p.stat().st_size for p in found) if plain else None
    return progress.work(f"tokenising {Path(source.path).name}", "bytes", total=total)


def pieces(stream: Iterable[tuple[str, bool]], tokenizer: Any, source: Source) -> Iterator[Piece]:
    """Cut the documents of `stream` into pieces of about 262,144 characters.

    `stream` has pairs of a text and whether it begins a document. Documents without text are left out.
    """
    rest, begins = "", True
    for text, begins_document in stream:
        if begins_document:
            if rest or not begins:
                yield Piece(rest, begins, True, _bytes(rest, source))
            rest, begins = "", True
        rest, start = rest + text, 0
        while len(rest) - start > _PIECE:
            stop, after = _cut(rest, start + _PIECE, tokenizer)
            yield Piece(rest[start:stop], begins, False, _bytes(rest[start:after], source))
            start, begins = after, False
        rest = rest[start:]
    if rest or not begins:
        yield Piece(rest, begins, True, _bytes(rest, source))


def _bytes(text: str, source: Source) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UpcycleError(
            f"{source.path} has a document that is no Unicode text ({error.reason}); take it out"
        ) from None


def _cut(text: str, end: int, tokenizer: Any) -> tuple[int, int]:
    """Return where the piece before about `end` stops and where the next one starts.

    The two pieces must give the ids of the whole, compared over `_NEAR` characters on either side. A
    tokenizer that adds a blank before a text needs the blank between the pieces dropped; another needs it
    kept.
    """
    first = max(1, end - _PIECE // 2)
    between_words = re.finditer(r"(?<=\S)\s(?=\S)", text[first - 1 : end + 1])
    blanks = [first - 1 + m.start() for m in between_words][:-33:-1]
    tried = [cut for p in blanks for cut in ((p, p + 1), (p, p), (p + 1, p + 1))]
    tried += [(p, p) for p in range(end, max(first, end - 32), -1)]
    for stop, start in tried:
        a, b = max(0, stop - _NEAR), start + _NEAR
        apart = [*_ids(text[a:stop], tokenizer), *_ids(text[start:b], tokenizer)]
        if apart == _ids(text[a:b], tokenizer):
            return stop, start
    place = blanks[0] if blanks else end
    return place, place


def _ids(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches of about `_BATCH` characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(pieces: list[Piece], tokenizer: Any, append_eos: bool) -> Iterator[np.ndarray]:
    """Yield the ids of each piece, int64 [N], with the special tokens before and after a document."""
    bare = tokenizer(
        [p.text for p in pieces], add_special_tokens=False, return_attention_mask=False
    ).input_ids
    before, after = _special(tokenizer)
    for piece, ids in zip(pieces, bare, strict=True):
        whole = [*(before if piece.begins else []), *ids, *(after if piece.ends else [])]
        if append_eos and piece.ends and tokenizer.eos_token_id not in (None, *whole[-1:]):
            whole.append(tokenizer.eos_token_id)
        yield np.array(whole, np.int64)


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text."""
    full, bare = tokenizer("a").input_ids, _ids("a", tokenizer)
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:start], full[start + len(bare) :]

"""Token files: each source is tokenised once, into a file that is memory-mapped and never parsed again.

`KEY.bin` holds the ids, little endian, and `KEY.starts` the number of the first id of each document.
`KEY.json`, written last, describes them. The key is a hash of everything that the ids depend on, with the
text by name, size and time. Existing files are checked: the ids by their hash, which costs a thousandth of
tokenising; the text by its stamp and, if that differs, by its hash (`stamps.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Annotated, Any, ClassVar

import numpy as np

from upcycle.checkpoints.checkpoint import file_hash
from upcycle.data.documents import PLAIN, Source, documents, files, kind
from upcycle.data.pieces import Piece, batches, encode, pieces
from upcycle.data.stamps import Stamp, is_as_it_was, stamp, stamps
from upcycle.errors import UpcycleError
from upcycle.settings import Settings, Within
from upcycle.system import panics, progress, whole_file
from upcycle.system.progress import Work

FORMAT = 2
_STARTS = np.dtype("<i8")
_BLANK = "▁"  # as SentencePiece writes it
_MOST_IDS = 1 << 24  # upper limit for a tokenizer's ids; no vocabulary comes near it


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """The `[data]` table."""

    section: ClassVar[str] = "data"

    sources: tuple[Source, ...]
    # share of each source held out: tokens from its end, or labelled examples (sft and classification) drawn
    # from all of it
    held_out: Annotated[float, Within("[0, 1)")] = 0.0
    # which labelled examples are held out: runs that are compared, or go on from one another, need the same;
    # None: 0, or what the run has had if it goes on
    split_seed: int | None = None
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
    starts_sha256: str | None = None  # hash of that file

    def ids(self) -> np.memmap:
        """Return all ids, memory-mapped, [count]."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def first_ids(self) -> np.ndarray:
        """Return the numbers of the first ids of all documents, in order, int64 [documents]."""
        assert self.starts is not None
        return np.fromfile(self.starts, _STARTS)


def prepare(
    data: Data,
    source_folder: Path,
    cache: Path,
    *,
    vocab_size: int,
    checked: Mapping[str, Stamp] = MappingProxyType({}),
) -> list[Tokens]:
    """Return the token file of each source; make it in the folder `cache` if it does not exist.

    One process must call this first; the others then find the files. What is found is read whole and compared
    with its hash, unless it has the stamp with which another process has `checked` it. Raises `UpcycleError`
    for data or a tokenizer that cannot be used.
    """
    words = tokenizer(data, source_folder)
    if len(words) > vocab_size:
        raise UpcycleError(
            f"the tokenizer has {len(words)} tokens and the embedding {vocab_size} rows, which do not "
            f"belong together; put that of the model into its folder, or in a run, set data.tokenizer to it"
        )
    made = []
    for source in data.sources:
        path = cache / f"{_key(source, data, words, vocab_size)}.bin"
        tokens = _found(path, source, vocab_size, checked)
        if tokens is not None and data.isolate and tokens.starts is None:
            progress.say(
                f"{path} does not say where documents begin, which data.isolate needs; it is made anew"
            )
            tokens = None
        made.append(tokens or _make(source, data, words, path, vocab_size))
    return made


def stamps_of(tokens: Iterable[Tokens]) -> dict[str, Stamp]:
    """Return the stamps of token files, by path."""
    return stamps(path for each in tokens for path in (each.path, each.starts) if path is not None)


def tokenizer(data: Data, source_folder: Path) -> Any:
    """Return the tokenizer for the data. Raises `UpcycleError` if there is none."""
    return read_tokenizer(data.tokenizer or source_folder)


def digest_of_tokenizer(where: str | Path) -> str:
    """Return the SHA-256 of what a tokenizer does, whichever files say it."""
    words = read_tokenizer(where)
    backend = words.backend_tokenizer.to_str() if words.is_fast else sorted(words.get_vocab().items())
    special = {name: str(token) for name, token in words.special_tokens_map.items()}
    text = json.dumps([backend, special, words.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_tokenizer(where: str | Path) -> Any:
    """Return the tokenizer in a folder. Raises `UpcycleError` if there is none."""
    from transformers import AutoTokenizer

    try:
        with panics.caught():
            found = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            found("a")  # some damaged files only fail when they are first used
        # Without files, some classes make a tokenizer of special tokens alone, or of these and a blank.
        words = found.get_vocab().keys() - {*found.get_added_vocab(), *found.all_special_tokens}
        if words <= {_BLANK}:
            raise ValueError("its vocabulary is empty")
        word, largest = max(found.get_vocab().items(), key=lambda item: item[1])
        if largest >= _MOST_IDS:  # the tokenizers library allocates a list of that length
            raise ValueError(f"{word!r} has the id {largest}; ids must be less than {_MOST_IDS:,}")
    except Exception as error:  # tokenizers raises plain Exception for an unreadable file
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(": ")
        raise UpcycleError(
            f"{where} has no tokenizer that can be read ({reason}); put its files there, or in a "
            f"run, set data.tokenizer"
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


def _found(path: Path, source: Source, vocab_size: int, checked: Mapping[str, Stamp]) -> Tokens | None:
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
        starts = _starts_of(path, known, checked)
        if "sha256" in known:
            digest, whole = known["sha256"], _is_whole(path, known["sha256"], checked)
        else:  # of an older version; the largest id detects the worst damage
            digest, whole = file_hash(path), int(tokens.ids().max()) == largest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if not whole:
        progress.say(f"{path} is damaged; it is made anew")
        return None
    _refuse(largest, vocab_size, source)
    return replace(
        tokens, sha256=digest, starts=starts, starts_sha256=known.get("starts_sha256") if starts else None
    )


def _starts_of(path: Path, known: dict[str, Any], checked: Mapping[str, Stamp]) -> Path | None:
    """Return the file of the first ids of documents, if it is there and as it was written."""
    starts = path.with_suffix(".starts")
    whole = starts.is_file() and _is_whole(starts, known.get("starts_sha256"), checked)
    return starts if whole else None


def _is_whole(path: Path, sha256: str | None, checked: Mapping[str, Stamp]) -> bool:
    """Return whether a file is as it was written; it is not read if another process has checked it."""
    return stamp(path) == checked.get(str(path)) or file_hash(path) == sha256


def _is_of(made_from: dict[str, Any], source: Source) -> bool:
    """Return whether a token file was made from the current text."""
    known = {name: (stamp, digest) for name, (stamp, digest) in made_from.items()}
    return all(
        is_as_it_was(path, *known[name]) for path in files(source) if (name := str(path.resolve())) in known
    )


@dataclass(kw_only=True)
class _Written:
    """The part of a token file that has been written."""

    dtype: str
    count: int = 0  # of ids
    documents: int = 0
    nbytes: int = 0  # of text
    largest: int = 0  # id
    begins: list[int] = field(default_factory=list)  # the number of the first id of each document
    digest: Any = field(default_factory=hashlib.sha256)  # of the ids

    def take(self, piece: Piece, ids: np.ndarray) -> bytes:
        """Count a piece, and return its ids as they are written."""
        if piece.begins:
            self.begins.append(self.count)
        raw = ids.astype(self.dtype).tobytes()
        self.digest.update(raw)
        self.count += len(ids)
        self.documents += piece.ends
        self.nbytes += piece.bytes
        return raw


def _make(source: Source, data: Data, tokenizer: Any, path: Path, vocab_size: int) -> Tokens:
    """Tokenise a source into the file `path`."""
    read = [p.resolve() for p in files(source)]
    before, starts = stamps(read), path.with_suffix(".starts")
    with whole_file.filling(path) as file:
        with _tokenising(source) as work:
            written = _write(source, data, tokenizer, file, vocab_size, work)
        if not written.count:
            raise UpcycleError(f"{source.path} holds no text; give one that does, or leave it out")
        text = {str(p): [before[str(p)], file_hash(p)] for p in read}
        if stamps(read) != before:
            raise UpcycleError(f"{source.path} changed while it was read; begin again")
        first_ids = np.array(written.begins, _STARTS).tobytes()
        whole_file.write(starts, first_ids)
    about = {
        "count": written.count,
        "dtype": written.dtype,
        "documents": written.documents,
        "bytes": written.nbytes,
        "sha256": written.digest.hexdigest(),
        "files": text,
        "starts_sha256": hashlib.sha256(first_ids).hexdigest(),
        "largest_id": written.largest,
        "made_from": {"format": FORMAT, "source": asdict(source), "append_eos": data.append_eos},
    }
    whole_file.write_json(path.with_suffix(".json"), about)
    return Tokens(
        path=path,
        name=source.path,
        count=written.count,
        dtype=written.dtype,
        documents=written.documents,
        bytes=written.nbytes,
        sha256=written.digest.hexdigest(),
        starts=starts,
        starts_sha256=about["starts_sha256"],
    )


def _write(
    source: Source, data: Data, tokenizer: Any, file: IO[bytes], vocab_size: int, work: Work
) -> _Written:
    """Write the ids of a source."""
    written = _Written(dtype=_dtype(vocab_size))
    for batch in batches(pieces(documents(source), tokenizer, source)):
        before = written.nbytes
        for piece, ids in zip(batch, encode(batch, tokenizer, data.append_eos), strict=True):
            written.largest = max(written.largest, int(ids.max(initial=0)))
            _refuse(written.largest, vocab_size, source)
            file.write(written.take(piece, ids))
        work.advance(written.nbytes - before)
    return written


def _refuse(largest: int, vocab_size: int, source: Source) -> None:
    if largest >= vocab_size:
        raise UpcycleError(
            f"the tokenizer gives id {largest} in {source.path} and the embedding has {vocab_size} rows; "
            f"put the tokenizer of the model into its folder, or in a run, set data.tokenizer to it"
        )


def _tokenising(source: Source) -> AbstractContextManager[Work]:
    found = files(source)
    # Other files are compressed, so their size is not that of their text.
    plain = bool(found) and all(kind(p) in (*PLAIN, ".jsonl") for p in found)
    total = sum(p.stat().st_size for p in found) if plain else None
    return progress.work(f"tokenising {Path(source.path).name}", "bytes", total=total)

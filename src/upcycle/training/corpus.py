"""Token files: each source tokenised once into a file that is mapped into memory and never parsed again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.training.documents import Source, documents, files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1 << 20  # characters tokenised at once
FORMAT = 1

Progress = Callable[[int], None]  # called with the number of bytes of text done since the last call


@dataclass(frozen=True, kw_only=True)
class Data:
    """The `[data]` table."""

    sources: tuple[Source, ...]
    held_out: float = 0.0  # share of each source, its last part
    tokenizer: str | None = None  # None: that of the run's source
    append_eos: bool = True  # end a document with EOS, if there is one and the tokenizer did not add it
    cache: str | None = None  # folder of token files; None: RUN/tokens

    def __post_init__(self) -> None:
        if not self.sources:
            raise UpcycleError("data.sources is empty; name at least one [[data.sources]] with a path")
        if not 0 <= self.held_out < 1:
            raise UpcycleError(f"data.held_out = {self.held_out}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A token file: `count` ids of `dtype`, little endian, of `documents` documents and `bytes` of text."""

    path: Path
    count: int
    dtype: str
    documents: int
    bytes: int
    name: str  # of the source, for messages

    def ids(self) -> np.ndarray:
        """All ids, mapped into memory, [count]."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))


def prepare(
    data: Data, source_folder: Path, cache: Path, *, vocab_size: int, progress: Progress = lambda n: None
) -> list[Tokens]:
    """The token file of each source, made where the cache does not have it yet.

    One process calls it first; the others find the files afterwards. Raises `UpcycleError` for data or a
    tokenizer that cannot be used.
    """
    tokenizer = _tokenizer(data, source_folder)
    if len(tokenizer) > vocab_size:
        raise UpcycleError(
            f"the tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows; they do not belong "
            f"together: set data.tokenizer to that of the model"
        )
    return [_cached(source, data, tokenizer, cache, vocab_size, progress) for source in data.sources]


def size_of(data: Data) -> int | None:
    """Bytes of all sources on disk; None where they are not in files."""
    found = [files(source) for source in data.sources]
    return sum(p.stat().st_size for group in found for p in group) if all(found) else None


def _tokenizer(data: Data, source_folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    where = data.tokenizer or source_folder
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UpcycleError(f"{where} has no tokenizer ({reason}); set data.tokenizer") from None
    tokenizer.model_max_length = 1 << 60  # rows are packed: no document is too long
    return tokenizer


def _cached(
    source: Source, data: Data, tokenizer: Any, cache: Path, vocab_size: int, progress: Progress
) -> Tokens:
    key = _key(source, data, tokenizer, vocab_size)
    path, about = cache / f"{key}.bin", cache / f"{key}.json"
    if about.is_file():
        known = json.loads(about.read_text())
        found = Tokens(path=path, name=source.path, **{k: known[k] for k in ("count", "dtype", "documents", "bytes")})
        if path.is_file() and path.stat().st_size == found.count * np.dtype(found.dtype).itemsize:
            return found
    cache.mkdir(parents=True, exist_ok=True)
    made = _write(source, data, tokenizer, path, vocab_size, progress)
    known = {k: v for k, v in asdict(made).items() if k not in ("path", "name")}
    partial = about.with_suffix(".partial")
    partial.write_text(json.dumps(known | {"source": asdict(source)}, indent=1))
    partial.rename(about)
    return made


def _key(source: Source, data: Data, tokenizer: Any, vocab_size: int) -> str:
    """What the ids depend on: the tokenizer, how it is used, and the files by name, size and time."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer.get_vocab())
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files(source)]
    how = [source.path, source.field, source.separator, source.split, data.append_eos, vocab_size > 1 << 16]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = json.dumps([FORMAT, hashlib.sha256(backend.encode()).hexdigest(), stats, how, special])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(
    source: Source, data: Data, tokenizer: Any, path: Path, vocab_size: int, progress: Progress
) -> Tokens:
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    partial = path.with_suffix(".partial")
    count = number = size = 0
    with partial.open("wb") as file:
        for pieces in _batches(documents(source)):
            for ids in _encode(pieces, tokenizer, data.append_eos):
                largest = int(ids.max(initial=0))
                if largest >= vocab_size:
                    raise UpcycleError(
                        f"the tokenizer gives id {largest} in {source.path}, and the embedding has {vocab_size} "
                        f"rows; set data.tokenizer to that of the model"
                    )
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
            number += sum(begins for text, begins, _ in pieces if text)
            done = sum(len(text.encode()) for text, _, _ in pieces)
            size += done
            progress(done)
        file.flush()
        os.fsync(file.fileno())
    if not number:
        partial.unlink()
        raise UpcycleError(f"{source.path} holds no text")
    partial.rename(path)
    return Tokens(path=path, count=count, dtype=dtype, documents=number, bytes=size, name=source.path)


Piece = tuple[str, bool, bool]  # text, whether it begins a document, whether it ends one


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[Piece]]:
    """About `_BATCH` characters at a time. A piece ends a document where the next one begins another."""
    held: tuple[str, bool] | None = None
    batch: list[Piece] = []
    for text, begins in pieces:
        if held is not None:
            batch.append((*held, begins))
            if sum(len(t) for t, _, _ in batch) >= _BATCH:
                yield batch
                batch = []
        held = (text, begins)
    if held is not None:
        batch.append((*held, True))
    if batch:
        yield batch


def _encode(pieces: list[Piece], tokenizer: Any, append_eos: bool) -> Iterator[np.ndarray]:
    """The ids of each piece: what the tokenizer puts before a document goes before its first piece only."""
    texts = [text for text, _, _ in pieces if text]
    if not texts:
        return
    bare = tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
    before, after = _special(tokenizer, append_eos)
    kept = [(begins, ends) for text, begins, ends in pieces if text]
    for ids, (begins, ends) in zip(bare, kept, strict=True):
        yield np.array([*(before if begins else []), *ids, *(after if ends else [])], np.int64)


def _special(tokenizer: Any, append_eos: bool) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, with EOS at the end where it is wanted."""
    full, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:start], full[start + len(bare) :]
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and eos not in after:
        after = [*after, eos]
    return before, after

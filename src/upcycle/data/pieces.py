"""Documents cut into pieces that a tokenizer can take, and the ids of the pieces.

A long document is cut where the ids stay the same as for the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.data.documents import Source
from upcycle.errors import UpcycleError

_PIECE = 1 << 18  # maximum number of characters of a document tokenised as one string
_BATCH = 1 << 20  # number of characters given to the tokenizer at once
_NEAR = 256  # number of characters compared on either side of a cut


@dataclass(frozen=True)
class Piece:
    """A part of a document, and the bytes of text that it covers (a cut may swallow a blank)."""

    text: str
    begins: bool
    ends: bool
    bytes: int


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


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
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


def encode(pieces: list[Piece], tokenizer: Any, append_eos: bool) -> Iterator[np.ndarray]:
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

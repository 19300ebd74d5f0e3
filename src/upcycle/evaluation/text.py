"""Scores of a decoder on a text: loss, perplexity, bits per byte, accuracy; every token is scored once.

Each document is tokenised without special tokens. It begins with BOS (EOS if there is no BOS), which is not
scored. Windows of at most L tokens move over it in steps of S. The first window scores up to L tokens and
each later one the next S, with as much context before them as fits. S = L is the rolling likelihood of
lm-evaluation-harness.

The bytes of a token are those from its first character to that of the next token, so that they sum to the
bytes of the documents in UTF-8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.data.documents import PLAIN, Source, documents, kind
from upcycle.data.pieces import Piece, pieces
from upcycle.errors import UpcycleError
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.language_model import Advance, LanguageModel, Pair
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.system import progress
from upcycle.system.progress import Work

PASSAGE = 4096  # characters; the size of the units of a text that is one document
_REST = 1024  # characters; a shorter rest has no unit, because some tokenizer may begin no token in it
LENGTH = 512  # tokens of a window, unless the model takes fewer
_AT_ONCE = 512  # windows that are read ahead; those of equal length form batches


@dataclass(frozen=True, eq=False)
class Document:
    """The tokens of a document: ids, bytes of text of each, and passage it begins in; int64 [N] each."""

    ids: np.ndarray
    bytes: np.ndarray
    passages: np.ndarray


@dataclass(frozen=True)
class Window:
    """A window over a document: tokens `begin` to `end` are read, and those from `first` on are scored.

    Index -1 is the token that begins the document.
    """

    begin: int
    first: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A window with its document and the document's number."""

    number: int
    document: Document
    window: Window

    @property
    def scored(self) -> slice:
        """The slice of the tokens that are scored."""
        return slice(self.window.first, self.window.end)


Totals = dict[tuple[int, int], np.ndarray]  # keyed by document and passage


def windows(count: int, length: int, stride: int) -> list[Window]:
    """Return the windows over `count` tokens; each reads at most `length` tokens and scores `stride`."""
    ends = [min(length, count), *range(length + stride, count + stride, stride)] if count else []
    out, first = [], 0
    for end in ends:
        end = min(end, count)
        if end > first:
            out.append(Window(begin=max(-1, end - length - 1), first=first, end=end))
        first = end
    return out


def score(
    language: LanguageModel,
    path: Path,
    *,
    length: int | None,
    stride: int | None,
    limit: int,
    separator: str | None,
    field: str = Source.field,
) -> Result:
    """Score a decoder on the text at `path`; `limit` is the largest number of windows (0: all).

    The default `length` is `LENGTH` tokens, or fewer if the model reads fewer at once. The default `stride`
    is `length`. The units are documents, or passages of `PASSAGE` characters if there is a single document.
    """
    length, stride = _checked(language, length, stride)
    source = Source(path=str(path), separator=separator, field=field)
    if limit and not language.tokenizer.is_fast:
        raise UpcycleError(
            "--limit cuts a text between tokens, and this tokenizer does not say which bytes a token "
            "stands for (it is not a fast one); leave it out and shorten the text"
        )
    totals: Totals = defaultdict(lambda: np.zeros(4))
    done = 0
    with _scoring(path, limit) as work:
        for parts in _parts(source, language, length, stride, limit):
            _add(totals, parts, language, work.advance)
            done += len(parts)
    if not totals:
        raise UpcycleError(f"{path} holds no text")
    settings = {"length": length, "stride": stride, "limit": limit, "separator": separator}
    return _result(path, totals, settings | field_of(field), done, language)


def field_of(field: str) -> dict[str, str]:
    """Return the field of a text as a record has it, which says it if it is not the usual one."""
    return {} if field == Source.field else {"field": field}


def _checked(language: LanguageModel, length: int | None, stride: int | None) -> tuple[int, int]:
    """Return the length and the stride of the windows, after checking them."""
    most = language.length
    length = length or min(LENGTH, most or LENGTH)
    if most is not None and length > most:
        raise UpcycleError(f"--length {length} and the model takes {most} tokens; shorten the windows")
    stride = stride or length
    if stride > length:
        raise UpcycleError(
            f"--stride {stride} is longer than a window of --length {length}, so tokens would be left "
            f"out; it must be {length} or less"
        )
    return length, stride


def _scoring(path: Path, limit: int) -> AbstractContextManager[Work]:
    # The size of a file is that of its text only if it is plain text.
    plain = kind(path) in PLAIN and path.is_file() and not limit
    return progress.work(f"scoring {path.name}", "bytes", total=path.stat().st_size if plain else None)


def _add(totals: Totals, parts: list[Part], language: LanguageModel, advance: Advance) -> None:
    """Score windows and add nats, bytes, right answers and tokens up by document and passage."""
    share = sum(int(part.document.bytes[part.scored].sum()) for part in parts) / len(parts)
    pairs = [_pair(part, language.begin) for part in parts]
    found = language.likelihoods(pairs, lambda windows: advance(round(windows * share)))
    for part, likelihood in zip(parts, found, strict=True):
        ones = np.ones(len(likelihood.nats))
        made = np.stack([likelihood.nats, part.document.bytes[part.scored], likelihood.likeliest, ones])
        passages = part.document.passages[part.scored]
        for passage in np.unique(passages):
            totals[part.number, int(passage)] += made[:, passages == passage].sum(1)


def _pair(part: Part, begin: int) -> Pair:
    ids, window = part.document.ids, part.window
    before = ids[max(0, window.begin) : window.first].tolist()
    context = [begin, *before] if window.begin < 0 else before
    return Pair(context, ids[part.scored].tolist())


def _parts(
    source: Source, language: LanguageModel, length: int, stride: int, limit: int
) -> Iterator[list[Part]]:
    """Yield the windows of all documents, `_AT_ONCE` at a time and at most `limit` in all."""
    every = (
        Part(number=number, document=document, window=window)
        for number, document in enumerate(_documents(source, language))
        for window in windows(len(document.ids), length, stride)
    )
    wanted = islice(every, limit or None)
    while parts := list(islice(wanted, _AT_ONCE)):
        yield parts


def _documents(source: Source, language: LanguageModel) -> Iterator[Document]:
    """Yield the documents that have at least one token."""
    begun: list[Piece] = []
    for piece in pieces(documents(source), language.tokenizer, source):
        begun.append(piece)
        if piece.ends:
            made = _document(begun, language)
            begun = []
            if len(made.ids):
                yield made


def _document(parts: list[Piece], language: LanguageModel) -> Document:
    ids, sizes, passages, place = [], [], [], 0
    for piece in parts:
        made, size, starts = _tokens(piece, language)
        ids.append(made)
        sizes.append(size)
        passages.append((place + starts) // PASSAGE)
        place += len(piece.text) + (piece.bytes > len(piece.text.encode()))  # a blank may be lost at a cut
    last = max(0, (place - _REST) // PASSAGE)
    return Document(np.concatenate(ids), np.concatenate(sizes), np.minimum(np.concatenate(passages), last))


def _tokens(piece: Piece, language: LanguageModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of a piece, the bytes of each, and the character where each begins, int64 [N] each."""
    tokenizer = language.tokenizer
    if tokenizer.is_fast:
        made = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([begin for begin, _ in made.offset_mapping], np.int64)
    else:
        made = tokenizer(piece.text, add_special_tokens=False)
        starts = np.arange(len(made.input_ids)) * len(piece.text) // max(1, len(made.input_ids))
    ids = np.array(made.input_ids, np.int64)
    if not len(ids):
        return ids, ids, ids
    if ids.max() >= language.subject.vocab_size:
        raise UpcycleError(
            f"the tokenizer gives id {ids.max()} and the embedding has {language.subject.vocab_size} "
            "rows, which do not belong together; put the model's own tokenizer into "
            f"{language.subject.folder}"
        )
    starts = np.maximum.accumulate(starts)
    points = np.frombuffer(piece.text.encode("utf-32-le"), "<u4")
    wide = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(wide)])
    edges = np.concatenate([[0], before[starts[1:]], [piece.bytes]])
    return ids, np.diff(edges), starts


def _result(
    path: Path,
    totals: Totals,
    settings: dict[str, Any],
    done: int,
    language: LanguageModel,
) -> Result:
    numbers = sorted(totals)
    several = numbers[0][0] != numbers[-1][0]
    units = "documents" if several else "passages"
    grouped = groupby(numbers, key=lambda key: key[0] if several else key)
    sums = np.array([sum((totals[key] for key in keys), np.zeros(4)) for _, keys in grouped])
    nats, size, right, tokens = sums.T
    loss = Sums(top=nats, bottom=tokens, units=units)
    bits = Sums(top=nats / np.log(2), bottom=size, units=units)
    perplexity = float(np.exp(np.minimum(700.0, loss.value)))
    error = loss.standard_error
    spread = None if error is None else perplexity * error  # the delta method
    accuracy = Sums(top=right, bottom=tokens, units=units)
    return Result(
        kind="text",
        name=path.name,
        data={**data_of(path), **settings},
        metrics={
            "loss": Metric.of(loss, higher_is_better=False, per_token=True),
            "perplexity": Metric(
                value=perplexity, standard_error=spread, higher_is_better=False, per_token=True
            ),
            "bits_per_byte": Metric.of(bits, higher_is_better=False),
            "accuracy": Metric.of(accuracy, higher_is_better=True, per_token=True),
        },
        units=(units, *sorted({key[0] if several else key for key in numbers}), int(size.sum())),
        more={
            "task": "causal_lm",
            "targets": int(tokens.sum()),
            "bytes": int(size.sum()),
            "examples": done,
            units: len(nats),
        },
    )

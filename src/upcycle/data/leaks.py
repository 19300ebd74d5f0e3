"""Held-out rows that are trained on all the same, because two sources of data have files in common.

Each source holds rows of its own out: the last ones, or, of labelled examples, some that `data.split_seed`
draws. If two sources have the same files in the same order, they hold out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

from upcycle.data.corpus import Data
from upcycle.data.documents import PLAIN, Source, hub_name, is_dataset, kind, saved_splits
from upcycle.data.folders import behind_links
from upcycle.data.image_files import ENDINGS


def shared(one: Source, other: Source) -> Path | None:
    """Return the first file that two sources have in common, behind all links; None if there is none.

    A data set on the hub counts as one file for each split.
    """
    known = {*_files(other)}
    return next((file for file in _files(one) if file in known), None)


def within(data: Data) -> str | None:
    """Return a sentence about a held-out row of a source that another source trains on; None if none is."""
    if not data.held_out or len(data.sources) == 1:
        return None
    read = [(source, _files(source)) for source in data.sources]
    for (one, here), (other, there) in combinations(read, 2):
        file = _both_read(one, here, other, there)
        if file is None or _same(one, here, other, there):
            continue
        return (
            f"the data.sources {one.path} and {other.path} both read {file.name}, and each holds out other "
            f"rows of it, so data.held_out = {data.held_out:g} has rows that are trained on; name each file "
            f"in one source, or set data.held_out = 0"
        )
    return None


def later(tables: Sequence[Data]) -> str | None:
    """Return a sentence about a row that one table holds out and an earlier one trains on; None if none is.

    `tables` are those of the stages of a run, in order.
    """
    read = cache(_files)  # a folder is walked once, however many stages and sources there are
    return next(filter(None, (_between(*pair, read) for pair in combinations(tables, 2))), None)


def _between(before: Data, after: Data, read: Callable[[Source], tuple[Path, ...]]) -> str | None:
    if not after.held_out or (before.sources == after.sources and _holds_out_as_much(before, after)):
        return None
    for one in before.sources:
        here = read(one)
        for other in after.sources:
            there = read(other)
            if _both_read(one, here, other, there) is None:
                continue
            if _same(one, here, other, there) and _holds_out_as_much(before, after):
                continue
            alike = _tokens(before) == _tokens(after)
            why = f"holds out {before.held_out:g}" if alike else "makes other tokens"
            return (
                f"a stage is scored on {after.held_out:g} of {other.path}, which it holds out, and an "
                f"earlier stage trains on some of that, because it {why} of {one.path}; give both the same "
                f"sources, held_out, split_seed, tokenizer and append_eos, or other files"
            )
    return None


def _holds_out_as_much(before: Data, after: Data) -> bool:
    """Return whether `before` holds out what `after` does of the same source, and perhaps more.

    What is held out is counted in tokens, so both must make the same ones of a text.
    """
    alike = _tokens(before) == _tokens(after) and (before.split_seed or 0) == (after.split_seed or 0)
    return alike and before.held_out >= after.held_out


def _tokens(data: Data) -> tuple[str | None, bool]:
    """Return what decides which tokens a text becomes."""
    return data.tokenizer, data.append_eos


def _files(source: Source) -> tuple[Path, ...]:
    """Return the files that a source may read, behind all links, in order; itself if it is not a folder."""
    if hub_name(source) is not None:
        return (Path(source.path, source.split),)
    path = Path(source.path)
    path = path / source.split if saved_splits(path) else path
    if not path.is_dir():
        return (path.resolve(),)
    whole = is_dataset(source)
    return tuple(
        place
        for file, place in behind_links(path)
        if whole or kind(file) is not None or file.suffix.lower() in ENDINGS
    )


def _both_read(one: Source, here: Sequence[Path], other: Source, there: Sequence[Path]) -> Path | None:
    """Return the first file of which two sources read the same texts; None if there is none."""
    known = {*there}
    return next((file for file in here if file in known and not _other_texts(one, other, file)), None)


def _same(one: Source, here: Sequence[Path], other: Source, there: Sequence[Path]) -> bool:
    """Return whether two sources have the same rows in the same order."""
    return here == there and (one.field, one.separator) == (other.field, other.separator)


def _other_texts(one: Source, other: Source, file: Path) -> bool:
    """Return whether two sources read other columns of a file that both have."""
    return one.field != other.field and kind(file) not in PLAIN

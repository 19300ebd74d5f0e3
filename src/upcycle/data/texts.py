"""Labelled texts as training data, from JSON lines or parquet, tokenised once with one row per text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from upcycle.data.class_labels import common, names_in
from upcycle.data.documents import (
    WITH_ROWS,
    Source,
    files_at,
    json_lines,
    kind,
    opened_parquet,
    parquet_rows,
    say_left_out,
)
from upcycle.data.examples import refuse_other_classes
from upcycle.errors import UpcycleError, listed, shown

MOST_CLASSES = 1 << 31  # class numbers must be below it


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSet:
    """Texts, or pairs of texts, as ids [N, L] with a mask [N, L] and labels [N]."""

    name: str
    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray  # 1 for the tokens of a second text
    labels: np.ndarray
    class_names: tuple[str, ...]
    num_labels: int
    digest: str | None = None  # hash of the ids
    kind: ClassVar[str] = "texts"

    @classmethod
    def open(
        cls, path: str | Path, tokenizer: Any, *, length: int, fields: tuple[str, ...], label_field: str
    ) -> TextSet:
        """Open JSON lines or parquet, a file or a folder; texts are cut and padded to `length` tokens.

        `fields` names one text or two. Labels are integers, or names, which are numbered in alphabetical
        order. Integers have names if a parquet file stores some (a ClassLabel). Raises `UpcycleError` for
        data that cannot be used.
        """
        files = files_at(Path(path), WITH_ROWS)
        say_left_out(Source(path=str(path)), WITH_ROWS)
        texts, labels, places = [], [], []
        for where, row in chain.from_iterable(map(_rows, files)):
            for field in (*fields, label_field):
                if field not in row:
                    raise UpcycleError(f"{where} has no {field!r}; it has {listed(sorted(row))}")
            given = [row[field] for field in fields]
            if not all(isinstance(text, str) for text in given):
                raise UpcycleError(f"{where}: {', '.join(fields)} must be text")
            if not all(map(_is_unicode, given)):
                raise UpcycleError(f"{where} holds half of a character (a lone surrogate); take it out")
            if row[label_field] is None:
                raise UpcycleError(
                    f"{where} has no label: {label_field!r} is null; give it one, or take the row out"
                )
            texts.append(given)
            labels.append(row[label_field])
            places.append(where)
        if not texts:
            raise UpcycleError(f"{path} holds no examples")
        numbers, names = _numbered(
            labels, places, common((file, _names(file, label_field)) for file in files)
        )
        columns = [list(column) for column in zip(*texts, strict=True)]
        made = tokenizer(
            *columns, truncation=True, max_length=length, padding="max_length", return_token_type_ids=True
        )
        ids = np.array(made["input_ids"], np.int64)
        return cls(
            name=str(path),
            digest=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
            ids=ids,
            mask=np.array(made["attention_mask"], np.int64),
            types=np.array(made["token_type_ids"], np.int64),
            labels=numbers,
            class_names=names,
            num_labels=len(names) or int(numbers.max()) + 1,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the texts numbered `indices`: ids, mask and types [B, L], labels [B]."""
        parts = {"ids": self.ids, "mask": self.mask, "types": self.types, "labels": self.labels}
        return {name: part[indices] for name, part in parts.items()}

    def refuse(self, held_out: TextSet) -> None:
        """Raise `UpcycleError` if `held_out` does not fit this training set."""
        refuse_other_classes(self, held_out)


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which tokenizers do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each example of a file and its location, for messages."""
    if kind(path) == ".parquet":
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(parquet_rows(path)))
        return
    yield from json_lines(path)


def _names(path: Path, label_field: str) -> tuple[str, ...]:
    """Return the names that a parquet file stores for the numbers of its classes; empty if there are none."""
    if kind(path) != ".parquet":
        return ()
    with opened_parquet(path) as file:
        return names_in(file.schema_arrow, label_field)


def _numbered(
    labels: list[Any], places: list[str], of_numbers: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels as numbers, and the class names if there are any.

    `places` says where each label is, for messages. `of_numbers` has the names of numbered classes, if the
    data stores some.
    """
    if all(type(label) is bool for label in labels):
        return np.array(labels, np.int64), ("false", "true")
    most = len(of_numbers) or MOST_CLASSES
    named = [isinstance(label, str) for label in labels]
    numbered = [type(label) is int and 0 <= label < most for label in labels]
    if all(numbered):
        return np.array(labels, np.int64), of_numbers
    if all(named):
        names = sorted(set(labels))
        return np.array([names.index(label) for label in labels], np.int64), tuple(names)
    odd = (named if 2 * sum(named) > len(named) else numbered).index(False)
    why = f" (it names {most} classes)" if of_numbers else ""
    raise UpcycleError(
        f"{places[odd]}: label {shown(labels[odd])}; labels must all be whole numbers of 0 to "
        f"{most - 1:,}{why}, or all names"
    )

"""Rows of chats as training data: whole chats side by side, with labels at what the assistant says.

Letters: N rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from upcycle.data.corruption import IGNORED
from upcycle.errors import UpcycleError


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTokens:
    """The tokens of a chat, int32 [T], and whether each is the assistant's, bool [T]."""

    ids: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """The next token at each place before one of the assistant's, int32 [T]; `IGNORED` elsewhere."""
        found = np.full(len(self), IGNORED, np.int32)
        found[:-1] = np.where(self.answers[1:], self.ids[1:], IGNORED)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatRows:
    """Rows of chats. A row begins with its chats and ends with padding, which has no labels."""

    name: str
    ids: np.ndarray  # int32 [N, L]
    labels: np.ndarray  # int32 [N, L]
    used: np.ndarray  # tokens of each row before the padding, int32 [N]
    chats: int
    positions: np.ndarray | None = None  # in each chat and in the padding, int32 [N, L]; None: in the row
    cut: int = 0  # chats that were too long and lost their end
    left_out: int = 0  # chats that were too long and are in no row
    class_names: ClassVar[tuple[str, ...]] = ()
    num_labels: ClassVar[int] = 0
    kind: ClassVar[str] = "rows of chats"

    @classmethod
    def of(
        cls,
        chats: Sequence[ChatTokens],
        *,
        name: str,
        length: int,
        cut: bool,
        pack: bool,
        padding: int,
        isolate: bool = False,
        setting: str = "train.sequence_length",
    ) -> ChatRows:
        """Lay chats out in rows of `length` tokens, in their order, each in the first row that has room.

        A longer chat is cut at the end if `cut` is set and an answer is before it, and left out otherwise.
        Without `pack`, each chat has a row to itself. With `isolate`, positions start anew at each chat.
        Raises `UpcycleError` if no chat is left; `setting` is what the user calls `length`.
        """
        laid = [(chat.ids[:length], chat.labels[:length]) for chat in chats if cut or len(chat) <= length]
        laid = [(ids, labels) for ids, labels in laid if (labels != IGNORED).any()]
        if not chats:
            raise UpcycleError(f"{name} holds no chats; give a file that does")
        if not laid:
            raise UpcycleError(
                f"{name} holds no chat that fits into {setting} = {length} tokens (the shortest of "
                f"{len(chats)} has {min(map(len, chats))}); lengthen the rows, or in a run, set "
                f"task.too_long = cut"
            )
        sizes = [len(ids) for ids, _ in laid]
        rows = first_fit(sizes, length) if pack else list(range(len(sizes)))
        used = np.zeros(max(rows) + 1, np.int32)
        all_ids = np.full((len(used), length), padding, np.int32)
        all_labels = np.full((len(used), length), IGNORED, np.int32)
        begins = np.zeros_like(all_ids)  # the place where each chat begins, and the padding
        for (ids, labels), row in zip(laid, rows, strict=True):
            place = slice(used[row], used[row] + len(ids))
            all_ids[row, place], all_labels[row, place] = ids, labels
            used[row] += len(ids)
            begins[row, used[row] :] = used[row]
        longer = sum(len(chat) > length for chat in chats)
        left_out = len(chats) - len(laid)
        return cls(
            name=name, ids=all_ids, labels=all_labels, used=used, chats=len(laid),
            positions=np.arange(length, dtype=np.int32) - begins if isolate else None,
            cut=longer - left_out if cut else 0, left_out=left_out,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.used)

    @property
    def digest(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows numbered `indices`: ids, labels and mask of tokens, int64 [B, L]
        each, and positions if they start anew at each chat."""
        mask = np.arange(self.ids.shape[1]) < self.used[indices, None]
        parts = {"ids": self.ids[indices], "labels": self.labels[indices], "mask": mask}
        if self.positions is not None:
            parts["positions"] = self.positions[indices]
        return {name: part.astype(np.int64) for name, part in parts.items()}

    def refuse(self, held_out: Any) -> None:
        """Any chats fit to any others."""

    def notes(self) -> Iterator[str]:
        """Yield what a person should know about the rows, one sentence each."""
        length, tokens = self.ids.shape[1], int(self.used.sum())
        learnt = int((self.labels != IGNORED).sum())
        yield (
            f"{self.name}: {self.chats} chats of {tokens} tokens, of which {learnt} are the assistant's, in "
            f"{len(self)} rows; {1 - tokens / self.ids.size:.1%} of these is padding"
        )
        longer = f"{self.name}: chats of more than {length} tokens"
        if self.cut:
            yield f"{longer}, which are cut (task.too_long): {self.cut}"
        if self.left_out:
            why = " with no answer before that" if self.cut else ""
            yield f"{longer}{why}, which are left out (task.too_long): {self.left_out}"


def first_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """Return for each size the first of many bins of `capacity` that has room for it and those before it.

    A tree over the bins knows the most room below each of its nodes.
    """
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room, chosen = [capacity] * (2 * leaves), []
    for size in sizes:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        chosen.append(node - leaves)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return chosen

"""How the names of a family's tensors are spelled in a checkpoint that does not use them as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle.families import Family


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a checkpoint spells the names of a family's tensors.

    Those that begin with `root` begin with `body` there, and the `others` (the head) with `head`.
    """

    root: str = ""
    body: str = ""
    head: str = ""
    others: frozenset[str] = frozenset()
    former: Mapping[str, str] = field(default_factory=dict)  # ends of names that are called otherwise today

    def stored(self, name: str) -> str:
        """Return how the checkpoint spells a name of the family."""
        if name in self.others or not name.startswith(self.root):
            return self.head + name
        return self.body + name.removeprefix(self.root)

    def own(self, stored: str) -> str | None:
        """Return the name of the family that the checkpoint spells so, or None for a name of another part."""
        for old, new in self.former.items():
            if stored.endswith(old):
                return self.own(stored.removesuffix(old) + new)
        if stored.startswith(self.head) and stored.removeprefix(self.head) in self.others:
            return stored.removeprefix(self.head)
        return self.root + stored.removeprefix(self.body) if stored.startswith(self.body) else None


def spelled(family: Family, expected: Iterable[str], stored: Collection[str]) -> list[Names]:
    """Return every way in which all tensors of a base model are among the `stored` names.

    `expected` has the names of the family. An empty list means that some are missing.
    """
    root, heads = family.root, {family.tied[0]} if family.tied else set()
    body = [name.removeprefix(root) for name in expected if name.startswith(root) and name not in heads]
    anchor = next((name for name in body if ".0." in name), "")
    if not anchor:
        return [Names(former=family.former)]
    before = {name.removesuffix(anchor) for name in stored if f".{name}".endswith(f".{anchor}")}
    whole = [start for start in sorted(before) if all(start + name in stored for name in body)]
    others = frozenset(heads)
    return [
        Names(root=root, body=at, head=_head(at, others, stored), others=others, former=family.former)
        for at in whole
    ]


def _head(body: str, heads: Collection[str], stored: Collection[str]) -> str:
    """Return what stands before the names of a head: a part of `body`, the longest that fits."""
    parts = body.split(".")[:-1]
    starts = [".".join([*parts[:n], ""]) if n else "" for n in range(len(parts), -1, -1)]
    found = (start for start in starts if any(start + name in stored for name in heads))
    return next(found, "")

"""The towers that stay around a text model with experts: what of them is stored, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle import families
from upcycle.dense import places
from upcycle.errors import UpcycleError
from upcycle.families import Family, Shapes
from upcycle.families._names import Names, spelled
from upcycle.families._training import Trained
from upcycle.families._wrappers import VISION, config_key

_COUNTS = ("num_hidden_layers", "depth", "encoder_layers")  # keys of the number of blocks, in any class
_BLOCK = re.compile(r"(.*?\.)(\d{1,6})\.(.+)")
_SEES = re.compile(r"vis|image", re.IGNORECASE)  # in the names of towers
_HEARS = re.compile(r"audio", re.IGNORECASE)
_SOUND = "audio_config"
_BEHIND = re.compile(r"merger|project|connector|resampler", re.IGNORECASE)  # of what stands behind one


@dataclass(frozen=True, kw_only=True)
class Known:
    """A tower of a family, as its config says that it is."""

    family: Family
    expected: Shapes

    @classmethod
    def of(cls, raw: Mapping[str, Any], tensors: int) -> Known | None:
        """Return the tower of a multimodal model's config.json; None if no family knows it.

        It stays as it is, so that it need not be one that could have experts. There are `tensors` around the
        text model, and blocks are not enumerated if it has more of them.
        """
        wrapper = places.wrapper_of(raw)
        if wrapper is None or not wrapper.vision:
            return None
        own = places.own_config(raw, VISION)
        if own.get("model_type") not in families.names():
            return None
        family = families.find(str(own["model_type"]))
        counts = (own.get(key) for key in family.counts)
        if not family.sees or any(isinstance(count, int) and count > tensors for count in counts):
            return None
        tower = places.Tower(model_type=str(raw["model_type"]), wrapper=wrapper, text=None)
        try:
            config = family.config(tower.config(raw))
            shapes = family.shapes(config)
        except UpcycleError:
            return None
        lackable = family.may_lack(config)
        return cls(family=family, expected={n: shape for n, shape in shapes.items() if n not in lackable})

    def spelled(self, around: Iterable[str]) -> list[Names]:
        """Return every way in which the tensors of its first block are among the names `around`."""
        first = {name: shape for name, shape in self.expected.items() if ".0." in name}
        return spelled(self.family, first, [*around])


def missing(raw: Mapping[str, Any], around: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the tensors of the towers of images and sound that are missing, by their names on disk.

    `around` has the names of the tensors that are no part of the text model. The first list has what an image
    passes through; the second, what may never be read: blocks behind the one whose output the model takes,
    and what comes after the blocks. A tower that is there under names of another kind lacks nothing.
    """
    around = [*around]
    there = {*around}
    of_sound = [name for name in _due_of_blocks(raw, _SOUND, around) if name not in there]
    key = config_key(VISION)
    if not isinstance(raw.get(key), Mapping):
        return of_sound, []
    count = _count(raw, key)
    due = _due_of_blocks(raw, key, around)
    known = Known.of(raw, len(around))
    if known is not None:
        due = _due(known, around) or due
    lacks = [name for name in dict.fromkeys(due) if name not in there]
    after = known.family.after if known is not None and isinstance(known.family, Trained) else ()
    unread = [name for name in lacks if _may_be_unread(name, raw, count, after)]
    return [name for name in lacks if name not in unread] + of_sound, unread


def first_unread(raw: Mapping[str, Any], count: int) -> int:
    """Return the first of `count` blocks of a tower whose output nothing reads; `count` if all are read."""
    taken = raw.get("vision_feature_layer")
    found = [place for place in (taken if isinstance(taken, list) else [taken]) if type(place) is int]
    # There is one state more than there are blocks: what goes into the first.
    return max((place if place >= 0 else place + count + 1 for place in found), default=count)


def _count(raw: Mapping[str, Any], key: str) -> int | None:
    """Return the number of blocks of a tower; None if its config does not say it in a usual way."""
    own = raw.get(key)
    if not isinstance(own, Mapping):
        return None
    if own.get("drop_vision_last_layer") or raw.get("drop_vision_last_layer"):  # MiniCPM
        return None
    found = (own.get(key) for key in _COUNTS)
    return next((count for count in found if type(count) is int), None)


def _due(known: Known, around: list[str]) -> list[str]:
    return [names.stored(name) for names in known.spelled(around) for name in known.expected]


def _due_of_blocks(raw: Mapping[str, Any], key: str, around: list[str]) -> list[str]:
    """Return the names of the tensors in all blocks of a tower, whatever its class.

    All blocks have tensors of the same names.
    """
    count = _count(raw, key)
    if count is None:
        return []
    if count > len(around):  # each block has tensors of its own
        return [_all_blocks(count, key)]
    lists: dict[str, dict[int, set[str]]] = {}
    for name in around:
        if found := _BLOCK.fullmatch(name):
            lists.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
    named = _HEARS if key == _SOUND else _SEES
    seeing = {
        start: blocks for start, blocks in lists.items() if named.search(start) and not _BEHIND.search(start)
    }
    if not seeing:
        whole = any(len(blocks) >= count for blocks in lists.values())
        return [] if whole else [_all_blocks(count, key)]
    ends = {start: sorted(set().union(*blocks.values())) for start, blocks in seeing.items()}
    # Other lists in a tower (of a merger) are shorter, or have less in each entry.
    of_tower = max((len(blocks), len(ends[start])) for start, blocks in seeing.items())
    return [
        f"{start}{i}.{end}"
        for start, blocks in seeing.items()
        if (len(blocks), len(ends[start])) == of_tower
        for i in range(count)
        for end in ends[start]
    ]


def _all_blocks(count: int, key: str) -> str:
    return f"the {count} blocks of its {'encoder of sound' if key == _SOUND else 'vision tower'}"


def _may_be_unread(name: str, raw: Mapping[str, Any], count: int | None, after: tuple[str, ...]) -> bool:
    if found := _BLOCK.fullmatch(name):
        return count is not None and int(found[2]) >= first_unread(raw, count)
    return any(f".{end}" in f".{name}" for end in after)

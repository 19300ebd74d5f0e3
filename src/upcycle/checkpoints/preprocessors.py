"""What a checkpoint's preprocessor makes of pixels, as far as its files say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import UpcycleError, shown

FILE = "preprocessor_config.json"
WHOLE, PART = "processor_config.json", "image_processor"  # a file of all processors, and its part on images
# What decides which number a pixel becomes: a switch, and the keys that count unless it is off.
_STEPS = {"do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std")}
_DECIDING = {key for switch, keys in _STEPS.items() for key in (switch, *keys)}
_NEAR = 1e-3  # numbers that are rounded in one file differ by less than this share


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """What the files of a folder say of images, and which file says it."""

    said: Mapping[str, Any]
    file: str
    part: str = ""  # the key of the file that holds what is said; empty if that is all of the file

    @classmethod
    def of(cls, folder: Path) -> Preprocessor | None:
        """Return what a folder says of images, or None if it says nothing.

        The part of processor_config.json goes before preprocessor_config.json, as in transformers.
        """
        whole = folder / WHOLE
        part = read_json(whole, "").get(PART) if whole.is_file() else None
        if part is not None:
            if not isinstance(part, dict):
                raise UpcycleError(
                    f"{whole}: {PART} = {shown(part)}; it must be a table of settings, or be left out"
                )
            return cls(said=part, file=WHOLE, part=PART)
        path = folder / FILE
        return cls(said=read_json(path, ""), file=FILE) if path.is_file() else None

    def __str__(self) -> str:
        return f"{self.part} in {self.file}" if self.part else self.file


def difference(first: Path, second: Path) -> str | None:
    """Return the first contradiction between the pixels that two folders make, or None if none is found.

    What one of two folders leaves out contradicts nothing. A folder that says nothing of images contradicts
    one that says what a pixel becomes, if that is the second.
    """
    mine, theirs = (Preprocessor.of(folder) for folder in (first, second))
    if theirs is None or not _DECIDING & theirs.said.keys():
        return None
    if mine is None:
        return (
            f"do not both have {theirs} (copy {theirs.file} of {second} to {first} if it is right for both)"
        )
    for switch, keys in _STEPS.items():
        both_off = mine.said.get(switch) is False and theirs.said.get(switch) is False
        for key in (switch, *(() if both_off else keys)):
            one, other = mine.said.get(key), theirs.said.get(key)
            if None not in (one, other) and not _alike(one, other):
                files = str(theirs) if str(mine) == str(theirs) else f"{theirs} and {mine}"
                return f"differ in {key} of {files}: {shown(other)} and {shown(one)}"
    return None


def _alike(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_NEAR)
    return one == other

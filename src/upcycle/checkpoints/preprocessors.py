"""What a checkpoint's preprocessor makes of pixels, as far as its file says, to compare two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import shown

FILE = "preprocessor_config.json"
# What decides which number a pixel becomes: a switch, and the keys that count unless it is off.
_STEPS = {"do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std")}
_NEAR = 1e-3  # numbers that are rounded in one file differ by less than this share


def difference(first: Path, second: Path) -> str | None:
    """Return the first contradiction between the pixels that two folders make, or None if none is found.

    What one of two files leaves out contradicts nothing. A folder without the file contradicts one that says
    what a pixel becomes, if that is the second.
    """
    mine, theirs = (_said(folder) for folder in (first, second))
    if not theirs:
        return None
    if mine is None:
        return f"do not both have {FILE} (copy that of {second} to {first} if it is right for both)"
    for switch, keys in _STEPS.items():
        both_off = mine.get(switch) is False and theirs.get(switch) is False
        for key in (switch, *(() if both_off else keys)):
            one, other = mine.get(key), theirs.get(key)
            if None not in (one, other) and not _alike(one, other):
                return f"differ in {key} of {FILE}: {shown(other)} and {shown(one)}"
    return None


def _alike(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_NEAR)
    return one == other


def _said(folder: Path) -> Mapping[str, object] | None:
    """Return the keys of the file that decide what a pixel becomes; None if there is no file."""
    path = folder / FILE
    if not path.is_file():
        return None
    known = {key for switch, keys in _STEPS.items() for key in (switch, *keys)}
    return {key: value for key, value in read_json(path, "").items() if key in known}

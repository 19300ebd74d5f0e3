"""What a checkpoint's preprocessor makes of pixels, as far as its file says, to compare two checkpoints."""

from __future__ import annotations

from pathlib import Path

from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import shown

FILE = "preprocessor_config.json"
# The keys that decide what number a pixel becomes.
_KEYS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def difference(first: Path, second: Path) -> str | None:
    """Return the first contradiction between the pixels that two folders make, or None if none is found.

    A folder without the file contradicts one that says what a pixel becomes, if that is the second.
    """
    mine, theirs = (_said(folder) for folder in (first, second))
    if mine is None:
        return f"do not both have {FILE}" if theirs else None
    for key in _KEYS:
        one, other = mine.get(key), (theirs or {}).get(key)
        if None not in (one, other) and one != other:
            return f"differ in {key} of {FILE}: {shown(other)} and {shown(one)}"
    return None


def _said(folder: Path) -> dict[str, object] | None:
    """Return the keys of the file that decide what a pixel becomes; None if there is no file."""
    path = folder / FILE
    if not path.is_file():
        return None
    return {key: value for key, value in read_json(path, "").items() if key in _KEYS}

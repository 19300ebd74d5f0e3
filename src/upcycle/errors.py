"""The one exception that a user's mistake raises; its text is the whole message."""

import difflib
import unicodedata
from collections.abc import Collection, Iterable
from numbers import Integral

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogates, line and paragraph separators


class UpcycleError(Exception):
    """A user's mistake. The text says what was given, what is allowed and what to do.

    The command line prints the text and exits with 2.
    """

    elsewhere = False  # whether another process of the run says it


def refuse_fraction(name: str, given: object) -> None:
    """Raise `UpcycleError` if what was given for an option is neither a whole number nor None."""
    if given is not None and (not isinstance(given, Integral) or isinstance(given, bool)):
        raise UpcycleError(f"{name} {shown(given)}; it must be a whole number")


def listed(names: list[str], most: int = 3) -> str:
    """Return `a, b, c and 5 more`: enough names to find the fault, but never a screenful."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shown(value: object, most: int = 60) -> str:
    """Return the repr of a value for an error message, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with more digits than Python writes, or deep nesting
        return f"a {type(value).__name__} that is too long to show"
    return cut(text, most)


def cut(text: str, most: int = 80) -> str:
    """Return a text for an error message, shortened to `most` characters if it is longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """Return a foreign text in a form that is safe for a terminal.

    Characters that move the cursor or cannot be seen are written as Python escapes.
    """
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _UNSEEN else c for c in text)


def nearest(given: object, known: Iterable[str]) -> str:
    """Return `; did you mean ...? Known: ...`, the end of an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{hint} Known: {', '.join(known) or 'none'}"


def nearest_of_many(given: object, known: Collection[str], see: str) -> str:
    """Return the end of an error about an unknown name among too many names to list.

    It names at most three that are close, and the command `see` that prints all.
    """
    close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{hint} `{see}` prints the {len(known)} known ones"

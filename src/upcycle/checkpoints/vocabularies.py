"""The tokens of a checkpoint, as far as its files list them, to compare two checkpoints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import file_hash

_MARKS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_LINES = "vocab.txt"  # BERT's: a token a line
_OPAQUE = ("tokenizer.model", "spiece.model", "tekken.json")


def difference(first: Path, second: Path) -> str | None:
    """Return the first contradiction between the tokens of two folders, or None if none is found.

    A token that only one of them has contradicts nothing, unless the other has another token in its place.
    """
    mine, theirs = (_listed(folder) for folder in (first, second))
    if mine and theirs:
        named = {number: token for token, number in theirs.items()}
        for token, number in sorted(mine.items(), key=lambda item: item[1]):
            if theirs.get(token, number) != number:
                return f"have other tokens: {token!r} is number {theirs[token]} and {number}"
            if named.get(number, token) != token:
                return f"have other tokens: number {number} is {named[number]!r} and {token!r}"
        return None
    for name in _OPAQUE:
        one, other = first / name, second / name
        if one.is_file() and other.is_file() and file_hash(one) != file_hash(other):
            return f"have other tokens: {name} is not the same file"
    return None


def _listed(folder: Path) -> dict[str, int]:
    """Return the numbers of the tokens in the first file that lists them; empty if none can be read."""
    for name in ("tokenizer.json", "vocab.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if tokens := _vocabulary(found):
            return tokens
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = (folder / _LINES).read_text(encoding="utf-8").splitlines()
        return {token: number for number, token in enumerate(lines)}
    return {}


def _vocabulary(found: Any) -> dict[str, int]:
    """Return the vocabulary in a parsed file, with the tokens that were added to it."""
    if not isinstance(found, dict):
        return {}
    model = found.get("model", {"vocab": found})
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # unigram: pairs of token and score, in order
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    added = found.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            tokens[token.get("content")] = token.get("id")
    return {t: n for t, n in tokens.items() if isinstance(t, str) and isinstance(n, int)}


def more(first: Path, second: Path) -> list[str]:
    """Return the tokens that `second` has and `first` does not, in order; none if either has no list."""
    mine, theirs = (_listed(folder) for folder in (first, second))
    if not mine or not theirs:
        return []
    return [token for token, _ in sorted(theirs.items(), key=lambda item: item[1]) if token not in mine]


def other_marks(first: Path, second: Path) -> list[str]:
    """Return the special tokens that two folders name differently, each with both names."""
    mine, theirs = (_marks(folder) for folder in (first, second))
    return [
        f"{kind} ({theirs.get(kind)!r} and {mine.get(kind)!r})"
        for kind in sorted({*mine, *theirs})
        if mine and theirs and mine.get(kind) != theirs.get(kind)
    ]


def template(folder: Path) -> str | None:
    """Return the chat template of a folder; None if it has none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _object(folder / name).get("chat_template")
        if found is not None:
            return json.dumps(found) if not isinstance(found, str) else found
    return None


def _marks(folder: Path) -> dict[str, str]:
    """Return the special tokens that a folder names, by kind: bos_token, eos_token, ..."""
    found = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    named = {kind: found[kind] for kind in _MARKS if found.get(kind) is not None}
    return {kind: str(v.get("content") if isinstance(v, dict) else v) for kind, v in named.items()}


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

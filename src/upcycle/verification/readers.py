"""Tokenizers and processors, opened by Auto classes from both folders and shown the same things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.carried import has_tokenizer
from upcycle.conversion import tokenizer
from upcycle.system import panics
from upcycle.verification.proof import Check, reason


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The object that an Auto class opens beside the weights, or the reason why it cannot."""

    name: str
    thing: Any = None
    why: str = ""

    @classmethod
    def opened(cls, auto: Any, folder: Path) -> Reader:
        """Return what `auto` opens in a folder; whatever it raises is kept as text."""
        try:
            with panics.caught():
                return cls(name=auto.__name__, thing=auto.from_pretrained(folder, trust_remote_code=False))
        except Exception as error:  # a library that is missing, remote code, a damaged file
            return cls(name=auto.__name__, why=reason(error))


def checks(source: Path, out: Path) -> list[Check]:
    """Return a check for the tokenizer and one for the processors, of those that the source has."""
    found = []
    if has_tokenizer(source):
        found.append(tokenizers(source, out))
    if (source / "preprocessor_config.json").is_file() or (source / "processor_config.json").is_file():
        found.append(processors(source, out))
    return found


def tokenizers(source: Path, out: Path) -> Check:
    """Check that both folders give the same ids of the same texts, special tokens among them."""
    from transformers import AutoTokenizer

    return _pair("tokens", AutoTokenizer, source, out, tokenizer.same_tokens)


def processors(source: Path, out: Path) -> Check:
    """Check that both folders give the same processor of images or sound, with the same settings."""
    import transformers

    if (source / "processor_config.json").is_file():
        auto: Any = transformers.AutoProcessor
    elif '"feature_extractor_type"' in (source / "preprocessor_config.json").read_text("utf-8", "replace"):
        auto = transformers.AutoFeatureExtractor
    else:
        auto = transformers.AutoImageProcessor
    return _pair("processor", auto, source, out, _same_processor)


def _pair(name: str, auto: Any, source: Path, out: Path, same: Callable[[Any, Any], str]) -> Check:
    """Open both and compare them; `same` returns what is the same, or raises `_Other`."""
    from upcycle.hf.quiet import quiet

    with quiet():
        theirs = Reader.opened(auto, source)
        if theirs.why:
            said = f"not checked: {auto.__name__} does not open that of the source ({theirs.why})"
            return Check(name=name, holds=None, detail=said)
        ours = Reader.opened(auto, out)
        if ours.why:
            said = f"{auto.__name__} opens that of the source and not that of the result ({ours.why})"
            return Check(name=name, holds=False, detail=said)
        try:
            with panics.caught():
                return Check(name=name, holds=True, detail=same(theirs.thing, ours.thing))
        except (_OtherError, tokenizer.OtherTokensError) as other:
            return Check(name=name, holds=False, detail=str(other))
        except Exception as error:  # a tokenizer can raise anything
            return Check(name=name, holds=False, detail=f"cannot be compared: {reason(error)}")


class _OtherError(Exception):
    """Two processors differ; the text says how."""


def _same_processor(theirs: Any, ours: Any) -> str:
    if type(theirs) is not type(ours):
        raise _OtherError(f"{type(theirs).__name__} of the source became {type(ours).__name__}")
    a, b = theirs.to_dict(), ours.to_dict()
    different = sorted(k for k in {*a, *b} if a.get(k) != b.get(k) and k not in ("name_or_path", "tokenizer"))
    if different:
        raise _OtherError(f"{type(theirs).__name__} has another {', '.join(different)}")
    return f"{type(theirs).__name__}, {len(a)} settings as the source has them"

"""Tokenizers and processors, opened by Auto classes from both folders and shown the same things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.verification.proof import Check, reason

TEXTS = (
    "The cat sat on the mat.\n\nIt was\na  good   mat.\n",
    "  def f(x):\n\treturn x + 1\r\n\n\n",
    "Une éléphante à Zürich, naïve façade; Ünïcödé: ﬁ ½ ²",
    "数字 12345 и русский, עברית, 🙂👩‍👩‍👧 end",
    " ",
    "\n",
    "UPPER lower CamelCase 3.14159 http://a.b/c?d=e#f",
)
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_TOKENS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What an Auto class opens beside the weights, or why it cannot."""

    name: str
    thing: Any = None
    why: str = ""

    @classmethod
    def opened(cls, auto: Any, folder: Path) -> Reader:
        """Return what `auto` opens in a folder; whatever it raises is kept as text."""
        try:
            return cls(name=auto.__name__, thing=auto.from_pretrained(folder, trust_remote_code=False))
        except Exception as error:  # a library that is missing, remote code, a damaged file
            return cls(name=auto.__name__, why=reason(error))


def checks(source: Path, out: Path) -> list[Check]:
    """Return a check for the tokenizer and one for the processors, of those that the source has."""
    found = []
    if any(True for pattern in _FILES for _ in source.glob(pattern)):
        found.append(tokenizers(source, out))
    if (source / "preprocessor_config.json").is_file() or (source / "processor_config.json").is_file():
        found.append(processors(source, out))
    return found


def tokenizers(source: Path, out: Path) -> Check:
    """Check that both folders give the same ids of the same texts, special tokens among them."""
    from transformers import AutoTokenizer

    return _pair("tokens", AutoTokenizer, source, out, _same_tokens)


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
            return Check(name=name, holds=True, detail=same(theirs.thing, ours.thing))
        except _OtherError as other:
            return Check(name=name, holds=False, detail=str(other))
        except Exception as error:  # a tokenizer can raise anything
            return Check(name=name, holds=False, detail=f"cannot be compared: {reason(error)}")


class _OtherError(Exception):
    """The two differ; the text says how."""


def _same_tokens(theirs: Any, ours: Any) -> str:
    classes = f"{type(theirs).__name__} of the source and {type(ours).__name__} of the result"
    for name in _TOKENS:
        key = f"{name}_token_id"
        if (a := getattr(theirs, key, None)) != (b := getattr(ours, key, None)):
            raise _OtherError(f"{classes} have another {key}: {a} and {b}")
    texts = (*TEXTS, *_with_special(theirs))
    count = 0
    for text in texts:
        for special in (True, False):
            a, b = (list(t(text, add_special_tokens=special).input_ids) for t in (theirs, ours))
            if a != b:
                raise _OtherError(f"{classes} give other tokens of {text!r}: {a[:12]} and {b[:12]}")
            count += len(a)
        if theirs.decode(a) != ours.decode(b):
            raise _OtherError(f"{classes} make other texts of the tokens of {text!r}")
    if getattr(theirs, "chat_template", None) != getattr(ours, "chat_template", None):
        raise _OtherError(f"{classes} have another chat template")
    for key in ("padding_side", "model_max_length"):
        if getattr(theirs, key, None) != getattr(ours, key, None):
            raise _OtherError(f"{classes} have another {key}")
    return f"{count} tokens of {len(texts)} texts are the same; {classes}"


def _with_special(tokenizer: Any) -> Iterator[str]:
    """Return texts with the tokenizer's special tokens between and beside words."""
    special = [str(token) for token in tokenizer.all_special_tokens][:16]
    yield f"a {' b '.join(special)} c"
    yield "x".join(special)
    yield "".join(f"{token}\n word" for token in special)


def _same_processor(theirs: Any, ours: Any) -> str:
    if type(theirs) is not type(ours):
        raise _OtherError(f"{type(theirs).__name__} of the source became {type(ours).__name__}")
    a, b = theirs.to_dict(), ours.to_dict()
    different = sorted(k for k in {*a, *b} if a.get(k) != b.get(k) and k not in ("name_or_path", "tokenizer"))
    if different:
        raise _OtherError(f"{type(theirs).__name__} has another {', '.join(different)}")
    return f"{type(theirs).__name__}, {len(a)} settings as the source has them"

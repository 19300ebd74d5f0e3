"""The tokenizer of the result, made anew if the new model type would open the source's files as another one.

transformers chooses the class of a tokenizer by `model_type` as well as by tokenizer_config.json. Files of
Llama that are opened as Mixtral's lose newlines and leading blanks, for example. Then tokenizer.json is
written from the tokenizer that the source opens as.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upcycle.checkpoints.carried import TEMPLATES, carriable, has_tokenizer
from upcycle.checkpoints.checkpoint import CONFIG
from upcycle.system import panics, progress, scratch, whole_file

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEXTS = (
    "The cat sat on the mat.\n\nIt was\na  good   mat.\n",
    "  def f(x):\n\treturn x + 1\r\n\n\n",
    "Une éléphante à Zürich, naïve façade; Ünïcödé: ﬁ ½ ²",
    "数字 12345 и русский, עברית, 🙂👩‍👩‍👧 end",
    " ",
    "\n",
    "UPPER lower CamelCase 3.14159 http://a.b/c?d=e#f",
)
_SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_PLAIN_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is; a name that all versions know


class OtherTokensError(Exception):
    """Two tokenizers differ; the text says how."""


@contextmanager
def imported_beside(source: Path) -> Iterator[None]:
    """Import what `fit` will need in a thread, beside the body of the `with` statement.

    transformers takes seconds of a processor to import, and writing tensors leaves one idle. Whoever leaves
    the body by an exception does not wait for it.
    """
    thread = threading.Thread(target=_import, args=(source,), name="import transformers", daemon=True)
    if has_tokenizer(source) and "transformers" not in sys.modules:
        thread.start()
    yield
    if thread.ident is not None:
        thread.join()


def _import(source: Path) -> None:
    with suppress(Exception):  # `fit` imports again, and says what is wrong
        from transformers import AutoTokenizer

        opened(AutoTokenizer, source)  # which imports as much again


def fit(source: Path, folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Make the tokenizer in `folder` give the tokens of the one in `source`.

    `folder` has the files of `source`, and `config` is what its config.json will be. Returns the names of the
    files that were made anew, with the reason. Nothing is written if both give the same tokens already, or if
    transformers does not open the source's.
    """
    if not has_tokenizer(source):
        return {}
    try:
        from transformers import AutoTokenizer
    except ImportError:
        progress.warn(
            f"transformers is not installed, so it was not checked whether {config['model_type']} opens "
            f"the tokenizer as the source does; upcycle verify checks it"
        )
        return {}
    theirs = opened(AutoTokenizer, source)
    if theirs is None:
        return {}
    with scratch.folder() as trial:
        for name in carriable(folder):
            if "/" not in name or name.startswith(f"{TEMPLATES}/"):
                _copy(folder / name, trial / name)
        whole_file.write_json(trial / CONFIG, config)
        for change in (_nothing, _write_settings, _write_tokenizer, _name_plain_class, _save_whole):
            try:
                with panics.caught():
                    change(theirs, trial)
            except Exception:  # a damaged file of settings, or a tokenizer that cannot be saved
                continue
            if _agree(theirs, opened(AutoTokenizer, trial)):
                return _taken_over(trial, folder, type(theirs).__name__, str(config["model_type"]))
    progress.warn(
        f"{config['model_type']} opens the tokenizer of {source} as another one, and no file that was tried "
        f"mends it; take the tokenizer from the source"
    )
    return {}


def _nothing(theirs: Any, trial: Path) -> None:
    """Leave the files as they are."""


def _write_settings(theirs: Any, trial: Path) -> None:
    """Write the settings that otherwise are a class's own."""
    _settings(trial, {"padding_side": theirs.padding_side})


def _write_tokenizer(theirs: Any, trial: Path) -> None:
    """Write tokenizer.json from the tokenizer that the source opens as."""
    if (backend := getattr(theirs, "backend_tokenizer", None)) is not None:
        backend.save(str(trial / FILE))


def _name_plain_class(theirs: Any, trial: Path) -> None:
    """Name the class that reads tokenizer.json as it is."""
    _settings(trial, {"tokenizer_class": _PLAIN_CLASS})


def _settings(trial: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of tokenizer_config.json."""
    settings = json.loads((trial / SETTINGS).read_text()) if (trial / SETTINGS).is_file() else {}
    whole_file.write_json(trial / SETTINGS, {**settings, **changes})


def _save_whole(theirs: Any, trial: Path) -> None:
    """Write all files as transformers saves them, under the plain class."""
    theirs.save_pretrained(trial)
    _settings(trial, {"tokenizer_class": _PLAIN_CLASS, "padding_side": theirs.padding_side})


def opened(auto: Any, folder: Path) -> Any:
    """Return the tokenizer of a folder, or None if it cannot be opened."""
    import logging

    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with panics.caught():
            return auto.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # a damaged or foreign file raises whatever its reader raises; verify says so
        return None
    finally:
        log.setLevel(level)


def _agree(theirs: Any, ours: Any) -> bool:
    try:
        with panics.caught():
            return ours is not None and bool(same_tokens(theirs, ours))
    except Exception:  # they differ, or one of them cannot read a text
        return False


def _taken_over(trial: Path, folder: Path, name: str, model_type: str) -> dict[str, str]:
    """Copy the files that the trial changed; return them with the reason."""
    made = {}
    for path in sorted(path for path in trial.rglob("*") if path.is_file()):
        relative = path.relative_to(trial).as_posix()
        before = folder / relative
        if relative == CONFIG or (before.is_file() and before.read_bytes() == path.read_bytes()):
            continue
        _copy(path, before)
        made[relative] = f"{model_type} would not open the source's files as a {name}, which the source does"
    return made


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, to)


def same_tokens(theirs: Any, ours: Any) -> str:
    """Return how many tokens of how many texts are the same. Raises `OtherTokensError` for a difference."""
    classes = f"{type(theirs).__name__} of the source and {type(ours).__name__} of the result"
    for key in (f"{name}_token_id" for name in _SPECIAL):
        if (a := getattr(theirs, key, None)) != (b := getattr(ours, key, None)):
            raise OtherTokensError(f"{classes} have another {key}: {a} and {b}")
    texts = (*TEXTS, *_with_special(theirs))
    count = 0
    for text in texts:
        for special in (True, False):
            mine, yours = (list(t(text, add_special_tokens=special).input_ids) for t in (theirs, ours))
            if mine != yours:
                raise OtherTokensError(
                    f"{classes} give other tokens of {text!r}: {mine[:12]} and {yours[:12]}"
                )
            count += len(mine)
        if theirs.decode(mine) != ours.decode(yours):
            raise OtherTokensError(f"{classes} make other texts of the tokens of {text!r}")
    for key, what in (
        ("chat_template", "chat template"),
        ("padding_side", "side of padding"),
        ("model_max_length", "longest text"),
    ):
        if getattr(theirs, key, None) != getattr(ours, key, None):
            raise OtherTokensError(f"{classes} have another {what}")
    return f"{count} tokens of {len(texts)} texts are the same; {classes}"


def _with_special(tokenizer: Any) -> Iterator[str]:
    """Return texts with the tokenizer's special tokens between and beside words."""
    special = [str(token) for token in tokenizer.all_special_tokens][:16]
    yield f"a {' b '.join(special)} c"
    yield "x".join(special)
    yield "".join(f"{token}\n word" for token in special)

"""The files beside the weights that go with a model: tokenizer, processor, templates, pooling, licence.

They are copied byte for byte. Code among them is copied, too, and never run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from upcycle.errors import UpcycleError

CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "tekken.json", "bpe.codes", "normalizer.json", "tokenization_*.py", "chat_template*",
    "generation_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "bpe.codes")
_OF_TOKENIZER = (
    *TOKENIZER, "special_tokens_map.json", "added_tokens.json", "normalizer.json", "tokenization_*.py",
    "chat_template*",
)  # fmt: skip
MODULES = "modules.json"  # of sentence-transformers: the modules behind the model, and their folders
TEMPLATES = "additional_chat_templates"
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*")  # a folder directly below the model's, and nothing else
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has files of a tokenizer."""
    return any(True for pattern in TOKENIZER for _ in folder.glob(pattern))


def folders(folder: Path) -> list[str]:
    """Return the names of the folders that go with a model: those of `modules.json`, and of templates."""
    named = [TEMPLATES] if (folder / TEMPLATES).is_dir() else []
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return named
    for module in modules if isinstance(modules, list) else ():
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and _PLAIN.fullmatch(path):
            named.append(path)
    return sorted(set(named))


def of_tokenizer(names: Iterable[str]) -> list[str]:
    """Return those of the files, named as `carriable` does, that are of a tokenizer and its templates."""
    return [
        name
        for name in names
        if name.startswith(f"{TEMPLATES}/") or any(fnmatchcase(name, pattern) for pattern in _OF_TOKENIZER)
    ]


def carriable(folder: Path) -> list[str]:
    """Return the files to copy with a model, by their names below `folder`, with / between folders."""
    found = {path.name for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    for name in folders(folder):
        inside = (path for path in (folder / name).rglob("*") if path.suffix not in _PICKLES)
        found |= {path.relative_to(folder).as_posix() for path in inside if path.is_file()}
    return sorted(found)


def carried(folder: Path) -> list[str]:
    """Return those of the files that may be copied.

    A link is followed only inside the folder, or from a snapshot of the hub's cache to its own blobs. Any
    other link is refused, and so is a module whose weights are only there as a pickle.
    """
    names = carriable(folder)
    for name in folders(folder):
        pickled = folder / name / "pytorch_model.bin"
        if pickled.is_file() and not pickled.with_name("model.safetensors").is_file():
            raise UpcycleError(
                f"{pickled} is a pickle, which may run code when it is read; open the model once with "
                f"sentence-transformers and save it, which writes safetensors"
            )
    if outside := [name for name in names if not _stays(folder, folder / name)]:
        link = next(p for p in (folder / outside[0], *(folder / outside[0]).parents) if p.is_symlink())
        raise UpcycleError(
            f"{link} is a link to {os.readlink(link)}, outside the folder, and "
            f"would be copied; put the file itself there, or take the link away"
        )
    return names


def _stays(folder: Path, file: Path) -> bool:
    """Return whether `file`, links followed, lies in `folder` or where the hub's cache keeps its files."""
    home, target = folder.resolve(), file.resolve()
    if home in target.parents:
        return True
    blobs = home.parent.parent / "blobs"
    return home.parent.name == "snapshots" and blobs == target.parent

"""The corpus of the demo, which is Python's own sources, and a tokenizer for it."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError
from upcycle.system import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = 4_000_000
HELD_OUT = 0.1  # the share of the corpus that is held out, at its end
VOCABULARY = 1024
_SKIPPED = ("test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files that the demo writes: training text, held-out text, and prose."""

    sources: Path
    seen: Path  # the training text
    held_out: Path
    documentation: Path

    @classmethod
    def write(cls, folder: Path) -> Corpus:
        """Write the sources of the standard library, up to `BYTES`, and the texts of Python's reference."""
        made = cls(
            sources=folder / "sources.txt",
            seen=folder / "seen.txt",
            held_out=folder / "held-out.txt",
            documentation=folder / "documentation.txt",
        )
        sources = _sources()
        folder.mkdir(parents=True)
        whole_file.write_text(made.sources, sources)
        whole_file.write_text(made.seen, sources[: round((1 - HELD_OUT) * len(sources))])
        inside = sources[-len(sources) // 25 :]  # part of the held-out text, away from its beginning
        whole_file.write_text(made.held_out, inside)
        whole_file.write_text(made.documentation, _documentation())
        return made


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def _sources() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, total = [], 0
    for path in sorted(root.rglob("*.py")):
        if any(part in _SKIPPED for part in path.relative_to(root).parts):
            continue
        text = path.read_text(errors="ignore")
        texts.append(text)
        total += len(text)
        if total >= BYTES:
            break
    if total < 100_000:
        raise UpcycleError(f"the sources of Python's standard library are not at {root}")
    return "\n".join(texts)[:BYTES]


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())

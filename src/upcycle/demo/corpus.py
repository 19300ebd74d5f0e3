"""The corpus of the demo, which is Python's own sources."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.system import whole_file

BYTES = 4_000_000
HELD_OUT = 0.1  # the share of the corpus that is held out, at its end
_SKIPPED = ("test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files that the demo writes: all sources, held-out ones, and prose."""

    sources: Path
    held_out: Path
    documentation: Path

    @classmethod
    def write(cls, folder: Path) -> Corpus:
        """Write the sources of the standard library, up to `BYTES`, and the texts of Python's reference."""
        made = cls(
            sources=folder / "sources.txt",
            held_out=folder / "held-out.txt",
            documentation=folder / "documentation.txt",
        )
        sources = _sources()
        folder.mkdir(parents=True)
        whole_file.write_text(made.sources, sources)
        inside = sources[-len(sources) // 25 :]  # part of the held-out text, away from its beginning
        whole_file.write_text(made.held_out, inside)
        whole_file.write_text(made.documentation, _documentation())
        return made


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

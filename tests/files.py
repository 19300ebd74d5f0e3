"""Files that tests write and compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def toml(table_: dict) -> str:
    """The table as TOML: strings, numbers, booleans and lists are written as JSON writes them."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in table_.items() if not isinstance(v, dict)]
    for section, values in table_.items():
        if isinstance(values, dict):
            lines.append(f"[{section}]")
            lines += [f"{k} = {json.dumps(v)}" for k, v in values.items() if k != "sources"]
            for source in values.get("sources", ()):
                lines.append(f"[[{section}.sources]]")
                lines += [f"{k} = {json.dumps(v)}" for k, v in source.items()]
    return "\n".join(lines) + "\n"

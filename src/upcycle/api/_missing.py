"""Missing checkpoints are found before torch is imported, because that import takes seconds."""

from __future__ import annotations

from pathlib import Path

from upcycle.checkpoints import hub
from upcycle.errors import UpcycleError


def refuse_missing(checkpoint: str | Path) -> None:
    """Raise `UpcycleError` if a checkpoint is neither a hub id nor a folder."""
    if hub.is_id(checkpoint) or Path(checkpoint).is_dir():
        return
    what = "is a file, not a folder" if Path(checkpoint).exists() else "does not exist"
    raise UpcycleError(f"{checkpoint} {what}; give a checkpoint folder or a hub id (owner/name)")

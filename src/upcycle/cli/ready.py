"""What can be seen to be wrong without torch, which takes seconds to import: sources, data, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.evaluation.asked import Asked
    from upcycle.training.run import Run


def to_train(run: Run) -> None:
    """Raise where a run cannot begin: its source, what is made of it, and its data."""
    from upcycle.blueprints.blueprint import blueprint
    from upcycle.checkpoints import hub
    from upcycle.dense.source import admit

    if not hub.is_id(run.source):
        _folder(run.source)
    if not run.from_scratch and not hub.is_id(run.source):
        with hub.open_checkpoint(run.source) as opened:
            if run.recipe is None:
                admit(opened)
            else:
                blueprint(opened, run.recipe)
    for source in run.data.sources:
        if not source.path.startswith("hf:") and not Path(source.path).exists():
            raise UpcycleError(f"no data at {source.path}")


def to_eval(checkpoints: Sequence[str], asked: Asked) -> None:
    """Raise where checkpoints or data are not there."""
    from upcycle.checkpoints import hub

    for checkpoint in checkpoints:
        if not hub.is_id(checkpoint):
            _folder(checkpoint)
    for path in (*asked.texts, asked.images, asked.shots, asked.task_files, asked.superglue):
        if path is not None and not path.exists():
            raise UpcycleError(f"no data at {path}")


def _folder(name: str) -> None:
    """Raise where no folder is called so."""
    if not Path(name).is_dir():
        what = "is a file, not a folder" if Path(name).exists() else "does not exist"
        raise UpcycleError(f"{name} {what}; give a checkpoint folder or a hub id (owner/name)")

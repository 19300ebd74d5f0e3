"""The content of `upcycle.json` for a folder that was just made."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import upcycle
from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.records.provenance import DonorRecord, MadeFrom, Provenance, Training

Hashes = Mapping[str, Mapping[str, str]]  # SHA-256 of source files, by checkpoint and name


def of_blueprint(
    built: Blueprint,
    hashes: Hashes,
    out: Path,
    *,
    carried: list[str],
    left_behind: list[str],
    files: Mapping[str, str] | None = None,
    made_anew: Mapping[str, str] | None = None,
    training: tuple[Training, ...] | None = None,
) -> Provenance:
    """Return the provenance of the folder `out`, which holds a blueprint's result, or that after training.

    `files` has the hashes of the files written beside the weights, `made_anew` the files that are not as the
    source has them, with the reason.
    """
    return Provenance(
        format=Provenance.FORMAT,
        upcycle_version=upcycle.__version__,
        numpy_version=np.__version__,
        python_version=platform.python_version(),
        source=_made_from(built.source, built.dense.family.model_type, hashes, built.checkpoints[1:], out),
        target=built.target.model_type,
        recipe=built.recipe.as_table(),
        blueprint_hash=built.hash,
        preserves_function=built.preserves_function,
        moe_layers=built.moe_layers,
        left_out_tensors=dict(built.left_out),
        left_out_config_keys=tuple(key for key in built.dense.unknown_keys if key not in built.config),
        carried_files=tuple(carried),
        made_anew_files=dict(made_anew) if made_anew else None,
        left_behind_files=tuple(left_behind),
        files=files,
        training=training,
    )


def of_dense(
    source: Checkpoint,
    hashes: Hashes,
    out: Path,
    *,
    carried: list[str],
    left_behind: list[str],
    made_anew: Mapping[str, str] | None = None,
    training: tuple[Training, ...],
    target: str | None = None,
) -> Provenance:
    """Return the provenance of the folder `out`, a dense model that was trained further and not built.

    `target` is its type; None: that of the source.
    """
    model_type = source.config["model_type"]
    return Provenance(
        format=Provenance.FORMAT,
        upcycle_version=upcycle.__version__,
        numpy_version=np.__version__,
        python_version=platform.python_version(),
        source=_made_from(source, model_type, hashes, (), out),
        target=target or model_type,
        recipe=None,
        blueprint_hash=None,
        carried_files=tuple(carried),
        made_anew_files=dict(made_anew) if made_anew else None,
        left_behind_files=tuple(left_behind),
        training=training,
    )


def _made_from(
    source: Checkpoint, model_type: str, hashes: Hashes, donors: Sequence[Checkpoint], out: Path
) -> MadeFrom:
    return MadeFrom(
        name=source.name,
        path=published(source.folder, out),
        model_type=model_type,
        sha256=hashes[source.label],
        donors={
            c.label: DonorRecord(name=c.name, path=published(c.folder, out), sha256=hashes[c.label])
            for c in donors
        },
    )


def published(path: Path, out: Path) -> str:
    """Return where a checkpoint or a file is, in words that may be published with the folder `out`.

    That is its path from the home folder, or from `out` if both lie in one folder below the root. Otherwise
    it is the name alone, because a path through the root would tell all of the machine's folders.
    """
    whole, home, seen_from = path.resolve(), _home(), out.resolve()
    if home and whole.is_relative_to(home):
        return f"~/{whole.relative_to(home)}"
    shared = Path(os.path.commonpath([whole, seen_from]))
    return os.path.relpath(whole, seen_from) if shared != shared.parent else whole.name


def _home() -> Path | None:
    try:
        home = Path.home().resolve()
    except RuntimeError:  # there is no home directory
        return None
    return home if home != home.parent else None

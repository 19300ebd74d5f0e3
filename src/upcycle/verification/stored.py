"""Checks of what is stored: config, bytes, provenance, and the files beside the weights."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.carried import CARRIED, carriable
from upcycle.checkpoints.checkpoint import CONFIG, INDEX, Checkpoint, file_hash
from upcycle.conversion import selection
from upcycle.errors import listed
from upcycle.nn import kernels
from upcycle.records.evaluation import EvaluationRecord
from upcycle.records.provenance import Provenance
from upcycle.records.routing import RoutingRecord
from upcycle.verification.coverage import faults
from upcycle.verification.proof import Check


def config(built: Blueprint, moe: Checkpoint) -> Check:
    """Check config.json key by key."""
    wanted = json.loads(json.dumps(built.stored_config()))
    if kernels.KEY not in moe.config:  # written by a version that did not have this key
        wanted.pop(kernels.KEY, None)
    different = sorted(k for k in {*wanted, *moe.config} if wanted.get(k, ...) != moe.config.get(k, ...))
    return Check(
        name="config",
        holds=not different,
        detail=f"differs in {listed(different)}"
        if different
        else f"{len(wanted)} keys as the blueprint has them",
    )


def tensors(built: Blueprint, moe: Checkpoint) -> Check:
    """Check every byte of every tensor."""
    different = [
        name
        for name, entry in built.entries.items()
        if any(
            not np.array_equal(data, moe.pread(moe.tensors[name], start, start + data.size))
            for start, data in entry.pieces()
        )
    ]
    return Check(
        name="bytes",
        holds=not different,
        detail=f"differ in {listed(different)}"
        if different
        else f"{built.nbytes:,} bytes identical to the blueprint",
    )


_SAID = {
    "preserves_function": "preserves_function",
    "moe_layers": "moe_layers",
    "left_out_tensors": "left_out",
}
"""The fields of upcycle.json about a blueprint, and the attributes of a blueprint that they record."""
_EDITED = ("README.md", CONFIG)  # people may edit the card; the config is compared key by key
_READ = (
    "*.safetensors*", "*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf",
    "*.onnx", "*.py", "*.jinja", "adapter_*",
)  # fmt: skip
_RESULTS = (EvaluationRecord.FILE, RoutingRecord.FILE)


def files(built: Blueprint, moe: Checkpoint, record: Provenance) -> Check:
    """Check that the files beside the weights are what `convert` wrote, and list any others."""
    out, source = moe.folder, built.source.folder
    written = record.files or {}
    kept = [name for name in carriable(source) if name not in (record.made_anew_files or {})]
    wanted = {**written} | {name: file_hash(source / name) for name in kept}
    there = _there(out, {name.partition("/")[0] for name in wanted if "/" in name})
    missing = [name for name in wanted if name not in there]
    changed = [name for name in wanted if name in there and not _has(there[name], wanted[name])]
    changed += [name for name in written if written[name] != wanted[name] and name not in changed]
    known = {*wanted, *(file.name for file in moe.files), Provenance.FILE}
    if not written:  # written by a version that kept no hashes
        known |= {CONFIG, INDEX, "README.md", selection.FILE, *(record.carried_files or ())}
    others = sorted(there.keys() - known)
    found = {
        "missing": missing,
        "changed": [name for name in changed if name not in _EDITED],
        "not written by convert, and read by those who load it": [n for n in others if _is_read(there[n])],
    }
    notes = {
        "edited": [name for name in changed if name in _EDITED],
        "not written by convert": [name for name in others if not _is_read(there[name])],
    }
    fine = f"{len(wanted)} files beside the weights as they were written"
    said = [faults(found) or fine, faults(notes)]
    return Check(name="files", holds=not any(found.values()), detail="; ".join(filter(None, said)))


def _there(out: Path, opened: set[str]) -> dict[str, Path]:
    """Return files and folders of `out` by name; of the folders in `opened`, the files inside."""
    found = {path.name: path for path in out.iterdir() if not (path.name in opened and path.is_dir())}
    inside = [p for name in opened if (out / name).is_dir() for p in (out / name).rglob("*") if p.is_file()]
    return found | {path.relative_to(out).as_posix(): path for path in inside}


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and file_hash(path) == sha256


def _is_read(path: Path) -> bool:
    """Return whether a loader may read this file or folder."""
    if path.name.startswith(".") or path.name in _RESULTS:
        return False
    return path.is_dir() or any(fnmatch(path.name, pattern) for pattern in (*_READ, *CARRIED))


def provenance(built: Blueprint, record: Provenance) -> Check:
    """Check that upcycle.json tells the truth about the sources and the blueprint."""
    recorded = {"source": record.source.sha256}
    recorded |= {label: donor.sha256 for label, donor in record.source.donors.items()}
    found = {opened.label: opened.hashes() for opened in built.checkpoints}
    table = record.as_table()
    said = {key: table[key] for key in ("target", *_SAID) if key in table}
    true = {"target": built.target.model_type, **{key: getattr(built, name) for key, name in _SAID.items()}}
    claims = said == json.loads(json.dumps({key: true[key] for key in said}))
    same = record.blueprint_hash == built.hash and recorded == found and claims
    return Check(
        name="provenance",
        holds=same,
        detail="blueprint and source files have the recorded hashes"
        if same
        else "the blueprint or a source is not the one recorded in upcycle.json",
    )

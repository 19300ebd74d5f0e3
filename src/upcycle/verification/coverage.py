"""Coverage: every tensor of the source is used, and every tensor of the result is defined once."""

from __future__ import annotations

from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import listed
from upcycle.verification.proof import Check, reason


def of_source(built: Blueprint) -> Check:
    """Check that the blueprint uses every tensor of its sources, or says why it leaves one out."""
    used = {info for entry in built.entries.values() for info in entry.lazy.sources()}
    held = [info for c in built.checkpoints for info in c.tensors.values()]
    spared = built.left_out
    labelled = {info: f"{c.label}: {info.name}" for c in built.checkpoints[1:] for info in c.tensors.values()}
    strict = {info for c in built.dense.others for info in c.tensors.values()}
    unused = [
        info.name
        for info in held
        if info not in used
        and labelled.get(info) not in spared
        and (info in strict or info.name not in spared)
    ]
    reasons = {why: [n for n, w in built.left_out.items() if w == why] for why in built.left_out.values()}
    left = "".join(f"; left out {listed(names)}: {why}" for why, names in reasons.items())
    return Check(
        name="source coverage",
        holds=not unused,
        detail=f"{len(used)} of {len(held)} source tensors used"
        + (f", unused: {listed(unused)}" if unused else "")
        + left,
    )


def of_files(built: Blueprint, moe: Checkpoint) -> Check:
    """Check that the files hold the tensors of the blueprint, in its shapes and types, and no others."""
    missing = [n for n in built.entries if n not in moe.tensors]
    extra = [n for n in moe.tensors if n not in built.entries]
    wrong = [
        n
        for n, e in built.entries.items()
        if n in moe.tensors and (moe.tensors[n].shape, moe.tensors[n].dtype) != (e.shape, e.dtype)
    ]
    found = {"missing": missing, "unexpected": extra, "other shape or dtype": wrong}
    return Check(
        name="target coverage, files",
        holds=not any(found.values()),
        detail=faults(found) or f"{len(moe.tensors)} tensors, each defined once",
    )


def of_transformers(built: Blueprint, moe: Checkpoint) -> Check:
    """Check that transformers' own loader fills every parameter of its class from these names and shapes."""
    from upcycle.hf import headers, models, opening
    from upcycle.hf.quiet import quiet

    name = "target coverage, transformers"
    with quiet():
        architecture = models.architecture(built.target.architecture)
        state = {n: headers.Header(shape=info.shape, dtype=info.dtype) for n, info in moe.tensors.items()}
        try:
            opening.refuse_depth(moe.folder)
            model, report = headers.loaded(architecture, moe.folder, state)
        except Exception as error:  # whatever it rejects in a damaged folder is the finding
            return Check(name=name, holds=False, detail=f"cannot be loaded: {reason(error)}")
    dense = built.dense  # a source may lack what its class can do without, and then the result does
    spared = dense.family.may_lack(dense.config) - dense.tensors.keys()
    found = {kind.split("_")[0]: sorted({*map(str, report[kind])} - spared) for kind in report}
    count = sum(1 for _ in model.parameters())
    return Check(
        name=name,
        holds=not any(found.values()),
        detail=faults(found) or f"all {count} parameters of {built.target.architecture} are given",
    )


def faults(found: dict[str, list[str]]) -> str:
    """Return the faults that were found, by kind, as text."""
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in found.items() if names)

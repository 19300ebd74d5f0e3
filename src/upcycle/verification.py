"""The proof that a folder is what its recipe makes of a source: coverage, bytes and logits.

Three independent witnesses are used: the blueprint computed again from the source, the parameters that
transformers itself builds, and both models run side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.blueprints.blueprint import Blueprint, blueprint
from upcycle.checkpoints.checkpoint import CONFIG, INDEX, Checkpoint, TwoSetsError, file_hash
from upcycle.checkpoints.hub import CARRIED, carriable, open_checkpoint
from upcycle.conversion import selection
from upcycle.dense.source import Dense, refuse_two_heads
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config
from upcycle.nn import kernels
from upcycle.recipe import Recipe
from upcycle.records.evaluation import EvaluationRecord
from upcycle.records.provenance import Provenance
from upcycle.records.routing import RoutingRecord
from upcycle.system import memory
from upcycle.system.wording import size

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5  # relative to the logit scale, in float32
IMAGES = 16  # images taken from a set
TOKENS = 256  # tokens taken from a text, and of random input


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked; `holds` is None if nothing was promised."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest |logit difference| between dense and MoE, and the largest |logit| of the dense model."""

    max_difference: float
    scale: float
    tokens: int
    images: int | None = None  # set if the input is images
    source_difference: float | None = None  # difference to the source as stored, if the MoE is rounded

    @property
    def relative(self) -> float:
        """The difference relative to the scale."""
        return _share(self.max_difference, self.scale)


def _share(difference: float, scale: float) -> float:
    """Return `difference` / `scale`; for a scale of zero, zero or infinity."""
    if scale:
        return difference / scale
    return math.inf if difference else 0.0


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result of `verify`."""

    coverage: bool
    bit_identical: bool
    preserves_function: bool
    logits: dict[str, Difference]  # by input: random, text
    checks: list[Check]

    @property
    def holds(self) -> bool:
        """True if everything that the recipe promises holds."""
        return all(check.holds is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the proof as JSON has it."""
        return {"holds": self.holds, **asdict(self)}


def verify(
    source: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    images: str | Path | None = None,
    logits: bool = True,
) -> Proof:
    """Check the folder `out` against the dense checkpoint `source` and the recipe recorded in `out`.

    Logits are compared on random input. `text` names a file and `images` a folder or a parquet file to
    compare them on as well. Raises `UpcycleError` if there is nothing to check; a check that fails is in the
    result.
    """
    out = Path(out)
    shown = Shown(text=None if text is None else Path(text), images=None if images is None else Path(images))
    with open_checkpoint(source, allow_nonfinite=True) as dense:
        try:
            moe = Checkpoint.open(out, allow_nonfinite=True)
        except TwoSetsError as error:
            return _unfit(str(error))
        with moe:
            return _verify(dense, moe, out, shown if logits else None)


def _unfit(why: str) -> Proof:
    """Return the proof for a folder that different readers would read differently."""
    check = Check(name="files", holds=False, detail=why)
    return Proof(coverage=False, bit_identical=False, preserves_function=False, logits={}, checks=[check])


def _verify(dense: Checkpoint, moe: Checkpoint, out: Path, shown: Shown | None) -> Proof:
    record = Provenance.read(out)
    if record.training:
        steps = record.training[-1].step
        raise UpcycleError(
            f"{out} was trained for {steps} steps since it was built, so its bytes are no recipe's; "
            f"verify checks what `upcycle convert` wrote"
        )
    built = blueprint(dense, Recipe.of(record.recipe), allow_nonfinite=True)
    refuse_two_heads(built.dense)
    coverage = [_source_used(built), _names(built, moe), _transformers(built, moe)]
    settings = _config(built, moe)
    checks = [*coverage, settings]
    same = _bytes(built, moe) if coverage[1].holds else _skipped("bytes", "the names differ already")
    checks += [same, _hashes(built, record), _files(built, moe, record)]
    found: dict[str, Difference] = {}
    if shown is not None and settings.holds and coverage[1].holds and coverage[2].holds:
        found = compare_logits(built, out, shown)
        checks += [_logits(built, name, difference) for name, difference in found.items()]
    for donor in built.donors:
        donor.checkpoint.close()
    return Proof(
        coverage=all(bool(c.holds) for c in coverage),
        bit_identical=bool(same.holds),
        preserves_function=built.preserves_function,
        logits=found,
        checks=checks,
    )


def _skipped(name: str, why: str) -> Check:
    return Check(name=name, holds=False, detail=f"not checked: {why}")


def _source_used(built: Blueprint) -> Check:
    used = {info for entry in built.entries.values() for info in entry.lazy.sources()}
    held = [info for c in built.checkpoints for info in c.tensors.values()]
    spared = built.left_out
    second = {info: f"{c.label}: {info.name}" for c in built.dense.others for info in c.tensors.values()}
    unused = [i.name for i in held if i not in used and second.get(i, i.name) not in spared]
    reasons = {why: [n for n, w in built.left_out.items() if w == why] for why in built.left_out.values()}
    left = "".join(f"; left out {listed(names)}: {why}" for why, names in reasons.items())
    return Check(
        name="source coverage",
        holds=not unused,
        detail=f"{len(used)} of {len(held)} source tensors used"
        + (f", unused: {listed(unused)}" if unused else "")
        + left,
    )


def _names(built: Blueprint, moe: Checkpoint) -> Check:
    missing = [n for n in built.entries if n not in moe.tensors]
    extra = [n for n in moe.tensors if n not in built.entries]
    wrong = [
        n
        for n, e in built.entries.items()
        if n in moe.tensors and (moe.tensors[n].shape, moe.tensors[n].dtype) != (e.shape, e.dtype)
    ]
    faults = {"missing": missing, "unexpected": extra, "other shape or dtype": wrong}
    return Check(
        name="target coverage, files",
        holds=not any(faults.values()),
        detail=_faults(faults) or f"{len(moe.tensors)} tensors, each defined once",
    )


def _transformers(built: Blueprint, moe: Checkpoint) -> Check:
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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Check(name=name, holds=False, detail=f"cannot be loaded: {reason}")
    faults = {kind.split("_")[0]: sorted(map(str, report[kind])) for kind in report}
    count = sum(1 for _ in model.parameters())
    return Check(
        name=name,
        holds=not any(faults.values()),
        detail=_faults(faults) or f"all {count} parameters of {built.target.architecture} are given",
    )


def _faults(faults: dict[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in faults.items() if names)


def _config(built: Blueprint, moe: Checkpoint) -> Check:
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


def _bytes(built: Blueprint, moe: Checkpoint) -> Check:
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


def _files(built: Blueprint, moe: Checkpoint, record: Provenance) -> Check:
    """Check that the files beside the weights are what `convert` wrote, and list any others."""
    out, source = moe.folder, built.source.folder
    written = record.files or {}
    wanted = {**written} | {name: file_hash(source / name) for name in carriable(source)}
    there = {path.name: path for path in out.iterdir()}
    missing = [name for name in wanted if name not in there]
    changed = [name for name in wanted if name in there and not _has(there[name], wanted[name])]
    changed += [name for name in written if written[name] != wanted[name] and name not in changed]
    known = {*wanted, *(file.name for file in moe.files), Provenance.FILE}
    if not written:  # written by a version that kept no hashes
        known |= {CONFIG, INDEX, "README.md", selection.FILE, *(record.carried_files or ())}
    others = sorted(there.keys() - known)
    faults = {
        "missing": missing,
        "changed": [name for name in changed if name not in _EDITED],
        "not written by convert, and read by those who load it": [n for n in others if _is_read(there[n])],
    }
    notes = {
        "edited": [name for name in changed if name in _EDITED],
        "not written by convert": [name for name in others if not _is_read(there[name])],
    }
    fine = f"{len(wanted)} files beside the weights as they were written"
    said = [_faults(faults) or fine, _faults(notes)]
    return Check(name="files", holds=not any(faults.values()), detail="; ".join(filter(None, said)))


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and file_hash(path) == sha256


def _is_read(path: Path) -> bool:
    """Return whether a loader may read this file or folder."""
    if path.name.startswith(".") or path.name in _RESULTS:
        return False
    return path.is_dir() or any(fnmatch(path.name, pattern) for pattern in (*_READ, *CARRIED))


def _hashes(built: Blueprint, record: Provenance) -> Check:
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


def _count_of(difference: Difference) -> str:
    return f"{difference.tokens} tokens" if difference.images is None else f"{difference.images} images"


def _logits(built: Blueprint, name: str, difference: Difference) -> Check:
    said = (
        f"largest difference {difference.max_difference:.2g} of a scale of {difference.scale:.3g} "
        f"({difference.relative:.1g}) on {_count_of(difference)}"
    )
    if not difference.scale:
        said += "; the dense model gives zeros alone, which tells little"
    if (far := difference.source_difference) is not None:
        said += (
            f", to the dense model rounded to {built.narrowed}; {far:.2g} "
            f"({_share(far, difference.scale):.1g}) to the dense model as it is stored"
        )
    if not built.preserves_function:
        return Check(name=f"logits, {name}", holds=None, detail=said + "; none promised by this recipe")
    return Check(name=f"logits, {name}", holds=difference.relative <= TOLERANCE, detail=said)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The files that both models are run on besides random input."""

    text: Path | None = None
    images: Path | None = None


def compare_logits(built: Blueprint, out: Path, shown: Shown | None = None) -> dict[str, Difference]:
    """Compare the outputs of the dense model and of the folder `out`, in float32.

    Both run on random input and on what `shown` names. Outputs are logits, or the last hidden states of a
    model without a head.
    """
    import torch

    from upcycle.hf import models, opening
    from upcycle.hf.quiet import quiet

    shown = shown or Shown()
    source, dense = built.source.folder, built.dense
    _check_memory(built)
    inputs = {"random": _random(dense.family.inputs(dense.config, TOKENS), dense.config)}
    if shown.text is not None:
        ids = _tokens(source, shown.text, dense.family.length(dense.config))
        names = [n for n, (kind, _) in dense.family.inputs(dense.config, TOKENS).items() if kind == "tokens"]
        if not names:
            raise UpcycleError(f"--text is for models that read text, and {dense.family.model_type} does not")
        inputs["text"] = dict.fromkeys(names, ids)
    if shown.images is not None:
        inputs["images"] = _pixels(dense, shown.images)
    stored = None if built.recipe.dtype == "source" else getattr(torch, built.recipe.dtype)
    runs: list[tuple[Path, str, torch.dtype | None]] = [
        (source, dense.architecture, stored),
        (out, built.target.architecture, None),
    ]
    if built.narrowed:
        runs.append((source, dense.architecture, None))
    outputs = []
    for folder, name, dtype in runs:
        # `eager` runs the experts one by one and uses no kernel that restricts their width.
        options: dict[str, Any] = (
            {"left_out": built.left_out} if folder is source else {"experts_implementation": "eager"}
        )
        with quiet():
            cls = models.architecture(name)
            model = opening.fill(cls, folder, dtype=dtype or torch.float32, **options)
        model = model.float().eval()
        with torch.inference_mode():
            outputs.append({name: model(**given)[0] for name, given in inputs.items()})
        del model
    ours, theirs, *unrounded = outputs
    return {
        name: Difference(
            max_difference=float((ours[name] - theirs[name]).abs().max()),
            scale=float(ours[name].abs().max()),
            tokens=theirs[name].shape[:-1].numel(),
            images=len(theirs[name]) if "pixel_values" in inputs[name] else None,
            source_difference=float((unrounded[0][name] - theirs[name]).abs().max()) if unrounded else None,
        )
        for name in inputs
    }


def _random(shapes: Mapping[str, tuple[str, tuple[int, ...]]], config: Config) -> dict[str, torch.Tensor]:
    """Return random input of the given kinds and shapes; it is the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(config["vocab_size"], shape, generator=generator)
        if kind == "tokens"
        else torch.randn(shape, generator=generator)
        for name, (kind, shape) in shapes.items()
    }


def _tokens(source: Path, text: Path, limit: int) -> torch.Tensor:
    """Return the first tokens of a text, [1, L]."""
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")[: 64 * TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"--text {text} cannot be read as text: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(f"{source} has no tokenizer for --text: {reason}") from None
    ids = tokenizer(content, return_tensors="pt").input_ids[:, : min(TOKENS, limit)]
    if not ids.numel():
        raise UpcycleError(f"--text {text} holds no text")
    return ids


def _pixels(dense: Dense, images: Path) -> dict[str, torch.Tensor]:
    """Return the first images of a set, preprocessed as in an evaluation."""
    import torch

    from upcycle.dense.subject import Subject
    from upcycle.system import scratch
    from upcycle.tasks._rows import of_images

    if not any(kind != "tokens" for kind, _ in dense.family.inputs(dense.config, TOKENS).values()):
        raise UpcycleError(f"--images is for models that read images, and {dense.family.model_type} does not")
    with scratch.folder() as cache:
        found = of_images(images, Subject.of_dense(dense), cache, gradient=False, seed=0)
        read = found.read(np.arange(min(IMAGES, found.count)))
        batch = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in read.items()}
        inputs: dict[str, torch.Tensor] = dict(found.ask(batch).inputs)
    return inputs


def _check_memory(built: Blueprint) -> None:
    """Raise `UpcycleError` if one model in float32 does not fit in memory; only one is loaded at a time."""
    needed = 4 * sum(e.lazy.size for e in built.entries.values())
    free = memory.available()
    if free is not None and needed > free:
        raise UpcycleError(
            f"comparing logits loads the MoE in float32, {size(needed)}, and {size(free)} of "
            f"memory are free; verify the rest with --no-logits"
        )

"""Makes sure that all ranks see the same run file, checkpoints, data, files of the recipe, and one folder.

On nodes with disks of their own these may differ, and then each rank would train another model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle.checkpoints import carried
from upcycle.checkpoints.checkpoint import Checkpoint, file_hash
from upcycle.errors import UpcycleError, listed
from upcycle.loading import attention_heads
from upcycle.training import recipe_files, start, together
from upcycle.training.course import Course
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start
from upcycle.training.together import Prints

_SAMPLES, _SAMPLE = 64, 64  # tensors of a checkpoint that are looked into, and bytes of each
_PATIENCE = 60.0  # seconds; a network file system may show a new file late


@dataclass(frozen=True, kw_only=True)
class StartHere:
    """The start of the run as one rank sees it, or the reason why there is none."""

    begun: Start | None
    reason: str | None = None
    prints: Sequence[Prints] = ()  # of everything that must be alike

    @property
    def expert_counts(self) -> set[int] | None:
        """The numbers of experts per layer; None if there is no start to tell."""
        if self.begun is None:
            return None
        return self.begun.built.expert_counts if self.begun.built else set()

    @property
    def attention_heads(self) -> list[int]:
        """The numbers of attention heads that tensor parallelism splits."""
        return [] if self.begun is None else attention_heads(self.begun.config)


def start_here(run: Run, world: int) -> StartHere:
    """Return what this rank finds. Raises `UpcycleError` in a world of one, where there is nobody to ask."""
    begun, reason = together.tried(lambda: start.start_of(run), world)
    return StartHere(
        begun=begun, reason=reason, prints=_prints(run, begun) if begun is not None and world > 1 else ()
    )


def agreed(mine: StartHere, ranks: Ranks) -> Start:
    """Return the start that every rank has found; raise the same `UpcycleError` on all if one has not."""
    together.refuse_different(mine.reason, mine.prints, ranks)
    assert mine.begun is not None
    return mine.begun


def refuse_unseen(out: Path, file: str, ranks: Ranks) -> None:
    """Refuse an `out` that not every rank sees; the first rank has just made `file` in it."""
    end = time.monotonic() + _PATIENCE
    while not (seen := (out / file).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    told = ranks.gathered(seen)
    if not all(told):
        raise UpcycleError(
            f"process {told.index(False)} of {ranks.world} does not see {out}, which process 0 has made; "
            f"`out` must lie on a file system that all nodes share"
        )


def _prints(run: Run, begun: Start) -> list[Prints]:
    table = json.dumps(run.as_table(), sort_keys=True).encode()
    out = {"run file": hashlib.sha256(table).hexdigest()}
    for opened in begun.checkpoints:
        config = json.dumps(opened.config, sort_keys=True).encode()
        out[f"config of the {opened.label}"] = hashlib.sha256(config).hexdigest()
        out |= {f"{file.name} of the {opened.label}": _print(opened, file) for file in opened.files}
    for named in {leg.run.data.tokenizer for leg in Course(run).legs}:
        folder = Path(named or begun.subject.folder)  # a snapshot of the hub may lie elsewhere on each node
        out |= {f"{file} of the tokenizer {named or 'of the source'}": d for file, d in _of_tokenizer(folder)}
    if begun.built is None or run.recipe is None:
        return [out]
    read = [f"{path.name} of the recipe" for path in recipe_files.of(run.recipe).values()]
    return [out, {listed(read) or "blueprint of the model": begun.built.hash}]


def _of_tokenizer(folder: Path) -> list[tuple[str, str]]:
    """Return the names of the files of a tokenizer and their hashes; none if it is on the hub."""
    names = carried.of_tokenizer(carried.carriable(folder)) if folder.is_dir() else []
    return [(name, file_hash(folder / name)) for name in names if os.access(folder / name, os.R_OK)]


def _print(opened: Checkpoint, file: Path) -> str:
    """Return a digest of a file's size, its header and some bytes of some tensors; the whole may be large."""
    tensors = sorted((t for t in opened.tensors.values() if t.file == file), key=lambda tensor: tensor.offset)
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with file.open("rb") as handle:
        digest.update(handle.read(tensors[0].offset))
        for tensor in tensors[:: -(-len(tensors) // _SAMPLES)]:
            handle.seek(tensor.offset + tensor.nbytes // 2)
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()

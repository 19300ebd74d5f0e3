"""Makes sure that all ranks see the same run file, the same checkpoints to start from, and one folder.

On nodes with disks of their own these may differ, and then each rank would train another model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import UpcycleError, listed
from upcycle.loading import attention_heads
from upcycle.training import start
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start

_SAMPLES, _SAMPLE = 64, 64  # tensors of a checkpoint that are looked into, and bytes of each
_PATIENCE = 60.0  # seconds; a network file system may show a new file late


@dataclass(frozen=True, kw_only=True)
class StartHere:
    """The start of the run as one rank sees it, or the reason why there is none."""

    begun: Start | None
    reason: str | None = None
    prints: Mapping[str, str] | None = None  # of everything that must be alike, by its name for a user

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
    try:
        begun = start.start_of(run)
    except UpcycleError as error:
        if world == 1:
            raise
        return StartHere(begun=None, reason=str(error))
    return StartHere(begun=begun, prints=_prints(run, begun) if world > 1 else {})


def agreed(mine: StartHere, ranks: Ranks) -> Start:
    """Return the start that every rank has found; raise the same `UpcycleError` on all if one has not."""
    told = ranks.gathered((mine.reason, mine.prints or {}))
    _refuse_told([reason for reason, _ in told])
    for rank, (_, prints) in enumerate(told):
        if different := sorted(n for n in {*prints, *told[0][1]} if prints.get(n) != told[0][1].get(n)):
            raise UpcycleError(
                f"process {rank} of {ranks.world} sees another {listed(different)} than process 0; give "
                f"every node the same files, by a shared file system or by copies of one download"
            )
    assert mine.begun is not None
    return mine.begun


def first_alone(work: Callable[[], None], ranks: Ranks) -> None:
    """Do `work` on the first rank, and then on the others, which may find there what it has fetched.

    Raises the same `UpcycleError` on all ranks if one of them does.
    """
    reason = _reason(work) if ranks.first else None
    if (reason := ranks.share(reason)) is not None:
        raise UpcycleError(reason)
    _refuse_told(ranks.gathered(None if ranks.first else _reason(work)))


def _reason(work: Callable[[], None]) -> str | None:
    """Do `work`; return what it refuses to do, or None."""
    try:
        work()
    except UpcycleError as error:
        return str(error)
    return None


def _refuse_told(reasons: Sequence[str | None]) -> None:
    """Raise an `UpcycleError` with the first reason; it says which rank has it if the others do not."""
    for rank, reason in enumerate(reasons):
        if reason is not None:
            alike = all(other == reason for other in reasons)
            raise UpcycleError(reason if alike else f"process {rank} of {len(reasons)}: {reason}")


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


def _prints(run: Run, begun: Start) -> dict[str, str]:
    table = json.dumps(run.as_table(), sort_keys=True).encode()
    out = {"run file": hashlib.sha256(table).hexdigest()}
    for opened in begun.checkpoints:
        config = json.dumps(opened.config, sort_keys=True).encode()
        out[f"config of the {opened.label}"] = hashlib.sha256(config).hexdigest()
        out |= {f"{file.name} of the {opened.label}": _print(opened, file) for file in opened.files}
    return out


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

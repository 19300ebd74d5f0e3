"""The hashes of the files that a run reads: every rank reads some of them, and all know them all."""

from __future__ import annotations

from collections.abc import Sequence

from upcycle.checkpoints.checkpoint import Checkpoint, file_hashes
from upcycle.conversion.provenance import Hashes
from upcycle.errors import UpcycleError
from upcycle.training.parallel import Ranks


def hashes_of(checkpoints: Sequence[Checkpoint], ranks: Ranks) -> Hashes:
    """Return the SHA-256 of the weight files of checkpoints, by label and name. Every rank must call it.

    No rank then waits for one that reads terabytes alone. Raises `UpcycleError` on every rank for a file that
    one of them cannot read.
    """
    files = [(opened.label, file) for opened in checkpoints for file in opened.files]
    mine, failed = [], None
    try:
        mine = file_hashes([file for _, file in files[ranks.rank :: ranks.world]])
    except OSError as error:
        failed = f"{error.filename} cannot be read: {error.strerror}"
    told = ranks.gathered((mine, failed))
    if (said := next((failed for _, failed in told if failed is not None), None)) is not None:
        raise UpcycleError(said)
    found: dict[str, dict[str, str]] = {opened.label: {} for opened in checkpoints}
    for number, (label, file) in enumerate(files):
        found[label][file.name] = told[number % ranks.world][0][number // ranks.world]
    return found

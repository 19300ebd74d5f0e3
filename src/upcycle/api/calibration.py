"""`upcycle.calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.system.progress import Progress

if TYPE_CHECKING:
    from upcycle.dense.statistics import Statistics


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    text: str | Path | None = None,
    collect: Sequence[str] = ("l1", "l2", "count"),
    positions: Sequence[str] = ("neurons", "channels", "heads"),
    limit: int | None = None,
    length: int | None = None,
    batch_size: int = 32,
    threshold: float = 0.0,
    seed: int = 0,
    in_order: bool = False,
    device: str | None = None,
    cache: str | Path | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Collect statistics of the activations of a dense checkpoint.

    The statistics of `source` are written to the file `out`. Give either `images` (a parquet file, or a
    folder with one folder per class) or `text`. `collect` names the statistics (l1, l2, count, co_activation,
    gradient) and `positions` the activations they are taken of (neurons, channels, heads). At most `limit`
    images or rows are read (None: 30,000 images or 2,048 rows; 0: all). `length` is the number of tokens of a
    row. A call that was stopped resumes if it is repeated with the same arguments. Raises `UpcycleError` for
    input that cannot be used.
    """
    from upcycle.calibration import calibration

    asked = calibration.Asked(
        images=images, text=text, collect=tuple(collect), positions=tuple(positions), limit=limit,  # type: ignore[arg-type]
        length=length, batch_size=batch_size, threshold=threshold, seed=seed, in_order=in_order,
        device=device, cache=cache, allow_nonfinite=allow_nonfinite,  # type: ignore[arg-type]
    )  # fmt: skip
    return calibration.calibrate(source, out, asked, progress=progress)

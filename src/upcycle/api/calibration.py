"""`upcycle.calibrate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.api._names import names, refuse_unnamed
from upcycle.system.needed import said_if_missing
from upcycle.system.progress import Progress

if TYPE_CHECKING:
    from upcycle.records.statistics import Statistics


@said_if_missing()
def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    text: str | Path | None = None,
    prompts: str | Path | None = None,
    domains: Mapping[str, str | Path] | None = None,
    collect: Sequence[str] | None = None,
    positions: Sequence[str] = ("neurons", "channels", "heads"),
    limit: int | None = None,
    length: int | None = None,
    field: str = "text",
    batch_size: int = 32,
    threshold: float = 0.0,
    sample: int = 2_048,
    marked: int = 10,
    seed: int = 0,
    in_order: bool = False,
    device: str | None = None,
    cache: str | Path | None = None,
    allow_nonfinite: bool = False,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """Collect statistics of the activations of a dense checkpoint.

    The statistics of `source` are written to the file `out`. Give `images` (a parquet file, or a folder with
    one folder per class), `text`, or the domains of the experts: `prompts`, a TOML file with a `[[domain]]`
    for each expert, `domains`, a text for each name, or both, one after the other. `collect` names the
    statistics (those of `upcycle.records.statistics.NAMES`; by default l1, l2, count and, with domains, mean)
    and `positions` the activations they are taken of (neurons, channels, heads). At most `limit` images or
    rows (of each domain) are read (None: 30,000 images or 2,048 rows; 0: all). `length` is the number of
    tokens of a row, and `sample` that of a sample. `field` is that of the text in JSON lines and parquet.
    `marked` is the number of neurons of a token that co_marker counts as active. `drop` has names and
    patterns of tensors of the source to leave out, those of the recipe that the statistics are for. A call
    that was stopped resumes if it is repeated with the same arguments. Raises `UpcycleError` for input that
    cannot be used.
    """
    from upcycle.calibration import calibration
    from upcycle.calibration import domains as of_experts

    refuse_unnamed(domains, "domains")
    experts = of_experts.given(prompts, domains or {})
    usual = ("l1", "l2", "count", "mean") if experts else ("l1", "l2", "count")
    chosen = usual if collect is None else names(collect, "collect")
    asked = calibration.ToCalibrate(
        images=images, text=text, domains=experts, collect=chosen,  # type: ignore[arg-type]
        positions=names(positions, "positions"), limit=limit, length=length, field=field,
        batch_size=batch_size, threshold=threshold, sample=sample, marked=marked, seed=seed,
        in_order=in_order, device=device, cache=cache,  # type: ignore[arg-type]
        allow_nonfinite=allow_nonfinite, drop=names(drop, "drop"),
    )  # fmt: skip
    return calibration.calibrate(source, out, asked, progress=progress)

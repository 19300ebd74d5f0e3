"""The figures of `upcycle inspect --plot`: those of a report that are about one checkpoint, and its favourite
patches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.evaluate.specialisation import Layer, Specialisation
from upcycle.report import drawing, figures
from upcycle.report.checkpoints import CheckpointRecord, read_checkpoint
from upcycle.report.document import Picture
from upcycle.report.records import place_of
from upcycle.report.sections import routers, similarity


def plot(checkpoint: str | Path, seen: Specialisation | None, out: Path) -> list[Path]:
    """Write the figures of a Mixture of Experts as PNG into the folder `out`; with what was `seen` on images,
    the patches that each expert likes best. Figures of an earlier time are replaced."""
    drawing.need_matplotlib()
    folder = Path(checkpoint)
    record = read_checkpoint(folder, folder.name)
    if record.anatomy is None:
        raise UpcycleError(f"{folder} is a dense model: there are no experts to plot; leave --plot out")
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"--plot {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in _pictures(record, seen):
        path = out / f"{picture.name}.png"
        partial_path = path.with_name(path.name + ".partial")
        partial_path.write_bytes(drawing.png(picture))
        partial_path.replace(path)
        paths.append(path)
    return paths


def _pictures(record: CheckpointRecord, seen: Specialisation | None) -> Iterable[Picture]:
    yield from similarity.pictures([(0, record.name, record)])
    if seen is None:
        return
    yield from (block for block in routers.on_shown(0, record) if isinstance(block, Picture))
    for layer in seen.layers:
        if layer.patches is not None:
            yield _favourites(layer)


def _favourites(layer: Layer) -> Picture:
    assert layer.patches is not None
    place = place_of({"stack": layer.stack, "layer": layer.layer})
    title = f"Favourite patches, layer {place}"
    return Picture(
        name=f"patches-{place.replace(' ', '-').replace('_', '-')}",
        title=title,
        caption="The patches that each expert was surest to get, the surest first.",
        draw=partial(figures.patches, title=title, pixels=layer.patches.pixels),
    )

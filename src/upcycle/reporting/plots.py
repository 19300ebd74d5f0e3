"""The figures of `upcycle inspect --plot`: those of one checkpoint in a report, and its favourite patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import UpcycleError
from upcycle.reporting import drawing, figures
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.document import Picture
from upcycle.reporting.sections import routers, similarity
from upcycle.system import claim, whole_file
from upcycle.system.wording import place_of

if TYPE_CHECKING:
    from upcycle.evaluation.specialisation import Layer, Specialisation


def refuse(out: Path) -> None:
    """Raise an error early if the figures could not be written after a long inspection."""
    drawing.need_matplotlib()
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"--plot {out} is a file; name a folder")


def plot(name: str, anatomy: Mapping[str, Any], seen: Specialisation | None, out: Path) -> list[Path]:
    """Write the figures of a Mixture of Experts as PNG files into the folder `out`.

    They show what `anatomy.inspect` found and, if the routing was observed in `seen`, the routing and the
    favourite patches of each expert. Figures of an earlier call are replaced.
    """
    refuse(out)
    if not any(layer["num_experts"] for layer in anatomy["layers"]):
        raise UpcycleError(f"{name} is a dense model: there are no experts to plot; leave --plot out")
    record = CheckpointRecord(
        name=Path(name).resolve().name, folder=out, made=None, scores=(), damage=(), anatomy=anatomy,
        routing=None if seen is None else seen.record,
    )  # fmt: skip
    pictures = [*_pictures(record, seen)]
    for picture in pictures:
        claim.may_replace(out / f"{picture.name}.png", _is_figure, "a figure of ours")
    paths = []
    for picture in pictures:
        path = out / f"{picture.name}.png"
        whole_file.write(path, drawing.png(picture))
        paths.append(path)
    return paths


def _is_figure(path: Path) -> bool:
    with path.open("rb") as file:
        return drawing.MADE_BY.encode() in file.read(4096)


def _pictures(record: CheckpointRecord, seen: Specialisation | None) -> Iterable[Picture]:
    yield from similarity.pictures([(0, record.name, record)])
    if seen is None:
        return
    yield from (
        block for block in routers.on_shown(0, record.name, seen.record) if isinstance(block, Picture)
    )
    for layer in seen.layers:
        if layer.patches is not None:
            yield _favourites(layer)


def _favourites(layer: Layer) -> Picture:
    assert layer.patches is not None
    place = place_of(layer.stack, layer.layer)
    title = f"Favourite patches, layer {place}"
    return Picture(
        name=f"patches-{place.replace(' ', '-').replace('_', '-')}",
        title=title,
        caption="The patches that each expert was surest to get, the surest first.",
        draw=partial(figures.patches, title=title, pixels=layer.patches.pixels),
    )

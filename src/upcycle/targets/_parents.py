"""The source's expert that each expert of a grown layer is: all are copied equally often, or by utility."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense import fingerprint
from upcycle.dense.mixtures import Mixture
from upcycle.errors import UpcycleError
from upcycle.init import Growth
from upcycle.records.reader import load
from upcycle.records.routing import RoutingRecord
from upcycle.system.once import once
from upcycle.system.wording import quoted

if TYPE_CHECKING:
    from upcycle.recipe import Grow, Recipe


def growth(source: Mixture, recipe: Recipe, layer: int) -> Growth:
    """Return which expert of the source each expert of a layer is."""
    grow, old, count = recipe.grow, source.num_experts, recipe.moe.num_experts
    assert grow is not None
    if grow.choose == "all":
        parents = tuple(e % old for e in range(count))
    else:
        parents = _most_used(_loads(source, grow, layer), count, grow.most_copies)
    together = even(parents) and recipe.moe.top_k == source.top_k * count // old
    return Growth(
        parents=parents,
        exact=together and not (count > old and grow.noisy),
        cancels=count > old and grow.noise > 0,
    )


def even(parents: tuple[int, ...]) -> bool:
    """Return whether every expert of the source is there equally often."""
    return len(set(Counter(parents).values())) == 1


def _most_used(loads: tuple[float, ...], count: int, most: int) -> tuple[int, ...]:
    """Return the experts and their copies: each next one is of the expert with the most load per copy."""
    copies = [1] * len(loads)
    parents = [*range(len(loads))]
    while len(parents) < count:
        open_ = [e for e in range(len(loads)) if copies[e] < most]
        best = max(open_, key=lambda e: (loads[e] / copies[e], -copies[e], -e))
        copies[best] += 1
        parents.append(best)
    return tuple(parents)


def _loads(source: Mixture, grow: Grow, layer: int) -> tuple[float, ...]:
    """Return each expert's share of the tokens of a layer, as routing.json has it."""
    path = Path(grow.statistics)
    record = _routing(path, path.stat().st_mtime_ns if path.is_file() else 0)
    if record.weights is not None and _weights(source.checkpoint) not in (None, record.weights):
        raise UpcycleError(
            f"grow.statistics: {path} is of other weights than those in {source.checkpoint.folder}; make it "
            f"with `upcycle inspect {quoted(source.checkpoint.folder)} --text NAME=FILE`"
        )
    found = [row.load for row in record.layers if row.layer == layer]
    if len(found) != 1 or len(found[0]) != source.num_experts:
        raise UpcycleError(
            f"grow.statistics: {path} does not have the routing of the {source.num_experts} experts of layer "
            f"{layer}; make it with `upcycle inspect {quoted(source.checkpoint.folder)} --text NAME=FILE`"
        )
    return found[0]


@once(maxsize=2)
def _weights(checkpoint: Checkpoint) -> str | None:
    """Return what identifies the weights; None if only headers are here."""
    here = all(file.is_file() for file in checkpoint.files)
    return fingerprint.of_weights(checkpoint) if here else None


@once(maxsize=2)
def _routing(path: Path, mtime: int) -> RoutingRecord:
    return RoutingRecord.of(load(path, f"grow.statistics: there is no file {path}"), str(path))

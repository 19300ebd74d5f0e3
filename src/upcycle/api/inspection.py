"""`upcycle.inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle import inspection
from upcycle.api._names import names, refuse_unnamed
from upcycle.errors import UpcycleError
from upcycle.system.needed import said_if_missing
from upcycle.system.progress import Progress, reporting_to

if TYPE_CHECKING:
    from upcycle.evaluation.specialisation import Specialisation


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """The cosine similarity of the pairs of different experts of a layer."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer, or its universal experts; a block that stayed dense has no experts."""

    count: int
    width: int  # the number of neurons of one expert
    cosine: tuple[tuple[float, ...], ...]  # [E, E]
    between: Similarity | None  # None: fewer than two experts

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Experts:
        """Make the experts of a row of the table."""
        between = row.get("cosine_between")
        return cls(
            count=row["num_experts"],
            width=row["width"],
            cosine=tuple(map(tuple, row.get("cosine", ()))),
            between=None if between is None else Similarity(**between),
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model, with its experts and its router."""

    stack: str
    layer: int
    dtype: str
    experts: Experts
    universal: Experts | None  # narrower experts beside the others
    to_dense: tuple[float, ...] | None  # cosine of each expert to the dense network; None: unknown
    router_norms: tuple[float, ...]  # [E], norms of the rows of the router
    at_start: Similarity | None  # similarity of the experts when training began; None: unknown

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Block:
        """Make the block of a row of the table."""
        dense, start = row.get("cosine_to_dense"), row.get("cosine_between_at_start")
        return cls(
            stack=row.get("stack", "layers"),
            layer=row["layer"],
            dtype=row["dtype"],
            experts=Experts.of(row),
            universal=Experts.of(row["universal"]) if "universal" in row else None,
            to_dense=None if dense is None else tuple(dense),
            router_norms=tuple(row.get("router_norms", ())),
            at_start=None if start is None else Similarity(**start),
        )


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The inspection of a checkpoint: its blocks, and its routing if rows were given."""

    name: str  # the name of the checkpoint, as given
    table: Mapping[str, Any]  # facts about the weights, as JSON
    routing: Specialisation | None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return Path(self.table["checkpoint"])

    @property
    def model_type(self) -> str:
        """The model type in config.json."""
        return str(self.table["model_type"])

    @property
    def parameters(self) -> int:
        """The total number of elements of the tensors of the checkpoint."""
        return int(self.table["parameters"])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order."""
        return tuple(Block.of(row) for row in self.table["layers"])

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """The provenance in upcycle.json; None if there is none."""
        return self.table["provenance"]

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts that could not be found out, with the reason."""
        return tuple(self.table["notes"])

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON."""
        found = dict(self.table)
        return found if self.routing is None else found | {"routing": self.routing.as_dict()}

    def plot(self, out: str | Path) -> list[Path]:
        """Write the figures as PNG files into the folder `out`; figures of an earlier call are replaced."""
        from upcycle.reporting import plots

        return plots.plot(self.name, self.as_dict(), self.routing, Path(out))

    def save(self) -> Path | None:
        """Write the routing to routing.json in the folder of the checkpoint; None if no rows were given."""
        return None if self.routing is None else self.routing.save()


@said_if_missing()
def inspect(
    checkpoint: str | Path,
    source: str | Path | None = None,
    *,
    text: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
    limit: int = 256,
    length: int | None = None,
    field: str = "text",
    batch_size: int = 16,
    seed: int = 0,
    cache: str | Path | None = None,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Inspect the experts and routers of a checkpoint: widths, norms and similarities.

    Experts are compared with each other and with the dense network. `source` is the dense checkpoint they
    were made from (None: the one in the provenance). `text` and `images` give one set of rows per domain, by
    name. The model is then run on at most `limit` rows of each (0: all) of `length` tokens, and its routing
    is recorded. `field` is that of the text in JSON lines and parquet. `drop` has names and patterns of
    tensors of the dense checkpoint to leave out, besides those in the provenance. Raises `UpcycleError` for a
    file that it cannot read.
    """
    refuse_unnamed(text, "text")
    refuse_unnamed(images, "images")
    if not (text or images):
        _refuse_idle(limit=limit, length=length, field=field, batch_size=batch_size, seed=seed, cache=cache)
    table, seen = inspection.inspect(checkpoint, source, names(drop, "drop")), None
    if text or images:
        from upcycle.evaluation.specialisation import ToWatch, specialisation

        asked = ToWatch(
            text=text, images=images, limit=limit, length=length, field=field,  # type: ignore[arg-type]
            batch_size=batch_size, seed=seed, cache=cache,  # type: ignore[arg-type]
        )  # fmt: skip
        with reporting_to(progress):
            seen = specialisation(table["checkpoint"], asked)
    return Inspection(name=str(checkpoint), table=table, routing=seen)


def _refuse_idle(**given: object) -> None:
    """Refuse settings of the routing if no rows are given to watch the routers on."""
    usual = signature(inspect).parameters
    for name, value in given.items():
        if value != usual[name].default:
            raise UpcycleError(
                f"--{name.replace('_', '-')} {value} is for rows to watch the routers on, and there are "
                f"none; give --text [NAME=]PATH or --images [NAME=]PATH, or leave it out"
            )

"""`upcycle.inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle import inspection
from upcycle.system.progress import Progress, reporting_to

if TYPE_CHECKING:
    from upcycle.evaluation.specialisation import Specialisation


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Cosine similarity of the pairs of different experts of a layer."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer, or its universal ones; a block that stayed dense has none."""

    count: int
    width: int  # neurons of one expert
    cosine: tuple[tuple[float, ...], ...]  # [E, E]
    between: Similarity | None  # None: fewer than two experts

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Experts:
        """The experts that a row of the table tells of."""
        between = row.get("cosine_between")
        return cls(
            count=row["num_experts"],
            width=row["width"],
            cosine=tuple(map(tuple, row.get("cosine", ()))),
            between=None if between is None else Similarity(**between),
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model: its experts and its router."""

    stack: str
    layer: int
    dtype: str
    experts: Experts
    universal: Experts | None  # narrower experts beside them
    to_dense: tuple[float, ...] | None  # cosine of each expert to the dense network; None: not known
    router_norms: tuple[float, ...]  # of the router's rows, [E]
    at_start: Similarity | None  # of the experts when training began; None: not known

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Block:
        """The block that a row of the table tells of."""
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
    """A checkpoint seen block by block, and who goes where in it if rows were shown to it."""

    name: str  # as it was given
    table: Mapping[str, Any]  # what the weights say, as JSON has it
    routing: Specialisation | None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return Path(self.table["checkpoint"])

    @property
    def model_type(self) -> str:
        """That of config.json."""
        return str(self.table["model_type"])

    @property
    def parameters(self) -> int:
        """How many numbers the tensors of the checkpoint hold together."""
        return int(self.table["parameters"])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order."""
        return tuple(Block.of(row) for row in self.table["layers"])

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """What upcycle.json says; None: there is none."""
        return self.table["provenance"]

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be told, and why."""
        return tuple(self.table["notes"])

    def as_dict(self) -> dict[str, Any]:
        """The inspection as JSON has it."""
        found = dict(self.table)
        return found if self.routing is None else found | {"routing": self.routing.as_dict()}

    def plot(self, out: str | Path) -> list[Path]:
        """Write the figures as PNG into the folder `out`; those of an earlier time are replaced."""
        from upcycle.reporting import plots

        return plots.plot(self.name, self.as_dict(), self.routing, Path(out))

    def save(self) -> Path | None:
        """Write who goes where to routing.json in the checkpoint's folder; None if no rows were shown."""
        return None if self.routing is None else self.routing.save()


def inspect(
    checkpoint: str | Path,
    source: str | Path | None = None,
    *,
    text: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
    limit: int = 256,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at the experts of a checkpoint: width, similarity to each other and to the dense network, routers.

    `source` is the dense checkpoint it was made from (None: the one that its provenance names). With `text`
    or `images`, one set for each domain by name, the model is shown at most `limit` rows of each (0: all) of
    `length` tokens, and its routers are watched. Raises `UpcycleError` for what it cannot read.
    """
    table, seen = inspection.inspect(checkpoint, source), None
    if text or images:
        from upcycle.evaluation.specialisation import Asked, specialisation

        asked = Asked(
            text=text, images=images, limit=limit, length=length, batch_size=batch_size, seed=seed,  # type: ignore[arg-type]
            cache=cache,  # type: ignore[arg-type]
        )  # fmt: skip
        with reporting_to(progress):
            seen = specialisation(table["checkpoint"], asked)
    return Inspection(name=str(checkpoint), table=table, routing=seen)

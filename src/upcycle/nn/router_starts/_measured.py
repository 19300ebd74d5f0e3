"""The base of the router starts that are made of a file of statistics."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from upcycle.errors import UpcycleError, listed, nearest
from upcycle.nn.router_starts import RouterStart
from upcycle.records.statistics import Statistics, unmeasured
from upcycle.settings import Above
from upcycle.tensors.computed import Made
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.dense.source import Dense
    from upcycle.init import Site

DIGITS = 6  # decimals of a row of length one, so that another machine's last bit hardly ever changes a row
_SMALLEST = 1e-12  # a row that is shorter, relative to what it is the difference of, has no direction


@dataclass(frozen=True, kw_only=True)
class Measured(RouterStart, abc.ABC):
    """Rows of length one, divided by a temperature, made of what `upcycle calibrate` measured.

    A token x gives expert e the logit |x| cos(x, row e) / temperature, and |x| is about sqrt(H) behind a norm
    whose weights are about one.
    """

    from_data: ClassVar[bool] = True
    texts: ClassVar[str]  # the option of `upcycle calibrate` that names them
    needs: ClassVar[str] = "router.init.statistics = FILE, from upcycle calibrate"

    statistics: str = ""  # the file written by `upcycle calibrate`
    temperature: Annotated[float, Above(0)] = 1.0  # what the rows, of length one, are divided by

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make_absolute("statistics")

    @property
    @abc.abstractmethod
    def collect(self) -> str:
        """What `upcycle calibrate` has to collect: names of statistics with commas between them."""

    @property
    def measured(self) -> Statistics:
        """The file of statistics."""
        if not self.statistics:
            who = f"router.init = {self.name} starts from"
            raise unmeasured(who, "router.init.statistics", f"{self.collect} {self.texts}")
        return Statistics.shared(self.statistics)

    def admit(self, dense: Dense) -> None:
        self.measured.refuse_other(dense.fingerprint, dense.checkpoint.folder)

    def uniform(self, std: float) -> bool:
        return False

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        if site.hidden != site.dense_hidden:
            raise UpcycleError(
                f"router.init = {self.name} has rows of the {site.dense_hidden} channels that were measured, "
                f"and the successor has {site.hidden}; use normal"
            )
        if rows != site.all_experts:
            raise UpcycleError(
                f"router.init = {self.name} has a row for each expert, and this router has {rows} slots for "
                f"{site.all_experts} experts; use normal or orthogonal"
            )
        self.refuse(site, rows)
        table = {key: value for key, value in self.as_table().items() if key != "statistics"}
        about = ["router", table, self.measured.digest, site.stack, site.layer, rows, *self.drawn(site)]
        return Made((rows, site.hidden), dtype, lambda: self._scaled(site, rows), about)

    def _scaled(self, site: Site, rows: int) -> np.ndarray:
        made: np.ndarray = self.rows(site, rows) / self.temperature
        return made

    @abc.abstractmethod
    def rows(self, site: Site, rows: int) -> np.ndarray:
        """Return the rows of length one, [E, H]."""

    def refuse(self, site: Site, rows: int) -> None:
        """Raise `UpcycleError` if the statistics are not those of `rows` experts."""

    def drawn(self, site: Site) -> list[object]:
        """Return what random numbers depend on, if the rows do on any."""
        return []


@dataclass(frozen=True, kw_only=True)
class OfDomains(Measured):
    """A row for each domain. `domains` names that of each expert; without it, they have the file's order."""

    # the domain of each expert, by the names given to calibrate; by default those of the file, in its order
    domains: tuple[str, ...] = ()

    def places(self, rows: int) -> list[int]:
        """Return the number of the domain of each of `rows` experts."""
        known = [domain.name for domain in self.measured.domains]
        if not known:
            raise UpcycleError(
                f"{self.measured.path} knows no domains; calibrate with --collect {self.collect} {self.texts}"
            )
        if unknown := [name for name in self.domains if name not in known]:
            raise UpcycleError(
                f"router.init.domains: {self.measured.path} has no domain {unknown[0]}"
                f"{nearest(unknown[0], known)}"
            )
        taken = self.domains or tuple(known)
        if len(taken) != rows:
            said = "router.init.domains names" if self.domains else f"{self.measured.path} has"
            few = "fewer" if len(taken) < rows else "more"
            raise UpcycleError(
                f"{said} {len(taken)} domains ({listed(list(taken))}) and a layer has {rows} experts, so "
                f"there are {few} domains than experts; give one for each expert"
            )
        return [known.index(name) for name in taken]

    def refuse(self, site: Site, rows: int) -> None:
        self.places(rows)


def unit(rows: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """Return rows [N, H] divided by their lengths, in float64; one without a direction stays zero.

    `scale` is the length of the vectors that a row is a difference of.
    """
    wide = rows.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(1, keepdims=True))
    small = lengths <= _SMALLEST * np.maximum(scale, 1e-300)
    return np.where(small, 0.0, wide / np.where(small, 1.0, lengths)).round(DIGITS)

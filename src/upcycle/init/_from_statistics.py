"""The base of the initialisations that choose by what `upcycle calibrate` measured."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.init import Init
from upcycle.records.statistics import Statistics, unmeasured

if TYPE_CHECKING:
    from upcycle.dense.source import Dense


@dataclass(frozen=True, kw_only=True)
class FromStatistics(Init):
    """An initialisation with a file of statistics, which must be those of its source."""

    statistics: str = ""  # the file written by `upcycle calibrate`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.statistics:
            raise unmeasured(f"init {self.name} chooses by", "init.statistics", self.collect)
        self._make_absolute("statistics")

    @property
    @abc.abstractmethod
    def collect(self) -> str:
        """What `upcycle calibrate` has to collect: names of statistics with commas between them."""

    @property
    def measured(self) -> Statistics:
        """The file of statistics."""
        return Statistics.shared(self.statistics)

    def admit(self, dense: Dense) -> None:
        self.measured.refuse_other(dense.fingerprint, dense.checkpoint.folder)

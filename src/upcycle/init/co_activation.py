"""Experts from parts of the co-activation graph, so that neurons that fire together stay together.

The method is that of MoE Jetpack, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.init._selecting import Choice, drawn
from upcycle.init.importance import Measured
from upcycle.init.split import balanced_kmeans
from upcycle.records.statistics import Statistics
from upcycle.settings import AtLeast
from upcycle.system.once import once
from upcycle.tensors import rng


@dataclass(frozen=True, kw_only=True)
class CoActivation(Measured):
    """Experts are made of parts of the co-activation graph.

    The neurons of a layer are the vertices, and an edge says how often two of them are active together. The
    graph is cut into `parts` of equal size. An expert takes parts, drawn without replacement in proportion to
    the co-activation within them, until it has enough neurons; of the last part it takes the first ones.

    `partition` is `metis` (pymetis), `spectral` (leading eigenvectors and balanced k-means, without another
    library), or `auto`, which is metis if it is installed and spectral otherwise. `weighted` says whether
    METIS sees edge weights (paper) or only which edges exist (repo). Channels and heads are chosen as in
    `importance`.
    """

    summary = "groups of neurons that fire together, from a larger network (MoE Jetpack)"
    needs = "init.statistics = FILE, from upcycle calibrate --collect l2,co_activation"

    parts: Annotated[int, AtLeast(2)] = 32  # number of groups of equal size that the neurons are cut into
    # by pymetis (metis), by eigenvectors (spectral), or by pymetis if it is installed (auto)
    partition: Literal["auto", "metis", "spectral"] = "auto"
    # whether metis sees how often neurons fire together (paper), or only which ones do (repo)
    weighted: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._default("weighted", self.preset == "paper")
        found = find_spec("pymetis") is not None
        if self.partition == "metis" and not found:
            raise UpcycleError(
                "init.partition = metis needs pymetis: pip install 'upcycle[metis]', or use spectral"
            )
        # Resolved here, so that a folder records how it was made and is made the same way elsewhere.
        if self.partition == "auto":
            object.__setattr__(self, "partition", "metis" if found else "spectral")

    @property
    def collect(self) -> str:
        return f"{self.statistic},co_activation"

    @property
    def settings(self) -> list[object]:
        return [self.parts, self.partition, self.weighted]

    def _read(self, choice: Choice) -> str:
        parted = choice.kind == "neurons" and choice.layer is not None
        return "co_activation" if parted else super()._read(choice)

    def sampled(self, choice: Choice) -> np.ndarray:
        if choice.kind != "neurons" or choice.layer is None:
            return super().sampled(choice)
        by_metis = self.partition == "metis"
        labels, inside = _parts(
            self.measured, choice.stack, choice.layer, self.parts, by_metis, bool(self.weighted)
        )
        order = drawn(self._key(choice), inside)
        return np.sort(np.concatenate([np.flatnonzero(labels == p) for p in order])[: choice.count])

    def working_memory(self, width: int, hidden: int) -> int:
        return 4 * 8 * width * width


@once(maxsize=16)
def _parts(
    measured: Statistics, stack: str, layer: int, parts: int, by_metis: bool, weighted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each neuron of a layer, [I], and the co-activation within each part, float64 [P]."""
    graph = measured.of("neurons", stack, layer, "co_activation").astype(np.float64)
    np.fill_diagonal(graph, 0.0)
    if parts > len(graph):
        raise UpcycleError(f"init.parts = {parts} is more than the {len(graph)} neurons of a layer")
    labels = metis(graph, parts, weighted) if by_metis else spectral(graph, parts)
    inside = [graph[np.ix_(labels == p, labels == p)].sum() for p in range(parts)]
    return labels, np.array(inside)


def metis(graph: np.ndarray, parts: int, weighted: bool) -> np.ndarray:
    """Return the parts that METIS finds, [I]; nonzero edge weights become whole numbers from 1 to 1000."""
    import pymetis

    scale = 1000 / max(graph.max(), 1e-300)
    starts, neighbours, weights = [0], [], []
    for row in graph:
        joined = np.flatnonzero(row > 0)
        neighbours.append(joined)
        weights.append(np.maximum(1, np.round(row[joined] * scale)).astype(np.int64))
        starts.append(starts[-1] + len(joined))
    options = {"eweights": np.concatenate(weights).tolist()} if weighted else {}
    _, labels = pymetis.part_graph(parts, xadj=starts, adjncy=np.concatenate(neighbours).tolist(), **options)
    return np.array(labels, np.int64)


def spectral(graph: np.ndarray, parts: int) -> np.ndarray:
    """Return parts of equal size, give or take one, from leading eigenvectors of the normalised graph.

    The result is [I].
    """
    degree = np.sqrt(np.maximum(graph.sum(1), 1e-12))
    _, vectors = np.linalg.eigh(graph / degree[:, None] / degree[None])
    return balanced_kmeans(vectors[:, -parts:].astype(np.float32), parts, rng.key(0, "spectral"))


init = CoActivation

"""The dense network cut into experts, each neuron in one of them (MoEfication, LLaMA-MoE).

The partition of the neurons into N equal parts is random, found by balanced k-means on the gate's rows, or
given in a file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.init import Init, Site
from upcycle.system.once import once
from upcycle.tensors import rng
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.positions import Computed, Given, Order


@dataclass(frozen=True, kw_only=True)
class Split(Init):
    """Expert e is part e of the neurons; this needs moe.granularity = moe.num_experts.

    `by`: `random`, `kmeans` (cosine, on the rows of the gate matrix, or of up if there is no gate; Zhang et
    al., arXiv 2110.01786), or `file` (`labels` names a JSON file with a list per layer number that gives the
    expert of each neuron; a model of several stacks of blocks needs a table with such lists for each stack).

    `output`: `selected` multiplies by K, so that the chosen parts are summed as in MoEfication; `expected` by
    N, so that the mean over experts is the dense output; `llama_moe` by N / K (score_scale_factor of arXiv
    2406.16554). The first two give the dense network if K = N.
    """

    summary = "the dense FFN's neurons dealt out to the experts (LLaMA-MoE, MoEfication)"
    needs = "moe.granularity = moe.num_experts"
    fine_grained = True

    # how neurons are dealt out: at random, by balanced k-means on the gate, or by the file in labels
    by: Literal["random", "kmeans", "file"] = "random"
    # a JSON file with the expert of each neuron for each layer number, or for each name of a stack of blocks
    # (encoder, decoder, stage_1, mtp, ...) such lists
    labels: str = ""
    # factor for the outputs: K (selected), N (expected), N / K (llama_moe)
    output: Literal["selected", "expected", "llama_moe"] = "selected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.by == "file") != bool(self.labels):
            raise UpcycleError('init.labels names the file of init.by = "file"; give both or neither')
        self._make_absolute("labels")

    def check(self, site: Site) -> None:
        super().check(site)
        if site.granularity != site.num_experts:
            raise UpcycleError(
                f"split deals every neuron out once: moe.granularity must equal moe.num_experts, and "
                f"they are {site.granularity} and {site.num_experts}"
            )

    def check_together(self, sites: Sequence[Site]) -> None:
        if self.by != "file" or _is_by_stack(_read(Path(self.labels))):
            return
        stack_of: dict[int, str] = {}
        for site in sites:
            other = stack_of.setdefault(site.layer, site.stack)
            if other != site.stack:
                raise UpcycleError(
                    f"init.labels: layer {site.layer} is one of {other} and one of {site.stack}; give "
                    f"{self.labels} a table with the lists of each, by the names {other} and {site.stack}"
                )

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        n, width = site.dense_width, site.width
        if self.by == "random":
            return dense[0].take(Order(site.key("split"), n, e * width, (e + 1) * width, sort=True))
        if self.by == "file":
            labels = _from_file(Path(self.labels), site)
            return dense[0].take(Given(tuple(np.flatnonzero(labels == e).tolist())))
        gate = dense[0].gate if dense[0].gate is not None else dense[0].up
        return dense[0].take(
            Computed(
                lambda: np.flatnonzero(_partition(gate, site) == e),
                width,
                ["kmeans", e, list(site.key("kmeans")), gate.describe()],
            )
        )

    def scale(self, site: Site) -> float:
        n, k = site.num_experts, site.top_k
        return {"selected": float(k), "expected": float(n), "llama_moe": n / k}[self.output]

    def working_memory(self, width: int, hidden: int) -> int:
        return 3 * 4 * width * hidden if self.by == "kmeans" else 0  # rows, unit rows, and one working copy

    def preserves(self, site: Site) -> bool:
        whole = site.top_k == site.num_experts == self.scale(site)
        return whole and (site.uniform_router or site.num_experts == 1)

    def warnings(self, site: Site) -> list[str]:
        if self.preserves(site) or site.top_k != site.num_experts or self.scale(site) != site.top_k:
            return []
        return [
            "all parts are chosen, and they add up to the dense network where the router scores all of them "
            "alike: router.init = zeros keeps the function"
        ]


@once(maxsize=1)
def _parsed(path: Path, mtime: int) -> Any:
    return json.loads(path.read_text())


def _labels(path: Path) -> Any:
    """Return the content of the file, parsed once for all experts of all layers."""
    return _parsed(path, path.stat().st_mtime_ns)


def _read(path: Path) -> Any:
    """Return the content of the file. Raises `UpcycleError` if it cannot be read or is no JSON."""
    try:
        return _labels(path)
    except OSError as error:
        raise UpcycleError(f"init.labels: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UpcycleError(f"init.labels: {path} must be JSON, with a list for each layer") from None


def _is_by_stack(found: Any) -> bool:
    """Return whether the content of a file is a table with what is known of each stack of blocks."""
    return isinstance(found, dict) and not all(key.isdecimal() for key in found)


def _from_file(path: Path, site: Site) -> np.ndarray:
    """Return the expert of each neuron of a layer, [I]."""
    found = _read(path)
    where = f"layer {site.layer}" + (f" of {site.stack}" if _is_by_stack(found) else "")
    try:
        layers = found[site.stack] if _is_by_stack(found) else found
        labels = np.array(layers[str(site.layer)] if isinstance(layers, dict) else layers[site.layer])
    except (ValueError, LookupError, TypeError):
        raise UpcycleError(
            f"init.labels: {path} must be JSON with a list of {site.dense_width} expert numbers for "
            f"each layer; {where} has none"
        ) from None
    if labels.shape != (site.dense_width,):
        raise UpcycleError(
            f"init.labels: {where} of {path} must give each of {site.dense_width} neurons an expert; it has "
            f"a list of {labels.size}"
        )
    right = labels.dtype.kind == "i" and labels.min() >= 0
    counts = np.bincount(labels, minlength=site.num_experts) if right else np.zeros(0, np.int64)
    if counts.shape != (site.num_experts,) or (counts != site.width).any():
        raise UpcycleError(
            f"init.labels: {where} of {path} must give each of {site.dense_width} neurons an "
            f"expert, {site.width} to each of {site.num_experts}; it gives {counts.tolist()}"
        )
    return labels


@once(maxsize=8)
def _partition(gate: Lazy, site: Site) -> np.ndarray:
    """Return the k-means labels of `gate`'s rows, computed once for all experts of a layer."""
    return balanced_kmeans(gate.all("F32"), site.num_experts, site.key("kmeans"))


def balanced_kmeans(rows: np.ndarray, k: int, key: rng.Key, rounds: int = 20) -> np.ndarray:
    """Cluster `rows` [I, H] by cosine similarity into `k` clusters of at most I / k rows (rounded up).

    Rows are balanced greedily. Returns the labels, [I].
    """
    n = len(rows)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centroids = unit[_spread_out(unit, k, key)]
    labels = np.full(n, -1)
    for _ in range(rounds):
        # Rounded, so that the last bit of a matrix product on another machine hardly ever moves a neuron.
        similarity = np.round((unit @ centroids.T).astype(np.float64), 5)
        new = _deal(similarity, -(-n // k))
        if (new == labels).all():
            break
        labels = new
        centroids = np.stack(
            [unit[labels == e].mean(axis=0) if (labels == e).any() else centroids[e] for e in range(k)]
        )
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return labels


def _spread_out(unit: np.ndarray, k: int, key: rng.Key) -> list[int]:
    """Return k rows far from one another: a random one, then always the row least like those chosen."""
    chosen = [int(rng.permutation(key, len(unit))[0])]
    closest = np.round(unit @ unit[chosen[0]], 5)
    while len(chosen) < k:
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, np.round(unit @ unit[chosen[-1]], 5))
    return chosen


def _deal(similarity: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each row to its most similar cluster with room; rows with the most to lose come first."""
    n, k = similarity.shape
    ranked = np.argsort(-similarity, axis=1, kind="stable")
    best = np.take_along_axis(similarity, ranked, axis=1)
    regret = best[:, 0] - best[:, min(1, k - 1)]
    labels, room = np.empty(n, np.int64), [capacity] * k
    for i in np.argsort(-regret, kind="stable"):
        e = next(int(e) for e in ranked[i] if room[e])
        labels[i], room[e] = e, room[e] - 1
    return labels


init = Split

"""Balanced assignment: rows to clusters of equal size, at the least total cost."""

from __future__ import annotations

import numpy as np


def balanced(cost: np.ndarray) -> np.ndarray:
    """Return the cluster of each row, [n], for integer costs [n, k] and clusters of n / k rows each.

    The total cost is the least there is: rows are dealt out greedily, those with the most to lose first, and
    then moved round circles of clusters as long as one lowers the cost (Klein 1967). Equal costs are broken
    by the lowest number, so the result does not depend on the machine.
    """
    n, k = cost.shape
    assert n % k == 0
    labels = _greedy(cost, n // k)
    while (circle := _circle(cost, labels, k)) is not None:
        moved = [_cheapest(cost, labels, a, b)[1] for a, b in circle]
        for (_, b), row in zip(circle, moved, strict=True):
            labels[row] = b
    return labels


def _greedy(cost: np.ndarray, capacity: int) -> np.ndarray:
    ranked = np.argsort(cost, axis=1, kind="stable")
    best = np.take_along_axis(cost, ranked, axis=1)
    regret = best[:, min(1, cost.shape[1] - 1)] - best[:, 0]
    labels, room = np.empty(len(cost), np.int64), [capacity] * cost.shape[1]
    for i in np.argsort(-regret, kind="stable"):
        e = next(int(e) for e in ranked[i] if room[e])
        labels[i], room[e] = e, room[e] - 1
    return labels


def _cheapest(cost: np.ndarray, labels: np.ndarray, a: int, b: int) -> tuple[int, int]:
    """Return the least that moving a row from cluster a to b adds to the cost, and that row."""
    rows = np.flatnonzero(labels == a)
    added = cost[rows, b] - cost[rows, a]
    at = int(added.argmin())
    return int(added[at]), int(rows[at])


def _circle(cost: np.ndarray, labels: np.ndarray, k: int) -> list[tuple[int, int]] | None:
    """Return moves from cluster to cluster, round a circle, that lower the cost; None if none do."""
    own = np.take_along_axis(cost, labels[:, None], axis=1)
    edges = np.stack([(cost - own)[labels == a].min(0) for a in range(k)])  # [from, to]
    distance, before = np.zeros(k, edges.dtype), np.full(k, -1)
    last = -1
    for _ in range(k):  # Bellman-Ford from everywhere; a change in round k lies on a circle
        through = distance[:, None] + edges
        shorter = through.min(0) < distance
        if not shorter.any():
            return None
        before = np.where(shorter, through.argmin(0), before)
        distance = np.minimum(distance, through.min(0))
        last = int(np.flatnonzero(shorter)[0])
    for _ in range(k):
        last = int(before[last])
    circle, at = [], last
    while True:
        circle.append((int(before[at]), at))
        at = int(before[at])
        if at == last:
            return circle


__all__ = ["balanced"]

"""The few-shot linear probe of Sparse Upcycling: how well a linear map of frozen features predicts classes.

It follows the code of V-MoE: standardised features with a constant feature, targets of -1 and 1, and ridge
regression in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.tensors import rng

BIAS = 100.0  # the value of the constant feature: regularised too, but so large that it hardly matters
MOST = 1 << 20  # the largest number of classes
EPSILON = 1e-5  # added to a standard deviation

Solver = Literal["auto", "primal", "dual"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear classifier of standardised features."""

    mean: np.ndarray  # float64 [D]
    std: np.ndarray  # float64 [D], with EPSILON
    weights: np.ndarray  # float64 [D + 1, C]; the last row is that of the constant feature

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the class of each row of `features` [N, D], as int64 [N]."""
        scores = _design(_finite(features), self.mean, self.std) @ self.weights
        return np.argmax(scores, axis=1)


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The accuracy of the probe on the test examples, for each seed."""

    accuracies: tuple[float, ...]

    @property
    def accuracy_mean(self) -> float:
        """The mean accuracy over the seeds."""
        return float(np.mean(self.accuracies))

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean; None for a single seed."""
        n = len(self.accuracies)
        return float(np.std(self.accuracies, ddof=1) / n**0.5) if n > 1 else None


def shots(labels: np.ndarray, per_class: int, seed: int, *, num_classes: int | None = None) -> np.ndarray:
    """Return the indices of `per_class` examples of each class, class after class, as int64 [C x per_class].

    With the same seed, a smaller number of shots is a subset of a larger one. Without `num_classes`, the
    largest label is the last class. Raises `UpcycleError` if a class has too few examples.
    """
    labels = _labels(labels, num_classes)
    if per_class < 1:
        raise UpcycleError(f"per_class = {per_class}; it must be 1 or more examples of each class")
    counts = np.bincount(labels, minlength=num_classes or 1)
    scarce = int(np.argmin(counts))
    if counts[scarce] < per_class:
        raise UpcycleError(
            f"class {scarce} has {counts[scarce]} examples, fewer than per_class = {per_class}; lower it, or "
            f"give more examples"
        )
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [
        places[rng.permutation(rng.key(seed, "shots", c), len(places))[:per_class]]
        for c, places in enumerate(members)
    ]
    return np.concatenate(chosen)


def fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, *, l2: float = 1024.0, solver: Solver = "auto"
) -> Probe:
    """Fit the ridge regression of the classes on `features` [N, D].

    `primal` solves a system of D + 1 unknowns and `dual` one of N, with the same weights as the result;
    `auto` takes the smaller system. Raises `UpcycleError` for features or labels that cannot be fitted.
    """
    if not 0 < l2 < float("inf"):
        raise UpcycleError(f"l2 = {l2}; it must be greater than 0 and finite")
    labels = _labels(labels, num_classes)
    _refuse_shape(features, labels)
    features = _finite(features)
    mean, std = features.mean(axis=0), features.std(axis=0) + EPSILON
    x = _design(features, mean, std)
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    n, d = x.shape
    if solver == "auto":
        solver = "primal" if n >= d else "dual"
    if solver == "primal":
        weights = np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), y)
    return Probe(mean=mean, std=std, weights=weights)


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    per_class: int = 10,
    l2: float = 1024.0,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> FewShot:
    """Fit a probe to `per_class` training examples of each class for each seed, and test it.

    Features are [N, H] and labels [N]. Raises `UpcycleError` for the same reasons as `fit` and `shots`.
    """
    train_labels, test_labels = _labels(train_labels, num_classes), _labels(test_labels, num_classes)
    _refuse_shape(train_features, train_labels)
    _refuse_shape(test_features, test_labels)
    found = []
    for seed in seeds:
        chosen = shots(train_labels, per_class, seed, num_classes=num_classes)
        probe = fit(train_features[chosen], train_labels[chosen], num_classes, l2=l2)
        found.append(float(np.mean(probe.predict(test_features) == test_labels)))
    return FewShot(accuracies=tuple(found))


def _design(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the standardised features with the constant feature, float64 [N, D + 1]."""
    out = np.full((len(features), len(mean) + 1), BIAS)
    np.divide(np.subtract(features, mean), std, out=out[:, :-1])
    return out


def _labels(labels: np.ndarray, num_classes: int | None) -> np.ndarray:
    labels = np.asarray(labels, np.int64)
    if labels.size and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise UpcycleError(
            f"the labels go from {labels.min()} to {labels.max()} and must be {allowed}; renumber the classes"
        )
    classes = num_classes or (int(labels.max()) + 1 if labels.size else 0)
    if classes > MOST:
        raise UpcycleError(f"the labels name {classes:,} classes, and {MOST:,} are allowed; renumber them")
    return labels


def _refuse_shape(features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not features.size:
        raise UpcycleError(
            f"features of shape {list(features.shape)} for {len(labels)} labels; give one row of features a "
            f"label, and at least one"
        )


def _finite(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise UpcycleError(
            "the features hold NaN or inf and a probe needs numbers; look for them in the model"
        )
    return features

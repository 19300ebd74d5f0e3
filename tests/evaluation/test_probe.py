"""The few-shot probe: the ridge regression that others compute, on examples that the seed alone chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from upcycle.errors import UpcycleError
from upcycle.evaluation import probe
from upcycle.evaluation.probe import FewShot, few_shot, fit, shots

SHAPES = {"more examples": (60, 12, 4), "more features": (20, 50, 4), "square": (13, 12, 3)}


def problem(n: int, d: int, c: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of all sizes and places, one of them constant, and labels."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, d)) * 10 ** generator.uniform(-2, 3, d) + 5 * generator.normal(
        size=d
    )
    features[:, 1] = 3.25
    return features, np.arange(n) % c


def clusters(
    per_class: int, noise: float, seed: int, *, d: int = 20, c: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Points around one centre a class."""
    generator = np.random.default_rng(seed)
    centres = 10 * np.random.default_rng(99).normal(size=(c, d))
    labels = generator.permutation(np.repeat(np.arange(c), per_class))
    return centres[labels] + noise * generator.normal(size=(len(labels), d)), labels


def regression(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and the targets, number by number."""
    x = np.empty((features.shape[0], features.shape[1] + 1))
    for j, column in enumerate(features.T.tolist()):
        mean = sum(column) / len(column)
        deviation = (sum((v - mean) ** 2 for v in column) / len(column)) ** 0.5
        x[:, j] = [(v - mean) / (deviation + 1e-5) for v in column]
    x[:, -1] = 100.0
    y = np.array([[1.0 if c == label else -1.0 for c in range(classes)] for label in labels])
    return x, y


# --- the regression


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_weights_are_those_of_least_squares(shape: str, solver: Any) -> None:
    """Ridge regression is least squares with sqrt(l2) I and targets of 0 below the matrix."""
    n, d, c = SHAPES[shape]
    features, labels = problem(n, d, c)
    x, y = regression(features, labels, c)
    for l2 in (1024.0, 1.0):
        rows = np.concatenate([x, l2**0.5 * np.eye(d + 1)])
        wanted = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((d + 1, c))]), rcond=None)[0]
        found = fit(features, labels, c, l2=l2, solver=solver).weights
        assert found.shape == (d + 1, c)
        assert found.dtype == np.float64
        assert np.abs(found - wanted).max() < 1e-8 * np.abs(wanted).max()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_weights_are_those_of_scikit_learn(shape: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    n, d, c = SHAPES[shape]
    features, labels = problem(n, d, c)
    x, y = regression(features, labels, c)
    other = linear_model.Ridge(fit_intercept=False, alpha=1024, solver="cholesky").fit(x, y)
    found = fit(features, labels, c)
    assert np.abs(found.weights - other.coef_.T).max() < 1e-8 * np.abs(other.coef_).max()
    fresh = problem(200, d, c, seed=1)[0]
    standard = np.append((fresh - found.mean) / found.std, np.full((200, 1), 100.0), axis=1)
    np.testing.assert_array_equal(found.predict(fresh), other.predict(standard).argmax(axis=1))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_primal_and_dual_agree(shape: str) -> None:
    n, d, c = SHAPES[shape]
    features, labels = problem(n, d, c)
    primal, dual = (fit(features, labels, c, solver=solver).weights for solver in ("primal", "dual"))
    assert np.abs(primal - dual).max() < 1e-8 * np.abs(primal).max()


def test_auto_solves_the_smaller_system(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    solve = np.linalg.solve

    def watched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sizes.append(len(a))
        return solve(a, b)

    monkeypatch.setattr(np.linalg, "solve", watched)
    for n, d, c in [(60, 12, 4), (20, 50, 4), (13, 12, 3), (12, 12, 3)]:
        fit(*problem(n, d, c), c)
    assert sizes == [13, 20, 13, 12]


def test_standardised_by_the_training_examples() -> None:
    features, labels = problem(60, 12, 4)
    made = fit(features, labels, 4)
    np.testing.assert_allclose(made.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(made.std - 1e-5, features.std(axis=0), rtol=1e-9, atol=1e-12)
    assert made.std[1] == 1e-5
    assert not made.weights[1].any()  # a constant feature says nothing
    fresh, _ = problem(40, 12, 4, seed=1)
    # Sizes and places of the features are of no consequence, but for 1e-5.
    size, place = 10.0 ** np.arange(12), np.arange(12.0)
    other = fit(features * size + place, labels, 4)
    np.testing.assert_array_equal(other.predict(fresh * size + place), made.predict(fresh))


def test_the_bias_is_regularised_and_hardly_matters() -> None:
    """Standardised features are orthogonal to the constant one, so its weight has a form of its own."""
    features, labels = problem(60, 12, 4)
    labels[:30] = 0
    y = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    wanted = 100 * y.sum(axis=0) / (60 * 100.0**2 + 1024)
    made = fit(features, labels, 4)
    np.testing.assert_allclose(made.weights[-1], wanted, rtol=1e-9)
    np.testing.assert_allclose(100 * made.weights[-1], y.mean(axis=0), rtol=2e-3)
    # Where the features say nothing, the most frequent class wins.
    assert (made.predict(np.tile(features.mean(axis=0), (3, 1))) == 0).all()


def test_float32_features_are_computed_in_float64() -> None:
    features, labels = problem(60, 12, 4)
    small = features.astype(np.float32)
    np.testing.assert_array_equal(
        fit(small, labels, 4).weights, fit(small.astype(np.float64), labels, 4).weights
    )
    assert small.dtype == np.float32


def test_a_class_without_examples_is_not_predicted() -> None:
    features, labels = clusters(10, 0.5, 0)
    made = fit(features, labels, 7, l2=1.0)
    np.testing.assert_array_equal(made.predict(features), labels)


# --- which examples


def test_shots_are_those_of_a_class_and_of_none_twice() -> None:
    labels = np.random.default_rng(0).integers(0, 6, 300)
    before = labels.copy()
    found = shots(labels, 10, seed=3)
    np.testing.assert_array_equal(labels, before)
    assert found.shape == (60,)
    assert len(set(found.tolist())) == 60
    np.testing.assert_array_equal(labels[found], np.repeat(np.arange(6), 10))
    np.testing.assert_array_equal(found, shots(labels.tolist(), 10, 3, num_classes=6))
    assert set(found.tolist()) != set(shots(labels, 10, seed=4).tolist())
    fewer = shots(labels, 4, seed=3)
    np.testing.assert_array_equal(fewer.reshape(6, 4), found.reshape(6, 10)[:, :4])


def test_shots_are_spread_over_the_class() -> None:
    """Each of 20 examples is drawn as often as the others."""
    labels = np.arange(40) % 2
    drawn = np.bincount(np.concatenate([shots(labels, 5, seed) for seed in range(2000)]), minlength=40)
    assert (np.abs(drawn - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_what_is_drawn_of_a_class_does_not_depend_on_the_others() -> None:
    two = np.arange(100) % 2
    three = np.where(np.arange(100) % 4 == 1, 2, two)
    np.testing.assert_array_equal(shots(two, 5, 0)[:5], shots(three, 5, 0)[:5])


def test_the_shots_are_pinned() -> None:
    """Accuracies of two versions are of the same examples."""
    assert shots(np.arange(60) % 3, 3, seed=0).tolist() == PINNED


PINNED = [42, 24, 0, 25, 19, 43, 17, 56, 2]


# --- the measure


def test_a_separable_problem_is_solved() -> None:
    found = few_shot(*clusters(20, 0.5, 1), *clusters(50, 0.5, 2), num_classes=5)
    assert found.accuracies == (1.0,) * 5
    assert found.accuracy_mean == 1.0
    assert found.standard_error == 0.0


def test_few_shot_is_what_its_parts_give() -> None:
    train, test = clusters(30, 12.0, 1), clusters(80, 12.0, 2)
    found = few_shot(*train, *test, num_classes=5, per_class=7, l2=2.0, seeds=(4, 9, 2))
    wanted = []
    for seed in (4, 9, 2):
        chosen = shots(train[1], 7, seed)
        made = fit(train[0][chosen], train[1][chosen], 5, l2=2.0)
        wanted.append(sum(made.predict(test[0]) == test[1]) / 400)
    assert found.accuracies == tuple(wanted)
    assert len(set(wanted)) == 3
    assert min(wanted) > 0.3
    assert max(wanted) < 1
    mean = sum(wanted) / 3
    assert found.accuracy_mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx((sum((a - mean) ** 2 for a in wanted) / 2 / 3) ** 0.5)


def test_one_seed_has_no_standard_error() -> None:
    assert FewShot(accuracies=(0.5,)).standard_error is None


def test_labels_that_have_nothing_to_do_with_the_features() -> None:
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(500, 30)), generator.normal(size=(2000, 30))
    labels = generator.integers(0, 5, 2500)
    found = few_shot(train, labels[:500], test, labels[500:], num_classes=5)
    assert abs(found.accuracy_mean - 0.2) < 5 * (0.2 * 0.8 / 2000) ** 0.5


# --- what cannot be


def test_too_few_examples_of_a_class() -> None:
    labels = np.array([0, 1, 2] * 9 + [0, 2])
    with pytest.raises(UpcycleError, match="class 1 has 9 examples, fewer than per_class = 10; lower it"):
        shots(labels, 10, 0)
    with pytest.raises(UpcycleError, match="class 3 has 0 examples"):
        shots(labels, 2, 0, num_classes=4)
    with pytest.raises(UpcycleError, match="class 1 has 0 examples"):
        shots(labels * 2, 2, 0)
    with pytest.raises(UpcycleError, match="class 0 has 0 examples"):
        shots(np.array([], int), 1, 0)
    with pytest.raises(UpcycleError, match="per_class = 0"):
        shots(labels, 0, 0)


def test_what_nothing_can_be_fitted_to() -> None:
    features, labels = problem(60, 12, 4)
    for l2 in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UpcycleError, match="l2 = "):
            fit(features, labels, 4, l2=l2)
    with pytest.raises(UpcycleError, match=r"labels go from 0 to 3 and must be 0 to 2"):
        fit(features, labels, 3)
    with pytest.raises(UpcycleError, match=r"labels go from -1 to 2 and must be 0 or more"):
        shots(labels - 1, 1, 0)
    for wrong in (features[:-1], features[:, 0], features[:, :0]):
        with pytest.raises(UpcycleError, match=r"features of shape .* for 60 labels"):
            fit(wrong, labels, 4)
    with pytest.raises(UpcycleError, match=r"features of shape \[59, 12\] for 60 labels"):
        few_shot(features, labels, features[:-1], labels, num_classes=4)
    with pytest.raises(UpcycleError, match=r"features of shape \[0, 12\] for 0 labels"):
        few_shot(features, labels, features[:0], labels[:0], num_classes=4)
    with pytest.raises(UpcycleError, match=r"features of shape \[59, 12\] for 60 labels"):
        few_shot(features[:-1], labels, features, labels, num_classes=4)
    made = fit(features, labels, 4)
    for value in (np.nan, np.inf):
        broken = features.copy()
        broken[3, 5] = value
        with pytest.raises(UpcycleError, match="NaN or inf"):
            fit(broken, labels, 4)
        with pytest.raises(UpcycleError, match="NaN or inf"):
            made.predict(broken)
    assert probe.BIAS == 100.0


def test_a_label_of_an_enormous_class_is_a_sentence():
    labels = np.array([0, 1, 1 << 40])
    for call in (lambda: shots(labels, 1, 0), lambda: shots(labels, 1, 0, num_classes=(1 << 40) + 1)):
        with pytest.raises(UpcycleError, match="1,099,511,627,777 classes, and 1,048,576 are allowed"):
            call()

"""The linear probe: equal to scikit-learn's ridge classifier, its penalty chosen without the test set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from hdcache.errors import UsageError
from hdcache.evaluate.embed import Features
from hdcache.evaluate.probe import PENALTIES, probe, probe_layers
from hdcache.evaluate.vote import wilson

Arrays = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


@pytest.fixture(scope="module")
def digits() -> Arrays:
    """Real pictures of digits, whose border pixels are constant: 1200 to learn from, 597 to test."""
    features, labels = load_digits(return_X_y=True)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def blobs(seed: int, rows: int, classes: int, channels: int, noise: float) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Gaussian classes whose centres depend on ``classes`` and ``channels`` alone, so that two seeds match."""
    centres = np.random.default_rng(7).normal(size=(classes, channels))
    labels = np.arange(rows) % classes
    return centres[labels] + noise * np.random.default_rng(seed).normal(size=(rows, channels)), labels


def expected(train: Any, labels: Any, test: Any, penalty: float) -> Any:
    scaler = StandardScaler().fit(train)
    model = RidgeClassifier(alpha=penalty * len(train), solver="cholesky").fit(scaler.transform(train), labels)
    return model.predict(scaler.transform(test))


@pytest.mark.parametrize("penalty", [1e-4, 0.01, 1.0, 100.0])
def test_predictions_are_scikit_learns(digits: Arrays, penalty: float) -> None:
    train, labels, test, truth = digits
    found = probe(train, labels, test, truth, penalties=[penalty])
    wanted = expected(train, labels, test, penalty)
    np.testing.assert_array_equal(found.predictions, wanted)
    right = int((wanted == truth).sum())
    assert found.top1 == 100 * right / len(truth)
    assert found.interval == wilson(right, len(truth))
    assert (found.penalty, found.curve, found.train, found.test) == (penalty, {}, 1200, 597)


@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 12), st.integers(10, 40))
def test_predictions_are_scikit_learns_for_any_shape(seed: int, classes: int, channels: int, rows: int) -> None:
    """Two classes and more, more channels than rows and fewer."""
    train, labels = blobs(seed, rows, classes, channels, 0.7)
    test, truth = blobs(seed + 1, 25, classes, channels, 0.7)
    found = probe(train, labels, test, truth, penalties=[0.1])
    np.testing.assert_array_equal(found.predictions, expected(train, labels, test, 0.1))


def test_the_penalty_is_the_best_on_rows_of_train_alone(digits: Arrays) -> None:
    train, labels, test, truth = digits
    found = probe(train[:200], labels[:200], test, truth)
    assert tuple(found.curve) == PENALTIES
    best = max(found.curve.values())
    assert found.penalty == max(penalty for penalty, score in found.curve.items() if score == best)
    assert len(set(found.curve.values())) > 3, "the penalty matters here"
    np.testing.assert_array_equal(found.predictions, expected(train[:200], labels[:200], test, found.penalty))
    other = probe(train[:200], labels[:200], -test, truth)
    assert (other.penalty, other.curve) == (found.penalty, found.curve), "test takes no part in the choice"
    assert other.top1 < found.top1


def test_the_held_out_rows_are_a_share_of_each_class(digits: Arrays) -> None:
    """The curve is that of a fit on the other rows: with half of two classes held out, scores are multiples of 1/20."""
    train, labels, test, truth = digits
    few = np.concatenate([np.flatnonzero(labels == label)[:20] for label in (0, 1)])
    found = probe(train[few], labels[few], test, truth, held_out=0.5)
    assert all(score * 20 / 100 == pytest.approx(round(score * 20 / 100)) for score in found.curve.values())
    again = probe(train[few], labels[few], test, truth, held_out=0.5)
    assert again.curve == found.curve
    curves = {tuple(probe(train[:100], labels[:100], test, truth, seed=seed).curve.values()) for seed in range(4)}
    assert len(curves) > 1, "another seed holds out other rows"


def test_more_noise_asks_for_a_larger_penalty() -> None:
    penalties = []
    for noise in (0.05, 6.0):
        train, labels = blobs(0, 120, 4, 60, noise)
        test, truth = blobs(1, 100, 4, 60, noise)
        penalties.append(probe(train, labels, test, truth, held_out=0.3).penalty)
    assert penalties[0] != penalties[1]


def test_scale_shift_and_constant_channels_change_nothing(digits: Arrays) -> None:
    train, labels, test, truth = digits
    plain = probe(train, labels, test, truth, penalties=[0.1])
    changed = [np.column_stack([1e6 + 300 * rows, np.full(len(rows), 7.7)]) for rows in (train, test)]
    found = probe(changed[0], labels, changed[1], truth, penalties=[0.1])
    np.testing.assert_array_equal(found.predictions, plain.predictions)


def test_channels_that_depend_on_each_other_are_no_obstacle() -> None:
    train, labels = blobs(0, 40, 3, 5, 0.1)
    test, truth = blobs(1, 30, 3, 5, 0.1)
    doubled = probe(np.hstack([train, train]), labels, np.hstack([test, test]), truth)
    assert doubled.top1 == 100.0


def test_labels_are_strings_or_any_integers() -> None:
    train, labels = blobs(0, 60, 3, 6, 0.1)
    test, truth = blobs(1, 30, 3, 6, 0.1)
    names = np.array(["cat", "ant", "bee"])
    found = probe(train, names[labels], test, names[truth])
    assert found.classes == ("ant", "bee", "cat")
    assert found.predictions.tolist() == names[truth].tolist()
    assert probe(train, 10 * labels, test, 10 * truth).predictions.tolist() == (10 * truth).tolist()


def test_a_class_that_only_test_has_counts_as_wrong_and_is_never_predicted() -> None:
    train, labels = blobs(0, 60, 2, 6, 0.1)
    test, truth = blobs(1, 30, 3, 6, 0.1)
    found = probe(train, labels, test, truth)
    assert found.top1 == pytest.approx(100 * 2 / 3)
    assert set(found.predictions.tolist()) == {0, 1}


def test_classes_of_one_sample_stay_in_the_fit() -> None:
    """With one sample of each class nothing can be held out; with a second one of a single class it can."""
    train, labels = blobs(0, 3, 3, 6, 0.1)
    test, truth = blobs(1, 30, 3, 6, 0.1)
    with pytest.raises(UsageError, match=r"pets: expected a class with two samples, to choose the penalty; give more"):
        probe(train, labels, test, truth, names=("pets", "test"))
    assert probe(train, labels, test, truth, penalties=[0.01]).top1 == 100.0
    again = probe(np.vstack([train, train[:1]]), np.append(labels, 0), test, truth)
    assert set(again.curve.values()) <= {0.0, 100.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": np.ones((5, 3))}, r"features of train: expected numbers \[6, channels\] as there are labels, found float64 \[5, 3\]"),
        ({"test_features": np.ones(6)}, r"features of test: expected numbers \[6, channels\]"),
        ({"test_features": np.ones((6, 4))}, "features of test: expected width 3 as train, found 4"),
        ({"train_features": np.array([[1.0, 2, 3]] * 5 + [[1, np.nan, 3]])}, "features of train: row 5 holds NaN or infinity"),
        ({"train_labels": [0, 1, 0, 1, -1, 0]}, "expected a label for every sample"),
        ({"penalties": []}, r"penalties: expected positive numbers, found \[\]"),
        ({"penalties": [0.0, 1.0]}, r"penalties: expected positive numbers, found \[0\.0, 1\.0\]"),
        ({"held_out": 1.0}, "held_out 1.0 must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "train_features": np.arange(18.0).reshape(6, 3),
        "train_labels": [0, 1, 0, 1, 0, 1],
        "test_features": np.ones((6, 3)),
        "test_labels": [0, 1, 0, 1, 0, 1],
    }
    with pytest.raises(UsageError, match=message):
        probe(**given | changes)


def layer_of(name: str, seed: int, noise: float, classes: tuple[str, ...] = ("a", "b", "c")) -> Features:
    rows, labels = blobs(seed, 60, 3, 8, noise)
    ids = tuple(str(row) for row in range(60))
    return Features(ids, rows.astype(np.float32), labels, classes, name, False, "cls", {})


def test_each_layer_has_a_probe_of_its_own() -> None:
    train = [layer_of("block1.out", 0, 3.0), layer_of("final", 0, 0.1)]
    test = [layer_of("block1.out", 1, 3.0), layer_of("final", 1, 0.1)]
    found = probe_layers(train, test, held_out=0.2)
    assert list(found) == ["block1.out", "final"]
    assert found["block1.out"].top1 < found["final"].top1 == 100.0
    alone = probe(train[0].features, train[0].labels, test[0].features, test[0].labels, held_out=0.2)
    assert found["block1.out"].top1 == alone.top1


def test_layers_and_classes_must_match() -> None:
    train = [layer_of("final", 0, 0.1)]
    with pytest.raises(UsageError, match=r"layers of train and test: expected the same, found \['final'\] and \['bl"):
        probe_layers(train, [layer_of("block1.out", 1, 0.1)])
    with pytest.raises(UsageError, match="classes of train and test: expected the same"):
        probe_layers(train, [layer_of("final", 1, 0.1, ("b", "a", "c"))])

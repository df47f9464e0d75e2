"""Linear probe of frozen features in closed form: ridge regression onto one-hot labels, its penalty chosen on train.

Legend: N training rows, Q test rows, D channels, C classes.

Deterministic and free of learning rates, so that students of one study are compared by their features and not by how
well a probe was tuned to each. One eigendecomposition of the D x D covariance serves every penalty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdcache import draws
from hdcache.errors import UsageError
from hdcache.evaluate.embed import Features
from hdcache.evaluate.vote import class_indices, wilson

PENALTIES = tuple(float(10.0 ** (exponent / 2)) for exponent in range(-12, 7))
"""For each row and standardised channel: 1e-6 to 1e3 in half decades."""
HELD_OUT = 0.1


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a linear probe in percent, with Wilson's 95 % interval."""

    top1: float
    interval: tuple[float, float]
    penalty: float
    """The chosen one; ridge regression on N standardised rows adds N times it to the diagonal."""
    curve: Mapping[float, float]
    """Penalty -> top-1 in percent on the rows of train that were held out; empty where only one penalty was given."""
    predictions: NDArray[Any]
    """[Q]: labels' values."""
    classes: tuple[Any, ...]
    train: int
    test: int


def probe(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    penalties: Sequence[float] = PENALTIES,
    held_out: float = HELD_OUT,
    seed: int = 0,
    names: tuple[str, str] = ("train", "test"),
) -> ProbeResult:
    """Fit a linear classifier on ``train`` [N, D] and score it on ``test`` [Q, D], all in float64.

    Channels are standardised by mean and deviation of the training rows (a constant one becomes zero) and the bias is
    not penalised: predictions are those of scikit-learn's ``RidgeClassifier(alpha=N * penalty)`` on such features.
    The penalty is the one that scores best on ``held_out`` of each class of train (drawn by ``seed``; the largest of
    equal ones) when fitted on the others; then all of train is fitted. Test rows take no part in it. Labels are
    integers or strings; a class that only ``test`` has counts as wrong. Equal scores go to the smaller class.

    Raises
    ------
    UsageError
        for features or labels of other shapes or kinds, penalties that are not positive, features that are not
        finite, or a train set without two samples of any class where there is a penalty to choose.
    """
    labels, truth, classes = class_indices(train_labels, test_labels, None, names)
    train = _matrix(train_features, names[0], len(labels))
    test = _matrix(test_features, names[1], len(truth))
    if train.shape[1] != test.shape[1]:
        raise UsageError(
            f"features of {names[1]}: expected width {train.shape[1]} as {names[0]}, found {test.shape[1]}"
        )
    if not penalties or not all(0 < penalty < np.inf for penalty in penalties):
        raise UsageError(f"penalties: expected positive numbers, found {list(penalties)}; the default is 1e-6 to 1e3")
    if not 0 < held_out < 1:
        raise UsageError(f"held_out {held_out} must lie between 0 and 1: the share of train that chooses the penalty")
    curve: dict[float, float] = {}
    chosen = penalties[0]
    if len(penalties) > 1:
        held = _hold_out(labels, held_out, seed, names[0])
        path = Ridge(train[~held], labels[~held], len(classes))
        for penalty in sorted(penalties):
            curve[penalty] = 100 * float((path.predict(train[held], penalty) == labels[held]).mean())
        chosen = max(curve, key=lambda penalty: (curve[penalty], penalty))
    predicted = Ridge(train, labels, len(classes)).predict(test, chosen)
    right = int((predicted == truth).sum())
    return ProbeResult(
        100 * right / len(truth),
        wilson(right, len(truth)),
        chosen,
        curve,
        np.asarray(classes)[predicted],
        tuple(classes),
        len(train),
        len(test),
    )


def probe_layers(train: Sequence[Features], test: Sequence[Features], **settings: Any) -> dict[str, ProbeResult]:
    """:func:`probe` of each layer that ``embed_layers`` read of both sets: layer -> result, in their order.

    The two sets must have one list of classes (``open_dataset(..., classes=...)``). Raises :class:`UsageError` where
    layers or classes differ.
    """
    for what, ours, theirs in (
        ("layers", [one.layer for one in train], [one.layer for one in test]),
        ("classes", {one.classes for one in train}, {one.classes for one in test}),
    ):
        if ours != theirs:
            raise UsageError(
                f"{what} of train and test: expected the same, found {ours} and {theirs}; embed both alike"
            )
    return {
        one.layer: probe(one.features, one.labels, other.features, other.labels, **settings)
        for one, other in zip(train, test, strict=True)
    }


class Ridge:
    """Ridge regression of one-hot labels on standardised features, for any penalty from one factorisation."""

    def __init__(self, features: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int) -> None:
        """``features`` [N, D], ``labels`` [N] in 0 .. C - 1; a class without rows is never predicted."""
        self._rows = len(features)
        self._mean, deviation = features.mean(axis=0), features.std(axis=0)
        # Rounding leaves a constant channel with a tiny deviation; dividing by it would make noise of it.
        constant = deviation <= 1e-12 * np.abs(features).max(axis=0, initial=0.0)
        self._scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
        rows = (features - self._mean) * self._scale
        targets = np.eye(num_classes)[labels]
        self._bias = targets.mean(axis=0)
        self._absent = self._bias == 0
        values, self._vectors = np.linalg.eigh(rows.T @ rows)
        self._values = np.clip(values, 0.0, None)
        self._projected = self._vectors.T @ (rows.T @ (targets - self._bias))

    def predict(self, features: NDArray[np.float64], penalty: float) -> NDArray[np.int64]:
        """Class [Q] of each row of ``features`` [Q, D]; ``penalty`` for each training row."""
        shrunk = self._projected / (self._values + penalty * self._rows)[:, None]
        scores = (features - self._mean) * self._scale @ (self._vectors @ shrunk) + self._bias
        scores[:, self._absent] = -np.inf
        return np.asarray(scores.argmax(axis=1), np.int64)


def _hold_out(labels: NDArray[np.int64], share: float, seed: int, name: str) -> NDArray[np.bool_]:
    """bool [N]: ``share`` of each class, at least one and never the last of it."""
    held = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[draws.permutation(len(members), seed, int(label), "probe")[:count]]] = True
    if not held.any():
        raise UsageError(
            f"{name}: expected a class with two samples, to choose the penalty; give more samples or one penalty"
        )
    return held


def _matrix(features: ArrayLike, name: str, rows: int) -> NDArray[np.float64]:
    values = np.asarray(features)
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size or len(values) != rows:
        raise UsageError(
            f"features of {name}: expected numbers [{rows}, channels] as there are labels, found {values.dtype} "
            f"{list(values.shape)}; pass one row per sample"
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UsageError(f"features of {name}: row {row} holds NaN or infinity; the network or its input is broken")
    return values

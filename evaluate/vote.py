"""What labelled neighbours say: labels as class indices, the weighted vote, accuracy with its interval.

The vote is that of DINO's ``eval_knn.py``, with the three things it leaves open stated: ties, classes that got no
vote, and similarities so large that ``exp`` overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdcache.errors import UsageError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of the vote of ``k`` neighbours, in percent, with Wilson's 95 % intervals."""

    k: int
    top1: float
    top5: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]
    predictions: NDArray[Any]
    """[Q]: the winning class of each query, as the value that its label has."""
    ranked: NDArray[np.int64]
    """[Q, 5]: indices into ``KnnResult.classes``, best first, -1 where no further class got a vote."""


def vote(
    similarities: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    num_classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    compat_dino: bool = False,
) -> dict[int, NDArray[np.int64]]:
    """Rank classes by the sum of ``exp((s - s_max) / temperature)`` over the first k neighbours, for every k at once.

    ``similarities`` and ``labels`` (0 .. num_classes - 1) of the neighbours: [Q, K], nearest first. Returns int64
    [Q, 5] for each k: classes by (-score, index), then -1 where no further class has a positive score.
    ``compat_dino`` ranks as DINO's code does: by ``torch.sort``, so that classes without any vote fill up the first
    min(5, k) places. Which of them, and the order of equal scores, is up to that sort: it is not stable, and other
    builds of torch or other CPUs may credit others. Only this mode imports torch.
    Raises :class:`UsageError` for a temperature that is not positive or a k outside 1..K.
    """
    check_settings(ks, temperature)
    if max(ks) > labels.shape[1]:
        raise UsageError(f"k: expected at most {labels.shape[1]} (neighbours given), found {max(ks)}; search for more")
    out = {k: np.full((len(labels), TOP), -1, np.int64) for k in sorted(set(ks))}
    for rows in blocks(np.arange(len(labels)), max(1, (1 << 21) // num_classes)):
        s = similarities[rows].astype(np.float64)
        weights = np.exp((s - s[:, :1]) / temperature)
        cells = labels[rows] + np.arange(len(rows))[:, None] * num_classes
        scores, counted = np.zeros(len(rows) * num_classes), 0
        for k, ranked in out.items():
            # add.at adds onto the running sums, nearest first: what k gives does not depend on the other ks, and two
            # classes with equal votes have equal sums.
            np.add.at(scores, cells[:, counted:k].ravel(), weights[:, counted:k].ravel())
            ranked[rows] = _best(scores.reshape(len(rows), num_classes).copy(), k, compat_dino)
            counted = k
    return out


def check_settings(ks: Sequence[int], temperature: float) -> None:
    """:class:`UsageError` unless ``ks`` are one or more positive integers and ``temperature`` is positive."""
    if not ks or min(ks) < 1:
        raise UsageError(f"k: expected one or more positive integers, found {list(ks)}; DINO uses {list(KS)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature: expected a positive number, found {temperature}; DINO uses {TEMPERATURE}")


def wilson(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval for ``correct`` of ``total`` (> 0), in percent; 95 % by default."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    low = centre - half if correct else 0.0
    high = centre + half if correct < total else 1.0
    return 100 * low, 100 * high


def accuracy(k: int, ranked: NDArray[np.int64], truth: NDArray[np.int64], classes: NDArray[Any]) -> Accuracy:
    """Score ``ranked`` [Q, 5] against the true class indices [Q]; ``classes`` [C] are the labels' values."""
    hits, total = ranked == truth[:, None], len(truth)
    top1, top5 = int(hits[:, 0].sum()), int(hits.any(axis=1).sum())
    intervals = wilson(top1, total), wilson(top5, total)
    return Accuracy(k, 100 * top1 / total, 100 * top5 / total, *intervals, classes[ranked[:, 0]], ranked)


def class_indices(
    train: ArrayLike, test: ArrayLike, classes: Sequence[Any] | None, names: tuple[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Any]]:
    """Labels of both sets as int64 indices into one class list, and that list.

    The list is ``classes`` if given, else the sorted values of both sets. Raises :class:`UsageError` for labels that
    are neither integers nor strings, differ in kind, mean "none" (-1), or are not in ``classes``.
    """
    arrays = [_label_array(labels, name) for labels, name in zip((train, test), names, strict=True)]
    if arrays[0].dtype.kind != arrays[1].dtype.kind:
        raise UsageError(
            f"labels of {names[0]} and {names[1]}: expected the same kind, found {arrays[0].dtype} and "
            f"{arrays[1].dtype}; give both as class names or both as class numbers"
        )
    present = np.unique(np.concatenate(arrays)).tolist()
    order = present if classes is None else list(classes)
    position = {value: index for index, value in enumerate(order)}
    if strangers := [value for value in present if value not in position]:
        raise UsageError(f"labels: expected members of the {len(order)} given classes, found {strangers[:5]}; add them")
    indices = [np.array([position[value] for value in array.tolist()], np.int64) for array in arrays]
    return indices[0], indices[1], order


def refuse_unlabelled(labels: NDArray[Any], name: str) -> None:
    """:class:`UsageError` if a sample of the data set ``name`` has no label (-1)."""
    if labels.dtype.kind == "i" and (missing := int((labels == -1).sum())):
        raise UsageError(
            f"{name}: expected a label for every sample, found {missing} of {len(labels)} without one (-1); k-NN needs "
            "class labels: use a folder with one subfolder per class, or leave these samples out"
        )


def blocks(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """``indices`` in runs of at most ``size``, so that no intermediate grows with the data set."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _best(scores: NDArray[np.float64], k: int, compat_dino: bool) -> NDArray[np.int64]:
    """The first min(5, k) classes of ``scores`` [B, C], which is used up: int64 [B, 5], -1 beyond."""
    ranked, each = np.full((len(scores), TOP), -1, np.int64), np.arange(len(scores))
    places = min(TOP, k, scores.shape[1])
    if compat_dino:
        import torch

        # float32 as in DINO: the precision decides which sorting network runs, hence where equal scores land.
        ranked[:, :places] = torch.from_numpy(scores.astype(np.float32)).sort(1, True).indices[:, :places].numpy()
        return ranked
    for place in range(places):
        # argmax returns the smallest of equal classes.
        best = scores.argmax(axis=1)
        ranked[:, place] = np.where(scores[each, best] > 0, best, -1)
        scores[each, best] = -np.inf
    return ranked


def _label_array(labels: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(labels)
    strings = array.dtype.kind == "U" or (array.dtype.kind == "O" and all(isinstance(v, str) for v in array.flat))
    if array.ndim != 1 or not (strings or array.dtype.kind in "iub"):
        raise UsageError(
            f"labels of {name}: expected one integer or string per sample, found {array.dtype} {list(array.shape)}; "
            "pass class numbers or class names"
        )
    array = array.astype(np.str_ if strings else np.int64)
    refuse_unlabelled(array, name)
    return array

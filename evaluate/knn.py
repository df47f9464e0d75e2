"""Exact k-nearest-neighbour classification on frozen features: FAISS proposes, float64 decides, neighbours vote.

The protocol is that of DINO's ``eval_knn.py``: l2-normalised features, weights ``exp(cosine / 0.07)``, k = 10, 20,
100, 200, all from one search. Pure functions of arrays.

Ties are decided here, not by the thread schedule. :func:`unit_rows` puts every coordinate on a grid of 2^-26, so the
float64 inner product of two rows is *exact*: its terms are multiples of 2^-52 and no partial sum reaches 2. Equal rows
therefore have equal similarities on every machine and in any order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdcache.errors import UsageError
from hdcache.evaluate.vote import KS, TEMPERATURE, Accuracy, accuracy, blocks, check_settings, class_indices, vote
from hdcache.resources import available_cores

GRID = 2.0**26
SPARE = 16
"""Rows beyond k that FAISS proposes at first."""
_HOME = os.getpid()

Neighbours = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Similarities [Q, k] and bank indices [Q, k]."""


@dataclass(frozen=True)
class KnnResult:
    """The accuracy for each k, ascending, and what has to be said about it."""

    per_k: Mapping[int, Accuracy]
    classes: tuple[Any, ...]
    bank: int
    queries: int
    temperature: float
    compat_dino: bool
    leave_one_out: bool
    notes: tuple[str, ...]


def knn_classify(
    train: ArrayLike,
    train_labels: ArrayLike,
    test: ArrayLike,
    test_labels: ArrayLike,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    *,
    leave_one_out_ids: Sequence[str] | None = None,
    train_ids: Sequence[str] | None = None,
    test_ids: Sequence[str] | None = None,
    classes: Sequence[Any] | None = None,
    compat_dino: bool = False,
    names: tuple[str, str] = ("train", "test"),
) -> KnnResult:
    """Classify ``test`` [Q, D] by the labelled bank ``train`` [N, D].

    Labels [N] and [Q] are integers or strings, contiguous or not; -1 means "no label" and is refused. ``classes``
    fixes the class list and its order; without it, it is the sorted union of both label sets. With
    ``leave_one_out_ids`` (the distinct ids of the rows; ``test`` must then be ``train``) no query votes for itself,
    wherever its own row ranks. ``train_ids``, ``test_ids`` and ``names`` serve messages. A k above the size of the
    bank is lowered to it; ``notes`` says so, and names zero features and samples whose class the bank lacks (they
    count as wrong). Raises :class:`UsageError`.
    """
    own = 0 if leave_one_out_ids is None else 1
    if leave_one_out_ids is not None:
        train_ids = test_ids = leave_one_out_ids
    check_settings(ks, temperature)
    labels, truth, classes = class_indices(train_labels, test_labels, classes, names)
    bank = unit_rows(train, f"features of {names[0]}", train_ids)
    queries = unit_rows(test, f"features of {names[1]}", test_ids)
    _check_rows(bank, labels, names[0])
    _check_rows(queries, truth, names[1])
    if leave_one_out_ids is not None:
        _check_same_set(bank, queries, leave_one_out_ids)
    usable, notes = _clip(ks, len(bank) - own)
    similarities, neighbours = _search_units(bank, queries, usable[-1] + own)
    if own:
        similarities, neighbours = _drop_self(similarities, neighbours)
    ranking = vote(similarities, labels[neighbours], len(classes), usable, temperature, compat_dino)
    per_k = {k: accuracy(k, ranked, truth, np.asarray(classes)) for k, ranked in ranking.items()}
    for rows, name in ((bank, names[0]), (queries, names[1])):
        if zeros := int((~rows.any(axis=1)).sum()):
            notes.append(f"{name}: {zeros} features are all zero; their cosine to everything is taken as 0")
    if lost := int((np.bincount(labels, minlength=len(classes))[truth] == own).sum()):
        notes.append(f"{names[1]}: {lost} samples count as wrong, {names[0]} has no other sample of their class")
    return KnnResult(per_k, tuple(classes), len(bank), len(queries), temperature, compat_dino, bool(own), tuple(notes))


def search(train: ArrayLike, queries: ArrayLike, k: int) -> Neighbours:
    """The ``k`` rows of ``train`` [N, D] with the largest cosine to each of ``queries`` [Q, D].

    Returns similarities float64 [Q, k] and bank indices int64 [Q, k], sorted by (-similarity, index). Promise: a
    similarity is the exact inner product of two :func:`unit_rows`, and among equal similarities the smaller bank
    index comes first and stays in, also across rank k. A zero row has similarity 0 to everything.

    FAISS proposes a few more than k in float32. Its proposal stands only where its rounding bound proves that no
    other row could belong or tie; for the other queries it proposes more, and what is open then is searched exhaustively
    in float64. In a process forked after
    this module was imported all are, since FAISS can hang there (faiss #5206): the same answer, slower.
    Raises :class:`UsageError` for k outside 1..N, unequal widths, or features that are not finite.
    """
    return _search_units(unit_rows(train, "the bank"), unit_rows(queries, "the queries"), k)


def unit_rows(features: ArrayLike, what: str = "features", ids: Sequence[str] | None = None) -> NDArray[np.float32]:
    """L2-normalise ``features`` [N, D] in float64; float32 [N, D] on the grid of 2^-26; zero rows stay zero.

    ``what`` and ``ids`` name the rows in messages. Raises :class:`UsageError` for another shape, NaN or infinity.
    """
    rows = np.asarray(features)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or not rows.size:
        raise UsageError(
            f"{what}: expected numbers [rows, channels] with at least one of each, found {rows.dtype} "
            f"{list(rows.shape)}; pass one row per sample"
        )
    out = np.empty(rows.shape, np.float32)
    # Blocks that stay in the cache: a third of the time of large ones.
    for block in blocks(np.arange(len(rows)), max(1, (1 << 17) // rows.shape[1])):
        values = rows[block].astype(np.float64)
        # Dividing by the peak first keeps the squares of very large and very small rows inside float64.
        peak = np.abs(values).max(axis=1, keepdims=True)
        if not np.isfinite(peak).all():
            _refuse_nonfinite(rows, what, ids)
        values /= np.where(peak > 0, peak, 1.0)
        norm = np.sqrt(np.square(values).sum(axis=1, keepdims=True))
        out[block] = np.rint(values / np.where(norm > 0, norm, 1.0) * GRID) / GRID
    return out


def faiss_version() -> str:
    """The version of the installed FAISS."""
    import faiss

    return str(faiss.__version__)


def _search_units(bank: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> Neighbours:
    """:func:`search` on rows that :func:`unit_rows` made already."""
    if bank.shape[1] != queries.shape[1]:
        raise UsageError(
            f"bank and queries: expected equal widths, found {bank.shape[1]} and {queries.shape[1]} channels; "
            "embed both with the same model, layer and pool"
        )
    if not 1 <= k <= len(bank):
        raise UsageError(f"k: expected 1 to {len(bank)} (rows of the bank), found {k}; choose k in this range")
    unproved = np.arange(len(queries))
    similarities, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for wanted in sorted({min(len(bank), k + spare) for spare in (SPARE, 4 * SPARE + k // 2)}):
        if os.getpid() == _HOME and len(unproved):
            found, places, proved = _search_faiss(bank, queries[unproved], k, wanted)
            similarities[unproved], indices[unproved] = found, places
            unproved = unproved[~proved]
    for rows in blocks(unproved, 256):
        similarities[rows], indices[rows] = _search_exhaustively(bank, queries[rows], k)
    return similarities, indices


def _drop_self(similarities: NDArray[np.float64], indices: NDArray[np.int64]) -> Neighbours:
    """Remove bank row i from the K neighbours of query i: [Q, K - 1]. Its place is not assumed to be the first.

    A query that its duplicates crowded out of its own list loses the last neighbour instead.
    """
    keep = indices != np.arange(len(indices))[:, None]
    keep[keep.all(axis=1), -1] = False
    shape = (len(indices), indices.shape[1] - 1)
    return similarities[keep].reshape(shape), indices[keep].reshape(shape)


def _search_faiss(
    bank: NDArray[np.float32], queries: NDArray[np.float32], k: int, wanted: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """The best k of the ``wanted`` that FAISS proposes, and for which queries [Q] they are proved to be the best of all."""
    import faiss

    proposed, candidates = faiss.knn(queries, bank, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    # A float32 inner product of two unit rows, summed in any order, is off by at most D * 2^-24 (Higham's gamma_D).
    reach = proposed.min(axis=1).astype(np.float64) + 1.01 * (bank.shape[1] + 1) * 2.0**-24
    del proposed
    similarities, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)

    def rank(rows: NDArray[np.int64]) -> None:
        found = np.sort(candidates[rows], axis=1)
        exact = np.einsum("qcd,qd->qc", bank[found], queries[rows], dtype=np.float64)
        # Candidates are in ascending bank index, so a stable sort is the tie rule.
        order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        similarities[rows] = np.take_along_axis(exact, order, axis=1)
        indices[rows] = np.take_along_axis(found, order, axis=1)

    # Blocks that stay in the cache: a third of the time of large ones.
    with ThreadPoolExecutor(available_cores()) as pool:
        for _ in pool.map(rank, blocks(np.arange(len(queries)), 16)):
            pass
    return similarities, indices, (similarities[:, -1] > reach) | (wanted == len(bank))


def _search_exhaustively(bank: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> Neighbours:
    wide = queries.astype(np.float64)
    values, indices = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    for rows in blocks(np.arange(len(bank)), 8192):
        values = np.hstack([values, wide @ bank[rows].T.astype(np.float64)])
        indices = np.hstack([indices, np.broadcast_to(rows, (len(queries), len(rows)))])
        if values.shape[1] > k:
            kth = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
            better, equal = values > kth, values == kth
            # Columns are in ascending bank index: of the equal ones, the first stay.
            keep = better | (equal & (equal.cumsum(axis=1) <= k - better.sum(axis=1, keepdims=True)))
            values, indices = values[keep].reshape(-1, k), indices[keep].reshape(-1, k)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _refuse_nonfinite(rows: NDArray[np.generic], what: str, ids: Sequence[str] | None) -> None:
    bad = np.flatnonzero(~np.isfinite(rows.astype(np.float64)).all(axis=1))
    first = f"row {bad[0]}" if ids is None else f"id {ids[int(bad[0])]!r}"
    raise UsageError(
        f"{what}: expected finite numbers, found NaN or infinity in {len(bad)} of {len(rows)} rows, first {first}; "
        "check the checkpoint and run in fp32, or leave these samples out"
    )


def _check_rows(rows: NDArray[np.float32], labels: NDArray[np.int64], name: str) -> None:
    if len(rows) != len(labels):
        raise UsageError(f"{name}: expected one label per feature row, found {len(rows)} rows and {len(labels)} labels")


def _check_same_set(bank: NDArray[np.float32], queries: NDArray[np.float32], ids: Sequence[str]) -> None:
    if bank.shape != queries.shape or not (2 <= len(bank) == len(ids) == len(set(ids))):
        raise UsageError(
            f"leave-one-out: expected one set of at least 2 rows, given twice, with distinct ids, found {len(bank)} "
            f"and {len(queries)} rows, {len(ids)} ids of which {len(set(ids))} distinct; pass train as test"
        )


def _clip(ks: Sequence[int], bank: int) -> tuple[list[int], list[str]]:
    large = ", ".join(str(k) for k in sorted(set(ks)) if k > bank)
    notes = [f"k = {large}: lowered to {bank}, the number of samples that can vote"] if large else []
    return sorted({min(k, bank) for k in ks}), notes

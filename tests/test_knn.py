"""Exact search with a stated tie rule, and k-NN classification, against NumPy in float64 and scikit-learn."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hdcache.errors import UsageError
from hdcache.evaluate import knn
from hdcache.evaluate.knn import KnnResult, knn_classify, search, unit_rows

Floats = NDArray[Any]


def mixture(
    seed: int, rows: int, classes: int = 10, width: int = 24, spread: float = 0.9
) -> tuple[Floats, NDArray[np.int64]]:
    """Gaussian clusters whose overlap makes k-NN err about a third of the time."""
    centres = np.random.default_rng(99).standard_normal((classes, width)) / 2
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, classes, rows)
    return (centres[labels] + spread * draws.standard_normal((rows, width))).astype(np.float32), labels


def oracle(train: Floats, queries: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """The promise spelled out: all similarities, sorted by (-similarity, index)."""
    similarities = unit_rows(queries).astype(np.float64) @ unit_rows(train).astype(np.float64).T
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, axis=1), order


def scores(train: Floats, labels: NDArray[np.int64], queries: Floats, k: int, temperature: float) -> Floats:
    """Plain float64 class scores [Q, C], by another route: normalise, full product, loop."""
    x, q = (
        rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        for rows in (train, queries)
    )
    out = np.zeros((len(q), int(labels.max()) + 1))
    for row, s in enumerate(q @ x.T):
        for neighbour in np.argsort(-s, kind="stable")[:k]:
            out[row, labels[neighbour]] += np.exp(s[neighbour] / temperature)
    normalised: Floats = out / out.sum(axis=1, keepdims=True)
    return normalised


def decided(scored: Floats) -> NDArray[np.bool_]:
    """Where the best class leads by more than rounding."""
    best = np.sort(scored, axis=1)
    gaps: NDArray[np.bool_] = best[:, -1] - best[:, -2] > 1e-6
    return gaps


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize(
    ("rows", "queries", "width", "k"), [(300, 40, 24, 20), (5000, 700, 32, 100), (30, 7, 5, 30), (1, 3, 2, 1)]
)
def test_search_equals_the_oracle_exactly(rows: int, queries: int, width: int, k: int) -> None:
    train, _ = mixture(1, rows, width=width)
    test, _ = mixture(2, queries, width=width)
    for found, expected in zip(search(train, test, k), oracle(train, test, k), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_similarities_are_cosines() -> None:
    train, test = mixture(1, 200)[0], mixture(2, 20)[0]
    similarities, indices = search(train, test, 5)
    x, q = train[indices].astype(np.float64), test.astype(np.float64)[:, None]
    cosine = (x * q).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(similarities, cosine, atol=1e-7)


def test_ties_across_rank_k_keep_the_smallest_indices() -> None:
    train = np.random.default_rng(0).standard_normal((2000, 16))
    train[::3] = train[0]
    similarities, indices = search(train, train[:1] * 5, 50)
    assert indices[0].tolist() == list(range(0, 150, 3))
    assert len(set(similarities[0].tolist())) == 1


def test_collapsed_features_are_all_ties() -> None:
    _, indices = search(np.ones((9000, 8)), np.full((300, 8), 2.0), 10)
    np.testing.assert_array_equal(indices, np.tile(np.arange(10), (300, 1)))


def test_nearly_collapsed_features_still_follow_the_rule() -> None:
    # Differences below FAISS's float32 resolution, on both sides of a block boundary of the exhaustive search.
    train = 1 + 1e-7 * np.random.default_rng(0).standard_normal((9000, 8))
    for found, expected in zip(search(train, train[:20], 10), oracle(train, train[:20], 10), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_ties_beyond_the_first_proposal_need_a_longer_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = mixture(1, 400)[0], mixture(2, 20)[0]
    train[100:140] = test[0]  # forty equal neighbours of the first query, ten of them wanted
    asked: list[tuple[int, int]] = []
    search_faiss = knn._search_faiss

    def counting(bank: Any, queries: Any, k: int, wanted: int) -> Any:
        asked.append((len(queries), wanted))
        return search_faiss(bank, queries, k, wanted)

    monkeypatch.setattr(knn, "_search_faiss", counting)
    monkeypatch.setattr(knn, "_search_exhaustively", None)
    for found, expected in zip(search(train, test, 10), oracle(train, test, 10), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [wanted for _, wanted in asked] == [10 + knn.SPARE, 10 + 4 * knn.SPARE + 5]
    assert asked[0][0] == 20 > asked[1][0] > 0


def test_a_zero_row_has_similarity_zero() -> None:
    train = np.array([[1.0, 0], [0, 0], [-1, 0], [0, 1]])
    similarities, indices = search(train, np.array([[0.0, 0], [3, 0]]), 4)
    assert indices.tolist() == [[0, 1, 2, 3], [0, 1, 3, 2]]
    assert similarities.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


def test_extreme_scales_normalise() -> None:
    rows = np.array([[3e300, 4e300], [3e-300, 4e-300], [3.0, 4.0], [5e-324, 0.0]])
    np.testing.assert_array_equal(unit_rows(rows)[:3], np.tile(unit_rows(rows)[2], (3, 1)))
    np.testing.assert_allclose(unit_rows(rows)[2], [0.6, 0.8], atol=1e-7)
    assert unit_rows(rows)[3].tolist() == [1, 0]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 4), st.data())
def test_search_keeps_its_promise_on_coarse_values(seed: int, rows: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, rows))
    draws = np.random.default_rng(seed)
    train, test = draws.integers(-2, 3, (rows, width)), draws.integers(-2, 3, (9, width))
    for found, expected in zip(search(train, test, k), oracle(train, test, k), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_forked_child_gets_the_same_answer_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = mixture(1, 300)[0], mixture(2, 20)[0]
    expected = search(train, test, 10)
    monkeypatch.setattr(knn, "_HOME", os.getpid() + 1)
    monkeypatch.setattr(knn, "_search_faiss", None)
    for found, value in zip(search(train, test, 10), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_a_forked_child_does_not_hang() -> None:
    code = (
        "import os, numpy as np; from hdcache.evaluate.knn import search\n"
        "rows = np.arange(3000.0).reshape(1000, 3) % 7\n"
        "expected = search(rows, rows, 5)[1]\n"
        "child = os.fork()\n"
        "if not child: os._exit(int((search(rows, rows, 5)[1] != expected).any()))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_importing_knn_loads_neither_faiss_nor_torch() -> None:
    code = "import sys, hdcache.evaluate.knn; sys.exit(bool({'faiss', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_features_that_are_not_finite_are_refused_by_id() -> None:
    train = np.ones((40, 3), np.float32)
    train[[7, 9], 1] = np.nan, np.inf
    with pytest.raises(UsageError, match=r"the bank: .*NaN or infinity in 2 of 40 rows, first row 7"):
        search(train, np.ones((1, 3)), 1)
    labels, ids = [0] * 40, [f"n07/{i}.jpg" for i in range(40)]
    with pytest.raises(UsageError, match=r"features of digits: .*in 2 of 40 rows, first id 'n07/7\.jpg'"):
        knn_classify(train, labels, train, labels, [1], train_ids=ids, names=("digits", "test"))


@pytest.mark.parametrize(
    "features", [np.ones(3), np.ones((0, 3)), np.ones((3, 0)), np.array([["a"]]), np.ones((2, 2), complex)]
)
def test_features_that_are_no_matrix_are_refused(features: NDArray[Any]) -> None:
    with pytest.raises(UsageError, match=r"features: expected numbers \[rows, channels\] with at least one of each"):
        unit_rows(features)


def test_unequal_widths_are_refused() -> None:
    with pytest.raises(UsageError, match="expected equal widths, found 3 and 4 channels; embed both with the same"):
        search(np.ones((5, 3)), np.ones((5, 4)), 1)


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_bank_is_refused_by_search(k: int) -> None:
    with pytest.raises(UsageError, match=rf"k: expected 1 to 5 \(rows of the bank\), found {k}"):
        search(np.ones((5, 3)), np.ones((5, 3)), k)


# ---------------------------------------------------------------------------------------- classification


def check_against(
    result: KnnResult, train: Floats, labels: NDArray[np.int64], test: Floats, temperature: float
) -> None:
    for k, accuracy in result.per_k.items():
        scored = scores(train, labels, test, k, temperature)
        clear = decided(scored)
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(accuracy.predictions[clear], scored.argmax(axis=1)[clear])


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_classes_equal_those_of_a_float64_oracle(temperature: float) -> None:
    (train, labels), (test, truth) = mixture(1, 600), mixture(2, 150)
    result = knn_classify(train, labels, test, truth, (1, 3, 20, 200), temperature)
    check_against(result, train, labels, test, temperature)
    assert 40 < result.per_k[20].top1 < 95
    assert result.per_k[20].top1 == 100 * (result.per_k[20].predictions == truth).mean()


def against_sklearn(train: Floats, labels: NDArray[np.int64], test: Floats, truth: NDArray[np.int64]) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    result = knn_classify(train, labels, test, truth)
    assert list(result.per_k) == [10, 20, 100, 200]
    for k, accuracy in result.per_k.items():
        rival = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        chances = rival.fit(train.astype(np.float64), labels).predict_proba(test.astype(np.float64))
        clear = decided(chances)
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(accuracy.predictions[clear], rival.classes_[chances.argmax(axis=1)][clear])


def test_equals_scikit_learn_on_digits() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    against_sklearn(pixels[:1200], labels[:1200], pixels[1200:], labels[1200:])


def test_equals_scikit_learn_on_a_mixture() -> None:
    against_sklearn(*mixture(3, 2000, classes=30), *mixture(4, 300, classes=30))


def test_permuting_the_bank_changes_nothing_away_from_ties() -> None:
    (train, labels), (test, truth) = mixture(1, 500), mixture(2, 100)
    clear = decided(scores(train, labels, test, 20, 0.07))
    expected = knn_classify(train, labels, test, truth, [20]).per_k[20].predictions
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(train))
        found = knn_classify(train[order], labels[order], test, truth, [20]).per_k[20].predictions
        np.testing.assert_array_equal(found[clear], expected[clear])


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.integers(2, 60))
def test_scaling_rows_by_a_power_of_two_changes_nothing(seed: int, temperature: float, rows: int) -> None:
    draws = np.random.default_rng(seed)
    train, labels, test = draws.standard_normal((rows, 6)), draws.integers(0, 4, rows), draws.standard_normal((5, 6))
    scale = 2.0 ** draws.integers(-20, 20, (rows, 1))
    first = knn_classify(train, labels, test, labels[:5][:1].repeat(5), [1, 5], temperature)
    second = knn_classify(train * scale, labels, test, labels[:5][:1].repeat(5), [1, 5], temperature)
    for k in first.per_k:
        np.testing.assert_array_equal(first.per_k[k].ranked, second.per_k[k].ranked)


def test_a_k_above_the_bank_is_lowered_and_said() -> None:
    (train, labels), (test, truth) = mixture(1, 50), mixture(2, 7)
    result = knn_classify(train, labels, test, truth)
    assert list(result.per_k) == [10, 20, 50]
    assert any("k = 100, 200: lowered to 50" in note for note in result.notes)
    alone = knn_classify(train, labels, train, labels, leave_one_out_ids=[str(i) for i in range(50)])
    assert list(alone.per_k) == [10, 20, 49]


def test_seven_queries_are_enough() -> None:
    result = knn_classify(*mixture(1, 300), *mixture(2, 7), [10])
    assert result.per_k[10].ranked.shape == (7, 5)
    low, high = result.per_k[10].top1_interval
    assert low < result.per_k[10].top1 < high or result.per_k[10].top1 in (low, high)


def test_one_class_is_always_right() -> None:
    train = mixture(1, 30)[0]
    result = knn_classify(train, [4] * 30, train[:7], [4] * 7, [5])
    assert (result.per_k[5].top1, result.per_k[5].top5) == (100.0, 100.0)
    assert result.per_k[5].ranked.tolist() == [[0, -1, -1, -1, -1]] * 7


def test_string_labels_give_string_predictions() -> None:
    (train, labels), (test, truth) = mixture(1, 300), mixture(2, 50)
    names = np.array([f"class {9 - i}" for i in range(10)])
    expected = knn_classify(train, labels, test, truth, [20]).per_k[20]
    found = knn_classify(train, names[labels].tolist(), test, names[truth].tolist(), [20]).per_k[20]
    np.testing.assert_array_equal(found.predictions, names[expected.predictions])
    assert found.top1 == expected.top1


def test_classes_absent_from_the_bank_count_as_wrong_and_are_said() -> None:
    (train, labels), (test, truth) = mixture(1, 300), mixture(2, 50)
    truth[:8] = 1_000_003
    result = knn_classify(train, labels, test, truth, [20], names=("bank", "queries"))
    assert result.per_k[20].top1 == 100 * (result.per_k[20].predictions == truth).mean()
    assert "queries: 8 samples count as wrong, bank has no other sample of their class" in result.notes


def test_zero_features_are_counted() -> None:
    (train, labels), (test, truth) = mixture(1, 60), mixture(2, 9)
    train[[3, 4]] = 0
    test[5] = 0
    notes = knn_classify(train, labels, test, truth, [20]).notes
    assert [note for note in notes if "zero" in note] == [
        "train: 2 features are all zero; their cosine to everything is taken as 0",
        "test: 1 features are all zero; their cosine to everything is taken as 0",
    ]


def test_leave_one_out_removes_the_own_row_wherever_it_ranks() -> None:
    # Rows 0..9 are one point; the own row of query 9 is its tenth neighbour, and column 0 is somebody else.
    train, labels = mixture(1, 200)
    train[:10] = train[0]
    labels[:10] = np.arange(10)
    ids = [f"{i:03}" for i in range(200)]
    result = knn_classify(train, labels, train, labels, [1, 3, 9, 15], leave_one_out_ids=ids)
    for query in range(0, 200, 7):
        rest = np.delete(np.arange(200), query)
        single = knn_classify(train[rest], labels[rest], train[[query]], labels[[query]], [1, 3, 9, 15])
        for k in (1, 3, 9, 15):
            assert result.per_k[k].predictions[query] == single.per_k[k].predictions[0]
    assert result.per_k[1].predictions[0] == 1
    assert result.per_k[1].predictions[9] == 0


def test_leave_one_out_of_more_duplicates_than_k() -> None:
    ids = [str(i) for i in range(40)]
    labels = np.arange(40) % 2
    result = knn_classify(np.ones((40, 3)), labels, np.ones((40, 3)), labels, [1], leave_one_out_ids=ids)
    assert result.per_k[1].predictions.tolist() == [1] + [0] * 39


def test_leave_one_out_says_what_is_alone_in_its_class() -> None:
    train, labels = mixture(1, 40, classes=3)
    labels[4] = 77
    result = knn_classify(train, labels, train, labels, [5], leave_one_out_ids=[str(i) for i in range(40)])
    assert "test: 1 samples count as wrong, train has no other sample of their class" in result.notes


@pytest.mark.parametrize(("test_rows", "ids"), [(4, "abcde"), (5, "abcd"), (5, "abcda"), (5, "abcdef")])
def test_leave_one_out_needs_one_set_with_distinct_ids(test_rows: int, ids: str) -> None:
    with pytest.raises(UsageError, match="leave-one-out: expected one set of at least 2 rows, given twice"):
        knn_classify(np.ones((5, 2)), [0] * 5, np.ones((test_rows, 2)), [0] * test_rows, [1], leave_one_out_ids=ids)


def test_leave_one_out_of_one_row_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 rows"):
        knn_classify(np.ones((1, 2)), [0], np.ones((1, 2)), [0], [1], leave_one_out_ids=["a"])


def test_more_labels_than_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="test: expected one label per feature row, found 2 rows and 3 labels"):
        knn_classify(np.ones((5, 2)), [0] * 5, np.ones((2, 2)), [0] * 3, [1])


def test_missing_labels_are_refused_by_the_name_of_the_data_set() -> None:
    with pytest.raises(UsageError, match=r"folder:/flat: expected a label for every sample, found 5 of 5"):
        knn_classify(np.ones((5, 2)), [-1] * 5, np.ones((2, 2)), [0] * 2, [1], names=("folder:/flat", "test"))

"""Labels, the weighted vote and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from hdcache.errors import UsageError
from hdcache.evaluate.vote import accuracy, class_indices, vote, wilson

NAMES = ("bank.tar", "queries.tar")


def test_vote_weighs_by_exp_of_similarity() -> None:
    # Two neighbours of class 1 at 0.9 outvote one of class 0 at 1.0 only if 2 exp(-0.1 / T) > 1.
    s, labels = np.array([[1.0, 0.9, 0.9]]), np.array([[0, 1, 1]])
    assert vote(s, labels, 2, [3], temperature=0.07)[3][0, 0] == 0
    assert vote(s, labels, 2, [3], temperature=0.2)[3][0, 0] == 1


def test_vote_is_independent_of_the_other_ks() -> None:
    draws = np.random.default_rng(0)
    s, labels = -np.sort(-draws.random((50, 40)), axis=1), draws.integers(0, 7, (50, 40))
    together = vote(s, labels, 7, [1, 3, 10, 40])
    for k, ranked in together.items():
        np.testing.assert_array_equal(ranked, vote(s, labels, 7, [k])[k])


def test_class_ties_go_to_the_smallest_class() -> None:
    s = np.full((1, 6), 0.3)
    assert vote(s, np.array([[4, 2, 3, 3, 4, 2]]), 5, [6])[6].tolist() == [[2, 3, 4, -1, -1]]


def test_equal_votes_are_equal_sums_whatever_the_order() -> None:
    s = np.array([[0.9, 0.9, 0.7, 0.7, 0.1, 0.1]])
    for labels in ([0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]):
        for ks in ([6], [1, 3, 6], [1, 2, 3, 4, 5, 6]):
            assert vote(s, np.array([labels]), 2, ks)[6][0, 0] == 0


def test_strict_top5_credits_no_class_without_votes_but_dino_does() -> None:
    s, labels = np.full((1, 10), 0.5), np.full((1, 10), 7)
    assert vote(s, labels, 9, [2, 10])[10].tolist() == [[7, -1, -1, -1, -1]]
    compat = vote(s, labels, 9, [2, 10], compat_dino=True)
    assert compat[10][0, 0] == 7
    assert len({*range(9)} & {*compat[10][0].tolist()}) == 5, "five classes, though four have no vote"
    assert compat[2][0, 2:].tolist() == [-1, -1, -1], "DINO looks at min(5, k) classes"


def test_dino_mode_is_torchs_sort_of_the_float32_scores() -> None:
    import torch

    draws = np.random.default_rng(1)
    s, labels = -np.sort(-draws.random((80, 6)), axis=1), draws.integers(0, 30, (80, 6))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), 30)
    probs = (one_hot * torch.from_numpy(s).float().div(0.07).exp().unsqueeze(-1)).sum(1)
    expected = probs.sort(1, True)[1][:, :5]
    np.testing.assert_array_equal(vote(s, labels, 30, [6], compat_dino=True)[6], expected.numpy())


def test_large_similarities_do_not_overflow() -> None:
    ranked = vote(np.array([[1.0, -1.0]]), np.array([[1, 0]]), 2, [2], temperature=1e-4)[2]
    assert ranked[0, 0] == 1


def test_many_classes_are_voted_in_blocks() -> None:
    classes, queries = 1 << 20, 5
    labels = np.arange(queries)[:, None] * 1000 + np.zeros((1, 3), np.int64)
    assert vote(np.ones((queries, 3)), labels, classes, [3])[3][:, 0].tolist() == [0, 1000, 2000, 3000, 4000]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match=r"temperature: expected a positive number, found .*DINO uses 0\.07"):
        vote(np.ones((1, 1)), np.zeros((1, 1), np.int64), 1, [1], temperature)


def test_bad_k_is_refused() -> None:
    for ks in ([], [0], [3, -1]):
        with pytest.raises(UsageError, match="k: expected one or more positive integers"):
            vote(np.ones((1, 1)), np.zeros((1, 1), np.int64), 1, ks)
    with pytest.raises(UsageError, match=r"k: expected at most 1 \(neighbours given\), found 2"):
        vote(np.ones((1, 1)), np.zeros((1, 1), np.int64), 1, [2])


def test_wilson_interval() -> None:
    # 74.5 % of 50,000 and 85 % of 3,925: worked by hand in the literature's formula.
    assert wilson(37250, 50000) == pytest.approx((74.12, 74.88), abs=0.005)
    assert wilson(3336, 3925) == pytest.approx((83.84, 86.08), abs=0.015)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 100.0
    assert wilson(7, 7)[0] == pytest.approx(64.57, abs=0.01)


def test_accuracy_counts_ranked_classes() -> None:
    ranked = np.array([[0, 1, -1, -1, -1], [1, 0, 2, -1, -1]])
    scored = accuracy(3, ranked, np.array([0, 2]), np.array(["a", "b", "c"]))
    assert (scored.top1, scored.top5) == (50.0, 100.0)
    assert scored.predictions.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([900, 3, 900], [7, 3], [3, 7, 900]),
        (["b", "a", "b"], ["c", "a"], ["a", "b", "c"]),
        (np.array(["b", "a"], object), ["a"], ["a", "b"]),
        (np.array([5, 250], np.uint8), np.array([-7], np.int16), [-7, 5, 250]),
    ],
)
def test_labels_of_both_sets_share_one_sorted_class_list(train: object, test: object, expected: list[object]) -> None:
    first, second, classes = class_indices(train, test, None, NAMES)  # type: ignore[arg-type]
    assert classes == expected
    assert [classes[i] for i in first] == list(train)  # type: ignore[call-overload]
    assert [classes[i] for i in second] == list(test)  # type: ignore[call-overload]


def test_samples_without_a_label_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"queries\.tar: expected a label for every sample, found 2 of 3 without one"):
        class_indices([0, 1], [-1, 0, -1], None, NAMES)


def test_labels_of_different_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels of bank\.tar and queries\.tar: expected the same kind"):
        class_indices([0, 1], ["0", "1"], None, NAMES)


@pytest.mark.parametrize("labels", [[0.5, 1.5], [[0, 1]], np.array([0, "a"], object), 3])
def test_labels_that_are_no_labels_are_refused(labels: object) -> None:
    with pytest.raises(UsageError, match=r"labels of bank\.tar: expected one integer or string per sample"):
        class_indices(labels, [0], None, NAMES)  # type: ignore[arg-type]


def test_labels_outside_the_given_classes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected members of the 2 given classes, found \['c'\]"):
        class_indices(["a"], ["c"], ["a", "b"], NAMES)

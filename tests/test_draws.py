"""Draws: pure functions of their key, pinned to literal values."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache import draws

keys = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


def test_values_that_no_other_numpy_may_change() -> None:
    """The numbers behind every recorded view and every epoch order."""
    assert draws.uniform(3, 0, "a", 0, "view").tolist() == [0.7732559280045161, 0.25230182989518835, 0.5820871986560467]
    assert draws.permutation(8, 0, "rows").tolist() == [1, 3, 5, 2, 7, 6, 4, 0]
    assert draws.integer_seed(1, "x") == 2828631406473205806


@settings(max_examples=50)
@given(key=keys, count=st.integers(0, 40))
def test_same_key_same_numbers_in_any_order_of_calls(key: list[object], count: int) -> None:
    first = draws.uniform(count, *key)
    draws.uniform(7, "between")
    np.testing.assert_array_equal(first, draws.uniform(count, *key))
    assert ((first >= 0) & (first < 1)).all()
    # A longer draw only adds numbers.
    np.testing.assert_array_equal(first, draws.uniform(count + 5, *key)[:count])


@settings(max_examples=50)
@given(first=keys, second=keys)
def test_other_keys_give_other_numbers(first: list[object], second: list[object]) -> None:
    same = [str(part) for part in first] == [str(part) for part in second]
    joined = "\x1f".join(map(str, first)) == "\x1f".join(map(str, second))
    assert (draws.integer_seed(*first) == draws.integer_seed(*second)) == (same or joined)


@settings(max_examples=50)
@given(count=st.integers(0, 300), key=keys)
def test_permutation_holds_every_index_once(count: int, key: list[object]) -> None:
    found = draws.permutation(count, *key)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


def test_uniform_rows_are_the_rows_of_uniform() -> None:
    rows = draws.uniform_rows(5, [(0, "a"), (0, "b")])
    np.testing.assert_array_equal(rows, [draws.uniform(5, 0, "a"), draws.uniform(5, 0, "b")])


def test_numbers_are_spread_evenly() -> None:
    """Mean, variance and neighbours of 100,000 numbers are those of independent uniform ones (5 sigma)."""
    found = draws.uniform(100_000, "spread")
    assert abs(found.mean() - 1 / 2) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(found.var() - 1 / 12) < 5 * (1 / 180 / 1e5) ** 0.5
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / 1e5**0.5


def test_permutations_of_a_few_are_equally_frequent() -> None:
    """Each of the 6 orders of 3 things comes up in a sixth of 3,000 keys (5 sigma)."""
    orders = [tuple(draws.permutation(3, key)) for key in range(3000)]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert (abs(counts - 500) < 5 * (3000 * 5 / 36) ** 0.5).all()

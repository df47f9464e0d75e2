"""The order of an epoch: an exact permutation, the same for any number of ranks, and nearly a full shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hdcache.order import MAX_LANES, epoch_order, rank_slice

small = {
    "count": st.integers(0, 300),
    "batch": st.integers(1, 40),
    "run": st.integers(1, 40),
    "buffer": st.integers(1, 200),
}


@settings(max_examples=200)
@given(**small, holes=st.integers(0, 3), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_row_comes_once(count: int, batch: int, run: int, buffer: int, holes: int, seed: int, epoch: int) -> None:
    """For any batch, run and buffer, with rows missing (failed) anywhere; and again the same when asked again."""
    rows = np.arange(count, dtype=np.int64)
    rows = rows[rows % 7 >= holes]
    order = epoch_order(rows, batch, run_rows=run, buffer_rows=buffer, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), rows)
    np.testing.assert_array_equal(
        order, epoch_order(rows, batch, run_rows=run, buffer_rows=buffer, seed=seed, epoch=epoch)
    )


@settings(max_examples=60)
@given(**small, pieces=st.sampled_from([1, 50, 1 << 20]))
def test_how_much_is_permuted_at_a_time_changes_nothing(
    count: int, batch: int, run: int, buffer: int, pieces: int
) -> None:
    rows = np.arange(count, dtype=np.int64)
    whole = epoch_order(rows, batch, run_rows=run, buffer_rows=buffer, seed=0, epoch=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hdcache.order.PIECE_ROWS", pieces)
        cut = epoch_order(rows, batch, run_rows=run, buffer_rows=buffer, seed=0, epoch=0)
    np.testing.assert_array_equal(whole, cut)


def test_an_order_that_no_release_may_change() -> None:
    """A run that is resumed with a later release goes on where it was."""
    order = epoch_order(np.arange(24), 4, run_rows=4, buffer_rows=8, seed=0, epoch=1)
    assert order.tolist() == [13, 15, 16, 17, 12, 14, 18, 19, 0, 1, 10, 8, 2, 3, 11, 9, 22, 20, 5, 4, 21, 23, 6, 7]


def test_seed_and_epoch_change_the_order() -> None:
    rows = np.arange(64)
    orders = {
        tuple(epoch_order(rows, 8, run_rows=8, buffer_rows=32, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@settings(max_examples=100)
@given(length=st.integers(0, 500), world=st.integers(1, 16))
def test_shares_of_ranks_partition_each_batch(length: int, world: int) -> None:
    """Contiguous, in order, without gap or overlap, equal up to one row: so the global batch knows no ranks."""
    batch = np.arange(length)
    shares = [batch[rank_slice(length, rank, world)] for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(shares), batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# How good the shuffle is: 4,096 rows in runs of 8, batches of 64, a buffer of 1,024.


@pytest.fixture(scope="module", params=range(3))
def epoch(request: pytest.FixtureRequest) -> NDArray[np.int64]:
    return epoch_order(np.arange(4096), 64, run_rows=8, buffer_rows=1024, seed=1, epoch=request.param)


def entropy(order: NDArray[np.int64]) -> float:
    """Entropy of the differences between neighbours, in 64 equal bins of [-4096, 4096)."""
    counts = np.histogram(np.diff(order), bins=64, range=(-4096, 4096))[0]
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def kendall(order: NDArray[np.int64]) -> float:
    """Kendall's tau between the epoch's order and the order on disk."""
    pairs = len(order) * (len(order) - 1) / 2
    return sum(int((order[i + 1 :] > order[i]).sum()) for i in range(len(order))) / pairs * 2 - 1


def test_neighbours_are_as_random_as_in_a_full_shuffle(epoch: NDArray[np.int64]) -> None:
    full = np.random.default_rng(0).permutation(4096)
    assert entropy(epoch) >= 0.97 * entropy(full)
    assert entropy(np.arange(4096)) < 0.1 * entropy(full)


def test_the_order_on_disk_does_not_show() -> None:
    """|tau| < 0.05 in the mean of ten epochs; one epoch of 512 runs strays by about 0.03, as 512 shuffled things do."""
    orders = [
        epoch_order(np.arange(4096), 64, run_rows=8, buffer_rows=1024, seed=1, epoch=epoch) for epoch in range(10)
    ]
    found = np.array([kendall(order) for order in orders])
    assert np.abs(found).mean() < 0.05
    assert abs(found.mean()) < 0.03
    assert np.abs(found).max() < 0.12
    assert kendall(np.arange(4096)) == 1


def test_batches_mix_many_runs(epoch: NDArray[np.int64]) -> None:
    """A batch of 64 draws on at least 32 of the 512 runs of 8 rows; a full shuffle has about 60."""
    runs = [len(set((batch // 8).tolist())) for batch in epoch.reshape(-1, 64)]
    assert min(runs) >= 32


@pytest.mark.parametrize("world", [2, 4, 8, 16, 64])
def test_a_rank_reads_its_share_of_the_runs(world: int, epoch: NDArray[np.int64]) -> None:
    """With 64 lanes, ranks that divide them share no run: together they read each run once, not each rank all."""
    batches = epoch.reshape(-1, 64)
    read = [set((batches[:, rank_slice(64, rank, world)] // 8).ravel().tolist()) for rank in range(world)]
    assert [len(runs) for runs in read] == [512 // world] * world


def test_other_numbers_of_ranks_read_more_but_train_alike(epoch: NDArray[np.int64]) -> None:
    """Three ranks may cut across lanes and then read some runs twice; the batches are the same."""
    batches = epoch.reshape(-1, 64)
    shares = [batches[:, rank_slice(64, rank, 3)] for rank in range(3)]
    read = sum(len(set((share // 8).ravel().tolist())) for share in shares)
    assert 512 <= read < 1.5 * 512
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), batches)


@pytest.mark.parametrize(("batch", "lanes"), [(64, 8), (12, 6), (7, 7), (13, 1), (1, 1)])
def test_a_batch_takes_an_equal_part_of_each_lane(batch: int, lanes: int) -> None:
    """Where a buffer is one run a lane, a batch holds batch / lanes rows of each run."""
    each = 6 * batch // lanes
    order = epoch_order(np.arange(6 * batch), batch, run_rows=each, buffer_rows=6 * batch, seed=0, epoch=0)
    assert lanes <= MAX_LANES
    for part in order.reshape(6, batch):
        assert np.bincount(part // each, minlength=lanes).tolist() == [batch // lanes] * lanes

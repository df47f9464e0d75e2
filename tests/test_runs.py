"""Runs of rows: each read once, every row in its batch and place, whatever the threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache.runs import RUN_ROWS, Runs
from hdcache.schema import ArrayCard
from hdcache.stages import Stages


class Counting:
    """A teacher whose stored value of a row is the row's number; counts what is read."""

    name = "t"
    arrays = {"x/values": ArrayCard(shape=(1,), dtype="int32")}  # noqa: RUF012

    def __init__(self) -> None:
        self.read_runs: list[tuple[int, int]] = []
        self.expected_runs: list[tuple[int, int]] = []

    def expect(self, view: int, start: int, stop: int) -> None:
        self.expected_runs.append((start, stop))

    def read(self, view: int, start: int, stop: int, into: Any) -> None:
        self.read_runs.append((start, stop))
        for row, wanted in zip(range(start, stop), into, strict=True):
            if wanted is not None:
                arrays, place = wanted
                arrays["x/values"][place] = row + 1000 * view


@settings(max_examples=50)
@given(
    data=st.data(),
    count=st.integers(1, 200),
    size=st.integers(1, 40),
    ahead=st.integers(1, 5),
    threads=st.integers(1, 4),
    skipped=st.integers(0, 3),
)
def test_batches_have_their_rows_and_each_run_is_read_once(
    data: st.DataObject, count: int, size: int, ahead: int, threads: int, skipped: int
) -> None:
    """Every batch gets its own rows in its own order; a run is read once and forgotten after its last use.

    Batches may begin in the middle of an epoch: rows that none of them wants go nowhere.
    """
    order = np.array(data.draw(st.permutations(range(count))), np.int64)
    shares = [order[i : i + size] for i in range(0, count, size)][skipped:]
    source: Any = Counting()
    runs, stages = Runs([source], 2, count, shares), Stages()
    with ThreadPoolExecutor(threads) as pool:
        for number, rows in enumerate(shares):
            runs.request(pool, number + ahead)
            found = runs.gather(number)["t"]["x/values"]
            assert found[:, 0].tolist() == (rows + 2000).tolist()
    wanted = sorted({int(row) // RUN_ROWS for rows in shares for row in rows})
    assert sorted(source.read_runs) == [(run * RUN_ROWS, min(count, (run + 1) * RUN_ROWS)) for run in wanted]
    assert source.expected_runs == source.read_runs or threads > 1
    assert sorted(source.expected_runs) == sorted(source.read_runs)
    assert not runs._futures
    assert not runs._uses
    assert not runs._buffers
    assert stages.seconds()["read"] == 0


def test_a_batch_without_rows_has_arrays_without_rows() -> None:
    """A rank whose share of the last batch is empty."""
    source: Any = Counting()
    runs = Runs([source], 0, 4, [np.arange(4), np.arange(0)])
    with ThreadPoolExecutor(1) as pool:
        runs.request(pool, 2)
        assert runs.gather(0)["t"]["x/values"].shape == (4, 1)
        assert runs.gather(1)["t"]["x/values"].shape == (0, 1)


def test_nothing_is_read_for_no_teacher() -> None:
    runs = Runs([], 0, 10, [np.arange(10)])
    with ThreadPoolExecutor(1) as pool:
        runs.request(pool, 1)
        assert runs.gather(0) == {}


def test_a_read_that_fails_fails_the_batches_that_need_it() -> None:
    source: Any = Counting()
    good, source.read = source.read, lambda *arguments: 1 / 0 if arguments[1] else good(*arguments)
    runs = Runs([source], 0, 2 * RUN_ROWS, [np.arange(RUN_ROWS), np.arange(RUN_ROWS, 2 * RUN_ROWS)])
    with ThreadPoolExecutor(1) as pool:
        runs.request(pool, 2)
        assert runs.gather(0)["t"]["x/values"][-1].item() == RUN_ROWS - 1
        with pytest.raises(ZeroDivisionError):
            runs.gather(1)


def test_what_cannot_be_expected_is_for_the_read_to_say() -> None:
    source: Any = Counting()
    source.expect = lambda *arguments: 1 / 0
    runs = Runs([source], 0, 10, [np.arange(10)])
    with ThreadPoolExecutor(1) as pool:
        runs.request(pool, 1)
        assert runs.gather(0)["t"]["x/values"][:, 0].tolist() == list(range(10))


def test_reading_is_counted() -> None:
    source: Any = Counting()
    stages = Stages()
    runs = Runs([source], 0, 10, [np.arange(10)], stages=stages)
    with ThreadPoolExecutor(1) as pool:
        runs.request(pool, 1)
        runs.gather(0)
    assert stages.seconds()["read"] > 0

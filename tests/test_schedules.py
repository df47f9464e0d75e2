from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.distill.schedules import cosine, ema_momentum, learning_rate, scaled_lr, weight_decay
from hdcache.errors import UsageError

RUNS = st.integers(2, 500).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1)))


def test_tinymim_learning_rate_at_batch_4096() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(1.5e-4, 256) == 1.5e-4


@given(RUNS, st.floats(1e-6, 10), st.floats(0, 1e-7))
def test_learning_rate_rises_then_falls_between_its_ends(run: tuple[int, int], peak: float, minimum: float) -> None:
    total, warmup = run
    rates = [learning_rate(step, total, warmup, peak, minimum) for step in range(total + 1)]
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in pairwise(up))
    assert all(a >= b for a, b in pairwise(down))
    assert rates[warmup] == pytest.approx(peak)
    assert rates[-1] == minimum
    if warmup:
        assert rates[0] == 0


@given(RUNS)
def test_learning_rate_has_no_jump(run: tuple[int, int]) -> None:
    total, warmup = run
    steepest = max(1 / max(warmup, 1), math.pi / 2 / (total - warmup))
    rates = [learning_rate(step, total, warmup, 1.0) for step in range(total + 1)]
    assert all(abs(a - b) <= steepest * 1.001 for a, b in pairwise(rates))


def test_learning_rate_agrees_with_the_released_schedule() -> None:
    for step in range(1000):
        epoch = step / 10
        if epoch < 15:
            expected = 2.4e-3 * epoch / 15
        else:
            expected = 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 15) / (100 - 15)))
        assert learning_rate(step, 1000, 150, 2.4e-3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_warm_up_must_fit(warmup: int) -> None:
    with pytest.raises(UsageError, match=f"warm-up of {warmup} steps does not fit into 10 steps; lower warmup_epochs"):
        learning_rate(0, 10, warmup, 1.0)


@pytest.mark.parametrize("schedule", [weight_decay, ema_momentum])
def test_constant_or_cosine(schedule: object) -> None:
    assert callable(schedule)
    assert schedule(7, 10, 0.05) == 0.05
    values = [schedule(step, 10, 0.04, 0.4) for step in range(11)]
    assert values[0] == pytest.approx(0.04)
    assert values[5] == pytest.approx(0.22)
    assert values[10] == 0.4
    assert values == sorted(values)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-5, 5))
def test_cosine_stays_between_its_ends(start: float, end: float, progress: float) -> None:
    value = cosine(start, end, progress)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12

"""``--budget``: what is stored fits, no other choice of codes is better, and a rerun asks for the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdcache.errors import StoreMismatch, UsageError
from hdcache.extract.budget import Point, _spread, fit_within_budget, with_budget
from hdcache.extract.plan import plan
from hdcache.extract.run import extract
from hdcache.store import Store
from hdcache.tap_requests import request, request_all
from hdcache.taps import Tokens

FAST: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 2, "batch": 8}


def tokens(rows: int, spread: float, seed: int) -> Tokens:
    noise = torch.Generator().manual_seed(seed)
    scale = spread * torch.arange(1, 25).float() ** -1
    return Tokens(torch.zeros(rows, 1, 24), torch.randn(rows, 16, 24, generator=noise) * scale)


def known(spreads: dict[str, float]) -> dict[str, tuple[Tokens, Tokens]]:
    return {
        tap: (tokens(80, spread, seed), tokens(20, spread, seed + 9))
        for seed, (tap, spread) in enumerate(spreads.items())
    }


@pytest.mark.parametrize("budget", [60, 120, 300])
def test_rows_fit_and_the_bytes_are_used(budget: int) -> None:
    requests = with_budget(request_all(["final", "block1.out"], None, None), 1000 * budget, 1000)
    assert [entry.row_budget for entry in requests] == [budget, budget]
    data = known({"block1.out": 1.0, "final": 1.0})
    # The prefix token needs 48 bytes in each tap, whatever the code.
    found = fit_within_budget([entry.model_copy(update={"row_budget": budget + 96}) for entry in requests], data, None)
    used = sum(encoder.card.bytes_per_row for encoder in found.values())
    assert 0.6 * (budget + 96) < used <= budget + 96


def test_a_tap_that_needs_few_bytes_gets_the_finer_code() -> None:
    """Errors are relative: a tap is not finer because its numbers are large, but because a bit buys more there."""
    rough, smooth = tokens(100, 1.0, 0), tokens(100, 1.0, 1)
    smooth.patches[..., 3:] = 0
    data = {"block1.out": (rough, rough), "final": (smooth, smooth)}
    requests = with_budget(request_all(list(data), None, None), 250, 1)
    found = fit_within_budget(requests, data, None)
    assert found["final"].card.fidelity < found["block1.out"].card.fidelity  # type: ignore[operator]
    scaled = {
        "block1.out": data["block1.out"],
        "final": tuple(Tokens(v.prefix, 1000 * v.patches) for v in data["final"]),
    }
    again = fit_within_budget(requests, scaled, None)  # type: ignore[arg-type]
    assert again["final"].card.fidelity == found["final"].card.fidelity


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.floats(0.3, 0.9)), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    st.integers(1, 150),
)
def test_the_choice_fits_and_is_near_the_best(shapes: list[list[tuple[int, float]]], budget: int) -> None:
    """Against every choice there is: no error that a step within what is left could still take away."""
    curves: dict[str, list[Point]] = {}
    for number, shape in enumerate(shapes):
        size, error, points = 0.0, 1.0, []
        for place, (more, factor) in enumerate(shape):
            size, error = size + more, error * factor
            points.append(Point(1.0 / (place + 1), size, error))
        curves[str(number)] = points
    found = _spread(curves, budget)
    fitting = [
        choice for choice in itertools.product(*curves.values()) if sum(point.bytes for point in choice) <= budget
    ]
    if found is None:
        assert not fitting
        return
    chosen = [next(p for p in curves[tap] if p.fidelity == fidelity) for tap, fidelity in found.items()]
    assert sum(point.bytes for point in chosen) <= budget
    left = budget - sum(point.bytes for point in chosen)
    for point, points in zip(chosen, curves.values(), strict=True):
        assert not [other for other in points if point.bytes < other.bytes <= point.bytes + left]
    best = min(sum(point.error for point in choice) for choice in fitting)
    assert sum(point.error for point in chosen) <= best + max(p[0].error for p in curves.values())


def test_too_small_a_budget_says_what_would_do() -> None:
    requests = with_budget(request_all(["final"], None, None), 5, 1)
    with pytest.raises(
        UsageError, match=r"leaves 5 B a row, but the coarsest codes of final need .*; give .* times as much"
    ):
        fit_within_budget(requests, known({"final": 1.0}), None)


@pytest.mark.parametrize("budget", [0, 49])
def test_a_budget_that_curves_promise_and_rows_break_ends(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to divide by, and no search without end."""
    requests = with_budget(request_all(["final"], None, None), budget, 1)
    curve = [Point(0.5, 1.0, 0.25)]
    monkeypatch.setattr("hdcache.extract.budget._curve", lambda *_: curve if budget else [Point(0.5, 60.0, 0.25)])
    with pytest.raises(UsageError, match=r"but the coarsest codes of final need .*; give .* times as much"):
        fit_within_budget(requests, known({"final": 1.0}), None)


def test_a_budget_needs_a_tap_to_spend_it_on() -> None:
    with pytest.raises(UsageError, match="--budget chooses the fidelity of klt taps, but none is asked for"):
        with_budget([request("final", "fp16", None), request("pooled", None, None)], 100, 1)


def test_a_store_stays_within_its_budget_and_goes_on(tmp_path: Path, make_npz: Callable[..., str], tiny: str) -> None:
    """From end to end; other taps keep their bytes; another view is added with the same bytes a row."""
    data = make_npz(tmp_path / "data.npz", 160)
    taps = ["block2.attn_in", "final", "pooled"]
    common: dict[str, Any] = {"store": tmp_path / "s", "teachers": [f"t={tiny}"], "taps": taps, **FAST}
    done = extract(data, budget="80KB", **common).teachers["t"]
    # Chunk and shard headers of so small a store come on top.
    assert done["bytes"] < 1.35 * 80_000
    record = Store.open(tmp_path / "s").teacher("t")
    assert sum(card.bytes_per_row for card in record.taps.values()) <= 500
    assert [entry.row_budget for entry in record.requests] == [500, 500, None]
    assert extract(data, budget="80KB", **common).teachers["t"]["rows_written"] == 0
    assert extract(data, budget="160KB", num_views=2, **common).teachers["t"]["rows_written"] == 160
    with pytest.raises(StoreMismatch, match="row_budget"):
        extract(data, budget="90KB", **common)
    assert plan(data, budget="80KB", **common | {"store": tmp_path / "p"}).bytes == pytest.approx(80_000, rel=0.2)
    for command in (extract, plan):
        with pytest.raises(UsageError, match="budget chooses the fidelity of each tap; leave one of the two out"):
            command(data, budget="80KB", fidelity=0.1, **common)

"""What a small extraction sees and measures; that a large one then does the same is in test_plan.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.datasets import Subset, open_dataset
from hdcache.errors import UsageError
from hdcache.extract import trial
from hdcache.extract.trial import _rates, named, probe_shard, sample_of, try_out
from hdcache.tap_requests import request
from hdcache.teachers import load_teacher
from hdcache.views import parse_views


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PROBE_ROWS", 80)


def test_the_first_rows_of_view_0_are_tried(tmp_path: Path, make_npz: Callable[..., str]) -> None:
    whole = open_dataset(make_npz(tmp_path / "d.npz", 200))
    part = sample_of(whole, 0, 4)
    assert isinstance(part, Subset)
    assert part.card.count == len(part.ids) == len(set(part.ids)) == 80
    assert part.card.fingerprint != whole.card.fingerprint
    places = [whole.ids.index(sample_id) for sample_id in part.ids]
    assert places == sorted(places)
    assert np.array_equal(part.labels, whole.labels[places])
    assert np.array_equal(part.read(part.ids[3]), whole.read(part.ids[3]))
    small = Subset(whole, whole.ids[:70])
    assert sample_of(small, 0, 4) is small


def test_rates_are_of_shards_after_the_first() -> None:
    """Quartiles where shards differ, a tenth either way where they do not."""
    assert _rates([(0.0, 16), (1.0, 16), (2.0, 16), (3.0, 16)]) == pytest.approx((14.4, 17.6))
    assert _rates([(100.0, 16), (101.0, 16)]) == pytest.approx((14.4, 17.6))
    slow, fast = _rates([(0.0, 8), (1.0, 8), (3.0, 8), (7.0, 8), (8.0, 8)])
    assert (slow, fast) == pytest.approx((2.5, 8.0))
    with pytest.raises(UsageError, match="too few samples to plan for"):
        _rates([(0.0, 16)])


@pytest.mark.parametrize(("most", "shards"), [(100, 5), (24, 4), (4, 20)])
def test_a_trial_has_no_larger_shards_than_the_extraction(
    most: int, shards: int, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    sample = open_dataset(make_npz(tmp_path / "d.npz", 80))
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8)
    requests = [request("final", "klt", 0.1)]
    found = try_out(sample, tmp_path / "probe", teacher, requests, parse_views("mae", 5), most, min(8, most), 2)
    receipts = list((tmp_path / "probe/teachers/t/views/0/receipts").glob("*.json"))
    assert len(receipts) == shards
    assert (found.rows, found.timing.rows) == (80, 80)
    assert found.record.views.seed == 5
    assert min(found.calibration, found.reading, found.timing.forward) > 0
    assert set(found.others["final"]) == {"fp32", "fp16", "int8", "klt 5 %", "klt 20 %"}
    assert found.others["final"]["fp32"] == 4 * 17 * 48


@given(count=st.integers(1, 400), shard=st.integers(1, 300), batch=st.integers(1, 130))
def test_a_probe_computes_whole_batches(count: int, shard: int, batch: int) -> None:
    """Or fills them up as the extraction does; but for data of fewer rows than five batches."""
    rows = probe_shard(count, shard, batch)
    assert 1 <= rows <= shard
    assert rows == shard or rows % batch == 0 or count < 5 * batch
    assert rows == shard or 3 * shard > count


def test_encodings_have_names() -> None:
    assert (named("klt", 0.05), named("fp16", None)) == ("klt 5 %", "fp16")

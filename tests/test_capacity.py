"""What does not fit is refused before anything is written, with a number that fits."""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache.array_metadata import NESTED, RECORD_BYTES
from hdcache.encodings import request
from hdcache.errors import OutOfSpace, UsageError
from hdcache.extract import capacity
from hdcache.extract.calibrate import calibrate
from hdcache.extract.capacity import (
    COPIES,
    check_manifest,
    check_space,
    held_per_row,
    place_of,
    rows_left,
    samples_left,
    scratch_beside,
    shards_ahead,
)
from hdcache.extract.opening import open_or_create
from hdcache.extract.run import extract
from hdcache.schema import DatasetCard, StoreCard, TapCard
from hdcache.store import Store
from hdcache.teachers import load_teacher

FAST: dict[str, Any] = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "threads": 1}
TOKENS = 4 * 17 * 48
"""Bytes of a row of ``final`` in fp32."""
PIXELS = 3 * 32 * 32
usage = collections.namedtuple("usage", "total used free")


@pytest.fixture
def data(tmp_path: Path, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path / "d.npz", 64)


def memory(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(capacity, "machine_memory", lambda: count)


# Memory


def test_a_row_is_its_pixels_and_three_times_its_arrays(data: str, tmp_path: Path, tiny: str) -> None:
    dataset, store = open_or_create(data, tmp_path / "s", None, 0, 8)
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8)
    asked = [request("final", "fp32", None), request("block2.rel.qk", "sqrt8", None)]
    record, _ = calibrate(store, dataset, teacher, asked, threads=1, source="")
    assert held_per_row(teacher.card, record.taps.values()) == PIXELS + COPIES * (TOKENS + 3 * 17 * 17)


def test_shards_in_the_works_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 4_000_000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert shards_ahead("t", 100, 10_000) == 2
    assert shards_ahead("t", 100, 10_001) == 1
    assert shards_ahead("t", 200, 10_000) == 1
    assert shards_ahead("t", 100, 10_000, at_once=2) == 1
    message = (
        r"teacher t: a shard of 201 rows needs about 2.0 MB of memory while it is extracted, 2.0 MB are there for it; "
        r"give --rows-per-shard 200, to a new store where this one holds rows already$"
    )
    with pytest.raises(UsageError, match=message):
        shards_ahead("t", 201, 10_000)
    with pytest.raises(
        UsageError, match=r"666.7 KB are there for it \(3 such shards at once\); give --rows-per-shard 64,"
    ):
        shards_ahead("t", 100, 10_000, at_once=3)
    with pytest.raises(UsageError, match="--rows-per-shard 4,"):
        shards_ahead("t", 8, 500_000)
    with pytest.raises(UsageError, match="not even one row fits: store fewer taps, or in --encoding fp16"):
        shards_ahead("t", 8, 2_000_001)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"500\.0 KB are there"):
        shards_ahead("t", 100, 10_000)


@given(
    shards=st.integers(1, 200_000),
    names=st.sets(st.from_regex(r"[a-z]{1,40}", fullmatch=True), min_size=1, max_size=12),
    teacher=st.sampled_from(["t", "x" * 128]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_accepted_can_be_read(shards: int, names: set[str], teacher: str) -> None:
    """The manifest of what :func:`check_manifest` lets pass is within the bounds of its reader, and what it names passes."""
    tap = TapCard.model_construct(arrays={"codes": None, "scale": None})
    taps: Any = dict.fromkeys(sorted(names), tap)

    def store(rows: int) -> Any:
        card = DatasetCard.model_construct(count=shards * 256)
        return StoreCard.model_construct(dataset=card, rows_per_shard=rows)

    def size_of(shards: int) -> tuple[int, int]:
        one = {"size": 2**34, "sha256": "0" * 64}
        arrays = [f"{name}/{array}/c.{shards}.0.0.0" for name in names for array in ("codes", "scale")]
        arrays += [f"mask/visible/c.{shards}.0.0", f"pixels/digest/c.{shards}.0.0", f"receipts/{shards}.json"]
        entries = {f"teachers/{teacher}/views/10/{key}": one for key in arrays}
        return shards * len(arrays), shards * len(json.dumps(entries, separators=(",", ":")))

    def fits(shards: int) -> bool:
        objects, bytes_ = size_of(shards)
        return objects < NESTED and bytes_ < RECORD_BYTES

    try:
        check_manifest(store(256), teacher, taps)
    except UsageError as error:
        rows = int(re.findall(r"--rows-per-shard (\d+)", str(error))[0])
        assert rows > 256
        check_manifest(store(rows), teacher, taps)
        assert not fits(2 * shards), "refused with room for twice as many"
    else:
        assert fits(shards)


def test_so_many_shards_are_refused_before_the_first(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"store": tmp_path / "s", "teachers": [f"t={tiny}"], "taps": ["final"], **FAST}
    monkeypatch.setattr("hdcache.extract.capacity.LISTED", 16)
    monkeypatch.setattr("hdcache.extract.opening.shard_size", lambda count, wanted, pixels: wanted)
    with pytest.raises(
        UsageError, match=r"t: 8 shards of \d arrays are more than one manifest may list; give --rows-per-shard 32"
    ):
        extract(data, rows_per_shard=8, **arguments)
    assert not (tmp_path / "s/teachers/t/views").exists()
    assert extract(data, rows_per_shard=32, **arguments).teachers["t"]["rows"] == 64


def test_the_number_that_is_named_fits(data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before the refusal, so the same store takes it."""
    memory(monkeypatch, 2 * 40 * (PIXELS + COPIES * TOKENS))
    arguments: dict[str, Any] = {"store": tmp_path / "s", "teachers": [f"t={tiny}"], "taps": ["final"], **FAST}
    monkeypatch.setattr("hdcache.extract.opening.shard_size", lambda count, wanted, pixels: wanted)
    with pytest.raises(UsageError, match=r"a shard of 64 rows needs about .* of memory") as refused:
        extract(data, rows_per_shard=64, **arguments)
    assert Store.open(tmp_path / "s").teachers() == []
    fits = int(re.findall(r"--rows-per-shard (\d+)", str(refused.value))[0])
    assert fits == 40
    assert extract(data, rows_per_shard=fits, **arguments).teachers["t"]["rows"] == 64
    # Local workers have two shards each.
    with pytest.raises(UsageError, match=r"\(4 such shards at once\); give --rows-per-shard 8, to a new store"):
        extract(data, **arguments, num_views=2, workers=2)


def test_the_machine_has_memory() -> None:
    assert capacity.machine_memory() > 100e6


# Disk


def test_the_place_of_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(tmp_path) == place_of(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("")
    assert place_of(tmp_path / "file") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert place_of(Path("a")) == tmp_path


def test_scratch_lies_beside_a_store_and_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    assert scratch_beside(tmp_path / "s") == tmp_path
    assert scratch_beside(tmp_path / "new" / "s") == tmp_path
    real = Path.stat

    def mounted(self: Path, **more: Any) -> Any:
        found = real(self, **more)
        return type(found)((*found[:2], found.st_dev + 1, *found[3:])) if self == tmp_path / "s" else found

    monkeypatch.setattr(Path, "stat", mounted)
    assert scratch_beside(tmp_path / "s") == tmp_path / "s"
    monkeypatch.setattr(capacity.os, "access", lambda *_: False)
    assert scratch_beside(tmp_path / "s") is None


def test_rows_and_samples_that_are_left(data: str, tmp_path: Path, tiny: str) -> None:
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], rows_per_shard=8, **FAST)
    store = Store.open(tmp_path / "s")
    assert (rows_left(store, "t", 1), rows_left(store, "t", 3), rows_left(store, "u", 2)) == (0, 128, 128)
    (tmp_path / "s/teachers/t/views/0/receipts/2.json").unlink()
    assert rows_left(store, "t", 1) == 8
    assert samples_left(store) == 64
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], pixels="source", **FAST)
    assert samples_left(store) == 0


def test_all_teachers_and_the_samples_count_together(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would fit alone; nothing is written, not even a record, so coarser settings are no mismatch."""
    rows = 64 * TOKENS

    def free(count: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, count))

    arguments: dict[str, Any] = {"store": tmp_path / "s", "taps": ["final"], **FAST}
    both = [f"t={tiny}", f"u={tiny}&seed=1"]
    free(1.9 * rows)
    message = (
        r"about 417.8 KB are needed for 128 rows \(t 208.9 KB, u 208.9 KB\), 396.9 KB are free; free space, store fewer"
    )
    with pytest.raises(OutOfSpace, match=message):
        extract(data, teachers=both, **arguments)
    assert Store.open(tmp_path / "s").teachers() == []
    free(1.01 * rows)
    with pytest.raises(OutOfSpace, match=r"are needed for 64 rows \(t 208.9 KB, samples \d+"):
        extract(data, teachers=both[:1], **arguments, pixels="source")
    assert not (tmp_path / "s/samples/pixels").exists()
    free(1.9 * rows)
    done = extract(data, teachers=both, **arguments | {"encoding": "fp16"})
    assert [facts["rows"] for facts in done.teachers.values()] == [64, 64]
    free(0)
    assert extract(data, teachers=both, **arguments | {"encoding": "fp16"}).failed == {}, "nothing is left to write"


def test_what_fits_is_not_refused(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = open_or_create(data, tmp_path / "s", None, 0, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 1000))
    check_space(store, {"t": (10, 50.0), "u": (10, 50.0)})
    with pytest.raises(OutOfSpace):
        check_space(store, {"t": (10, 50.0), "u": (10, 50.1)})
    with pytest.raises(OutOfSpace):
        check_space(store, {"t": (10, 50.0)}, samples=501)

"""Shard by shard: which rows a shard has, what becomes of a bad one, and where the time went."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFile

from hdcache.arrays import ShardWriter
from hdcache.datasets import open_dataset
from hdcache.durable import durable_write
from hdcache.encodings import request
from hdcache.errors import InputNotFound, Interrupted, StoreMismatch, TooManyFailures, UsageError
from hdcache.extract.calibrate import calibrate, write_record
from hdcache.extract.lanes import Lanes
from hdcache.extract.opening import open_or_create
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.rows import decode_row, order_of, shard_rows
from hdcache.extract.writer import Row, ViewWriter
from hdcache.ledgers import view_ledger
from hdcache.schema import ArrayCard, Preprocessing, Receipt
from hdcache.shards import Codec
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, batches, load_teacher
from hdcache.views import row_order

PREPROCESSING = Preprocessing(size=32)


def ignore(rows: int, timing: Timing) -> None:
    """No progress bar."""


def forwarded(pipeline: Pipeline, writer: ViewWriter, shard: int, rows: list[Row]) -> tuple[Any, dict[int, str], int]:
    """What :meth:`Pipeline.run` makes of a shard's rows, short of writing it."""
    with Lanes(pipeline.teacher, 1) as lanes:
        encoded = [
            lanes.run(
                [row.pixels for row in rows[span]],
                [pipeline.store.ids[row.sample] for row in rows[span]],
                0,
                writer.encoders,
            )
            for span in batches(len(rows), pipeline.teacher.batch)
        ]
    return pipeline._joined(writer, shard, rows, [row.pixels is not None for row in rows], encoded)


@pytest.fixture
def folder(tmp_path: Path, make_folder: Callable[..., Path]) -> Path:
    return make_folder(tmp_path / "d", 20)


@pytest.fixture
def pipeline(folder: Path, tmp_path: Path, tiny: str) -> Pipeline:
    dataset, store = open_or_create(str(folder), tmp_path / "s", None, 0, 8)
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=4)
    return Pipeline(store, dataset, teacher, threads=2, max_failures=None)


@pytest.fixture
def writer(pipeline: Pipeline) -> ViewWriter:
    record, encoders = calibrate(
        pipeline.store, pipeline.dataset, pipeline.teacher, [request("final", "fp32", None)], threads=2, source=""
    )
    write_record(pipeline.store, pipeline.teacher, record, encoders)
    writer = ViewWriter(pipeline.store, record, encoders, 0)
    writer.open()
    return writer


def test_shards_cover_every_sample_once(pipeline: Pipeline) -> None:
    shards = [shard_rows(pipeline.store, 0, shard) for shard in range(3)]
    assert [len(rows) for rows in shards] == [8, 8, 4]
    assert [sample for rows in shards for sample, _ in rows] == row_order(20, 0, 0).tolist()
    assert all(recorded is None for rows in shards for _, recorded in rows)


def test_recorded_rows_come_with_their_numbers(pipeline: Pipeline, writer: ViewWriter) -> None:
    pipeline.run(writer, [1], ignore)
    for sample, recorded in shard_rows(pipeline.store, 0, 1):
        assert recorded is not None
        assert recorded[0][0] == sample
        assert len(recorded[1]) == 32
    assert all(recorded is None for _, recorded in shard_rows(pipeline.store, 0, 0))


def test_rows_in_another_order_than_the_seed_gives_are_refused(pipeline: Pipeline, writer: ViewWriter) -> None:
    pipeline.run(writer, [0], ignore)
    geometry = np.zeros((8, 8), np.int32)
    geometry[:, 0] = row_order(20, 0, 0)[7::-1]
    shard = ShardWriter(20, ArrayCard(shape=(8,), dtype="int32"), 8, 8, codec=Codec(), attributes={})
    ledger = view_ledger(pipeline.store, 0)
    receipt = ledger.receipt(0)
    assert receipt is not None
    changed = durable_write(ledger.folder / "geometry" / shard.key(0), shard.encode(0, geometry))
    ledger.record(Receipt(shard=0, rows=(0, 8), objects=receipt.objects | {f"geometry/{shard.key(0)}": changed}))
    with pytest.raises(StoreMismatch, match="row 0 of shard 0 names another sample than the store's seed gives"):
        shard_rows(pipeline.store, 0, 0)


def test_a_bad_image_becomes_its_reason(pipeline: Pipeline, folder: Path) -> None:
    (folder / "a/00.png").write_bytes(b"")
    row = decode_row(pipeline.store, pipeline.dataset, PREPROCESSING, 0, 0)
    assert row == Row(0, None, reason="a/00.png: the file is empty (0 bytes)")
    (folder / "a/02.png").unlink()
    row = decode_row(pipeline.store, pipeline.dataset, PREPROCESSING, 0, 1)
    assert row.pixels is None
    assert "a/02.png: cannot be read: No such file" in row.reason
    good = decode_row(pipeline.store, pipeline.dataset, PREPROCESSING, 0, 2)
    assert good.pixels is not None
    assert good.pixels.shape == (3, 32, 32)
    assert good.source_size == (44, 40)


def test_a_process_that_allows_truncated_images_is_refused_not_recorded(
    pipeline: Pipeline, writer: ViewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES is set in this process"):
        pipeline.run(writer, [0], ignore)
    assert writer.todo() == [0, 1, 2]


def test_a_row_keeps_its_place_beside_a_failed_one(pipeline: Pipeline, writer: ViewWriter, folder: Path) -> None:
    rows = [decode_row(pipeline.store, pipeline.dataset, PREPROCESSING, 0, sample) for sample in range(8)]
    whole, none, _ = forwarded(pipeline, writer, 1, rows)
    assert none == {}
    holed = [*rows[:2], Row(2, None, reason="torn"), *rows[3:]]
    parts, failed, _ = forwarded(pipeline, writer, 1, holed)
    assert failed == {10: "torn"}
    others = [0, 1, 3, 4, 5, 6, 7]
    for name, value in parts["final"].items():
        assert np.array_equal(value[others], whole["final"][name][others])
        assert not value[2].any()
        assert whole["final"][name][2].any()


def test_a_few_bad_rows_alone_in_a_shard_do_not_condemn_the_teacher(
    pipeline: Pipeline, writer: ViewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens]:
        return {
            tap: Tokens(torch.zeros(len(pixels), 1, 48), torch.full((len(pixels), 16, 48), torch.nan)) for tap in taps
        }

    monkeypatch.setattr(Teacher, "forward", broken)
    pipeline.run(writer, [2], ignore)
    receipt = writer.ledger.receipt(2)
    assert receipt is not None
    assert sorted(receipt.failed) == [16, 17, 18, 19]
    with pytest.raises(
        UsageError, match="teacher t: no row of shard 0 has finite features in fp32; check the checkpoint"
    ):
        pipeline.run(writer, [0], ignore)


def test_too_many_failures_keep_what_was_done(pipeline: Pipeline, writer: ViewWriter, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    pipeline.max_failures = 8
    with pytest.raises(TooManyFailures, match=r"16 images failed, more than --max-failures 8; the first: .*empty"):
        pipeline.run(writer, [0, 1, 2], ignore)
    receipts = [writer.ledger.receipt(shard) for shard in range(3)]
    assert [receipt is not None for receipt in receipts] == [True, True, False]


def test_a_data_set_that_is_gone_is_no_failed_row(
    pipeline: Pipeline, writer: ViewWriter, folder: Path, tmp_path: Path
) -> None:
    pipeline.run(writer, [0], ignore)
    folder.rename(tmp_path / "away")
    with pytest.raises(
        InputNotFound,
        match=r"none of the images of shard 1 could be read \(.*No such file.*is the data set still there\?.*again",
    ):
        pipeline.run(writer, [1, 2], ignore)
    assert writer.todo() == [1, 2]
    (tmp_path / "away").rename(folder)
    pipeline.run(writer, [1, 2], ignore)
    assert writer.todo() == []


def test_a_batch_of_failed_rows_needs_no_teacher(
    pipeline: Pipeline, writer: ViewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = ["block2.rel.qk", "final", "pooled"]
    _, encoders = calibrate(
        pipeline.store, pipeline.dataset, pipeline.teacher, [request(t, None, None) for t in taps], threads=2, source=""
    )
    writer.encoders = encoders
    good = decode_row(pipeline.store, pipeline.dataset, PREPROCESSING, 0, 0)
    forward, sizes = Teacher.forward, []

    def counted(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens | torch.Tensor]:
        sizes.append(len(pixels))
        return forward(self, pixels, taps, visible)

    monkeypatch.setattr(Teacher, "forward", counted)
    parts, failed, _ = forwarded(pipeline, writer, 0, [good, *(Row(i, None, reason="torn") for i in range(1, 8))])
    assert sizes == [4]
    assert sorted(failed) == [1, 2, 3, 4, 5, 6, 7]
    for arrays in parts.values():
        for value in arrays.values():
            assert all(np.array_equal(value[1], value[i]) for i in range(2, 8)), "zeros that were encoded otherwise"


def test_a_complete_shard_is_forwarded_again_only_if_a_failed_row_can_be_read(
    pipeline: Pipeline, writer: ViewWriter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / "a/00.png").read_bytes()
    (folder / "a/00.png").write_bytes(b"")
    pipeline.run(writer, [0, 1, 2], ignore)
    (left,) = writer.todo()
    told: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "forward", lambda *_: pytest.fail("a shard was forwarded for nothing"))
        pipeline.run(writer, [left], lambda rows, timing: told.append(rows))
    assert told == [len(shard_rows(pipeline.store, 0, left))]
    assert list(pipeline.timing.failed) == ["a/00.png"]
    (folder / "a/00.png").write_bytes(content)
    pipeline.run(writer, [left], ignore)
    assert writer.todo() == []


def test_a_view_is_put_in_order_once(pipeline: Pipeline, writer: ViewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdcache.extract import rows as module

    calls: list[int] = []

    def counted(count: int, seed: int, view: int) -> np.ndarray:
        calls.append(view)
        return row_order(count, seed, view)

    monkeypatch.setattr(module, "row_order", counted)
    order_of.cache_clear()
    pipeline.run(writer, [0, 1, 2], ignore)
    assert calls == [0]


def test_an_error_of_the_writing_thread_is_raised(
    pipeline: Pipeline, writer: ViewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr(ViewWriter, "write", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        pipeline.run(writer, [0, 1, 2], ignore)


def test_no_thread_outlives_a_run(pipeline: Pipeline, writer: ViewWriter, signals: None) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Interrupted, match=r"stopped by SIGUSR1 with all finished shards written to .*; run the same"):
        pipeline.run(writer, [0, 1, 2], ignore)
    assert writer.todo() == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "teacher", "write"))]


def test_progress_is_told_of_every_row(pipeline: Pipeline, writer: ViewWriter) -> None:
    told: list[int] = []
    pipeline.run(writer, [0, 1, 2], lambda rows, timing: told.append(rows))
    assert told == [8, 8, 4]
    assert pipeline.timing.rows == 20
    receipts = [writer.ledger.receipt(shard) for shard in range(3)]
    assert pipeline.timing.bytes == sum(e.size for r in receipts if r is not None for e in r.objects.values())
    assert pipeline.timing.bottleneck() in (
        "reading and decoding",
        "teacher forward",
        "encoding",
        "writing",
    )


@pytest.fixture
def stages() -> Iterator[tuple[str, str]]:
    return iter(
        [
            ("waiting_for_images", "reading and decoding"),
            ("forward", "teacher forward"),
            ("encode", "encoding"),
            ("waiting_for_disk", "writing"),
        ]
    )


def test_the_bottleneck_is_the_longest_stage(stages: Iterator[tuple[str, str]]) -> None:
    for name, text in stages:
        assert Timing(**{name: 1.0}).bottleneck() == text


def test_the_store_is_the_same_after_reopening(pipeline: Pipeline, folder: Path) -> None:
    dataset = open_dataset(str(folder))
    assert Store.open(pipeline.store.path).ids == tuple(dataset.ids)

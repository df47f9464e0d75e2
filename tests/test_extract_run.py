"""``extract``: every row once and right, the same bytes whatever happens on the way, and clear refusals."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdcache import klt
from hdcache.arrays import ShardWriter
from hdcache.datasets import open_dataset
from hdcache.errors import (
    HdcacheError,
    InputNotFound,
    Interrupted,
    OutOfSpace,
    StoreCorrupt,
    StoreLocked,
    StoreMismatch,
    TooManyFailures,
    UsageError,
)
from hdcache.extract.opening import default_taps, shard_size
from hdcache.extract.run import extract
from hdcache.extract.summary import ExtractSummary, format_summary
from hdcache.geometry import read_geometry
from hdcache.index import Held
from hdcache.integrity import verify
from hdcache.ledgers import view_ledger
from hdcache.reader import TeacherReader
from hdcache.samples import open_sample
from hdcache.schema import ArrayCard, Receipt, ViewSpec
from hdcache.shards import Codec
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, load_teacher
from hdcache.views import parse_views

Tree = Callable[[Path], dict[str, bytes]]
Python = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def data(tmp_path: Path, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path / "data.npz")


def run(data: str | Path | None, store: Path, teacher: str, **settings: Any) -> ExtractSummary:
    common = {"encoding": "fp32", "precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu"}
    return extract(None if data is None else str(data), store=store, teachers=[teacher], **common | settings)


def manifests(summary: ExtractSummary) -> dict[str, dict[str, str]]:
    return {name: facts["manifests"] for name, facts in summary.teachers.items()}


def sealed(root: Path) -> dict[str, Any]:
    """What teacher ``t``'s manifest of view 0 says, but for the record that holds its birth certificate."""
    manifest = TeacherReader(Store.open(root), "t").manifest(0).model_dump()
    manifest["objects"].pop("teachers/t/zarr.json", None)
    return manifest


def parts_of(value: Tokens | torch.Tensor) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [value.prefix, value.patches]


def live(store: Store, data: str, teacher: Teacher, tap: str, view: int = 0) -> Tokens | torch.Tensor:
    """The teacher's features of every row of a view, computed from the recorded boxes."""
    dataset = open_dataset(data)
    geometry, digests = read_geometry(store, view)
    pixels = []
    for numbers, digest in zip(geometry, digests, strict=True):
        recorded = (numbers, digest.tobytes())
        opened = open_sample(dataset, store.ids[numbers[0]], store.card.views, view, recorded)
        pixels.append(torch.from_numpy(opened.pixels(teacher.card.preprocessing)))
    return teacher.forward(torch.stack(pixels), [tap])[tap]


# What is stored


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8", "klt"])
def test_every_row_is_stored_once_and_decodes_to_what_the_teacher_gives(
    encoding: str, data: str, tmp_path: Path, tiny: str
) -> None:
    taps = ["block3.attn_in", "final", "pooled", "block2.rel.qk"]
    summary = run(data, tmp_path / "s", f"t={tiny}", encoding=encoding, taps=taps)
    store = Store.open(tmp_path / "s")
    reader = TeacherReader(store, "t")
    geometry, _ = read_geometry(store, 0)
    assert sorted(geometry[:, 0].tolist()) == list(range(40))
    assert summary.teachers["t"]["rows"] == summary.teachers["t"]["rows_written"] == 40
    assert summary.failed == {}
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8)
    for tap in taps:
        exact = parts_of(live(store, data, teacher, tap))[-1].double()
        copy = parts_of(reader.tap(0, tap, 0, 40))[-1].double()
        stated = reader.record.taps[tap].certificate.relative_rmse
        flat = exact.flatten(0, -2)
        spread = float(((flat - flat.mean(0)) ** 2).sum())
        error = (float(((exact - copy) ** 2).sum()) / spread) ** 0.5
        if reader.record.taps[tap].encoding == "fp32":
            assert torch.equal(exact, copy)
        assert error <= 1.3 * stated, f"{tap}: {error} against the stated {stated}"


def test_teachers_of_other_sizes_share_the_boxes(data: str, tmp_path: Path, tiny: str, tree: Tree) -> None:
    run(data, tmp_path / "s", f"a={tiny}")
    before = tree(tmp_path / "s")
    run(data, tmp_path / "s", f"b={tiny}", img_size=48)
    after = tree(tmp_path / "s")
    assert {key: after[key] for key in before} == before
    store = Store.open(tmp_path / "s")
    for name, size in (("a", 32), ("b", 48)):
        teacher = load_teacher(f"{name}={tiny}", img_size=size, precision="fp32", batch=8)
        assert teacher.card.preprocessing.size == size
        stored = TeacherReader(store, name).tap(0, "final", 0, 40)
        for got, wanted in zip(parts_of(stored), parts_of(live(store, data, teacher, "final")), strict=True):
            assert torch.equal(got, wanted)


def test_several_teachers_in_one_call(data: str, tmp_path: Path, tiny: str) -> None:
    settings: dict[str, Any] = {"encoding": "fp32", "precision": "fp32", "device": "cpu"}
    one = extract(data, store=tmp_path / "s", teachers=[f"a={tiny}", f"b={tiny}&seed=1"], **settings)
    assert sorted(one.teachers) == Store.open(tmp_path / "s").teachers() == ["a", "b"]
    assert one.teachers["a"]["identity"] != one.teachers["b"]["identity"]


@pytest.mark.parametrize("count", [1, 3])
def test_one_network_is_there_at_a_time(
    count: int, data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several are loaded on the CPU before the store is made, to be calibrated, and for their turn; one alone once."""
    loaded: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def counted(*given: Any, **more: Any) -> Teacher:
        alive.append(sum(found() is not None for found in loaded))
        teacher = load_teacher(*given, **more)
        loaded.append(weakref.ref(teacher.backbone.model))
        return teacher

    monkeypatch.setattr("hdcache.extract.opening.load_teacher", counted)
    common = {"encoding": "fp32", "precision": "fp32", "rows_per_shard": 8, "batch": 8, "device": "cpu"}
    teachers = [f"{name}={tiny}&seed={number}" for number, name in enumerate("abc"[:count])]
    summary = extract(data, store=tmp_path / "s", teachers=teachers, **common)
    assert list(summary.teachers) == list("abc"[:count])
    assert alive == [0] * (1 if count == 1 else 3 * count)
    assert all(found() is None for found in loaded)


def test_a_store_that_nothing_was_written_to_takes_the_shards_that_are_asked_for(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hdcache.extract.opening.calibrate", lambda *_, **__: (_ for _ in ()).throw(UsageError("later"))
    )
    with pytest.raises(UsageError, match="later"):
        run(data, tmp_path / "s", f"t={tiny}", rows_per_shard=40)
    monkeypatch.undo()
    run(data, tmp_path / "s", f"t={tiny}", rows_per_shard=4)
    assert Store.open(tmp_path / "s").card.rows_per_shard == 4
    run(data, tmp_path / "s", f"u={tiny}", rows_per_shard=8)
    assert Store.open(tmp_path / "s").card.rows_per_shard == 4, "it holds rows now"


def test_a_second_view_leaves_every_byte_of_the_first(data: str, tmp_path: Path, tiny: str, tree: Tree) -> None:
    run(data, tmp_path / "s", f"t={tiny}")
    before = tree(tmp_path / "s")
    run(data, tmp_path / "s", f"t={tiny}", num_views=2)
    after = tree(tmp_path / "s")
    assert {key: after[key] for key in before} == before
    assert Store.open(tmp_path / "s").views("t") == [0, 1]
    both = run(data, tmp_path / "both", f"t={tiny}", num_views=2)
    assert tree(tmp_path / "both").keys() == after.keys()
    assert manifests(both)["t"] == manifests(run(data, tmp_path / "s", f"t={tiny}", num_views=2))["t"]


def test_nothing_is_added_to_a_partial_copy(data: str, tmp_path: Path, tiny: str, tree: Tree) -> None:
    run(data, tmp_path / "s", f"t={tiny}", taps=["final", "pooled"])
    (tmp_path / "s/teachers/t/held.json").write_bytes(Held(taps=("final",)).canonical())
    before = tree(tmp_path / "s")
    said = r"this copy has final of teacher 't' and lacks pooled, .*: hdcache pull URL \S+/s --teacher t$"
    with pytest.raises(StoreMismatch, match=said):
        run(data, tmp_path / "s", f"t={tiny}", taps=["final", "pooled"], num_views=2)
    after = tree(tmp_path / "s")
    assert {key: after[key] for key in before} == before
    run(data, tmp_path / "s", f"u={tiny}", taps=["pooled"])


def test_a_second_teacher_replays_what_is_recorded(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, tmp_path / "s", f"a={tiny}")
    monkeypatch.setattr("hdcache.samples.draw", lambda *_: pytest.fail("a recorded view was drawn again"))
    assert run(data, tmp_path / "s", f"b={tiny}&seed=1").teachers["b"]["rows"] == 40


def test_a_recorded_box_is_what_later_teachers_see(data: str, tmp_path: Path, tiny: str) -> None:
    run(data, tmp_path / "s", f"a={tiny}")
    store = Store.open(tmp_path / "s")
    geometry, _ = read_geometry(store, 0)
    geometry[3, 1:5] = [1, 2, 9, 7]
    ledger = view_ledger(store, 0)
    receipt = ledger.receipt(0)
    assert receipt is not None
    writer = ShardWriter(40, ArrayCard(shape=(8,), dtype="int32"), 8, 8, codec=Codec(), attributes={})
    from hdcache.arrays import durable_write

    changed = durable_write(ledger.folder / "geometry" / writer.key(0), writer.encode(0, geometry[:8]))
    ledger.record(Receipt(shard=0, rows=(0, 8), objects=receipt.objects | {f"geometry/{writer.key(0)}": changed}))
    ledger.unseal()
    run(data, tmp_path / "s", f"b={tiny}")
    assert read_geometry(store, 0)[0][3, 1:5].tolist() == [1, 2, 9, 7]
    a, b = (parts_of(TeacherReader(store, name).tap(0, "final", 0, 40))[1] for name in "ab")
    assert [row for row in range(40) if not torch.equal(a[row], b[row])] == [3]


def test_rows_of_a_teacher_without_a_record_are_not_taken_for_another_ones(
    data: str, tmp_path: Path, tiny: str, tree: Tree
) -> None:
    """A copy that was cut short leaves receipts and no record; a seal without one is a loss that is not written over."""
    run(data, tmp_path / "clean", f"t={tiny}&seed=1")
    run(data, tmp_path / "s", f"t={tiny}")
    record, seal = tmp_path / "s/teachers/t/zarr.json", tmp_path / "s/teachers/t/views/0/manifest.json"
    record.unlink()
    before = tree(tmp_path / "s")
    with pytest.raises(StoreCorrupt, match=r"missing, though view 0 of teacher 't' is sealed; .*repair .*t-2=MODEL"):
        run(data, tmp_path / "s", f"t={tiny}&seed=1")
    assert tree(tmp_path / "s") == before
    seal.unlink()
    assert run(data, tmp_path / "s", f"t={tiny}&seed=1").teachers["t"]["rows_written"] == 40
    assert tree(tmp_path / "s") == tree(tmp_path / "clean")


def test_values_do_not_depend_on_shards_threads_or_the_folder(data: str, tmp_path: Path, tiny: str) -> None:
    first = run(data, tmp_path / "1", f"t={tiny}", encoding="klt", num_views=2)
    again = run(data, tmp_path / "2", f"t={tiny}", encoding="klt", num_views=2, threads=1)
    assert manifests(first) == manifests(again)
    run(data, tmp_path / "3", f"t={tiny}", encoding="klt", num_views=2, rows_per_shard=16)
    one, other = (TeacherReader(Store.open(tmp_path / name), "t") for name in "13")
    assert one.record.taps == other.record.taps
    for view in (0, 1):
        for tap in one.record.taps:
            for got, wanted in zip(*(parts_of(r.tap(view, tap, 0, 40)) for r in (one, other)), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("count", [1, 5])
def test_very_small_data_sets(count: int, tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    data = make_npz(tmp_path / "d.npz", count)
    summary = run(data, tmp_path / "s", f"t={tiny}", encoding="klt")
    store = Store.open(tmp_path / "s")
    assert summary.teachers["t"]["rows"] == count
    assert verify(store).good
    exact = parts_of(live(store, data, load_teacher(f"t={tiny}", precision="fp32", batch=8), "final"))[1]
    copy = parts_of(TeacherReader(store, "t").tap(0, "final", 0, count))[1]
    assert float((exact - copy).norm() / exact.norm()) < 0.2


def test_default_taps_leave_out_what_was_never_trained(data: str, tmp_path: Path, tiny: str) -> None:
    """A relation-distilled student as a teacher has an untrained tail; its last trained layer is stored instead."""
    teacher = load_teacher(f"t={tiny}")
    assert default_taps(teacher) == ["block3.attn_in", "final"]
    student = replace(teacher, backbone=replace(teacher.backbone, last_trained="block2.out"))
    assert default_taps(student) == ["block3.attn_in", "block2.out"]


def test_shards_are_whole_chunks() -> None:
    for count in (1, 7, 40, 1000, 100_000):
        for wanted in (1, 5, 8, 100, 256):
            size = shard_size(count, wanted)
            assert 1 <= size <= max(8, wanted)
            assert size < 8 or size % 8 == 0


# Refusals


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "views": ({"views": "gentle"}, r"views\.scale\[0\]: the store has 0\.2, asked was 0\.6"),
    "view seed": ({"view_seed": 5}, r"views\.seed: the store has 0, asked was 5"),
    "taps": ({"taps": ["block1.out"]}, r"requests.*block3\.attn_in.*block1\.out"),
    "encoding": ({"encoding": "fp16", "fidelity": None}, r"requests\[0\]\.encoding: the store has 'klt'.*'fp16'"),
    "fidelity": ({"fidelity": 0.1}, r"requests\[0\]\.fidelity: the store has 0\.2, asked was 0\.1"),
    "precision": ({"precision": "bf16"}, r"card\.precision: the store has 'fp32', asked was 'bf16'"),
    "image size": ({"img_size": 48}, r"card\.preprocessing\.size: the store has 32, asked was 48"),
}


@pytest.fixture(scope="module")
def klt_store(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str], tiny: str) -> Path:
    root = tmp_path_factory.mktemp("klt")
    run(make_npz(root / "d.npz", 16), root / "s", f"t={tiny}", encoding="klt", fidelity=0.2)
    return root


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_is_refused_by_name(what: str, klt_store: Path, tiny: str, tree: Tree) -> None:
    changes, message = CHANGES[what]
    before = tree(klt_store / "s")
    with pytest.raises(StoreMismatch, match=message):
        run(f"npz:{klt_store}/d.npz", klt_store / "s", f"t={tiny}", **{"encoding": "klt", "fidelity": 0.2} | changes)
    assert tree(klt_store / "s") == before


def test_other_weights_are_refused(klt_store: Path, tiny: str) -> None:
    message = r"teacher 't'.*card\.weights: the store has .*add this one under another name: --teacher t-2="
    with pytest.raises(StoreMismatch, match=message):
        run(None, klt_store / "s", f"t={tiny}&seed=1", encoding="klt", fidelity=0.2)


def test_another_data_set_is_refused(klt_store: Path, tiny: str, tmp_path: Path, make_npz: Callable[..., str]) -> None:
    for count, message in (
        (16, "dataset: the same samples, but labels or contents have changed"),
        (18, "dataset: of 16 samples, 2 samples are new, such as '0000016'"),
        (15, "dataset: of 16 samples, 1 samples are gone, such as '0000015'"),
    ):
        with pytest.raises(StoreMismatch, match=message):
            run(make_npz(tmp_path / "d.npz", count, seed=9), klt_store / "s", f"t={tiny}", encoding="klt", fidelity=0.2)


def test_moved_data_another_thread_count_and_batch_are_no_mismatch(
    klt_store: Path, tiny: str, tmp_path: Path, tree: Tree
) -> None:
    shutil.copy(klt_store / "d.npz", tmp_path / "elsewhere.npz")
    before = tree(klt_store / "s")
    for settings in ({"threads": 1}, {"batch": 16}, {"rows_per_shard": 64}):
        again = run(
            f"npz:{tmp_path}/elsewhere.npz", klt_store / "s", f"t={tiny}", encoding="klt", fidelity=0.2, **settings
        )
        assert again.teachers["t"]["bottleneck"] == "nothing left to do"
    assert tree(klt_store / "s") == before


def test_messages_for_settings_that_cannot_be_meant(data: str, tmp_path: Path, tiny: str) -> None:
    with pytest.raises(UsageError, match="no teacher given; say --teacher"):
        extract(data, store=tmp_path / "s", teachers=[])
    for setting in ({"num_views": 0}, {"threads": 0}, {"rows_per_shard": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(setting))} 0 must be at least 1"):
            run(data, tmp_path / "s", f"t={tiny}", **setting)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; give --store a folder"):
        run(data, tmp_path / "file", f"t={tiny}")
    with pytest.raises(InputNotFound, match="no store there yet; name the data set too"):
        run(None, tmp_path / "s", f"t={tiny}")
    with pytest.raises(InputNotFound, match="no such file"):
        run("npz:missing.npz", tmp_path / "s", f"t={tiny}")
    assert not (tmp_path / "s").exists(), "a refused call left something behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": ["block9.out"]}, "the network has 3 blocks"),
        ({"taps": ["logits"], "top_k": 0}, "top_k 0 must be at least 1"),
        ({"teacher_mask": "random:0.01"}, "hides 0"),
        ({"encoding": "klx"}, "unknown encoding 'klx'"),
        ({"views": "videomae"}, "holds images, but the views are clips"),
        ({"teachers": ["random:vit_tiny_patch16_224?img_size=16&depth=1", "b=timm:vit_tiny_patch16_224?checkpoint=no"]}, "no such checkpoint"),
        ({"teachers": ["random:vit_tiny_patch16_224?img_size=16&depth=1&frames=4"]}, "takes clips of 4 frames"),
    ],
)  # fmt: skip
def test_a_refused_command_leaves_no_store(
    data: str, tmp_path: Path, tiny: str, changes: dict[str, Any], message: str
) -> None:
    """Every teacher is loaded and checked before the views of a store are fixed."""
    settings = {"teachers": [f"a={tiny}"], "precision": "fp32", "device": "cpu"} | changes
    with pytest.raises(HdcacheError, match=message):
        extract(data, store=tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_what_only_calibration_finds_can_be_corrected(
    data: str, tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    """The store of a refused command holds nothing yet: other data and views are no mismatch."""
    broken = make_folder(tmp_path / "broken", 4)
    for path in broken.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputNotFound, match="none of 4 images could be read"):
        run(str(broken), tmp_path / "s", f"t={tiny}", views="gentle", view_seed=3)
    found = run(data, tmp_path / "s", f"t={tiny}", views="center")
    assert found.teachers["t"]["rows"] == 40
    store = Store.open(tmp_path / "s")
    assert (len(store.ids), store.card.views.kind) == (40, "center-crop")
    checked = verify(store)
    assert (checked.faults, checked.unlisted) == ([], [])
    with pytest.raises(StoreMismatch, match="was made with other settings"):
        run(data, tmp_path / "s", f"t={tiny}", views="gentle")


def test_the_views_of_a_store_without_teachers_stay_where_none_are_asked_for(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hdcache.extract.opening.calibrate", lambda *_, **__: (_ for _ in ()).throw(UsageError("later"))
    )
    with pytest.raises(UsageError, match="later"):
        run(data, tmp_path / "s", f"t={tiny}", views="gentle", view_seed=3)
    monkeypatch.undo()
    run(data, tmp_path / "s", f"t={tiny}")
    assert Store.open(tmp_path / "s").card.views == parse_views("gentle", 3)


def test_the_data_set_of_a_store_need_not_be_named(data: str, tmp_path: Path, tiny: str) -> None:
    run(data, tmp_path / "s", f"a={tiny}")
    assert run(None, tmp_path / "s", f"b={tiny}&seed=1").teachers["b"]["rows"] == 40
    Path(data.removeprefix("npz:")).unlink()
    with pytest.raises(InputNotFound, match="if the data set has moved, name it: 'hdcache extract DATA"):
        run(None, tmp_path / "s", f"a={tiny}")


def test_too_little_disk_is_noticed_before_the_work(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutOfSpace, match=r"are needed for 40 rows, 1.0 KB are free; free space, store fewer taps"):
        run(data, tmp_path / "s", f"t={tiny}")


def test_the_disk_is_measured_for_every_tap_and_all_views(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = ["block3.attn_in", "final", "pooled", "block2.rel.qk"]
    for encoding in ("fp32", "klt"):
        summary = run(data, tmp_path / encoding, f"t={tiny}", encoding=encoding, taps=taps, rows_per_shard=40)
        record = Store.open(tmp_path / encoding).teacher("t")
        guess = 40 * sum(card.bytes_per_row for card in record.taps.values())
        # Of so few rows a fifth of the bytes are metadata.
        assert guess == pytest.approx(summary.teachers["t"]["bytes"], rel=0.25)
        assert all(card.bytes_per_row > 0 for card in record.taps.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutOfSpace, match=r"are needed for 80 rows"):
        run(data, tmp_path / "fp32", f"t={tiny}", taps=taps, num_views=3)


def test_taps_in_another_order_are_the_same_teacher(data: str, tmp_path: Path, tiny: str) -> None:
    first = run(data, tmp_path / "s", f"t={tiny}", taps=["pooled", "final"])
    again = run(data, tmp_path / "s", f"t={tiny}", taps=["final", "pooled"])
    assert manifests(again) == manifests(first)
    assert again.teachers["t"]["bottleneck"] == "nothing left to do"


def test_a_batch_that_only_the_pipeline_finds_too_large_has_a_way_out(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher has its record by then, and keeps its batch; what the message says works."""
    forward = Teacher._forward

    def full(self: Teacher, *given: Any) -> Any:
        if self.batch >= 16 and (tmp_path / f"s/teachers/{self.name}/zarr.json").exists():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given)

    monkeypatch.setattr(Teacher, "_forward", full)
    for batch in (16, 8):
        with pytest.raises(UsageError, match=r"lower than 16, and where a store has t already, .* another name too"):
            run(data, tmp_path / "s", f"t={tiny}", batch=batch)
    assert run(data, tmp_path / "s", f"u={tiny}", batch=8).teachers["u"]["rows"] == 40


# What was lost


@pytest.mark.parametrize("victim", ["geometry/c.1.0", "source_digest/c.1.0", "receipts/1.json"])
@pytest.mark.parametrize("what", ["missing", "short"])
def test_lost_geometry_is_drawn_again_without_the_teacher(
    victim: str, what: str, data: str, tmp_path: Path, tiny: str, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, tmp_path / "s", f"t={tiny}")
    before = tree(tmp_path / "s")
    path = tmp_path / "s/views/0" / victim
    if what == "short" and path.suffix != ".json":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("the teacher ran"))
    assert run(data, tmp_path / "s", f"t={tiny}").teachers["t"]["rows_written"] == 0
    assert tree(tmp_path / "s") == before


def test_lost_constants_are_made_again_or_refused(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], tree: Tree
) -> None:
    root = make_folder(tmp_path / "d")
    run(root, tmp_path / "s", f"t={tiny}", encoding="klt")
    before = tree(tmp_path / "s")
    folder = tmp_path / "s/teachers/t"
    weight = folder / "weights/block3/qkv_weight/c.0.0"
    flipped = bytearray(weight.read_bytes())
    flipped[5] ^= 1
    weight.write_bytes(flipped)
    (folder / "weights/zarr.json").unlink()
    (folder / "encodings/final/basis/c.0.0").unlink()
    run(root, tmp_path / "s", f"t={tiny}", encoding="klt")
    assert tree(tmp_path / "s") == before
    (folder / "encodings/final/basis/c.0.0").unlink()
    spoil(root)
    with pytest.raises(StoreMismatch, match=r"basis/c.0.0: missing or damaged.*under a new name: --teacher t-2="):
        run(root, tmp_path / "s", f"t={tiny}", encoding="klt")


@pytest.mark.parametrize("budget", [None, "20KB"])
def test_constants_follow_what_was_chosen_not_what_would_be_now(
    budget: str | None,
    tmp_path: Path,
    tiny: str,
    make_folder: Callable[..., Path],
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier version may have found other codes smaller, and so another fidelity within a budget, or a DCT that pays."""
    root = make_folder(tmp_path / "d")
    for pays in (0.0, 1e9):
        store = tmp_path / f"s{pays:g}"
        monkeypatch.setattr(klt, "PAYS", pays)
        run(root, store, f"t={tiny}", encoding="klt", budget=budget)
        before = tree(store)
        card = Store.open(store).teacher("t").taps["final"]
        assert (card.grid is None) == (pays == 0)
        (store / "teachers/t/encodings/final/basis/c.0.0").unlink()
        (store / "teachers/t/encodings/final/step/c.0").unlink()
        monkeypatch.setattr(klt, "PAYS", 1e9 - pays)
        run(root, store, f"t={tiny}", encoding="klt", budget=budget)
        assert tree(store) == before


def test_a_teacher_in_bf16_codes_in_bf16(tmp_path: Path, tiny: str, make_npz: Callable[..., str], tree: Tree) -> None:
    """Finer taps of the same teacher do not; a run that lost shards ends as one that did not."""
    data = make_npz(tmp_path / "d.npz", 80)
    common: dict[str, Any] = {"encoding": "klt", "taps": ("final", "block2.out"), "precision": "bf16"}
    run(data, tmp_path / "s", f"t={tiny}", **common)
    record = Store.open(tmp_path / "s").teacher("t")
    assert {card.code_precision for card in record.taps.values()} == {"bf16"}
    before = tree(tmp_path / "s")
    for name in ("manifest.json", "receipts/00000001.json"):
        (path,) = (tmp_path / "s/teachers/t/views/0").glob(name.replace("00000001", "*1"))
        path.unlink()
    run(data, tmp_path / "s", f"t={tiny}", **common)
    assert tree(tmp_path / "s") == before
    run(data, tmp_path / "fine", f"t={tiny}", **common | {"fidelity": 0.02})
    assert {card.code_precision for card in Store.open(tmp_path / "fine").teacher("t").taps.values()} == {"fp32"}
    run(data, tmp_path / "budget", f"t={tiny}", **common, budget="60KB")
    for card in Store.open(tmp_path / "budget").teacher("t").taps.values():
        assert card.fidelity is not None
        assert card.code_precision == ("bf16" if card.fidelity >= klt.COARSE else "fp32")


def test_chunks_are_of_as_many_rows_as_suit_an_array(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 where a codec makes them small, 8 where none does; a store of earlier versions keeps its 8, and its next view too."""

    def rows(store: Path, view: int, key: str) -> int:
        meta = json.loads((store / f"teachers/t/views/{view}/{key}/zarr.json").read_text())
        return int(meta["codecs"][0]["configuration"]["chunk_shape"][0])

    data = make_npz(tmp_path / "d.npz", 260)
    run(data, tmp_path / "new", f"t={tiny}", encoding="klt", rows_per_shard=32)
    assert Store.open(tmp_path / "new").card.rows_per_shard == 32
    assert (rows(tmp_path / "new", 0, "final/codes"), rows(tmp_path / "new", 0, "final/prefix")) == (32, 8)
    with monkeypatch.context() as earlier:
        earlier.setattr("hdcache.extract.opening.chunk_rows", lambda shard: min(8, shard))
        run(data, tmp_path / "old", f"t={tiny}", encoding="klt", rows_per_shard=32)
    run(data, tmp_path / "old", f"t={tiny}", encoding="klt", rows_per_shard=32, num_views=2)
    for view in (0, 1):
        assert (rows(tmp_path / "old", view, "final/codes"), rows(tmp_path / "old", view, "final/prefix")) == (8, 8)
    old, new = (TeacherReader(Store.open(tmp_path / name), "t").rows(0, "final", 0, 260) for name in ("old", "new"))
    assert all(np.array_equal(old[name], new[name]) for name in old)


# Rows that fail


def spoil(root: Path) -> dict[str, bytes]:
    """Damage three images of a folder without changing their size; returns what they were."""
    good = {name: (root / name).read_bytes() for name in ("a/00.png", "b/03.png", "a/08.png")}
    sizes = {name: len(whole) for name, whole in good.items()}
    (root / "a/00.png").write_bytes(b"no image".ljust(sizes["a/00.png"], b"!"))
    (root / "b/03.png").write_bytes(good["b/03.png"][: sizes["b/03.png"] // 2].ljust(sizes["b/03.png"], b"\0"))
    (root / "a/08.png").write_bytes(bytes(sizes["a/08.png"]))
    return good


def test_failed_rows_are_named_and_the_others_untouched(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    good = make_folder(tmp_path / "good")
    bad = shutil.copytree(good, tmp_path / "bad")
    (bad / "a/02.png").write_bytes(b"")
    (bad / "b/05.png").write_bytes((good / "b/05.png").read_bytes()[:100])
    (bad / "a/04.png").write_bytes(b"not an image at all")
    summary = run(bad, tmp_path / "s", f"t={tiny}")
    assert set(summary.failed) == {"a/02.png", "b/05.png", "a/04.png"}
    assert summary.failed["a/02.png"] == "a/02.png: the file is empty (0 bytes)"
    assert summary.failed["a/04.png"].startswith("a/04.png: not an image of a known format")
    store = Store.open(tmp_path / "s")
    reader = TeacherReader(store, "t")
    geometry, _ = read_geometry(store, 0)
    rows = {store.ids[sample]: row for row, sample in enumerate(geometry[:, 0].tolist())}
    assert reader.manifest(0).failed == {rows[name]: why for name, why in summary.failed.items()}
    assert verify(store).good
    run(good, tmp_path / "whole", f"t={tiny}")
    whole = TeacherReader(Store.open(tmp_path / "whole"), "t")
    for got, wanted in zip(*(parts_of(r.tap(0, "final", 0, 20)) for r in (reader, whole)), strict=True):
        for name, row in rows.items():
            same = torch.equal(got[row], wanted[row])
            assert same == (name not in summary.failed)
            assert same or not got[row].any(), "a failed row must hold zeros"
    text = format_summary(summary)
    assert "3 samples failed" in text
    assert summary.failed["b/05.png"] in text


def test_a_mended_image_is_retried_and_leaves_no_trace(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], tree: Tree
) -> None:
    root = make_folder(tmp_path / "d")
    run(root, tmp_path / "whole", f"t={tiny}")
    good = spoil(root)
    assert set(run(root, tmp_path / "s", f"t={tiny}").failed) == set(good)
    before = tree(tmp_path / "s")
    again = run(root, tmp_path / "s", f"t={tiny}")
    assert set(again.failed) == set(good)
    assert again.teachers["t"]["rows_written"] == 0
    assert tree(tmp_path / "s") == before, "a retry that mends nothing writes nothing"
    for name, content in good.items():
        (root / name).write_bytes(content)
    mended = run(root, tmp_path / "s", f"t={tiny}")
    assert mended.failed == {}
    assert sealed(tmp_path / "s") == sealed(tmp_path / "whole")
    assert view_ledger(Store.open(tmp_path / "s"), 0).manifest().digest() == (
        view_ledger(Store.open(tmp_path / "whole"), 0).manifest().digest()
    )
    assert verify(Store.open(tmp_path / "s")).good


def test_a_retry_never_gives_up_a_row_that_is_stored(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 8)
    good = spoil_one(root)
    run(root, tmp_path / "s", f"t={tiny}")
    before = tree(tmp_path / "s")
    shutil.move(root / "b", tmp_path / "away")
    (root / "b").symlink_to(tmp_path / "away", target_is_directory=True)
    for path in (tmp_path / "away").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    (root / "a/00.png").write_bytes(good)
    summary = run(f"folder:{root}", tmp_path / "s", f"t={tiny}")
    assert len(summary.failed) == 4
    assert tree(tmp_path / "s") == before


def spoil_one(root: Path) -> bytes:
    content = (root / "a/00.png").read_bytes()
    (root / "a/00.png").write_bytes(bytes(len(content)))
    return content


def test_a_mended_row_is_recorded_beside_the_old_boxes(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 8)
    good = spoil_one(root)
    run(root, tmp_path / "s", f"a={tiny}")
    store = Store.open(tmp_path / "s")
    before, digests = read_geometry(store, 0)
    (root / "a/00.png").write_bytes(good)
    lost = (root / "b/01.png").read_bytes()
    (root / "b/01.png").write_bytes(bytes(len(lost)))
    summary = run(root, tmp_path / "s", f"b={tiny}")
    after, new_digests = read_geometry(store, 0)
    assert set(summary.failed) == {"b/01.png"}
    unread = before[:, 6] == 0
    assert unread.sum() == 1
    assert np.array_equal(after[~unread], before[~unread])
    assert np.array_equal(new_digests[~unread], digests[~unread])
    assert (after[unread][:, 3:5] > 0).all()


def test_an_image_that_changed_between_teachers_is_a_failed_row(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 8)
    run(root, tmp_path / "s", f"a={tiny}")
    content = bytearray((root / "a/00.png").read_bytes())
    (root / "a/00.png").write_bytes(content.replace(b"IEND", b"IEND", 1)[:-4] + b"\xae\x42\x60\x83")
    summary = run(root, tmp_path / "s", f"b={tiny}")
    assert list(summary.failed) == ["a/00.png"]
    assert "the image changed since its view was recorded" in summary.failed["a/00.png"]


def test_a_file_mended_to_another_size_is_retried(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "d", 8)
    (root / "a/00.png").write_bytes(b"")
    assert len(run(root, tmp_path / "s", f"t={tiny}").failed) == 1
    make_folder(root, 8)
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "fresh"))
    mended = run(root, tmp_path / "s", f"t={tiny}")
    assert (len(mended.failed), mended.teachers["t"]["failed_rows"]) == (0, 0)


def test_the_manifest_does_not_depend_on_where_the_data_lies(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    """Two copies of a data set in two folders give stores with equal manifests; where they came from is kept apart."""
    first, second = (make_folder(tmp_path / name / "d", 8) for name in ("one", "two"))
    runs = [run(root, root.parent / "s", f"t={tiny}") for root in (first, second)]
    assert runs[0].teachers["t"]["manifests"] == runs[1].teachers["t"]["manifests"]
    stores = [Store.open(root.parent / "s") for root in (first, second)]
    assert [store.card.dataset.spec for store in stores] == [f"folder:{first}", f"folder:{second}"]


def test_max_failures_stops_and_a_rerun_goes_on(tmp_path: Path, tiny: str, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d")
    spoil(root)
    with pytest.raises(
        TooManyFailures, match=r"[23] images failed, more than --max-failures 1; the first: [ab]/0\d\.png: "
    ):
        run(root, tmp_path / "s", f"t={tiny}", max_failures=1)
    assert run(root, tmp_path / "s", f"t={tiny}", max_failures=3).teachers["t"]["failed_rows"] == 3
    assert Store.open(tmp_path / "s").views("t") == [0]


def nan_where(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
    forward = Teacher.forward

    def broken(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens | torch.Tensor]:
        found = forward(self, pixels, taps, visible)
        for value in found.values():
            parts_of(value)[-1][chosen(pixels.float().mean((1, 2, 3)).cpu())] = float("nan")
        return found

    monkeypatch.setattr(Teacher, "forward", broken)


def test_rows_without_finite_features_fail_alone(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_where(monkeypatch, lambda mean: mean > 145)
    summary = run(data, tmp_path / "s", f"t={tiny}", encoding="klt")
    assert 0 < len(summary.failed) < 20
    assert all(
        why.endswith(f"{name}: the features of teacher t are not finite"[len(name) :])
        for name, why in summary.failed.items()
    )
    store = Store.open(tmp_path / "s")
    assert (read_geometry(store, 0)[0][:, 6] > 0).all(), "the images themselves were read"
    stored = parts_of(TeacherReader(store, "t").tap(0, "final", 0, 40))[1]
    assert torch.isfinite(stored).all()


def test_a_teacher_without_finite_features_is_refused(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        nan_where(patch, lambda mean: mean > -1)
        with pytest.raises(UsageError, match="teacher t: features are not finite in fp32; check the checkpoint"):
            run(data, tmp_path / "s", f"t={tiny}")
        with pytest.raises(UsageError, match="features are not finite in bf16; use --precision fp32"):
            run(data, tmp_path / "s", f"t={tiny}", precision="bf16")
    run(data, tmp_path / "s", f"t={tiny}")
    nan_where(monkeypatch, lambda mean: mean > -1)
    with pytest.raises(UsageError, match="no row of shard 0 has finite features in fp32; check the checkpoint"):
        run(data, tmp_path / "s", f"t={tiny}", num_views=2)


def test_nothing_readable_at_all(tmp_path: Path, tiny: str, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", 4)
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(InputNotFound, match=r"none of 4 images could be read; the first: [ab]/0"):
        run(root, tmp_path / "s", f"t={tiny}")


def test_odd_images(tmp_path: Path, tiny: str, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", 4)
    grey = Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40))
    grey.save(root / "a/grey.png")
    grey.quantize(8).save(root / "a/palette.png")
    grey.convert("CMYK").save(root / "a/cmyk.jpg")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(root / "a/deep.png")
    grey.convert("RGBA").save(root / "a/alpha.webp")
    Image.new("L", (1, 1)).save(root / "a/dot.png")
    Image.new("1", (30000, 30000)).save(root / "a/huge.png")
    summary = run(root, tmp_path / "s", f"t={tiny}")
    assert list(summary.failed) == ["a/huge.png"]
    assert "too many pixels" in summary.failed["a/huge.png"]
    assert summary.teachers["t"]["rows"] == 11


# Whatever happens on the way


def test_a_rerun_of_a_complete_store_writes_nothing(data: str, tmp_path: Path, tiny: str) -> None:
    first = run(data, tmp_path / "s", f"t={tiny}", num_views=2)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.name[0] != "."}
    again = run(data, tmp_path / "s", f"t={tiny}", num_views=2)
    stamps.pop(tmp_path / "s", None)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.name[0] != "."}
    assert again.teachers["t"]["bottleneck"] == "nothing left to do"
    assert again.teachers["t"]["rows_written"] == 0
    assert manifests(again) == manifests(first)
    assert "bottleneck: nothing left to do" in format_summary(again)


KILLED = """
import os, signal, sys
from hdcache.extract.run import extract
data, store, teacher, last = sys.argv[1:]
sync, left = os.fsync, [int(last)]
def fsync(file):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
os.fsync = fsync
extract(data, store=store, teachers=[teacher], encoding="klt", precision="fp32", rows_per_shard=8, batch=8, num_views=2,
        device="cpu")
"""


def kill_and_finish(moments: list[int], data: str, tmp_path: Path, tiny: str, tree: Tree, python: Python) -> None:
    whole = run(data, tmp_path / "whole", f"t={tiny}", encoding="klt", num_views=2)
    for moment in moments:
        process = python(KILLED, data, tmp_path / "s", f"t={tiny}", moment)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, output
    finished = run(data, tmp_path / "s", f"t={tiny}", encoding="klt", num_views=2)
    assert manifests(finished) == manifests(whole)
    checked = verify(Store.open(tmp_path / "s"))
    assert checked.good
    assert checked.unsealed == []
    left = {key: value for key, value in tree(tmp_path / "s").items() if not key.endswith(".partial")}
    assert left == tree(tmp_path / "whole")


def test_killed_twice_and_finished_equals_undisturbed(
    data: str, tmp_path: Path, tiny: str, tree: Tree, python: Python
) -> None:
    kill_and_finish([21, 87], data, tmp_path, tiny, tree, python)


@pytest.mark.slow
def test_killed_twenty_times_and_finished_equals_undisturbed(
    data: str, tmp_path: Path, tiny: str, tree: Tree, python: Python
) -> None:
    chance = random.Random(7)
    kill_and_finish([chance.randint(1, 26) for _ in range(20)], data, tmp_path, tiny, tree, python)


WAITING = """
import sys
from hdcache.extract.run import extract
from hdcache.extract.writer import ViewWriter
write, once = ViewWriter.write, []
def slow(self, shard, *rest):
    if not once:
        once.append(shard)
        print("writing", flush=True)
        sys.stdin.readline()
    return write(self, shard, *rest)
ViewWriter.write = slow
data, store, teacher = sys.argv[1:]
extract(data, store=store, teachers=[teacher], encoding="fp32", precision="fp32", rows_per_shard=8, batch=8, device="cpu")
"""


def test_two_processes_in_one_store(data: str, tmp_path: Path, tiny: str, tree: Tree, python: Python) -> None:
    whole = run(data, tmp_path / "whole", f"t={tiny}")
    first = python(WAITING, data, tmp_path / "s", f"t={tiny}")
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    with pytest.raises(
        StoreLocked, match=rf"is being written by \S+, process {first.pid} on .*; wait for it, or stop it"
    ):
        run(data, tmp_path / "s", f"t={tiny}")
    other = run(data, tmp_path / "s", f"u={tiny}&seed=1")
    assert other.teachers["u"]["rows"] == 40, "another teacher may be written at the same time"
    first.communicate("go\n", timeout=60)
    assert first.returncode == 0
    assert manifests(run(data, tmp_path / "s", f"t={tiny}")) == manifests(whole)
    assert verify(Store.open(tmp_path / "s")).good


TOGETHER = """
import sys
from hdcache.extract import run
from hdcache.store import Store
data, store, teacher = sys.argv[1:]
made = Store.create
def slow(*given, **more):
    import time
    time.sleep(1)
    return made(*given, **more)
Store.create = slow
print("ready", flush=True)
sys.stdin.readline()
run.extract(data, store=store, teachers=[teacher], encoding="fp32", precision="fp32", rows_per_shard=8, batch=8, device="cpu")
"""


def test_processes_that_make_one_store_together_all_succeed(
    data: str, tmp_path: Path, tiny: str, python: Python
) -> None:
    """Each waits while another makes it, then adds its teacher."""
    started = [python(TOGETHER, data, tmp_path / "s", f"t{number}={tiny}&seed={number}") for number in range(3)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    store = Store.open(tmp_path / "s")
    assert [(name, store.views(name)) for name in store.teachers()] == [("t0", [0]), ("t1", [0]), ("t2", [0])]
    assert verify(store).good


@pytest.mark.parametrize("call", [1, 14, 33])
def test_a_full_disk_loses_nothing_that_was_finished(
    call: int, data: str, tmp_path: Path, tiny: str, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole", f"t={tiny}")
    made = run(data, tmp_path / "s", f"other={tiny}&seed=1")
    assert made.teachers["other"]["rows"] == 40
    sync, left = os.fsync, [call]

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutOfSpace, match=r"no space left while writing .*; finished shards are safe: free space"):
            run(data, tmp_path / "s", f"t={tiny}")
    assert manifests(run(data, tmp_path / "s", f"t={tiny}")) == manifests(whole)
    assert verify(Store.open(tmp_path / "s")).good
    assert not [key for key in tree(tmp_path / "s") if key.endswith(".partial")]


@pytest.mark.parametrize("name", ["geometry", "source_digest", "receipts"])
def test_a_disk_that_is_full_while_a_mended_image_is_recorded_breaks_no_teacher(
    name: str, tmp_path: Path, tiny: str, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "d", 16)
    good = (root / "a/04.png").read_bytes()
    (root / "a/04.png").write_bytes(b"bad")
    for spec in (f"t={tiny}", f"u={tiny}&seed=1"):
        assert sorted(run(root, tmp_path / "s", spec).failed) == ["a/04.png"]
    (root / "a/04.png").write_bytes(good)
    replace_file, full = os.replace, []

    def replaced(source: Path, path: Path) -> None:
        if f"views/0/{name}/" in str(path) and "teachers" not in str(path):
            full.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        with pytest.raises(OutOfSpace, match=r"finished shards are safe: free space and run the same command again"):
            run(root, tmp_path / "s", f"t={tiny}")
    assert full
    assert verify(Store.open(tmp_path / "s")).faults == []
    for spec in (f"v={tiny}&seed=2", f"u={tiny}&seed=1", f"t={tiny}"):
        assert run(root, tmp_path / "s", spec).failed == {}
    run(root, tmp_path / "whole", f"t={tiny}")
    assert verify(Store.open(tmp_path / "s")).faults == verify(Store.open(tmp_path / "s")).unlisted == []
    found, whole = (read_geometry(Store.open(tmp_path / folder), 0) for folder in ("s", "whole"))
    assert all(np.array_equal(one, other) for one, other in zip(found, whole, strict=True))


def test_sigterm_stops_between_shards(
    data: str, tmp_path: Path, tiny: str, tree: Tree, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache import stopping
    from hdcache.extract.writer import ViewWriter

    whole = run(data, tmp_path / "whole", f"t={tiny}")
    write = ViewWriter.write

    def signalled(self: ViewWriter, shard: int, *rest: Any) -> int:
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ViewWriter, "write", signalled)
        with pytest.raises(Interrupted, match="stopped by SIGTERM with all finished shards written to") as caught:
            run(data, tmp_path / "s", f"t={tiny}")
    assert caught.value.exit_code == 75
    assert "run the same command again" in str(caught.value)
    stopping._received.clear()
    written = len(list((tmp_path / "s/teachers/t/views/0/receipts").glob("*.json")))
    assert 2 <= written < 5
    rest = run(data, tmp_path / "s", f"t={tiny}")
    assert rest.teachers["t"]["rows_written"] == 40 - 8 * written
    assert manifests(rest) == manifests(whole)


def test_clipped_values_are_said(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_npz(tmp_path / "d.npz", 8)
    run(data, tmp_path / "s", f"t={tiny}", encoding="int8")
    forward = Teacher.forward

    def louder(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens | torch.Tensor]:
        found = forward(self, pixels, taps, visible)
        return {key: Tokens(v.prefix, 3 * v.patches) for key, v in found.items() if isinstance(v, Tokens)}

    monkeypatch.setattr(Teacher, "forward", louder)
    summary = run(data, tmp_path / "s", f"t={tiny}", encoding="int8", num_views=2)
    assert summary.teachers["t"]["saturated"] > 0
    assert f"{summary.teachers['t']['saturated']:,} values clipped" in format_summary(summary)


def test_a_view_spec_may_be_given_as_a_record(data: str, tmp_path: Path, tiny: str) -> None:
    spec = ViewSpec(kind="center-crop", flip=0.0, fraction=1.0)
    run(data, tmp_path / "s", f"t={tiny}", views=spec)
    assert {tuple(box) for box in read_geometry(Store.open(tmp_path / "s"), 0)[0][:, 1:6].tolist()} == {
        (2, 0, 40, 40, 0)
    }

"""``hdcache export-store``: what other libraries read from an export is what hdcache itself decodes."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

import hdcache
from hdcache import cli
from hdcache.datasets import store_dataset
from hdcache.errors import (
    HdcacheError,
    InputNotFound,
    Interrupted,
    OutOfSpace,
    StoreCorrupt,
    StoreLocked,
    StoreMismatch,
    UsageError,
)
from hdcache.extract.run import extract
from hdcache.geometry import read_geometry
from hdcache.leases import lease
from hdcache.reader import TeacherReader
from hdcache.samples import open_sample
from hdcache.sharing.export import export_store, format_export
from hdcache.store import Store
from hdcache.taps import Tokens

SMALL = {"device": "cpu", "precision": "fp32", "batch": 8, "threads": 2}


def whole(out: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """All shards of an export one after the other: ids, tensors."""
    ids: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            ids += json.loads(file.metadata()["ids"])
            for name in file.keys():  # noqa: SIM118  # not a dict
                parts.setdefault(name, []).append(file.get_tensor(name))
    return ids, {name: torch.cat(found) for name, found in parts.items()}


def samples(out: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of every sample of an export as tars, as WebDataset groups them."""
    for path in sorted(out.glob("*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        yield from found.items()


def decoded(store: Path, tap: str, view: int = 0, teacher: str = "t") -> Tokens:
    opened = Store.open(store)
    found = TeacherReader(opened, teacher).tap(view, tap, 0, opened.card.dataset.count)
    assert isinstance(found, Tokens)
    return found


# What is in it


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_safetensors_hold_what_hdcache_decodes(
    dtype: str, kind: torch.dtype, sealed_store: Path, tmp_path: Path
) -> None:
    """klt, fp32 and fp16 taps, tokens and vectors; prefix and patches apart; ids and labels of the rows beside them."""
    facts = export_store(sealed_store, tmp_path / "o", layout="safetensors", dtype=dtype, rows_per_shard=6)
    ids, found = whole(tmp_path / "o")
    store = Store.open(sealed_store)
    for tap in ("block1.attn_in", "final"):
        value = decoded(sealed_store, tap)
        assert torch.equal(found[f"t.{tap}.patches"], value.patches.to(kind))
        assert torch.equal(found[f"t.{tap}.prefix"], value.prefix.to(kind))
    assert torch.equal(found["t.pooled.values"], TeacherReader(store, "t").tap(0, "pooled", 0, 20).to(kind))  # type: ignore[union-attr]
    geometry = read_geometry(store, 0)[0]
    assert np.array_equal(found["geometry"].numpy(), geometry)
    assert ids == [store.ids[sample] for sample in geometry[:, 0]]
    assert found["sample"].tolist() == geometry[:, 0].tolist()
    assert found["label"].tolist() == store.labels[geometry[:, 0]].tolist()
    assert found["row"].tolist() == list(range(20))
    assert (facts["rows"], facts["shards"], facts["written"], facts["failed"]) == (20, 4, 4, [])


def test_targets_are_those_that_a_student_learns_from(tiny_store: Path, tmp_path: Path) -> None:
    """Relations and QKV derived from a tap, by sample id, beside a tap as it is stored."""
    targets = ["block3.rel.qk", "block3.rel.vv@6", "block3.qkv"]
    out = tmp_path / "o"
    export_store(tiny_store, out, layout="safetensors", taps=["final"], targets=targets, view=1, dtype="fp32")
    ids, found = whole(out)
    assert {name for name in found if "." in name} == {
        "t.final.patches", "t.final.prefix", "t.block3.qkv.patches", "t.block3.qkv.prefix",
        "t.block3.rel.qk.values", "t.block3.rel.vv@6.values",
    }  # fmt: skip
    loader = hdcache.open_store(tiny_store).loader({"t": targets}, batch_size=16, size=32)
    seen = 0
    for batch in loader.epoch(1):
        rows = [ids.index(sample) for sample in batch.ids]
        asked: Any = batch.targets["t"]
        for name in targets[:2]:
            torch.testing.assert_close(found[f"t.{name}.values"][rows], asked[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found["t.block3.qkv.patches"][rows], asked["block3.qkv"].patches, rtol=1e-5, atol=1e-5
        )
        seen += len(rows)
    assert seen == 64


def test_tars_hold_one_object_a_sample_and_tap(tiny_store: Path, tmp_path: Path) -> None:
    """Tensors, facts, label, and the pixels that the teacher saw, under a key without dots."""
    export_store(tiny_store, tmp_path / "o", layout="webdataset", taps=["final"], dtype="fp32", images=True)
    store = Store.open(tiny_store)
    geometry, digests = read_geometry(store, 0)
    value, dataset = decoded(tiny_store, "final"), store_dataset(store)
    count = 0
    for row, (key, files) in enumerate(samples(tmp_path / "o")):
        facts, sample = json.loads(files["json"]), int(geometry[row, 0])
        assert (key, facts["sample"], facts["id"]) == (f"{sample:09d}", sample, store.ids[sample])
        assert (facts["box"], facts["flip"]) == (geometry[row, 1:5].tolist(), bool(geometry[row, 5]))
        assert int(files["cls"]) == facts["label"] == store.labels[sample]
        assert facts["class"] == store.card.dataset.classes[facts["label"]]
        tensors = safetensors.torch.load(files["t.final.safetensors"])
        assert torch.equal(tensors["patches"], value.patches[row])
        assert torch.equal(tensors["prefix"], value.prefix[row])
        recorded = (geometry[row], digests[row].tobytes())
        opened = open_sample(dataset, facts["id"], store.card.views, 0, recorded)
        seen = opened.pixels(TeacherReader(store, "t").record.card.preprocessing)
        with Image.open(io.BytesIO(files["png"])) as image:
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1), seen)
        assert files.keys() == {"json", "cls", "png", "t.final.safetensors"}
        count += 1
    assert count == 64


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(tiny_store: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    export_store(tiny_store, tmp_path / "o", layout="webdataset", taps=["final"], images=True, rows_per_shard=40)
    urls = [str(path) for path in sorted((tmp_path / "o").glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(urls) == 2
    assert sorted(sample["json"]["id"] for sample in found) == sorted(Store.open(tiny_store).ids)
    assert all(sample["png"].shape == (32, 32, 3) and isinstance(sample["cls"], int) for sample in found)
    gc.collect()  # it leaves its files to the collector, which says so


def test_images_beside_arrays_are_the_same_pixels(tiny_store: Path, tmp_path: Path) -> None:
    export_store(tiny_store, tmp_path / "a", layout="safetensors", taps=["final"], images=True)
    export_store(tiny_store, tmp_path / "b", layout="webdataset", taps=["final"], images=True)
    images = whole(tmp_path / "a")[1]["images"]
    assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.uint8)
    for row, (_, files) in enumerate(samples(tmp_path / "b")):
        with Image.open(io.BytesIO(files["png"])) as image:
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1), images[row].numpy())


def test_masked_teachers_say_which_tokens_they_saw(make_npz: Callable[..., str], tiny: str, tmp_path: Path) -> None:
    data = make_npz(tmp_path / "d.npz", 10)
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], teacher_mask="0.75", **SMALL)
    export_store(tmp_path / "s", tmp_path / "a", layout="safetensors")
    export_store(tmp_path / "s", tmp_path / "b", layout="webdataset")
    reader = TeacherReader(Store.open(tmp_path / "s"), "t")
    visible = reader.unpacked(reader.packed_masks(0, 0, 10))
    found = whole(tmp_path / "a")[1]
    assert found["t.final.patches"].shape == (10, 4, 48)
    assert np.array_equal(found["t.final.visible"].numpy(), visible)
    for row, (_, files) in enumerate(samples(tmp_path / "b")):
        assert np.array_equal(safetensors.torch.load(files["t.final.safetensors"])["visible"].numpy(), visible[row])


def test_clips_have_a_picture_for_each_frame(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdcache.samples import OpenedSample

    still = OpenedSample.pixels
    monkeypatch.setattr(OpenedSample, "pixels", lambda self, how: np.stack([still(self, how)] * 3, axis=1))
    export_store(tiny_store, tmp_path / "b", layout="webdataset", taps=["final"], images=True)
    _, files = next(samples(tmp_path / "b"))
    assert {name for name in files if "png" in name} == {"frame0000.png", "frame0001.png", "frame0002.png"}


def test_failed_rows_are_left_out_and_listed(make_folder: Callable[..., Path], tiny: str, tmp_path: Path) -> None:
    """Of several teachers, rows that any of them lacks; all others come in order, in whole shards."""
    root = make_folder(tmp_path / "data")
    (root / "a" / "04.png").write_bytes(b"no image")
    teachers = [f"t={tiny}", f"u={tiny}&seed=1"]
    extract(str(root), store=tmp_path / "s", teachers=teachers, taps=["final"], rows_per_shard=4, **SMALL)
    facts = export_store(tmp_path / "s", tmp_path / "o", layout="safetensors", dtype="fp32", rows_per_shard=5)
    ids, found = whole(tmp_path / "o")
    gone = [entry["row"] for entry in facts["failed"]]
    kept = [row for row in range(20) if row not in gone]
    assert [(entry["id"], entry["teacher"]) for entry in facts["failed"]] == [("a/04.png", "t"), ("a/04.png", "u")]
    assert all("not an image" in entry["reason"] for entry in facts["failed"])
    assert json.loads((tmp_path / "o" / "index.json").read_text())["failed"] == facts["failed"]
    assert f"left out: row {gone[0]} (a/04.png), failed in teacher t: " in format_export(facts)
    assert "a/04.png" not in ids
    assert found["row"].tolist() == kept
    for name in ("t", "u"):
        assert torch.equal(found[f"{name}.final.patches"], decoded(tmp_path / "s", "final", 0, name).patches[kept])
    index = json.loads((tmp_path / "o" / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [5, 5, 5, 4]


def test_of_a_copy_with_some_taps_those_are_exported(sealed_store: Path, tmp_path: Path) -> None:
    (sealed_store / "teachers" / "t" / "held.json").write_text('{"taps": ["final"]}')
    for tap in ("block1.attn_in", "pooled"):
        shutil.rmtree(sealed_store / "teachers" / "t" / "views" / "0" / tap)
    facts = export_store(sealed_store, tmp_path / "o", layout="safetensors")
    assert {name for name in facts["arrays"] if "." in name} == {"t.final.patches", "t.final.prefix"}


# Bytes


@pytest.mark.parametrize("layout", ["safetensors", "webdataset"])
def test_bytes_do_not_change_with_threads(
    layout: str, tiny_store: Path, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    found = []
    for threads in (1, 3):
        out = tmp_path / str(threads)
        targets = ["block3.rel.qk", "final"]
        export_store(tiny_store, out, layout=layout, targets=targets, images=True, rows_per_shard=40, threads=threads)
        found.append(tree(out))
    assert found[0] == found[1]


@pytest.mark.parametrize(("layout", "images", "exact"), [("safetensors", True, True), ("webdataset", False, True), ("webdataset", True, False)])  # fmt: skip
def test_a_dry_run_says_how_many_bytes_and_writes_none(
    layout: str, images: bool, exact: bool, tiny_store: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"layout": layout, "images": images, "rows_per_shard": 40}
    planned = export_store(tiny_store, tmp_path / "o", dry_run=True, **settings)
    assert not (tmp_path / "o").exists()
    done = export_store(tiny_store, tmp_path / "o", **settings)
    bytes_there = sum(path.stat().st_size for path in (tmp_path / "o").glob("shard-*"))
    assert done["bytes"] == bytes_there
    assert (planned["bytes"] == bytes_there) if exact else (planned["bytes"] >= bytes_there)
    assert (planned["written"], planned["shards"], planned["rows"]) == (None, done["shards"], done["rows"])
    assert "would need" in format_export(planned)
    assert "2 of them written now" in format_export(done)


def test_the_index_names_every_shard_with_its_sha256(sealed_store: Path, tmp_path: Path) -> None:
    import hashlib

    facts = export_store(sealed_store, tmp_path / "o", layout="safetensors", rows_per_shard=8)
    index = json.loads((tmp_path / "o" / "index.json").read_text())
    for shard in index["shards"]:
        data = (tmp_path / "o" / shard["file"]).read_bytes()
        assert (shard["size"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert index["arrays"]["t.final.patches"] == {"shape": [9, 6], "dtype": "float16"}
    assert index["classes"] == ["a", "b"]
    assert index["bytes"] == facts["bytes"] == sum(shard["size"] for shard in index["shards"])


def test_a_shard_is_no_larger_than_a_quarter_of_a_gibibyte_unless_asked(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = export_store(tiny_store, tmp_path / "o", layout="safetensors", dry_run=True)
    assert facts["rows_per_shard"] == 1024
    row = sum(np.prod(card["shape"], dtype=int) * 2 for name, card in facts["arrays"].items() if "." in name)
    monkeypatch.setattr("hdcache.sharing.export.SHARD_BYTES", int(row) * 10 + 1)
    assert export_store(tiny_store, tmp_path / "o", layout="safetensors", dry_run=True)["rows_per_shard"] == 10


# The same command again


@pytest.mark.parametrize("layout", ["safetensors", "webdataset"])
def test_an_export_goes_on_where_it_was_stopped(
    layout: str, sealed_store: Path, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Finished shards stay the files that they are; the end is that of an export that was never stopped."""
    settings: dict[str, Any] = {"layout": layout, "rows_per_shard": 6}
    export_store(sealed_store, tmp_path / "whole", **settings)
    asked = iter([False, False, True])
    monkeypatch.setattr("hdcache.stopping.requested", lambda: next(asked))
    with pytest.raises(Interrupted, match=r"with 2 of 4 shards in .*; run the same command again to go on"):
        export_store(sealed_store, tmp_path / "o", **settings)
    monkeypatch.undo()
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("shard-*")}
    assert len(first) == 2
    (tmp_path / "o" / ".shard-00002.tar.1-2.partial").write_bytes(b"what a killed process left")
    facts = export_store(sealed_store, tmp_path / "o", **settings)
    assert facts["written"] == 2
    assert {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in first} == first
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")
    assert export_store(sealed_store, tmp_path / "o", **settings)["written"] == 0


def test_a_kill_leaves_what_the_next_run_completes(
    tiny_store: Path, tmp_path: Path, python: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    code = """
import sys
from hdcache.sharing import export
calls = []
def stop(folder, shard, written, kept=export.record):
    if len(calls) == 2:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(shard)
    return kept(folder, shard, written)
export.record = stop
export.export_store(sys.argv[1], sys.argv[2], layout="safetensors", rows_per_shard=16)
"""
    process = python(code, tiny_store, tmp_path / "o", OMP_NUM_THREADS="1")
    assert (process.communicate(timeout=120), process.returncode)[1] == -9
    assert len(list((tmp_path / "o").glob("shard-*"))) == 3
    facts = export_store(tiny_store, tmp_path / "o", layout="safetensors", rows_per_shard=16)
    assert (facts["shards"], facts["written"]) == (4, 2)
    export_store(tiny_store, tmp_path / "whole", layout="safetensors", rows_per_shard=16)
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "receipt", "foreign receipt"])
def test_a_shard_that_changed_is_written_again(
    damage: str, sealed_store: Path, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    settings: dict[str, Any] = {"layout": "safetensors", "rows_per_shard": 6}
    export_store(sealed_store, tmp_path / "o", **settings)
    before = tree(tmp_path / "o")
    shard, receipt = tmp_path / "o" / "shard-00001.safetensors", tmp_path / "o" / "receipts" / "1.json"
    data = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(data[:100])
    elif damage == "remove":
        shard.unlink()
    elif damage == "receipt":
        receipt.write_bytes(receipt.read_bytes()[:-3])
    else:
        shutil.copy(tmp_path / "o" / "receipts" / "2.json", receipt)
    assert export_store(sealed_store, tmp_path / "o", **settings)["written"] == 1
    assert tree(tmp_path / "o") == before


# What is refused


def test_an_export_of_other_settings_is_refused_with_the_fields(sealed_store: Path, tmp_path: Path) -> None:
    export_store(sealed_store, tmp_path / "o", layout="safetensors", taps=["final"], rows_per_shard=6)
    with pytest.raises(
        StoreMismatch,
        match=r"o: an export of other settings \(dtype is 'fp16', asked was 'bf16'; rows_per_shard is 6, asked was 7\); choose another",
    ):
        export_store(sealed_store, tmp_path / "o", layout="safetensors", taps=["final"], rows_per_shard=7, dtype="bf16")
    with pytest.raises(
        StoreMismatch, match=r"features is \{'t': \['final'\]\}, asked was \{'t': \['final', 'pooled'\]\}"
    ):
        export_store(sealed_store, tmp_path / "o", layout="safetensors", taps=["final", "pooled"], rows_per_shard=6)
    (tmp_path / "o" / "export.json").write_text("[]")
    with pytest.raises(StoreMismatch, match=r"an export of other settings \(dataset is None"):
        export_store(sealed_store, tmp_path / "o", layout="safetensors", taps=["final"], rows_per_shard=6)


def test_a_folder_of_something_else_is_left_alone(sealed_store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StoreMismatch, match=r"mine: not empty, and not an export; choose another folder"):
        export_store(sealed_store, tmp_path / "mine", layout="webdataset")
    with pytest.raises(StoreMismatch, match=r"thesis.txt: a file, not a folder; choose another folder"):
        export_store(sealed_store, tmp_path / "mine" / "thesis.txt", layout="webdataset")
    with pytest.raises(UsageError, match=r"lies in the store, where nothing else may be; choose another folder"):
        export_store(sealed_store, sealed_store / "export", layout="webdataset")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_too_little_space_is_said_before_anything_is_written(
    sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = export_store(sealed_store, tmp_path / "o", layout="safetensors", dry_run=True)["bytes"]
    space = "hdcache.sharing.export_folder.shutil.disk_usage"
    monkeypatch.setattr(space, lambda path: SimpleNamespace(free=need - 1))
    with pytest.raises(
        OutOfSpace, match=rf"o: .* \({need:,} bytes\) are needed, .* are free; free space, choose fewer"
    ):
        export_store(sealed_store, tmp_path / "o", layout="safetensors")
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(space, lambda path: SimpleNamespace(free=need))
    export_store(sealed_store, tmp_path / "o", layout="safetensors")
    monkeypatch.setattr(space, lambda path: SimpleNamespace(free=0))
    assert export_store(sealed_store, tmp_path / "o", layout="safetensors")["written"] == 0, (
        "what is there needs no room"
    )


def test_one_process_writes_an_export(sealed_store: Path, tmp_path: Path) -> None:
    with lease(tmp_path / "o" / ".export.lock"), pytest.raises(StoreLocked):
        export_store(sealed_store, tmp_path / "o", layout="safetensors")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layout": "parquet"}, UsageError, r"--format 'parquet': choose from: safetensors, webdataset"),
        ({"layout": "webdatset"}, UsageError, r"--format 'webdatset': did you mean 'webdataset'\?"),
        ({"dtype": "half"}, UsageError, r"--dtype 'half': choose from: bf16, fp16, fp32"),
        ({"threads": 0}, UsageError, r"threads 0 must be at least 1"),
        ({"rows_per_shard": 0}, UsageError, r"--rows-per-shard 0 must be at least 1"),
        ({"teachers": ["x"]}, InputNotFound, r"no teacher 'x' \(teachers: t\)"),
        ({"taps": ["block2.out"]}, InputNotFound, r"teacher 't' holds .*, not block2.out; --target NAME derives what"),
        ({"taps": ["blok2"]}, UsageError, r"unknown tap 'blok2'"),
        ({"targets": ["block2.out"]}, InputNotFound, r"which cannot give block2.out"),
        ({"view": 3}, InputNotFound, r"view 3 of teacher 't' is not complete"),
        ({"data": "x"}, UsageError, r"--data says where the images are; add --images, or leave it out"),
        ({"images": True}, InputNotFound, r"; if the data set has moved, give --data SPEC"),
        ({"images": True, "data": "nowhere"}, InputNotFound, r"nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, Any], error: type[HdcacheError], message: str, sealed_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_store(sealed_store, tmp_path / "o", **{"layout": "safetensors"} | settings)
    assert not (tmp_path / "o").exists()


def test_another_data_set_is_refused(tiny_store: Path, make_npz: Callable[..., str], tmp_path: Path) -> None:
    other = make_npz(tmp_path / "other.npz", 64, seed=9)
    with pytest.raises(
        StoreMismatch, match=r"is not the data set that .* was made from: .*; give --data SPEC of the original"
    ):
        export_store(tiny_store, tmp_path / "o", layout="webdataset", images=True, data=other)


def test_a_store_without_teachers_has_nothing_to_export(sealed_store: Path, tmp_path: Path) -> None:
    shutil.rmtree(sealed_store / "teachers" / "t")
    with pytest.raises(
        InputNotFound, match=r"no teacher to export; add one: hdcache extract --store .* --teacher NAME=MODEL"
    ):
        export_store(sealed_store, tmp_path / "o", layout="safetensors")


def test_a_view_whose_rows_all_failed_has_nothing_to_export(
    sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = TeacherReader(Store.open(sealed_store), "t").manifest(0)
    none = seal.model_copy(update={"failed": dict.fromkeys(range(20), "unreadable")})
    monkeypatch.setattr(TeacherReader, "manifest", lambda self, view: none)
    with pytest.raises(InputNotFound, match=r"every row of view 0 failed in extraction; there is none to export"):
        export_store(sealed_store, tmp_path / "o", layout="safetensors")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1e5, UsageError, r"final of teacher 't' has values up to 1e\+05, which fp16 cannot hold; choose --dtype bf16"),
        (float("nan"), StoreCorrupt, r"final of teacher 't' is not finite; run 'hdcache verify'"),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_refused(
    value: float, error: type[HdcacheError], message: str, sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    large = Tokens(torch.zeros(1, 1, 6), torch.full((1, 9, 6), value))
    monkeypatch.setattr(TeacherReader, "coded", lambda self, tap, parts, dtype=None: large)
    with pytest.raises(error, match=message):
        export_store(sealed_store, tmp_path / "o", layout="safetensors", taps=["final"])


def test_a_shard_that_does_not_fit_into_memory_is_refused(
    sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of safetensors; tars are written sample by sample."""
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "1KB")
    with pytest.raises(
        UsageError,
        match=r"--rows-per-shard 20: a shard of 5.0 KB is put together in memory, and 1.0 KB may be held; choose at most 3, or raise HDCACHE_BUFFER_BYTES",
    ):
        export_store(sealed_store, tmp_path / "o", layout="safetensors", rows_per_shard=20)
    export_store(sealed_store, tmp_path / "o", layout="webdataset", rows_per_shard=20)


def test_teachers_that_see_views_in_other_forms_cannot_share_images(
    make_npz: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    """Nor may their names differ in case alone, where WebDataset lowers it."""
    data = make_npz(tmp_path / "d.npz", 8)
    teachers = [f"T={tiny}", f"t={tiny.replace('img_size=32', 'img_size=48')}"]
    extract(data, store=tmp_path / "s", teachers=teachers, taps=["final"], **SMALL)
    with pytest.raises(
        UsageError,
        match=r"--images: teachers see the view in different forms \(T: 32 px bicubic, t: 48 px bicubic\); export one",
    ):
        export_store(tmp_path / "s", tmp_path / "o", layout="safetensors", images=True)
    with pytest.raises(
        UsageError, match=r"names of teachers differ in case alone \(T.final, t.final\), and WebDataset lowers it"
    ):
        export_store(tmp_path / "s", tmp_path / "o", layout="webdataset")
    export_store(tmp_path / "s", tmp_path / "o", layout="webdataset", teachers=["t"], images=True)
    export_store(tmp_path / "s", tmp_path / "both", layout="safetensors")
    assert {"T.final.patches", "t.final.patches"} <= whole(tmp_path / "both")[1].keys()


# The command


def test_the_command_speaks_json_or_text(
    sealed_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["export-store", str(sealed_store), str(tmp_path / "o"), "--format", "safetensors", *more])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    code, out, err = run("--tap", "final", "--dry-run")
    assert (code, "would need" in out, (tmp_path / "o").exists()) == (0, True, False)
    code, out, err = run("--tap", "final", "--rows-per-shard", "7", "--json")
    assert (code, json.loads(out)["shards"]) == (0, 3)
    assert "export  20/20 rows (100 %)" in err
    code, out, err = run("--tap", "final", "--rows-per-shard", "7", "-q")
    assert (code, err) == (0, "")
    assert "0 of them written now" in out
    code, out, err = run("--tap", "final")
    assert (code, out) == (5, "")
    assert err.startswith("hdcache: ")
    assert err.count("\n") == 1

"""Keeping samples in the store: nothing changes but that the data set is needed no more."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdcache.cli import main
from hdcache.datasets import open_dataset, store_dataset
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import (
    InputNotFound,
    Interrupted,
    OutOfSpace,
    StoreCorrupt,
    StoreLocked,
    StoreMismatch,
    UsageError,
)
from hdcache.evaluate.run import knn_eval
from hdcache.extract.opening import open_or_create
from hdcache.extract.packing import PROBED, bytes_per_sample, pack
from hdcache.extract.plan import format_plan, plan
from hdcache.extract.run import extract
from hdcache.extract.summary import ExtractSummary
from hdcache.info import describe_store, format_store
from hdcache.integrity import verify
from hdcache.leases import Owner
from hdcache.packed import bytes_key, packed_order, pixels_ledger
from hdcache.pixels import decode, digest
from hdcache.store import Store
from hdcache.student_files import WEIGHTS_FILE

Make = Callable[..., Path]
Tree = Callable[[Path], dict[str, bytes]]
Python = Callable[..., "subprocess.Popen[str]"]


def run(data: str | Path | None, store: Path, teacher: str, **settings: Any) -> ExtractSummary:
    common = {"encoding": "fp32", "precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu"}
    return extract(None if data is None else str(data), store=store, teachers=[teacher], **common | settings)


def manifests(summary: ExtractSummary) -> dict[str, dict[str, str]]:
    return {name: facts["manifests"] for name, facts in summary.teachers.items()}


def keep(data: str | Path, store: Path, threads: int = 2, rows: int = 8) -> Store:
    """A store without teachers that keeps its samples."""
    dataset, opened = open_or_create(str(data), store, None, 0, rows)
    pack(opened, dataset, threads=threads)
    return opened


# Without the data set


def test_all_goes_on_without_the_data_set_and_equal_to_the_bit(
    tmp_path: Path, tiny: str, make_folder: Make, small_recipe: Callable[..., Recipe], tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 32)
    (root / "a/06.png").write_bytes(b"broken")
    (root / "b/07.png").write_bytes(b"")
    taps = ["block3.attn_in", "final"]
    with_data, alone = tmp_path / "with", tmp_path / "alone"
    first = run(root, with_data, f"t={tiny}", taps=taps)
    kept = run(root, alone, f"t={tiny}", taps=taps, pixels="source")
    assert manifests(kept) == manifests(first)
    assert kept.failed == first.failed
    assert sorted(kept.failed) == ["a/06.png", "b/07.png"]
    second = run(root, with_data, f"u={tiny}&seed=1", num_views=2)
    recipe = small_recipe(batch_size=10, objective__teacher="t")
    distill(recipe, out=tmp_path / "a", store=with_data, device="cpu", threads=2)
    shutil.move(root, tmp_path / "elsewhere")
    shutil.move(alone, tmp_path / "moved")
    alone = tmp_path / "moved"
    again = run(None, alone, f"u={tiny}&seed=1", num_views=2)
    assert manifests(again) == manifests(second)
    assert again.failed == second.failed
    distill(recipe, out=tmp_path / "b", store=alone, device="cpu", threads=1)
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()
    own = {key: value for key, value in tree(alone).items() if not key.startswith(("samples/pixels", "about"))}
    assert own == {key: value for key, value in tree(with_data).items() if not key.startswith("about")}
    assert manifests(run(tmp_path / "elsewhere", alone, f"t={tiny}", taps=taps)) == manifests(first), "named data wins"
    with pytest.raises(InputNotFound, match="if the data set has moved"):
        run(None, with_data, f"v={tiny}&seed=2")


def test_labels_and_classes_come_from_the_store(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 12)
    whole = open_dataset(str(root))
    run(root, tmp_path / "s", f"t={tiny}", pixels="source")
    shutil.rmtree(root)
    own = open_dataset(f"store:{tmp_path}/s")
    assert own.labels.tolist() == whole.labels.tolist()
    assert own.card.classes == ("a", "b")
    assert own.card.fingerprint == whole.card.fingerprint
    found = knn_eval(tiny, train=f"store:{tmp_path}/s", device="cpu", ks=(1,))
    assert found["train"]["spec"] == f"store:{tmp_path}/s"


def as_folder(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    return f"folder:{make_folder(tmp_path / 'd', 10)}"


def as_npz(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path / "d.npz", 10)


def as_grey(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).integers(0, 256, (10, 9, 7, 1), dtype=np.uint8))
    return f"npz:{tmp_path}/d.npz"


def as_tar(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for path in sorted(make_folder(tmp_path / "d", 10).rglob("*.png")):
            tar.add(path, f"{path.stem}.png")
            label = tarfile.TarInfo(f"{path.stem}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(path.parent.name.replace("a", "0").replace("b", "1").encode()))
    return f"tar:{tmp_path}/d.tar"


def as_hub(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    files = sorted(make_folder(tmp_path / "d", 10).rglob("*.png"))
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["z", "a"])})
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in files], "label": [0, 1] * 5}
    library.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "hub"))
    return f"hf:{tmp_path}/hub"


def as_torchvision(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    return "torchvision:FakeData?size=10&image_size=3,20,30&num_classes=3"


def as_video(tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]) -> str:
    av = pytest.importorskip("av")
    for number in range(4):
        path = tmp_path / "d" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            for shade in range(6):
                frame = np.full((32, 32, 3), 40 * number + 10 * shade, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return f"video:{tmp_path}/d"


@pytest.mark.parametrize("kind", [as_folder, as_npz, as_grey, as_tar, as_hub, as_torchvision, as_video])
def test_every_kind_of_data_set_is_kept(
    kind: Callable[..., str], tmp_path: Path, make_folder: Make, make_npz: Callable[..., str]
) -> None:
    spec = kind(tmp_path, make_folder, make_npz)
    whole = open_dataset(spec)
    views = "videomae?frames=4&stride=1" if whole.card.kind == "video" else None
    dataset, store = open_or_create(spec, tmp_path / "s", views, 0, 8)
    own = pack(store, dataset, threads=2)
    assert own.card == whole.card.model_copy(update={"spec": f"store:{tmp_path}/s"})
    assert own.labels.tolist() == whole.labels.tolist()
    assert [digest(own.read(name)) for name in own.ids] == [digest(whole.read(name)) for name in whole.ids]
    assert verify(store).good


# Shrunk


def test_shrunk_images_are_what_teachers_and_students_see(
    tmp_path: Path, tiny: str, make_folder: Make, small_recipe: Callable[..., Recipe]
) -> None:
    root = make_folder(tmp_path / "d", 32)
    small = run(root, tmp_path / "s", f"t={tiny}", taps=["block3.attn_in", "final"], pixels="24")
    whole = run(root, tmp_path / "w", f"t={tiny}", taps=["block3.attn_in", "final"])
    one, other = (Store.open(tmp_path / name).teacher("t") for name in "sw")
    assert one.identity_digest() != other.identity_digest()
    assert manifests(small) != manifests(whole)
    store = Store.open(tmp_path / "s")
    assert store.card.dataset.shorter_side == 24
    assert {min(decode(store_dataset(store).read(name)).size) for name in store.ids} == {24}
    named = store_dataset(store, str(root))
    assert named.card.fingerprint == store.card.dataset.fingerprint
    for name in store.ids:
        assert named.read(name) == store_dataset(store).read(name), "shrunk as it is read, it is the same image"
    assert manifests(run(root, tmp_path / "s", f"t={tiny}", taps=["block3.attn_in", "final"])) == manifests(small)
    recipe = small_recipe(epochs=1, warmup_epochs=0)
    distill(recipe, out=tmp_path / "cached", store=tmp_path / "s", device="cpu", threads=2)
    distill(recipe, out=tmp_path / "live", store=tmp_path / "s", online=True, device="cpu", threads=2)
    assert (tmp_path / "cached" / WEIGHTS_FILE).read_bytes() == (tmp_path / "live" / WEIGHTS_FILE).read_bytes()
    shutil.rmtree(root)
    assert run(None, tmp_path / "s", f"u={tiny}&seed=1").teachers["u"]["rows"] == 32
    assert "kept here" in format_store(describe_store(store))
    assert "shrunk to a shorter side of 24 pixels" in format_store(describe_store(store))


def test_another_size_than_the_store_has_is_refused(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 12)
    run(root, tmp_path / "w", f"t={tiny}")
    with pytest.raises(StoreMismatch, match=r"seen whole images, so those shrunk to 24 pixels .* \(--pixels source\)"):
        run(root, tmp_path / "w", f"t={tiny}", pixels="24")
    run(root, tmp_path / "s", f"t={tiny}", pixels=24)
    for other in ("source", 32):
        with pytest.raises(StoreMismatch, match=f"shrunk to 24 pixels, so --pixels {other} is .*repeat --pixels 24"):
            run(root, tmp_path / "s", f"t={tiny}", pixels=other)
    with pytest.raises(UsageError, match="--pixels 'small': write 'source'"):
        run(root, tmp_path / "x", f"t={tiny}", pixels="small")
    assert not (tmp_path / "x").exists()
    shutil.rmtree(tmp_path / "s/samples/pixels")
    with pytest.raises(StoreCorrupt, match=r"samples/pixels/manifest\.json: missing, though it was there"):
        describe_store(Store.open(tmp_path / "s"))
    (tmp_path / "s/index.json").unlink()  # it was removed on purpose
    assert "not kept here" in format_store(describe_store(Store.open(tmp_path / "s")))


# Later, again, and after trouble


def test_samples_are_added_to_a_store_that_was_made_without(
    tmp_path: Path, tiny: str, make_folder: Make, tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 20)
    run(root, tmp_path / "s", f"t={tiny}")
    before = tree(tmp_path / "s")
    assert describe_store(Store.open(tmp_path / "s"))["pixels"] is None
    run(None, tmp_path / "s", f"t={tiny}", pixels="source")
    after = tree(tmp_path / "s")
    assert {key: after[key] for key in before} == before
    run(None, tmp_path / "s", f"t={tiny}", pixels="source")
    assert tree(tmp_path / "s") == after, "again, it changes nothing"
    facts = describe_store(Store.open(tmp_path / "s"))["pixels"]
    assert facts["samples"] == 20
    assert facts["bytes"] == sum(path.stat().st_size for path in root.rglob("*.png"))
    direct = tree(keep(root, tmp_path / "direct").path)
    own = {key: value for key, value in after.items() if key.startswith("samples")}
    assert own == {key: value for key, value in direct.items() if key.startswith("samples")}


def test_a_sample_that_changed_since_it_was_seen_is_refused(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 20)
    run(root, tmp_path / "s", f"t={tiny}")
    seen = (root / "a/04.png").read_bytes()
    (root / "a/04.png").write_bytes((root / "a/06.png").read_bytes())
    with pytest.raises(StoreMismatch, match=r"a/04\.png: it changed since its view was recorded"):
        run(None, tmp_path / "s", f"t={tiny}", pixels="source")
    (root / "a/04.png").unlink()
    (root / "a/04.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreMismatch, match=r"a/04\.png: cannot be read: .*; it could be read when its view was"):
        run(None, tmp_path / "s", f"t={tiny}", pixels="source")
    (root / "a/04.png").unlink()
    (root / "a/04.png").write_bytes(seen)
    run(None, tmp_path / "s", f"t={tiny}", pixels="source")
    assert verify(Store.open(tmp_path / "s")).good


def test_mended_images_are_kept_and_extracted_by_the_same_command(
    tmp_path: Path, tiny: str, make_folder: Make, tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 20)
    good = {name: (root / name).read_bytes() for name in ("a/04.png", "b/05.png", "b/07.png")}
    (root / "a/04.png").unlink()
    (root / "b/05.png").write_bytes(b"broken")
    (root / "b/07.png").write_bytes(b"")
    (root / "a/04.png").symlink_to(tmp_path / "nowhere")
    settings = {"pixels": "source", "num_views": 2}
    first = run(root, tmp_path / "s", f"t={tiny}", **settings)
    assert sorted(first.failed) == sorted(good)
    before = tree(tmp_path / "s")
    assert sorted(run(root, tmp_path / "s", f"t={tiny}", **settings).failed) == sorted(good)
    assert tree(tmp_path / "s") == before, "nothing was mended, nothing is written"
    (root / "a/04.png").unlink()
    for name, data in good.items():
        (root / name).write_bytes(data)
    mended = run(root, tmp_path / "s", f"t={tiny}", **settings)
    assert mended.failed == {}
    run(root, tmp_path / "whole", f"t={tiny}", **settings)

    def rows(store: Path) -> dict[str, bytes]:
        """All but the teacher's birth certificate, which was measured without these images, and its seals."""
        own = {"teachers/t/zarr.json", *(f"teachers/t/views/{view}/manifest.json" for view in range(2))}
        return {key: value for key, value in tree(store).items() if key not in own}

    assert rows(tmp_path / "s") == rows(tmp_path / "whole")
    assert verify(Store.open(tmp_path / "s")).unlisted == []


KILLED = """
import os, signal, sys
from hdcache.extract.opening import open_or_create
from hdcache.extract.packing import pack
data, store, last = sys.argv[1:]
dataset, opened = open_or_create(data, __import__("pathlib").Path(store), None, 0, 8)
sync, left = os.fsync, [int(last)]
def fsync(file):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
os.fsync = fsync
pack(opened, dataset, threads=2)
"""


def test_killed_in_the_middle_and_finished_equals_undisturbed(
    tmp_path: Path, make_folder: Make, python: Python, tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 40)
    whole = tree(keep(root, tmp_path / "whole").path)
    for moment in (9, 22):
        process = python(KILLED, root, tmp_path / "s", moment)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, output
    store = keep(root, tmp_path / "s", threads=1)
    assert {key: value for key, value in tree(store.path).items() if not key.endswith(".partial")} == whole
    checked = verify(store)
    assert (checked.faults, checked.unsealed) == ([], [])


def test_a_signal_stops_between_samples_and_finished_shards_stay(
    tmp_path: Path, make_folder: Make, signals: None, tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 40)
    dataset, store = open_or_create(str(root), tmp_path / "s", None, 0, 8)
    read, count = dataset.read, [0]

    def told(name: str) -> Any:
        count[0] += 1
        if count[0] == PROBED + 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(name)

    object.__setattr__(dataset, "read", told)
    with pytest.raises(Interrupted, match="all finished shards of samples are in"):
        pack(store, dataset, threads=1)
    assert pixels_ledger(store).receipt(0) is not None
    assert verify(store).unsealed == ["samples/pixels"]
    assert not list(store.path.rglob("*.partial"))


SLOW = KILLED.replace(
    "sync, left",
    """
def told(name, read=dataset.read, once=[]):
    if not once:
        once.append(name)
        print("keeping", flush=True)
        __import__("time").sleep(1)
    return read(name)
object.__setattr__(dataset, "read", told)
sync, left""",
)


def test_processes_that_keep_the_same_samples_wait_for_each_other(
    tmp_path: Path, make_folder: Make, python: Python, tree: Tree
) -> None:
    root = make_folder(tmp_path / "d", 40)
    whole = tree(keep(root, tmp_path / "whole").path)
    process = python(SLOW, root, tmp_path / "s", 0)
    assert process.stdout is not None
    assert process.stdout.readline() == "keeping\n"
    keep(root, tmp_path / "s")
    assert tree(tmp_path / "s") == whole
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert tree(tmp_path / "s") == whole


def test_who_waits_says_for_whom(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, store = open_or_create(str(make_folder(tmp_path / "d", 4)), tmp_path / "s", None, 0, 8)
    held = store.lock("samples/pixels")
    held.__enter__()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    pack(store, dataset, threads=1, quiet=False)
    assert len(slept) == 3
    assert capsys.readouterr().err.count(f"is being written by {Owner.here().user}, process {os.getpid()}") == 1


def test_a_seal_that_another_process_withdrew_is_said(
    tmp_path: Path, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, store = open_or_create(str(make_folder(tmp_path / "d", 4)), tmp_path / "s", None, 0, 8)
    monkeypatch.setattr("hdcache.extract.packing.packed_dataset", lambda _: None)
    with pytest.raises(StoreLocked, match="another process has begun to write its samples anew"):
        pack(store, dataset, threads=1)


def test_a_data_set_that_is_gone_is_no_set_of_broken_images(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 20)
    dataset, store = open_or_create(str(root), tmp_path / "s", None, 0, 8)
    shutil.rmtree(root)
    with pytest.raises(
        InputNotFound, match=r"none of the images of shard 0 could be read .*No such file.*bring it back"
    ):
        pack(store, dataset, threads=2)
    make_folder(root, 20)
    pack(store, dataset, threads=2)
    assert verify(store).good


def test_verify_finds_one_flipped_byte(tmp_path: Path, make_folder: Make) -> None:
    store = keep(make_folder(tmp_path / "d", 20), tmp_path / "s")
    assert verify(store).good
    path = store.path / "samples/pixels" / bytes_key(2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert [fault.split(": ")[0] for fault in verify(store).faults] == [str(path)]
    assert verify(store, quick=True).good
    path.unlink()
    assert len(verify(store, quick=True).faults) == 1


def test_a_damaged_sample_stops_an_extraction_and_is_no_failed_row(
    tmp_path: Path, tiny: str, make_folder: Make
) -> None:
    store = keep(make_folder(tmp_path / "d", 20), tmp_path / "s")
    path = store.path / "samples/pixels" / bytes_key(0)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(StoreCorrupt, match="are not those that were stored; run 'hdcache verify'"):
        run(None, tmp_path / "s", f"t={tiny}")


# Bytes


def test_too_little_disk_is_noticed_before_the_work(
    tmp_path: Path, tiny: str, make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "d", 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(
        OutOfSpace, match=r"about 4\.\d KB are needed to keep 20 images, 1\.0 KB are free; .*--pixels 256"
    ):
        run(root, tmp_path / "s", f"t={tiny}", pixels="source")
    assert not (tmp_path / "s/samples/pixels/bytes/0").exists()


def test_the_guess_of_bytes_and_the_plan_count_samples(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 40)
    (root / "a/00.png").write_bytes(b"")
    exact = sum(path.stat().st_size for path in root.rglob("*.png"))
    assert 40 * bytes_per_sample(open_dataset(str(root))) == pytest.approx(exact, rel=0.05)
    asked = {
        "store": tmp_path / "s",
        "teachers": [f"t={tiny}"],
        "encoding": "fp32",
        "precision": "fp32",
        "device": "cpu",
    }
    found = plan(str(root), **asked, pixels="source")
    assert found.pixels == pytest.approx(exact, rel=0.05)
    assert found.bytes == found.pixels + found.teachers["t"].bytes
    assert "  the samples themselves: " in format_plan(found)
    assert plan(str(root), **asked).pixels == 0
    run(root, tmp_path / "s", f"t={tiny}", pixels="source")
    assert plan(None, **asked, pixels="source").pixels == 0, "they are kept already"
    with pytest.raises(StoreMismatch, match="seen whole images"):
        plan(None, **asked, pixels="24")


def test_samples_lie_in_the_order_of_the_first_view(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    """An epoch over view 0 reads its files from end to end."""
    from hdcache.geometry import read_geometry

    run(make_folder(tmp_path / "d", 20), tmp_path / "s", f"t={tiny}", pixels="source")
    store = Store.open(tmp_path / "s")
    assert read_geometry(store, 0)[0][:, 0].tolist() == packed_order(store).tolist()


def test_the_command_keeps_samples(
    tmp_path: Path,
    tiny: str,
    make_folder: Make,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_folder(tmp_path / "d", 12)
    command = ["extract", str(root), "--store", str(tmp_path / "s"), "--teacher", f"t={tiny}", "--pixels", "24"]
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    with pytest.raises(SystemExit) as left:
        main([*command, "--device", "cpu", "--rows-per-shard", "8"])
    assert left.value.code == 0
    store = Store.open(tmp_path / "s")
    assert store.card.dataset.shorter_side == 24
    assert "keep the images of s  12/12 samples" in capsys.readouterr().err
    kept = store_dataset(store).read("a/00.png")
    assert isinstance(kept, bytes)
    assert Image.open(io.BytesIO(kept)).format == "JPEG"


# Killed, or lost, and the data set is not what it was


def unreadable(root: Path, name: str) -> bytes:
    """Let the system read a file no more; returns what it held."""
    data = (root / name).read_bytes()
    (root / name).unlink()
    (root / name).symlink_to(root / "nowhere")
    return data


def readable(root: Path, name: str, data: bytes) -> None:
    (root / name).unlink()
    (root / name).write_bytes(data)


def shard_of(store: Store, name: str) -> int:
    return int(np.flatnonzero(packed_order(store) == store.ids.index(name))[0]) // 8


def test_a_kill_at_any_moment_of_mending_keeps_what_the_data_set_has_no_more(
    tmp_path: Path, make_folder: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "d", 16)
    whole = tree(keep(root, tmp_path / "whole").path)
    data = unreadable(root, "a/04.png")
    store = keep(root, tmp_path / "s")
    number = shard_of(store, "a/04.png")
    mate = next(name for name in store.ids if shard_of(store, name) == number and name != "a/04.png")
    readable(root, "a/04.png", data)
    (root / mate).write_bytes(b"rotten")
    sync, moment, died = os.fsync, 0, True

    class Killed(BaseException):
        pass

    while died:
        moment += 1
        copy = shutil.copytree(store.path, tmp_path / f"s{moment}")
        count, died = [0], False

        def fsync(file: int, count: list[int] = count, moment: int = moment) -> None:
            count[0] += 1
            if count[0] == moment:
                raise Killed
            sync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                keep(root, copy)
            except Killed:
                died = True
        assert tree(keep(root, copy).path) == whole
    assert moment > 10


def test_a_lost_shard_is_restored_with_what_can_be_read_now(tmp_path: Path, make_folder: Make, tree: Tree) -> None:
    root = make_folder(tmp_path / "d", 20)
    whole = tree(keep(root, tmp_path / "whole").path)
    data = unreadable(root, "a/04.png")
    store = keep(root, tmp_path / "s")
    assert len(pixels_ledger(store).manifest().failed) == 1
    readable(root, "a/04.png", data)
    (store.path / "samples/pixels" / bytes_key(shard_of(store, "a/04.png"))).unlink()
    assert tree(keep(root, store.path).path) == whole
    assert verify(store).faults == []


def test_a_lost_shard_is_not_restored_from_other_samples(tmp_path: Path, make_folder: Make, tree: Tree) -> None:
    """No teacher has seen them, but the store knows their sha256; and what it still has stays readable."""
    root = make_folder(tmp_path / "d", 20)
    store = keep(root, tmp_path / "s")
    whole = tree(store.path)
    lost, other = (
        shard_of(store, "a/04.png"),
        next(n for n in store.ids if shard_of(store, n) != shard_of(store, "a/04.png")),
    )
    data = (root / "a/04.png").read_bytes()
    (store.path / "samples/pixels" / bytes_key(lost)).unlink()
    (root / "a/04.png").write_bytes(data[::-1])
    with pytest.raises(StoreMismatch, match=r"a/04\.png: it is not what was kept here .*: sha256 .*bring it back"):
        keep(root, store.path)
    unreadable(root, "a/04.png")
    with pytest.raises(
        StoreMismatch, match=r"a/04\.png: it is not what was kept here .*: .*cannot be read.*bring it back"
    ):
        keep(root, store.path)
    assert store_dataset(store).read(other) == (root / other).read_bytes()
    readable(root, "a/04.png", data)
    assert tree(keep(root, store.path).path) == whole


def test_a_lost_sample_that_no_teacher_could_decode_may_be_mended(tmp_path: Path, tiny: str, make_folder: Make) -> None:
    root = make_folder(tmp_path / "d", 20)
    data = (root / "a/04.png").read_bytes()
    (root / "a/04.png").write_bytes(b"broken")
    run(root, tmp_path / "s", f"t={tiny}", pixels="source")
    store = Store.open(tmp_path / "s")
    (store.path / "samples/pixels" / bytes_key(shard_of(store, "a/04.png"))).unlink()
    (root / "a/04.png").write_bytes(data)
    assert run(root, tmp_path / "s", f"t={tiny}", pixels="source").failed == {}
    assert store_dataset(store).read("a/04.png") == data
    assert verify(store).good


def test_unfinished_files_are_removed(tmp_path: Path, make_folder: Make, tree: Tree) -> None:
    root = make_folder(tmp_path / "d", 20)
    store = keep(root, tmp_path / "s")
    before = tree(store.path)
    for name in ("bytes/1/.c.0.77-1.partial", "bytes/1/.c.0.next.partial", "receipts/.1.json.7-7.partial"):
        (store.path / "samples/pixels" / name).write_bytes(b"x")
    assert tree(keep(root, store.path).path) == before

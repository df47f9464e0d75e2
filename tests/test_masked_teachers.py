"""Teachers that see a part of each sample, from the command line to a student's batch: what they saw is stored with
their rows, is part of what they are, and gives the same values from the store as from the network itself.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdcache.cli import main
from hdcache.datasets import open_dataset
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.extract.summary import ExtractSummary, format_summary
from hdcache.geometry import read_geometry
from hdcache.info import describe_store, format_store
from hdcache.integrity import verify
from hdcache.loader import Loader
from hdcache.masks import draw_visible, pack_visible
from hdcache.options import Options
from hdcache.reader import TeacherReader
from hdcache.row_arrays import MASK_ARRAY
from hdcache.samples import open_sample
from hdcache.schema import MaskSpec, Preprocessing, TeacherRecord
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import StoredTargets, open_targets
from hdcache.teachers import load_teacher, reload_teacher

COUNT, CELLS = 24, 16
TAPS = ["block2.out", "block3.attn_in", "final"]
TARGETS = ["final", "block3.rel.qk", "block3.rel.vv@6", "block3.qkv", "block2.out"]
COMMON: dict[str, Any] = {
    "encoding": "fp32", "precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """24 pictures and a store of two views with a teacher ``r`` under a random mask and ``u`` that sees all tokens."""
    folder = tmp_path_factory.mktemp("masked")
    data = make_npz(folder / "data.npz", COUNT)
    run(data, folder / "s", f"r={tiny}", taps=TAPS, num_views=2, teacher_mask="0.75")
    run(data, folder / "s", f"u={tiny}", taps=TAPS, num_views=2)
    return folder


def run(data: str | None, store: Path, teacher: str, **settings: Any) -> ExtractSummary:
    return extract(data, store=store, teachers=[teacher], **COMMON | settings)


def ids_of(store: Store, view: int) -> list[str]:
    return [store.ids[number] for number in read_geometry(store, view)[0][:, 0]]


# What is stored


@pytest.mark.parametrize("view", [0, 1])
def test_the_stored_mask_is_the_one_the_teacher_ran_on(root: Path, view: int) -> None:
    store = Store.open(root / "s")
    reader = TeacherReader(store, "r")
    ids = ids_of(store, view)
    visible = reader.unpacked(reader.packed_masks(view, 0, COUNT))
    assert visible.shape == (COUNT, 4)
    assert np.array_equal(visible, reload_teacher(reader.record).visible(ids, view))
    expected = draw_visible(MaskSpec(kind="random", ratio=0.75), ids, view, CELLS, purpose="teacher mask")
    assert np.array_equal(visible, expected)
    assert len({row.tobytes() for row in visible}) > COUNT // 2


def test_masks_differ_between_views_and_teachers(root: Path) -> None:
    store = Store.open(root / "s")
    reader = TeacherReader(store, "r")
    first, second = (
        dict(zip(ids_of(store, v), reader.packed_masks(v, 0, COUNT).tolist(), strict=True)) for v in (0, 1)
    )
    assert first.keys() == second.keys()
    assert first != second
    assert reload_teacher(store.teacher("u")).visible(ids_of(store, 0), 0) is None
    assert not list((root / "s/teachers/u").rglob("visible"))


def test_taps_hold_what_was_seen_and_rows_are_smaller_for_it(root: Path) -> None:
    store = Store.open(root / "s")
    masked, whole = (store.teacher(name) for name in ("r", "u"))
    assert [(masked.taps[tap].tokens, whole.taps[tap].tokens) for tap in TAPS] == [(4, 16)] * 3
    readers = [TeacherReader(store, name) for name in ("r", "u")]
    assert readers[0].bytes_per_row(["final"]) == (4 + 1) * 48 * 4 + 2
    assert readers[1].bytes_per_row(["final"]) == (16 + 1) * 48 * 4


def test_hidden_patches_have_no_influence(tiny: str) -> None:
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=4, mask="random:0.75")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    visible = teacher.visible(["a", "b", "c", "d"], 0)
    assert visible is not None
    seen = torch.zeros(4, CELLS, dtype=torch.bool).scatter_(1, torch.from_numpy(visible), True)
    shown = seen.view(4, 1, 4, 1, 4, 1).expand(4, 3, 4, 8, 4, 8).reshape(4, 3, 32, 32)
    first, second = (teacher.forward(p, ["final"], visible)["final"] for p in (pixels, torch.where(shown, pixels, 0)))
    assert isinstance(first, Tokens)
    assert isinstance(second, Tokens)
    assert first.patches.shape == (4, 4, 48)
    assert torch.equal(first.sequence(), second.sequence())
    whole = teacher.forward(pixels, ["final"])["final"]
    assert isinstance(whole, Tokens)
    assert whole.patches.shape == (4, 16, 48)


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8", "klt"])
def test_rows_decode_to_what_the_teacher_gives(
    encoding: str, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    """Under every encoding, also one fitted on the few tokens that were seen; the error is the stated one."""
    data = make_npz(tmp_path / "d.npz", 40)
    run(data, tmp_path / "s", f"t={tiny}", encoding=encoding, taps=["final"], teacher_mask="tube:0.5")
    store = Store.open(tmp_path / "s")
    reader, dataset = TeacherReader(store, "t"), open_dataset(data)
    teacher = reload_teacher(reader.record)
    geometry, digests = read_geometry(store, 0)
    opened = [
        open_sample(dataset, store.ids[row[0]], store.card.views, 0, (row, digest.tobytes()))
        for row, digest in zip(geometry, digests, strict=True)
    ]
    pixels = torch.stack([torch.from_numpy(sample.pixels(teacher.card.preprocessing)) for sample in opened])
    visible = reader.unpacked(reader.packed_masks(0, 0, 40))
    exact, copy = teacher.forward(pixels, ["final"], visible)["final"], reader.tap(0, "final", 0, 40)
    assert isinstance(exact, Tokens)
    assert isinstance(copy, Tokens)
    assert copy.patches.shape == (40, 8, 48)
    if encoding == "fp32":
        assert torch.equal(exact.sequence(), copy.sequence())
    flat = exact.patches.flatten(0, 1).double()
    error = float((exact.patches.double() - copy.patches.double()).square().sum())
    spread = float((flat - flat.mean(0)).square().sum())
    assert (error / spread) ** 0.5 <= 1.3 * reader.record.taps["final"].certificate.relative_rmse


def test_calibration_sees_the_same_tokens_as_extraction(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows are drawn for the same number of tokens, and each under the mask that its row is stored with."""
    from hdcache.extract import calibrate as module

    seen: dict[str, list[Any]] = {}
    features = module.features_of

    def watched(teacher: Any, pixels: Tensor, taps: Any, visible: Any) -> Any:
        seen[teacher.name] = [len(pixels), visible]
        return features(teacher, pixels, taps, visible)

    monkeypatch.setattr(module, "features_of", watched)
    monkeypatch.setattr(module, "MIN_ROWS", 1)
    data = make_npz(tmp_path / "d.npz", 310)
    for name, mask in (("m", "0.5"), ("w", None)):
        run(data, tmp_path / "s", f"{name}={tiny}", taps=["final"], teacher_mask=mask, rows_per_shard=64)
    assert [seen[name][0] for name in ("m", "w")] == [40 * 48 // 8 + 64, 40 * 48 // 16 + 64]
    assert seen["w"][1] is None
    reader = TeacherReader(Store.open(tmp_path / "s"), "m")
    assert np.array_equal(seen["m"][1], reader.unpacked(reader.packed_masks(0, 0, seen["m"][0])))


def test_a_failed_row_has_a_mask_too(tmp_path: Path, tiny: str, make_folder: Callable[..., Path]) -> None:
    """Its place in a shard is filled; a mended image is written under the mask it always had."""
    root = make_folder(tmp_path / "d", 20)
    whole = run(str(root), tmp_path / "whole", f"t={tiny}", taps=["final"], teacher_mask="0.5")
    good = (root / "a/04.png").read_bytes()
    (root / "a/04.png").write_bytes(good[:40])
    broken = run(str(root), tmp_path / "s", f"t={tiny}", taps=["final"], teacher_mask="0.5")
    assert list(broken.failed) == ["a/04.png"]
    masks = [TeacherReader(Store.open(tmp_path / name), "t").packed_masks(0, 0, 20) for name in ("s", "whole")]
    assert np.array_equal(*masks)
    (root / "a/04.png").write_bytes(good)
    mended = run(str(root), tmp_path / "s", f"t={tiny}", taps=["final"], teacher_mask="0.5")
    assert mended.failed == {}
    assert whole.teachers["t"]["mask"] == mended.teachers["t"]["mask"]


KILLED = """
import os, signal, sys
from hdcache.extract.run import extract
from hdcache.extract.writer import ViewWriter
write = ViewWriter._write_array
def killed(self, shard, key, *more):
    found = write(self, shard, key, *more)
    if (shard, key) == (2, "mask/visible"):
        os.kill(os.getpid(), signal.SIGKILL)
    return found
ViewWriter._write_array = killed
data, store, teacher = sys.argv[1:]
extract(data, store=store, teachers=[teacher], taps=["final"], encoding="klt", precision="fp32", rows_per_shard=8, batch=8,
        teacher_mask="random:0.75", device="cpu")
"""


def test_killed_and_finished_equals_undisturbed(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], tree: Callable[[Path], dict[str, bytes]],
    python: Callable[..., subprocess.Popen[str]],
) -> None:  # fmt: skip
    data = make_npz(tmp_path / "d.npz", COUNT)
    settings = {"taps": ["final"], "encoding": "klt", "teacher_mask": "random:0.75"}
    whole = run(data, tmp_path / "whole", f"t={tiny}", **settings)
    process = python(KILLED, data, tmp_path / "s", f"t={tiny}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert (tmp_path / "s/teachers/t/views/0/mask/visible/c.2.0").is_file()
    assert not (tmp_path / "s/teachers/t/views/0/receipts/2.json").exists()
    finished = run(data, tmp_path / "s", f"t={tiny}", **settings)
    assert 0 < finished.teachers["t"]["rows_written"] < COUNT
    assert finished.teachers["t"]["manifests"] == whole.teachers["t"]["manifests"]
    left = {key: value for key, value in tree(tmp_path / "s").items() if not key.endswith(".partial")}
    assert left == tree(tmp_path / "whole")


# What a batch holds


def loaders(root: Path) -> tuple[Loader, Loader]:
    """The same batches of teacher ``t`` from a store and from the live network."""
    store = Store.open(root)
    options = Options(batch_size=8, preprocessing=Preprocessing(size=16), buffer_rows=16)
    dataset = open_dataset(store.card.dataset.spec)
    stored, _ = open_targets(store, {"t": TARGETS})
    _, live = open_targets(store, {"t": TARGETS}, live={"t": reload_teacher(store.teacher("t"))})
    common: dict[str, Any] = {"views": store.card.views, "store": store}
    return (
        Loader(dataset, options, stored=stored, **common),
        Loader(dataset, options, live=live, teachers=["t"], **common),
    )


@pytest.mark.parametrize(("mask", "count"), [("random:0.75", 4), ("tube:0.5", 8)])
def test_cached_targets_equal_live_ones_to_the_bit(
    mask: str, count: int, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    data = make_npz(tmp_path / "d.npz", COUNT)
    run(data, tmp_path / "s", f"t={tiny}", taps=TAPS, num_views=2, teacher_mask=mask, teacher_mask_seed=3)
    cached, online = loaders(tmp_path / "s")
    for epoch in (0, 1):
        pairs = list(zip(cached.epoch(epoch), online.epoch(epoch), strict=True))
        assert len(pairs) == 3
        for one, other in pairs:
            assert one.ids == other.ids
            assert torch.equal(one.images, other.images)
            assert one.visible["t"].dtype == torch.int64
            assert torch.equal(one.visible["t"], other.visible["t"])
            for target in TARGETS:
                first, second = one.targets["t"][target], other.targets["t"][target]
                if isinstance(first, Tokens):
                    assert isinstance(second, Tokens)
                    assert first.patches.shape[1] == count
                    first, second = first.sequence(), second.sequence()
                assert isinstance(first, Tensor)
                assert isinstance(second, Tensor)
                assert torch.equal(first, second), target


@pytest.mark.parametrize(("pieces", "world"), [(1, 1), (4, 1), (1, 3), (2, 2)])
def test_a_mask_comes_with_its_sample(root: Path, pieces: int, world: int) -> None:
    """Past shuffling, cutting into pieces and shares of several processes."""
    store = Store.open(root / "s")
    teacher = reload_teacher(store.teacher("r"))
    found: list[str] = []
    for rank in range(world):
        options = Options(
            batch_size=8, preprocessing=Preprocessing(size=16), buffer_rows=16, pieces=pieces, rank=rank, world=world
        )
        stored, _ = open_targets(store, {"r": ["final"], "u": ["final"]})
        dataset = open_dataset(store.card.dataset.spec)
        for batch in Loader(dataset, options, views=store.card.views, store=store, stored=stored).epoch(1):
            expected = teacher.visible(batch.ids, batch.view)
            assert expected is not None
            assert list(batch.visible) == ["r"], "a teacher that saw all has no mask"
            assert np.array_equal(batch.visible["r"].numpy(), expected)
            masked, whole = batch.targets["r"]["final"], batch.targets["u"]["final"]
            assert isinstance(masked, Tokens)
            assert isinstance(whole, Tokens)
            assert (masked.patches.shape[1], whole.patches.shape[1]) == (4, 16)
            found += batch.ids
    assert sorted(found) == sorted(store.ids)


def test_an_empty_share_has_an_empty_mask(root: Path) -> None:
    """A last batch of fewer rows than processes: both sources give 0 rows of the right width."""
    store = Store.open(root / "s")
    dataset = open_dataset(store.card.dataset.spec)
    options = Options(batch_size=23, preprocessing=Preprocessing(size=16), rank=0, world=2, buffer_rows=16)
    for live in (None, {"r": reload_teacher(store.teacher("r"))}):
        stored, running = open_targets(store, {"r": ["final"]}, live=live)
        loader = Loader(
            dataset, options, views=store.card.views, store=store, stored=stored, live=running, teachers=["r"]
        )
        last = list(loader.epoch(0))[-1]
        assert last.ids == []
        assert last.visible["r"].shape == (0, 4)
        assert last.targets["r"]["final"].patches.shape == (0, 4, 48)  # type: ignore[union-attr]


# What a teacher is


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"teacher_mask": "0.5"}, "card.mask.ratio: the store has 0.75, asked was 0.5"),
        ({"teacher_mask": "tube:0.75"}, "card.mask.kind: the store has 'random', asked was 'tube'"),
        ({"teacher_mask": "0.75", "teacher_mask_seed": 1}, "card.mask.seed: the store has 0, asked was 1"),
        ({}, "card.mask: the store has {'kind': 'random', 'ratio': 0.75, 'seed': 0}, asked was None"),
    ],
)
def test_another_mask_is_another_teacher(
    settings: dict[str, Any], difference: str, root: Path, tiny: str, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    before = tree(root / "s")
    with pytest.raises(StoreMismatch) as caught:
        run(None, root / "s", f"r={tiny}", taps=TAPS, num_views=2, **settings)
    assert difference in str(caught.value)
    assert "add this one under another name: --teacher r-2=..." in str(caught.value)
    assert tree(root / "s") == before


def test_a_mask_cannot_be_added_to_a_teacher_that_saw_all(root: Path, tiny: str) -> None:
    with pytest.raises(StoreMismatch, match=r"card.mask: the store has None, asked was \{'kind': 'tube'"):
        run(None, root / "s", f"u={tiny}", taps=TAPS, num_views=2, teacher_mask="tube:0.75")


def test_a_second_mask_is_a_second_name_beside_the_first(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    data = make_npz(tmp_path / "d.npz", 16)
    first = run(data, tmp_path / "s", f"a={tiny}", taps=["final"], teacher_mask="0.75")
    before = tree(tmp_path / "s")
    second = run(None, tmp_path / "s", f"b={tiny}", taps=["final"], teacher_mask="0.75", teacher_mask_seed=1)
    after = tree(tmp_path / "s")
    assert {key: after[key] for key in before} == before
    assert first.teachers["a"]["identity"] != second.teachers["b"]["identity"]
    reader = {name: TeacherReader(Store.open(tmp_path / "s"), name) for name in "ab"}
    assert not np.array_equal(*(reader[name].packed_masks(0, 0, 16) for name in "ab"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mask": "0.01"}, r"^mask ratio 0.01 of 16 cells hides 0 and leaves 16 visible; .*another ratio$"),
        ({"teacher_mask": "tub:0.5"}, "unknown kind 'tub'; did you mean 'tube'"),
        ({"teacher_mask": "half"}, "'half' is no number; write a ratio such as random:0.75"),
        ({"teacher_mask": "0.5", "teacher_mask_seed": -1}, "^mask seed -1 must be at least 0$"),
        (
            {"teacher_mask_seed": 4},
            "^teacher mask seed 4 has no mask to draw; give --teacher-mask too, or leave it out$",
        ),
    ],
)
def test_masks_that_cannot_be_meant_are_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    with pytest.raises(UsageError, match=message):
        run(make_npz(tmp_path / "d.npz", 8), tmp_path / "s", f"t={tiny}", **settings)
    assert not (tmp_path / "s/teachers/t").exists()


def test_the_store_and_the_summary_say_what_a_teacher_saw(root: Path, tiny: str) -> None:
    facts = describe_store(Store.open(root / "s"))
    text = format_store(facts)
    said = "random mask of ratio 0.75, seed 0: sees 4 of 16 patch tokens"
    assert text.count(said) == 1
    assert facts["teachers"]["u"]["mask"] is None
    assert facts["teachers"]["r"]["mask"] == {"kind": "random", "ratio": 0.75, "seed": 0, "visible": 4, "tokens": 16}
    bits = sum(
        path.stat().st_size
        for path in (root / "s/teachers/r/views").rglob("*")
        if ("/mask/" in str(path) or "/pixels/" in str(path)) and path.is_file()
    )
    taps = facts["teachers"]["r"]["taps"]
    assert facts["teachers"]["r"]["bytes"] == bits + sum(entry["bytes"] for entry in taps.values())
    summary = run(None, root / "s", f"r={tiny}", taps=TAPS, num_views=2, teacher_mask="random:0.75")
    assert summary.teachers["r"]["rows_written"] == 0
    assert said in format_summary(summary)


# Damage


@pytest.mark.parametrize("file", ["c.1.0", "zarr.json"])
def test_a_damaged_mask_is_found(file: str, tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    run(make_npz(tmp_path / "d.npz", 24), tmp_path / "s", f"t={tiny}", taps=["final"], teacher_mask="0.75")
    store = Store.open(tmp_path / "s")
    assert verify(store).good
    path = tmp_path / "s/teachers/t/views/0" / MASK_ARRAY / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = verify(store)
    assert len(found.faults) == 1
    assert f"{MASK_ARRAY}/{file}: sha256" in found.faults[0]
    with pytest.raises(StoreCorrupt, match="copy the store again"):
        TeacherReader(Store.open(tmp_path / "s"), "t").packed_masks(0, 0, 24)
    path.unlink()
    assert f"{MASK_ARRAY}/{file}: missing" in "".join(verify(store, quick=True).faults)


def test_a_mask_of_another_number_of_tokens_is_corrupt(root: Path) -> None:
    store = Store.open(root / "s")
    reader = TeacherReader(store, "r")
    packed = reader.packed_masks(0, 0, COUNT).copy()
    packed[5] = pack_visible(np.array([[0, 1, 2]]), CELLS)[0]
    message = (
        rf"^{root}/s: teacher 'r': a mask of 3 visible tokens where 4 are expected \(row 5\); copy the store again$"
    )
    with pytest.raises(StoreCorrupt, match=message):
        reader.unpacked(packed)
    stored = StoredTargets(reader, ["final"], torch.device("cpu"), torch.float32)
    with pytest.raises(StoreCorrupt, match=message):
        stored.visible({MASK_ARRAY: torch.from_numpy(packed)})


def test_a_tube_mask_that_is_no_tube_is_corrupt(tmp_path: Path) -> None:
    """Two temporal slots of 4 cells: as many visible tokens as there should be, but not the same cells."""
    teacher = load_teacher(
        "t=random:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=12&num_heads=2&frames=4", mask="0.5"
    )
    reader = TeacherReader.__new__(TeacherReader)
    fields = {"name": "t", "taps": {}, "requests": (), "dataset": "", "views": {}, "batch": 1}
    reader.record = TeacherRecord.model_validate(fields | {"card": teacher.card})
    reader.name, reader.store = "t", SimpleNamespace(path=tmp_path)  # type: ignore[assignment]
    good = np.array([[0, 2, 4, 6], [1, 2, 5, 6]])
    assert np.array_equal(reader.unpacked(pack_visible(good, 8)), good)
    with pytest.raises(
        StoreCorrupt, match=r"visible cells differ between temporal slots \(row 1\); copy the store again"
    ):
        reader.unpacked(pack_visible(np.array([[0, 2, 4, 6], [1, 2, 5, 7]]), 8))
    with pytest.raises(StoreCorrupt, match="differ between temporal slots"):
        reader.unpacked(pack_visible(np.array([[0, 1, 2, 4]]), 8))


def test_a_mask_that_no_manifest_lists_is_not_read(tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    run(make_npz(tmp_path / "d.npz", 16), tmp_path / "s", f"t={tiny}", taps=["final"], teacher_mask="0.75")
    path = tmp_path / "s/teachers/t/views/0/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("check", None)
    manifest["objects"] = {key: value for key, value in manifest["objects"].items() if "/mask/" not in key}
    path.write_text(json.dumps(manifest))
    with pytest.raises((StoreCorrupt, InputNotFound), match="mask/visible"):
        TeacherReader(Store.open(tmp_path / "s"), "t").packed_masks(0, 0, 16)
    assert "mask/visible" in "".join(verify(Store.open(tmp_path / "s")).faults)


# The command line


def cli(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_extract_takes_a_mask(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_npz(tmp_path / "d.npz", 8)
    base = ("extract", data, "--store", tmp_path / "s", "--teacher", f"t={tiny}", "--tap", "final", "-q")
    settings = ("--device", "cpu", "--encoding", "fp32", "--precision", "fp32")
    assert cli(*base, *settings, "--teacher-mask", "tube:0.75", "--teacher-mask-seed", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["teachers"]["t"]["mask"]["seed"] == 2
    assert Store.open(tmp_path / "s").teacher("t").card.mask == MaskSpec(kind="tube", ratio=0.75, seed=2)
    assert cli(*base, *settings) == 5
    assert "card.mask: the store has" in capsys.readouterr().err
    assert cli(*base, "--teacher-mask", "1.5") == 2
    assert "the ratio must lie between 0 and 1" in capsys.readouterr().err
    assert cli("info", tmp_path / "s") == 0
    assert "tube mask of ratio 0.75, seed 2: sees 4 of 16 patch tokens" in capsys.readouterr().out


def test_a_live_teacher_of_a_network_of_clips_gets_a_tube_by_default() -> None:
    spec = "random:vit_tiny_patch16_224?img_size=32&patch_size=16&depth=1&embed_dim=24&num_heads=3&frames=4&tubelet=2"
    teacher = load_teacher(spec, mask="0.5", mask_seed=9)
    assert teacher.card.mask == MaskSpec(kind="tube", ratio=0.5, seed=9)
    visible = teacher.visible(["a"], 0)
    assert visible is not None
    assert visible.shape == (1, 2 * teacher.card.slots)
    assert np.array_equal(visible[0, 2:], visible[0, :2] + 4)


def test_distill_takes_a_mask_for_live_teachers(
    root: Path, tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "objective.teacher_mask_ratio": 0.5, "objective.student_mask_ratio": 0.75, "objective.teacher_blocks": "[3]",
        "objective.student_blocks": "[3]", "objective.decoder_width": 16, "objective.decoder_heads": 2, "epochs": 1,
        "student.arguments": "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 3, num_heads: 3}", "batch_size": 8,
        "warmup_epochs": 0,
    }  # fmt: skip
    base = ["distill", "amd-image-tiny", "--out", tmp_path / "a", "--device", "cpu", "-q"]
    base += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    mask = ("--teacher-mask", "random:0.5", "--teacher-mask-seed", 1)
    live = ("--online", "--teacher", f"t={tiny}")
    assert cli(*base, "--data", f"npz:{root / 'data.npz'}", *live, *mask, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["online"], result["targets"], result["steps"]) == (True, {"t": ["block3.out"]}, 3)
    assert cli(*base, "--store", root / "s", *mask) == 2
    assert "--teacher-mask concerns teachers that run in the loop without a store" in capsys.readouterr().err


def test_the_command_that_adds_a_missing_tap_makes_the_same_masked_teacher(root: Path, tmp_path: Path) -> None:
    """The command is run as it is printed: what it adds differs from the first teacher in its taps alone."""
    store = tmp_path / "s"
    shutil.copytree(root / "s", store)
    name = next(name for name in Store.open(store).teachers() if Store.open(store).teacher(name).card.mask is not None)
    with pytest.raises(
        InputNotFound, match=f"ask for teacher '{name}-2', and store it under that name too: hdcache extract"
    ) as caught:
        open_targets(Store.open(store), {name: ["block1.out"]})
    words = shlex.split(str(caught.value).partition("hdcache extract ")[2])
    assert cli("extract", *words, "--precision", "fp32", "--quiet") in (0, None)
    first, second = (Store.open(store).teacher(which) for which in (name, f"{name}-2"))
    assert list(second.taps) == ["block1.out"]
    assert second.card == first.card

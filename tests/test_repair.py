"""``hdcache repair``: whatever is damaged comes out as it was, byte for byte, or nothing is touched and it is said why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hdcache import cli
from hdcache.errors import InputNotFound, StoreCorrupt, StoreLocked, StoreMismatch, UsageError
from hdcache.extract.repair import check_repaired, format_repair, repair
from hdcache.extract.rows import shard_rows
from hdcache.extract.run import extract
from hdcache.integrity import verify
from hdcache.ledgers import Ledger, file_size, teacher_ledger, view_ledger
from hdcache.reader import TeacherReader
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher

Tree = Callable[[Path], dict[str, bytes]]
Python = Callable[..., "subprocess.Popen[str]"]
ROWS = "teachers/t/views/0"
COMMON: dict[str, Any] = {"precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """24 pictures that the store keeps; teacher ``t`` with klt, relation and soft-label taps of two views, ``m`` under a mask."""
    folder = tmp_path_factory.mktemp("repair")
    data = make_npz(folder / "data.npz", 24)
    taps = ["block3.attn_in", "logits", "block2.rel.qk"]
    common = COMMON | {"store": folder / "s", "pixels": "source"}
    extract(data, teachers=[f"t={tiny}&num_classes=6"], taps=taps, top_k=3, num_views=2, **common)
    extract(data, teachers=[f"m={tiny}"], taps=["final"], encoding="fp16", teacher_mask="0.5", **common)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "s", tmp_path / "s")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def swap(path: Path) -> None:
    """With a sibling, where it has one."""
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    path.write_bytes(others[0].read_bytes() if others else b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = (flip, Path.unlink, cut, swap, folder)
OBJECTS = (
    "croissant.json",
    "index.json",
    "samples/id_bytes/c.0",
    "samples/label/zarr.json",
    "samples/pixels/bytes/1/c.0",
    "samples/pixels/bytes/1/zarr.json",
    "samples/pixels/digest/c.2.0",
    "samples/pixels/digest/zarr.json",
    "samples/pixels/manifest.json",
    "samples/pixels/receipts/0.json",
    "samples/receipt.json",
    "teachers/m/views/0/final/values/zarr.json",
    "teachers/m/views/0/manifest.json",
    "teachers/m/views/0/mask/visible/c.0.0",
    "teachers/m/views/0/receipts/2.json",
    "teachers/t/encodings/block3.attn_in/basis/c.0.0",
    "teachers/t/views/1/block2.rel.qk/values/c.1.0.0.0",
    "teachers/t/views/1/block3.attn_in/codes/c.0.0.0",
    "teachers/t/views/1/logits/classes/c.2.0",
    "teachers/t/views/1/pixels/digest/c.1.0",
    "teachers/t/views/1/zarr.json",
    "teachers/t/weights/block3/qkv_weight/c.0.0",
    "teachers/zarr.json",
    "views/0/geometry/c.1.0",
    "views/1/manifest.json",
    "views/1/receipts/1.json",
    "views/1/source_digest/c.2.0",
    "views/1/source_digest/zarr.json",
)

MANY = [key for key in OBJECTS if "manifest" not in key and key != "samples/receipt.json"]


def mend(root: Path, **settings: Any) -> dict[str, Any]:
    """With the data set where the store says that it was."""
    return repair(root, device="cpu", threads=2, **settings)


@pytest.mark.parametrize(("key", "damage"), [(key, DAMAGE[n % len(DAMAGE)]) for n, key in enumerate(OBJECTS)])
def test_every_kind_of_object_comes_out_as_it_was(
    key: str, damage: Callable[[Path], None], root: Path, tree: Tree
) -> None:
    before = tree(root)
    damage(root / key)
    result = mend(root)
    assert result["good"], result
    assert tree(root) == before
    assert [one["key"] for one in result["damaged"] if one["key"] != "index.json"] == [key] * (key != "index.json")
    assert all(seal["after"] == seal["before"] for seal in result["seals"].values() if seal["before"] is not None)
    assert verify(Store.open(root)).good


def test_much_at_once_and_nothing_again(root: Path, tree: Tree) -> None:
    """One object of each ledger, their receipts and constants, in one go; the second run finds nothing and writes nothing."""
    before = tree(root)
    for key in MANY:
        flip(root / key)
    result = mend(root)
    assert result["good"], [one for one in result["damaged"] if not one["outcome"]]
    assert tree(root) == before
    again = mend(root)
    assert again["good"]
    assert again["damaged"] == []
    assert format_repair(again) == f"{root}: all good"
    check_repaired(again)


def test_from_a_copy_everything_comes_back(made: Path, root: Path, tree: Tree) -> None:
    """Records too, which nothing else can give; no image and no network is needed."""
    before = tree(root)
    keys = ["zarr.json", "teachers/t/zarr.json", *OBJECTS[2::3], "samples/receipt.json", f"{ROWS}/manifest.json"]
    for key in keys:
        flip(root / key)
    (root / ROWS / "receipts/1.json").unlink()
    result = repair(root, copy=made / "s")
    assert result["good"], [one for one in result["damaged"] if not one["outcome"]]
    assert tree(root) == before


def test_from_a_copy_a_seal_and_its_receipts_come_back_together(made: Path, root: Path, tree: Tree) -> None:
    """Without the index such a view looks like one that was never finished; with it, it is known to be lost."""
    before = tree(root)
    for name in ("manifest.json", "receipts/0.json", "receipts/2.json"):
        (root / ROWS / name).unlink()
    flip(root / "teachers/t/views/1/manifest.json")
    flip(root / "teachers/t/views/1/receipts/1.json")
    flip(root / "samples/receipt.json")
    flip(root / "samples/label/zarr.json")
    result = repair(root, copy=made / "s")
    assert result["good"], [one for one in result["damaged"] if not one["outcome"]]
    assert tree(root) == before
    assert "missing, though it was there when index.json was written" in format_repair(result)


def test_a_copy_of_other_rows_gives_nothing(made: Path, root: Path, tmp_path: Path, tiny: str, tree: Tree) -> None:
    """Of the same data, so that its id is this store's, but of another network."""
    data = str(made / "data.npz")
    extract(data, store=tmp_path / "o", teachers=[f"t={tiny}&seed=5"], taps=["block3.attn_in"], **COMMON)
    flip(root / ROWS / "block3.attn_in/codes/c.0.0.0")
    flip(root / ROWS / "manifest.json")
    flip(root / "teachers/t/views/1/receipts/0.json")
    before = tree(root)
    result = repair(root, copy=tmp_path / "o")
    assert tree(root) == before
    assert not result["good"]
    why = {one["key"]: one["why_not"] for one in result["damaged"]}
    assert (
        "is another object, or is damaged too" in why[f"{ROWS}/manifest.json"]
        or "another size" in why[f"{ROWS}/manifest.json"]
    )
    assert why[f"{ROWS}/block3.attn_in/codes/c.0.0.0"].endswith(("damaged too", "is not there"))
    assert why["teachers/t/views/1/receipts/0.json"].endswith("is not there")
    with pytest.raises(StoreCorrupt, match=r"0 of 3 damaged objects mended; "):
        check_repaired(result)


def test_records_cannot_be_made_again(root: Path, tree: Tree) -> None:
    """A teacher's record, or the store's: what to do is said, all else is mended, nothing that is derived follows the damage."""
    flip(root / "teachers/m/zarr.json")
    flip(root / ROWS / "logits/values/c.0.0")
    before, index = tree(root), (root / "index.json").read_bytes()
    result = mend(root)
    assert {one["key"]: bool(one["outcome"]) for one in result["damaged"]} == {
        "teachers/m/zarr.json": False, f"{ROWS}/logits/values/c.0.0": True,
    }  # fmt: skip
    assert tree(root).keys() == before.keys()
    assert (root / "index.json").read_bytes() == index
    with pytest.raises(
        StoreCorrupt,
        match=r"1 of 2 damaged objects mended; teachers/m/zarr\.json: a record cannot be made again; take it",
    ):
        check_repaired(result)
    flip(root / "zarr.json")
    with pytest.raises(
        StoreCorrupt, match=r"a record cannot be made again; take it from a good copy \(--from COPY\): hdcache repair"
    ):
        mend(root)
    (root / "zarr.json").unlink()
    with pytest.raises(StoreCorrupt, match=r"hdcache repair .* --from COPY"):
        mend(root, dry_run=True)
    with pytest.raises(InputNotFound, match="no store there"):
        mend(root / "nowhere")


def test_a_dry_run_says_how_and_changes_nothing(root: Path, tree: Tree) -> None:
    for key in (f"{ROWS}/logits/values/c.0.0", "views/0/receipts/0.json", "teachers/m/zarr.json"):
        flip(root / key)
    before = tree(root)
    result = mend(root, dry_run=True)
    assert tree(root) == before
    assert {one["key"]: one["outcome"] for one in result["damaged"]} == {
        f"{ROWS}/logits/values/c.0.0": "would be extracted again",
        "views/0/receipts/0.json": "would be written again from the manifest",
        "teachers/m/zarr.json": "",
    }
    assert "NOT mended: a record cannot be made again" in format_repair(result)
    check_repaired(result)


def test_quick_looks_at_sizes(root: Path) -> None:
    flip(root / ROWS / "logits/values/c.0.0")
    assert mend(root, quick=True)["damaged"] == []
    cut(root / ROWS / "logits/values/c.0.0")
    assert mend(root, quick=True)["good"]
    assert verify(Store.open(root)).good


# Where the bytes come out otherwise


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose last bits are others."""
    forward = Teacher.forward

    def other(self: Teacher, *given: Any, **more: Any) -> dict[str, Tokens | torch.Tensor]:
        found = forward(self, *given, **more)
        return {
            tap: Tokens(v.prefix * 1.002, v.patches * 1.002) if isinstance(v, Tokens) else v for tap, v in found.items()
        }

    monkeypatch.setattr(Teacher, "forward", other)


def test_other_bytes_are_not_taken(root: Path, tree: Tree, rounding: None) -> None:
    flip(root / "teachers/m/views/0/final/values/c.0.0.0")
    before = tree(root)
    result = mend(root)
    assert tree(root) == before
    assert [one["differs"] for one in result["damaged"]] == [True]
    with pytest.raises(
        StoreMismatch, match=r"would come out with other bytes.*the seals are as they were.*--reseal"
    ) as left:
        check_repaired(result)
    assert left.value.exit_code == 5


def test_other_bytes_are_taken_where_that_is_asked_for(root: Path, tree: Tree, rounding: None) -> None:
    """What was good stays; the view gets another seal, and the store is whole."""
    name = "teachers/m/views/0/final/values/c.0.0.0"
    exact = TeacherReader(Store.open(root), "m").tap(0, "final", 0, 24)
    flip(root / name)
    before = tree(root)
    result = mend(root, reseal=True)
    assert result["good"], result
    after = tree(root)
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    view = "teachers/m/views/0"
    assert changed - {"croissant.json", "index.json"} == {name, f"{view}/manifest.json", f"{view}/receipts/0.json"}
    seal = result["seals"][view]
    assert seal["before"] != seal["after"]
    assert "it was" in format_repair(result)
    assert verify(Store.open(root)).good
    found = TeacherReader(Store.open(root), "m").tap(0, "final", 0, 24)
    assert isinstance(exact, Tokens)
    assert isinstance(found, Tokens)
    torch.testing.assert_close(found.patches[8:], exact.patches[8:], rtol=0, atol=0)
    torch.testing.assert_close(found.patches[:8], exact.patches[:8], rtol=0.01, atol=0.01)


# What cannot be made again


def test_images_that_are_gone_or_changed_are_named(made: Path, tmp_path: Path, tiny: str, make_folder: Any) -> None:
    images = make_folder(tmp_path / "images", 16)
    root = tmp_path / "f"
    extract(str(images), store=root, teachers=[f"t={tiny}"], taps=["final"], **COMMON)
    flip(root / ROWS / "final/codes/c.0.0.0")
    store = Store.open(root)
    victim = images / store.ids[shard_rows(store, 0, 0)[3][0]]
    data = victim.read_bytes()
    shutil.copy(next(path for path in sorted(images.rglob("*.png")) if path != victim), victim)
    (one,) = mend(root)["damaged"]
    assert f"{victim.relative_to(images)}: the image changed since its view was recorded" in one["why_not"]
    flip(root / "views/0/source_digest/c.0.0")
    flip(root / "views/0/geometry/c.1.0")
    whys = {one["key"]: one["why_not"] for one in mend(root)["damaged"] if not one["outcome"]}
    assert set(whys) == {f"{ROWS}/final/codes/c.0.0.0", "views/0/source_digest/c.0.0"}
    assert "made again, but of other images" in whys["views/0/source_digest/c.0.0"]
    assert whys[f"{ROWS}/final/codes/c.0.0.0"] == "views/0 is damaged there too, and could not be mended"
    victim.write_bytes(data)
    moved = images.rename(tmp_path / "elsewhere")
    with pytest.raises(
        StoreCorrupt, match=r"0 of 2 damaged objects mended; .*if the data set has moved, name it: --data DATA"
    ):
        check_repaired(mend(root))
    assert mend(root, data=str(moved))["good"]


def test_rows_that_failed_stay_failed(tmp_path: Path, tiny: str, make_folder: Any, tree: Tree) -> None:
    """Repair makes the rows that were there; trying failed ones again is for ``extract``."""
    images = make_folder(tmp_path / "images", 16)
    broken = sorted(images.rglob("*.png"))[3]
    data = broken.read_bytes()
    broken.write_bytes(b"no image")
    extract(str(images), store=tmp_path / "f", teachers=[f"t={tiny}"], taps=["final"], **COMMON)
    before = tree(tmp_path / "f")
    broken.write_bytes(data)
    for name in ("final/codes/c.0.0.0", "final/codes/c.1.0.0", "receipts/0.json", "receipts/1.json"):
        flip(tmp_path / "f" / ROWS / name)
    for name in ("geometry/c.0.0", "geometry/c.1.0"):
        flip(tmp_path / "f/views/0" / name)
    assert mend(tmp_path / "f")["good"]
    assert tree(tmp_path / "f") == before


def test_weights_that_moved_are_named(tmp_path: Path, tiny: str, make_npz: Any) -> None:
    from safetensors.torch import save_file

    from hdcache.teachers import load_teacher

    network = load_teacher(tiny).backbone.model
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    options = tiny.partition("?")[2]
    spec = f"timm:vit_tiny_patch16_224?checkpoint={tmp_path / 'w.safetensors'}&{options}"
    root = tmp_path / "f"
    extract(make_npz(tmp_path / "d.npz", 8), store=root, teachers=[f"t={spec}"], taps=["final"], **COMMON)
    (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    flip(root / ROWS / "final/codes/c.0.0.0")
    (one,) = mend(root)["damaged"]
    assert "if its weights have moved, name them: --teacher t=MODEL" in one["why_not"]
    assert mend(root, teachers=[f"t={spec.replace('w.safe', 'v.safe')}"])["good"]


@pytest.mark.parametrize("key", [ROWS, "views/1", "samples/pixels"])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_seal_and_a_receipt_that_are_both_lost(
    key: str, damage: Callable[[Path], None], root: Path, tree: Tree
) -> None:
    """The shard is made again, and it is what lies there: so it was that which the receipt spoke of."""
    before = tree(root)
    damage(root / key / "manifest.json")
    (root / key / "receipts/1.json").unlink()
    result = mend(root)
    assert result["good"], result
    assert tree(root) == before
    assert "sealed again from its receipts, as it was" in format_repair(result)


def test_rows_that_could_not_be_read_are_told_again(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], tree: Tree
) -> None:
    """Why they could not be read is in no other place than in what is lost; the images are as they were."""
    images = make_folder(tmp_path / "images", 16)
    broken = sorted(images.rglob("*.png"))[3]
    data = broken.read_bytes()
    broken.write_bytes(b"no image")
    root = tmp_path / "f"
    extract(str(images), store=root, teachers=[f"t={tiny}"], taps=["final"], **COMMON)
    before = tree(root)
    bad = next(n for n in (0, 1) if (receipt := view_ledger(Store.open(root), 0).receipt(n)) and receipt.failed)
    for name in ("manifest.json", f"receipts/{bad}.json"):
        (root / ROWS / name).unlink()
        (root / "views/0" / name).unlink()
    broken.write_bytes(data)
    whys = {one["key"]: one["why_not"] for one in mend(root)["damaged"]}
    assert "could not be read when its view was recorded, and can be by now" in whys[f"views/0/receipts/{bad}.json"]
    broken.write_bytes(b"no image")
    assert mend(root)["good"]
    assert tree(root) == before


def test_a_shard_that_comes_out_otherwise_tells_nothing(root: Path, made: Path, tree: Tree, rounding: None) -> None:
    """What is damaged stays damaged for all who look: the seal that cannot be read is not taken away."""
    good, view = tree(root), "teachers/m/views/0"
    flip(root / view / "manifest.json")
    (root / view / "receipts/1.json").unlink()
    before = tree(root)
    result = mend(root)
    assert tree(root) == before
    why = {one["key"]: one["why_not"] for one in result["damaged"]}
    assert "is not what it is when made again; take it from a good copy" in why[f"{view}/receipts/1.json"]
    assert (
        "delete what is left of the seal and of this receipt, and run the same 'hdcache extract'"
        in why[f"{view}/receipts/1.json"]
    )
    assert "must be mended first" in why[f"{view}/manifest.json"]
    assert not verify(Store.open(root)).good
    assert repair(root, copy=made / "s")["good"]
    assert tree(root) == good


def test_a_seal_without_receipts_is_not_taken_away(root: Path, tiny: str, tree: Tree) -> None:
    good = tree(root)
    flip(root / ROWS / "manifest.json")
    shutil.rmtree(root / ROWS / "receipts")
    before = tree(root)
    result = mend(root)
    assert tree(root) == before
    why = {one["key"]: one["why_not"] for one in result["damaged"]}
    assert f"the receipts of {ROWS} cover 0 of 24 rows" in why[f"{ROWS}/manifest.json"]
    assert not verify(Store.open(root)).good
    shutil.rmtree(root / ROWS)
    result, index = mend(root), (root / "index.json").read_bytes()
    assert not (root / ROWS).exists()
    assert f"{ROWS}/manifest.json".encode() in index
    with pytest.raises(StoreCorrupt, match=rf"{ROWS}/manifest\.json: "):
        check_repaired(result)
    taps = ["block3.attn_in", "logits", "block2.rel.qk"]
    extract(store=root, teachers=[f"t={tiny}&num_classes=6"], taps=taps, top_k=3, num_views=2, **COMMON)
    assert tree(root) == good, "the advice is followed"


def test_without_the_index_it_is_said_what_there_is(root: Path) -> None:
    """A view that is gone with it is missed by nothing: the reader of the result may."""
    shutil.rmtree(root / ROWS)
    (root / "teachers/m/views/0/manifest.json").unlink()
    (root / "teachers/m/views/0/receipts/1.json").unlink()
    flip(root / "index.json")
    for dry_run in (True, False):
        text = format_repair(mend(root, dry_run=dry_run))
        assert (
            "there are m with 0 sealed views [], t with 1 sealed view [1]; not sealed: teachers/m/views/0: if something lacks"
            in text
        )
    assert "index.json was damaged" not in format_repair(mend(root))


@pytest.mark.parametrize("key", [ROWS, "views/1", "samples/pixels"])
def test_a_seal_that_cannot_be_written_leaves_the_old_one(
    key: str, root: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    flip(root / key / "manifest.json")
    before = tree(root)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "seal", fails)
        (one,) = [one for one in mend(root)["damaged"] if one["kind"] != "index"]
    assert one["why_not"] == "Input/output error"
    assert tree(root) == before


def test_another_seal_than_the_index_lists(root: Path, tree: Tree) -> None:
    """A receipt that says otherwise, well-formed as it is: not without being asked."""
    flip(root / ROWS / "manifest.json")
    ledger = teacher_ledger(Store.open(root), "t", 0)
    known = ledger.receipt(1)
    assert known is not None
    ledger.record(known.model_copy(update={"failed": {9: "x"}}))
    before = tree(root)
    result = mend(root)
    assert tree(root) == before
    assert [one["why_not"] for one in result["damaged"]] == ["made again, but it is not the seal that index.json lists"]
    with pytest.raises(StoreMismatch, match="--reseal"):
        check_repaired(result)
    result = mend(root, reseal=True)
    assert result["good"], result
    assert "it was another one" in format_repair(result)


def test_the_index_waits_for_all_else(root: Path) -> None:
    """It alone says that the record is lost, and is written when nothing is any more."""
    (root / ROWS / "manifest.json").unlink()
    (root / "teachers/m/zarr.json").unlink()
    index = (root / "index.json").read_bytes()
    result = mend(root)
    assert {one["key"]: bool(one["outcome"]) for one in result["damaged"]} == {
        "teachers/m/zarr.json": False, f"{ROWS}/manifest.json": True,
    }  # fmt: skip
    assert (root / "index.json").read_bytes() == index
    shutil.rmtree(root / "teachers/m")
    assert not mend(root)["good"]


def test_a_seal_that_was_withdrawn_and_not_given_again(
    root: Path, rounding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is taken, and the view is not sealed: that is no repaired store."""

    def fails(*_: Any, **__: Any) -> Any:
        raise StoreCorrupt("no seal")

    flip(root / "teachers/m/views/0/final/values/c.0.0.0")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "seal", fails)
        result = mend(root, reseal=True)
    assert all(one["outcome"] for one in result["damaged"])
    assert result["unsealed"] == ["teachers/m/views/0"]
    with pytest.raises(StoreCorrupt, match=r"teachers/m/views/0: sealed when the index was written, and not any more"):
        check_repaired(result)
    assert mend(root)["damaged"]
    assert mend(root)["good"]


def test_a_receipt_is_that_which_the_seal_lists_or_none(
    root: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache.extract import record_mending

    of = record_mending.receipt_of

    def other(*given: Any) -> Any:
        return of(*given).model_copy(update={"failed": {0: "x"}})

    (root / ROWS / "receipts/1.json").unlink()
    before = tree(root)
    with monkeypatch.context() as patch:
        patch.setattr(record_mending, "receipt_of", other)
        (one,) = [one for one in mend(root)["damaged"] if one["kind"] != "index"]
    assert "it is not the one that the seal lists; take it from a good copy" in one["why_not"]
    assert tree(root) == before


# Copies that have some taps only


@pytest.fixture
def part(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A copy of the logits of teacher ``t``."""
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    assert call(capsys, "pull", made / "s", tmp_path / "part", "--teacher", "t", "--tap", "logits", "-q")[0] == 0
    return tmp_path / "part"


NOTE = "teachers/t/held.json"


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("copied", [False, True])
def test_which_taps_a_copy_has_follows_from_what_is_there(
    damage: Callable[[Path], None], copied: bool, part: Path, made: Path, tree: Tree
) -> None:
    """No other tap is extracted, or fetched; what is damaged of its own is mended, as far as that goes."""
    before = tree(part)
    damage(part / NOTE)
    assert "would be written again" in format_repair(mend(part, dry_run=True)) or copied
    result = mend(part, copy=made / "s" if copied else None)
    assert result["good"], result
    assert [one["key"] for one in result["damaged"]] == [NOTE]
    assert "written again: something of logits is there" in format_repair(result)
    assert tree(part) == before
    damage(part / NOTE)
    flip(part / "teachers/t/views/1/logits/values/c.1.0")
    result = mend(part, copy=made / "s")
    assert result["good"], result
    assert tree(part) == before


def test_a_note_in_a_whole_copy_is_removed(root: Path, tree: Tree) -> None:
    before = tree(root)
    (root / NOTE).write_text("{")
    result = mend(root)
    assert result["good"], result
    assert tree(root) == before
    assert "removed: something of every tap is there" in format_repair(result)


def test_what_a_copy_lacks_is_pulled_again(
    part: Path, made: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice is followed."""
    before, name = tree(part), "teachers/t/views/1/logits/values/c.1.0"
    flip(part / name)
    (one,) = mend(part)["damaged"]
    assert (
        "delete the damaged file and run the same 'hdcache pull' again, or take it from a good copy" in one["why_not"]
    )
    (part / name).unlink()
    assert call(capsys, "pull", made / "s", part, "--teacher", "t", "--tap", "logits", "-q")[0] == 0
    assert tree(part) == before


def test_a_copy_without_its_note_may_be_one(part: Path) -> None:
    (part / NOTE).unlink()
    text = format_repair(mend(part, dry_run=True))
    assert (
        "nothing of tap block2.rel.qk, block3.attn_in of teacher t is there: if this is a partial copy, whose held.json is lost, run"
        in text
    )
    assert "'--teacher t --tap logits' again instead" in text


# What cannot be read now


def test_what_cannot_be_read_is_not_damaged(root: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment: nothing is judged, nothing is made again, and the exit code says why."""
    before, look, opened = tree(root), file_size, os.open

    def fails(path: Any, *more: Any, **others: Any) -> Any:
        if str(path) == str(root / name):
            raise OSError(5, "Input/output error", str(path))
        return (opened if more or others else look)(path, *more, **others)

    for name in (
        f"{ROWS}/logits/values/c.0.0",
        "zarr.json",
        "croissant.json",
        f"{ROWS}/manifest.json",
        "teachers/t/zarr.json",
        "index.json",
    ):
        with monkeypatch.context() as patch:
            patch.setattr("hdcache.integrity.file_size", fails)
            patch.setattr(os, "open", fails)
            for dry_run in (True, False):
                with pytest.raises(
                    InputNotFound, match=r"Input/output error.*; what the system cannot read now is not"
                ) as left:
                    mend(root, dry_run=dry_run)
                assert left.value.exit_code == 3
                assert name in str(left.value)
    assert tree(root) == before


# What is refused before anything is looked at


def test_what_cannot_be_meant_is_refused_first(
    root: Path, made: Path, tmp_path: Path, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was looked at")

    monkeypatch.setattr("hdcache.extract.repair.survey", looked)
    other = make_npz(tmp_path / "other.npz", 24, seed=5)
    extract(other, store=tmp_path / "o", teachers=[f"t={tiny}"], taps=["final"], **COMMON)

    def refused(error: type[Exception], words: str, path: Any = root, **settings: Any) -> None:
        for dry_run in (False, True):
            with pytest.raises(error, match=words):
                repair(path, dry_run=dry_run, **settings)

    refused(UsageError, r"another store \(id .*\); --from takes a copy of .*s \(id", copy=tmp_path / "o")
    refused(InputNotFound, r"no store there; --from takes the folder of another copy", copy=tmp_path / "nowhere")
    refused(InputNotFound, r"that is the store itself", copy=root)
    refused(UsageError, r"--from http://x/y: .*get it first: hdcache pull http://x/y COPY", copy="http://x/y")
    refused(UsageError, r"^http://x/y: .*get it first: hdcache pull http://x/y FOLDER", "http://x/y")
    refused(UsageError, "STORE is empty; name the folder", "")
    refused(UsageError, "--from is empty; name the folder", copy="")
    refused(UsageError, "device 'foo' cannot be used here", device="foo")
    refused(UsageError, "threads 0 must be at least 1", threads=0)
    refused(UsageError, "--teacher t: say where its weights are: --teacher t=MODEL", teachers=["t"])
    refused(UsageError, "--teacher t=: say where its weights are", teachers=["t="])
    refused(InputNotFound, r"no teacher 'zz' \(teachers: m, t\)", teachers=["zz=foo"])
    refused(InputNotFound, "nowhere", data=str(tmp_path / "nowhere"))
    refused(StoreMismatch, "was made from other data than", data=other)
    flip(root / "samples/label/c.0")
    with pytest.raises(AssertionError):
        repair(root, data=str(made / "data.npz"))


def test_foreign_files_are_left_alone(root: Path) -> None:
    (root / ROWS / "receipts/99.json").write_text("{}")
    victim = root / ROWS / "logits/values/c.0.0"
    folder(victim)
    (victim / "mine").write_text("x")
    result = mend(root)
    why = {one["key"]: one["why_not"] for one in result["damaged"]}
    assert "there is no such shard" in why[f"{ROWS}/receipts/99.json"]
    assert "a folder that holds something, where a file belongs; move it away" in why[f"{ROWS}/logits/values/c.0.0"]
    assert (victim / "mine").read_text() == "x"


def test_who_writes_goes_first(root: Path) -> None:
    with Store.open(root).lock("t"), pytest.raises(StoreLocked):
        mend(root)


def test_clipped_values_are_counted_again(tmp_path: Path, tiny: str, make_npz: Any, tree: Tree) -> None:
    """The seal has their sum alone: where several receipts are lost, their shards are extracted again to tell."""
    root = tmp_path / "f"
    extract(
        make_npz(tmp_path / "d.npz", 40), store=root, teachers=[f"t={tiny}"], taps=["final"], encoding="int8", **COMMON
    )
    ledger = teacher_ledger(Store.open(root), "t", 0)
    clipped = [found.saturated for n in range(5) if (found := ledger.receipt(n)) is not None]
    assert ledger.manifest().saturated == sum(clipped)
    before = tree(root)
    for n in (1, 2, 4):
        flip(root / ROWS / f"receipts/{n}.json")
    assert mend(root)["good"]
    assert tree(root) == before
    assert sum(clipped) > 0, "choose pictures of which some values are clipped"


# Killed


class Killed(BaseException):
    """Not an error that anybody handles."""


@pytest.mark.parametrize("moment", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("reseal", [False, True])
def test_a_killed_repair_is_gone_on_with(
    moment: int, reseal: bool, root: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """At some flush to the disk: what is there then is the old object or the mended one; the next run does the rest."""
    before = tree(root)
    if reseal:
        request.getfixturevalue("rounding")
    keys = [
        "teachers/m/views/0/final/values/c.0.0.0",
        "teachers/m/views/0/final/values/c.2.0.0",
        "views/1/manifest.json",
    ]
    keys += ["teachers/m/views/0/receipts/1.json", "samples/pixels/bytes/0/c.0", "views/0/geometry/c.0.0"]
    for key in keys:
        flip(root / key)
    sync, left = os.fsync, [moment]

    def fsync(file: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        sync(file)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(os, "fsync", fsync)
        mend(root, reseal=reseal)
    result = mend(root, reseal=reseal)
    assert result["good"], result
    assert verify(Store.open(root)).good
    if not reseal:
        assert {key: value for key, value in tree(root).items() if not key.endswith(".partial")} == before


KILLED = """
import os, signal, sys
from hdcache.extract.repair import repair
sync, left = os.fsync, [int(sys.argv[2])]
def fsync(file):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
os.fsync = fsync
repair(sys.argv[1], device="cpu", threads=2)
"""


@pytest.mark.parametrize("moment", [3, 8])
def test_a_process_that_is_killed(moment: int, root: Path, tree: Tree, python: Python) -> None:
    before = tree(root)
    for key in MANY:
        flip(root / key)
    process = python(KILLED, root, moment, OMP_NUM_THREADS="1")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert mend(root)["good"]
    assert {key: value for key, value in tree(root).items() if not key.endswith(".partial")} == before


# The command


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_command(
    root: Path, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    flip(root / ROWS / "logits/values/c.0.0")
    code, out, err = call(capsys, "verify", root, "-q")
    assert code == 5
    assert f"'hdcache repair {root}' makes them again" in err
    code, out, err = call(capsys, "repair", root, "--dry-run", "-q")
    assert (code, err) == (0, "")
    assert "would be extracted again" in out
    code, out, err = call(capsys, "repair", root, "--json", "-q", "--device", "cpu")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [(one["key"], one["outcome"]) for one in result["damaged"]] == [
        (f"{ROWS}/logits/values/c.0.0", "extracted again")
    ]
    assert result["seals"][ROWS]["before"] == result["seals"][ROWS]["after"]
    flip(root / "teachers/t/zarr.json")
    code, out, err = call(capsys, "repair", root, "-q", "--device", "cpu")
    assert code == 5
    assert err.startswith("hdcache: ")
    assert err.count("\n") == 1
    code, out, err = call(capsys, "repair", root, "-q", "--from", made / "s")
    assert (code, err) == (0, "")
    assert f"taken from {made / 's'}" in out
    code, out, err = call(capsys, "repair", root, "--teacher", "t")
    assert code == 2
    assert "say where its weights are: --teacher t=MODEL" in err


@pytest.mark.parametrize("folder", ["teachers/t/views/1", "teachers/t", "views/1", "views", "teachers"])
def test_a_folder_that_is_gone_comes_back_from_a_copy(folder: str, root: Path, made: Path, tree: Tree) -> None:
    """Plain repair says that it is gone; a copy has it to the byte, with the notes that no record lists."""
    before = tree(root)
    shutil.rmtree(root / folder)
    result = repair(root, data=None, quiet=True)
    assert not result["good"]
    assert {one["key"].startswith(folder) for one in result["damaged"] if one["key"].endswith("manifest.json")} == {
        True
    }
    result = repair(root, copy=made / "s", quiet=True)
    assert result["good"], result
    assert not [note for note in result["notes"] if "partial copy" in note]
    assert tree(root) == before
    assert verify(Store.open(root)).good


@pytest.mark.parametrize("folder", ["teachers/t/views/1", "views/1", "samples/pixels"])
def test_a_folder_that_is_gone_comes_back_by_the_same_command(
    folder: str, root: Path, made: Path, tiny: str, tree: Tree
) -> None:
    before = tree(root)
    shutil.rmtree(root / folder)
    taps = ["block3.attn_in", "logits", "block2.rel.qk"]
    settings = COMMON | {"store": root, "pixels": "source"}
    extract(
        f"npz:{made / 'data.npz'}", teachers=[f"t={tiny}&num_classes=6"], taps=taps, top_k=3, num_views=2, **settings
    )
    assert tree(root) == before
    assert verify(Store.open(root)).good

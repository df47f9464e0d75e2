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
from hdcache.errors import InputNotFound, StoreCorrupt, StoreLocked, StoreMismatch
from hdcache.extract.repair import check_repaired, format_repair, repair
from hdcache.extract.rows import shard_rows
from hdcache.extract.run import extract
from hdcache.integrity import teacher_ledger, verify
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
    assert "missing, but index.json lists it" in format_repair(result)


def test_a_copy_of_something_else_gives_nothing(
    root: Path, tmp_path: Path, tiny: str, make_npz: Any, tree: Tree
) -> None:
    other = make_npz(tmp_path / "other.npz", 24, seed=5)
    extract(other, store=tmp_path / "o", teachers=[f"t={tiny}&num_classes=6"], taps=["block3.attn_in"], **COMMON)
    flip(root / ROWS / "block3.attn_in/codes/c.0.0.0")
    flip(root / ROWS / "manifest.json")
    flip(root / "teachers/t/views/1/receipts/0.json")
    before = tree(root)
    result = repair(root, copy=tmp_path / "o")
    assert tree(root) == before
    assert not result["good"]
    why = {one["key"]: one["why_not"] for one in result["damaged"]}
    assert "does not agree with the receipts here; is" in why[f"{ROWS}/manifest.json"]
    assert why[f"{ROWS}/block3.attn_in/codes/c.0.0.0"].endswith(("damaged too", "is not there"))
    assert why["teachers/t/views/1/receipts/0.json"].endswith(
        "missing; copy the store again or rerun 'hdcache extract'"
    )
    with pytest.raises(StoreCorrupt, match=r"0 of 3 damaged objects mended; "):
        check_repaired(result)
    with pytest.raises(InputNotFound, match=r"no store there; --from takes the folder of another copy"):
        repair(root, copy=tmp_path / "nowhere")
    with pytest.raises(InputNotFound, match=r"that is the store itself"):
        repair(root, copy=root)


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


def test_a_seal_and_a_receipt_that_are_both_lost(root: Path, tiny: str, made: Path, tree: Tree) -> None:
    """The advice is followed: without both, the same extraction makes the same store."""
    before = tree(root)
    for name in ("manifest.json", "receipts/1.json"):
        flip(root / ROWS / name)
    why = {one["key"]: one["why_not"] for one in mend(root)["damaged"]}
    assert "delete both and run the same 'hdcache extract' command again" in why[f"{ROWS}/receipts/1.json"]
    assert "must be mended first" in why[f"{ROWS}/manifest.json"]
    for name in ("manifest.json", "receipts/1.json"):
        (root / ROWS / name).unlink()
    unfinished = mend(root)
    assert unfinished["unsealed"] == [ROWS]
    assert f"not sealed yet: {ROWS}; run the same 'hdcache extract'" in format_repair(unfinished)
    taps = ["block3.attn_in", "logits", "block2.rel.qk"]
    extract(store=root, teachers=[f"t={tiny}&num_classes=6"], taps=taps, top_k=3, num_views=2, **COMMON)
    assert tree(root) == before


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

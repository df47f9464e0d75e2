"""A store of the first release of format 1: read, trained from, extended, never rewritten.

``data/format1.zip`` holds what commit bd6ab19 wrote: 24 small pictures, one view, a teacher ``plain`` (klt) and a teacher
``normed`` with normalised queries and keys (fp16), each beside its checkpoint. Its records have none of the fields that
came later.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import StoreMismatch
from hdcache.extract.run import ExtractSummary, extract
from hdcache.geometry import read_geometry
from hdcache.info import describe_store
from hdcache.integrity import verify
from hdcache.ledgers import read_index
from hdcache.reader import TeacherReader
from hdcache.schema import ViewSpec
from hdcache.sharing.places import open_place
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from hdcache.teachers import reload_teacher

IDENTITIES = {
    "plain": "777cc0ec5652494b44d5872e3989a8019a64b49c0c6749e38a8a77458f9cbc71",
    "normed": "00d5226c27f54014975f861da71f0fa38d71043656a770a1413b39690943b2b0",
}
MANIFESTS = {
    "plain": "9a10a5aace1cf27289855be76720d210a18fc0fe516cf2f66f2a071acf069bf7",
    "normed": "0987c9812b6894623c9b8bab51cedff3cd5300749c111bdcf3abfeacdbea338f",
}
SETTINGS: dict[str, Any] = {
    "views": "supervised", "view_seed": 5, "precision": "fp32", "batch": 4, "rows_per_shard": 8, "device": "cpu",
    "threads": 2,
}  # fmt: skip


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder with the store, its data and its checkpoints."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format1.zip") as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def spec(old: Path, name: str) -> str:
    size = "img_size=16&patch_size=8&embed_dim=8&depth=2&num_heads=2" + "&qk_norm=true" * (name == "normed")
    return f"{name}=timm:vit_tiny_patch16_224?checkpoint={old / name}.safetensors&{size}"


def repeat(old: Path, name: str, store: str = "store.hdc", **changes: Any) -> ExtractSummary:
    """The command that made the teacher."""
    own = {"encoding": "fp16", "taps": ["block1.qkv"]} if name == "normed" else {"taps": ["block2.attn_in", "final"]}
    settings = SETTINGS | own | changes
    return extract(f"npz:{old / 'images.npz'}", store=old / store, teachers=[spec(old, name)], **settings)


def test_it_opens_and_verifies_with_the_digests_that_it_had(old: Path) -> None:
    store = Store.open(old / "store.hdc")
    found = verify(store)
    assert (found.faults, found.unsealed, found.unlisted) == ([], [], [])
    assert found.objects > 30
    geometry, digests = read_geometry(store, 0)
    assert (geometry.shape, digests.shape) == ((24, 8), (24, 32))
    for name, identity in IDENTITIES.items():
        reader = TeacherReader(store, name)
        assert reader.record.identity_digest() == identity
        assert reader.manifest(0).digest() == MANIFESTS[name]
        assert reader.record.card.mask is None
    assert describe_store(store)["teachers"]


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_same_command_changes_nothing(old: Path, name: str, tree: Callable[[Path], dict[str, bytes]]) -> None:
    """Also for a teacher whose card would now hold a field that the record lacks, and where a default is another one now."""
    before = tree(old / "store.hdc")
    summary = repeat(old, name)
    assert summary.teachers[name]["rows_written"] == 0
    after = tree(old / "store.hdc")
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= {
        ".lock",
        f".{name}.lock",
    }
    if name == "plain":
        with pytest.raises(StoreMismatch, match=r"fidelity: the store has 0\.05, asked was 0\.1"):
            repeat(old, name, fidelity=0.1)


@pytest.mark.parametrize("name", IDENTITIES)
def test_another_view_is_added_and_another_network_is_not(old: Path, name: str) -> None:
    repeat(old, name, num_views=2)
    store = Store.open(old / "store.hdc")
    assert verify(store).faults == []
    reader = TeacherReader(store, name)
    assert store.views(name) == [0, 1]
    assert reader.manifest(0).digest() == MANIFESTS[name]
    assert reader.manifest(1).identity == IDENTITIES[name]
    with pytest.raises(StoreMismatch, match=r"card\.mask: the store has None, asked was \{'kind': 'random'"):
        repeat(old, name, teacher_mask="random:0.5")
    assert reload_teacher(reader.record, spec(old, name).partition("=")[2]).card.qk_norm == (name == "normed")


def test_a_teacher_is_added_to_a_view_that_is_sealed(old: Path) -> None:
    """The geometry that it shares keeps its metadata, whatever level of compression a version writes."""
    before = (old / "store.hdc/views/0/geometry/zarr.json").read_bytes()
    again = spec(old, "plain").replace("plain=", "third=", 1)
    extract(
        f"npz:{old / 'images.npz'}",
        store=old / "store.hdc",
        teachers=[again],
        **SETTINGS | {"taps": ["final"], "num_views": 2},
    )
    store = Store.open(old / "store.hdc")
    assert store.views("third") == [0, 1]
    assert verify(store).faults == []
    assert (old / "store.hdc/views/0/geometry/zarr.json").read_bytes() == before
    for name in IDENTITIES:
        assert TeacherReader(store, name).manifest(0).digest() == MANIFESTS[name]


def test_shards_that_are_lost_are_made_as_the_others_are(old: Path) -> None:
    """A view half done by an earlier version is finished with its chunks."""
    folder = old / "store.hdc/teachers/plain/views/0"
    expected = {
        tap: TeacherReader(Store.open(old / "store.hdc"), "plain").tap(0, tap, 0, 24)
        for tap in ("final", "block2.attn_in")
    }
    meta = (folder / "final/codes/zarr.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "receipts/1.json").unlink()
    assert repeat(old, "plain").teachers["plain"]["rows_written"] == 8
    assert (folder / "final/codes/zarr.json").read_bytes() == meta
    store = Store.open(old / "store.hdc")
    assert verify(store).faults == []
    for tap, value in expected.items():
        torch.testing.assert_close(TeacherReader(store, "plain").tap(0, tap, 0, 24), value)


def test_a_new_store_is_spelled_as_it_was(old: Path) -> None:
    """Fields that came later are left out where they say what older stores did."""
    for name, identity in IDENTITIES.items():
        # What was the default then.
        then = {"fidelity": 0.05} if name == "plain" else {}
        assert repeat(old, name, "new", **then).teachers[name]["identity"] == identity or name == "normed"
    # Records have had a check of their own since.
    one, other = (json.loads((old / name / "zarr.json").read_bytes())["attributes"] for name in ("new", "store.hdc"))
    assert one.keys() - other.keys() == {"hdcache_check"}
    assert one["hdcache"] == other["hdcache"]
    one, other = (json.loads((old / name / "samples/receipt.json").read_bytes()) for name in ("new", "store.hdc"))
    assert one == other | {"check": one["check"]}
    # Another level of compression makes other bytes of the same arrays.
    found = [json.loads((old / name / "views/0/manifest.json").read_text()) for name in ("new", "store.hdc")]
    assert found[0].pop("check")
    objects = [manifest.pop("objects") for manifest in found]
    assert found[0] == found[1]
    # Receipts have been listed since.
    assert objects[0].keys() - {f"views/0/receipts/{shard}.json" for shard in range(3)} == objects[1].keys()
    one, other = (read_geometry(Store.open(old / name), 0) for name in ("new", "store.hdc"))
    assert all(map(np.array_equal, one, other))
    fields = Store.open(old / "new").teacher("plain").model_dump(mode="json")
    then = Store.open(old / "store.hdc").teacher("plain").model_dump(mode="json")
    assert fields["card"] == then["card"]
    assert "mask" not in fields["card"]
    assert "frames" not in fields["views"]
    assert ViewSpec(frames=4, stride=1).model_dump(exclude_defaults=True) == {"frames": 4}


def test_it_travels(old: Path, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]) -> None:
    """Its manifests list no receipts: the index of a copy does."""
    copy_store(open_place(str(old / "store.hdc")), open_place(str(tmp_path / "copy")), quiet=True)
    store = Store.open(tmp_path / "copy")
    assert verify(store).good
    index = read_index(store.path)
    assert index is not None
    assert "views/0/receipts/0.json" in index.objects
    assert tree(tmp_path / "copy") == tree(old / "store.hdc")


def test_a_student_is_trained_from_it(old: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]) -> None:
    changes = {"student.arguments": {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}}
    result = distill(
        small_recipe(), out=tmp_path / "run", store=old / "store.hdc", data=f"npz:{old / 'images.npz'}", device="cpu",
        overrides={"objective.teacher": "plain", "batch_size": 8} | changes, threads=2,
    )  # fmt: skip
    assert torch.isfinite(torch.tensor(result["loss"]))

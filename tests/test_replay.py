"""``verify --replay``: the same files, the same pixels; or which are not, and why that may be."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hdcache import samples
from hdcache.durable import durable_write
from hdcache.errors import InputNotFound, StoreCorrupt, UsageError
from hdcache.extract.checked_rows import draw_rows
from hdcache.extract.replay import format_replay, replay
from hdcache.extract.run import extract
from hdcache.reader import TeacherReader
from hdcache.store import ABOUT, Store, read_about

COMMON: dict[str, Any] = {
    "taps": ["final"], "precision": "fp32", "batch": 8, "threads": 2, "device": "cpu", "rows_per_shard": 8,
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path, make_folder: Callable[..., Path]) -> Path:
    return make_folder(tmp_path / "images", 40)


@pytest.fixture
def root(tmp_path: Path, images: Path, tiny: str) -> Path:
    extract(str(images), store=tmp_path / "s", teachers=[f"t={tiny}"], num_views=2, **COMMON)
    return tmp_path / "s"


def look(root: Path, rows: int = 16, **settings: Any) -> dict[str, Any]:
    return replay(Store.open(root), rows, threads=2, **settings)


def test_what_did_not_change(root: Path) -> None:
    found = look(root)
    facts = found["teachers"]["t"]
    assert (facts["rows"], facts["pixels_compared"]) == (16, 10)
    assert (facts["sources_changed"], facts["pixels_changed"], facts["without_digests"]) == (0, 0, [])
    assert found["faults"] == found["notes"] == []
    assert look(root) == found
    assert format_replay(found) == [
        "teacher t: the images of 16 rows opened again, 0 of other files; pixels of 10 compared, 0 differ"
    ]


def test_a_decoder_that_changed_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the same, its pixels are off by a grey level."""
    decode = samples.decode

    def other(source: Any) -> Image.Image:
        return decode(source).point(lambda level: level ^ 1)

    monkeypatch.setattr(samples, "decode", other)
    about = read_about(root)
    durable_write(
        root / ABOUT, about.model_copy(update={"written_with": {"pillow": "1.0", "made by": "x"}}).canonical()
    )
    found = look(root, 40)
    facts = found["teachers"]["t"]
    assert facts["sources_changed"] == 0
    assert facts["pixels_changed"] == facts["pixels_compared"] == 10
    (fault,) = found["faults"]
    assert fault.startswith(
        f"teacher t: {facts['pixels_changed']} of 10 images do not decode to the pixels that it saw ("
    )
    assert "other pixels from the same file" in fault
    assert "here are pillow " in fault
    assert "(was 1.0)" in fault
    assert "made by" not in fault
    assert "install the versions that wrote the store" in fault
    (root / ABOUT).write_bytes(about.canonical())
    assert "all versions are as they were, so a library was built otherwise" in look(root, 40)["faults"][0]


def test_other_files_are_named(root: Path, images: Path) -> None:
    victim, other = sorted(images.rglob("*.png"))[:2]
    shutil.copy(other, victim)
    found = look(root, 80)
    assert found["teachers"]["t"]["sources_changed"] == 2
    (fault,) = found["faults"]
    assert "2 of 80 rows have another source than was recorded, or one that cannot be read (" in fault
    assert f"{victim.relative_to(images)}: the image changed since its view was recorded" in fault
    assert "name where they are: --data DATA" in fault
    moved = images.rename(images.with_name("moved"))
    with pytest.raises(InputNotFound, match=r"if the data set has moved, name it: --data DATA"):
        look(root)
    assert look(root, 80, data=str(moved))["teachers"]["t"]["sources_changed"] == 2


def test_samples_that_the_store_keeps_are_opened(root: Path, images: Path, tiny: str) -> None:
    extract(str(images), store=root, teachers=[f"t={tiny}"], num_views=2, pixels="source", **COMMON)
    shutil.rmtree(images)
    assert look(root)["faults"] == []


def test_a_store_of_an_earlier_version_has_no_digests(tmp_path: Path) -> None:
    """Its sources are compared, and it is said."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format1.zip") as archive:
        archive.extractall(tmp_path)
    found = look(tmp_path / "store.hdc", 8, data=f"npz:{tmp_path / 'images.npz'}")
    assert found["faults"] == []
    assert {name: facts["pixels_compared"] for name, facts in found["teachers"].items()} == {"normed": 0, "plain": 0}
    assert found["notes"][1] == (
        "teacher plain: no pixel digests in 1 view (0), which an earlier version of hdcache wrote; only the sources of these rows "
        "were compared"
    )
    assert found["notes"][1] in format_replay(found)


def test_rows_are_spread_and_repeatable(root: Path) -> None:
    store = Store.open(root)
    manifests = {view: TeacherReader(store, "t").manifest(view) for view in (0, 1)}
    ten = draw_rows(store, manifests, 10, 0, "x")
    assert len({(place.view, place.row // 8) for place in ten}) == 10
    assert draw_rows(store, manifests, 10, 0, "x") == ten == sorted(ten)
    assert draw_rows(store, manifests, 10, 1, "x") != ten
    assert len(draw_rows(store, manifests, 1000, 0, "x")) == len(set(draw_rows(store, manifests, 1000, 0, "x"))) == 80
    first = draw_rows(store, manifests, 20, 0, "x", first=lambda place: place in (2, 5))
    assert {place.row % 8 for place in first} == {2, 5}
    failed = {
        view: found.model_copy(update={"failed": dict.fromkeys(range(16), "x")}) for view, found in manifests.items()
    }
    assert {place.row for place in draw_rows(store, failed, 48, 0, "x")} == set(range(16, 40))
    assert len(draw_rows(store, failed, 6, 0, "x")) == 6
    with pytest.raises(UsageError, match=r"0 rows are no sample; ask for at least 1"):
        draw_rows(store, manifests, 0, "x")


def test_geometry_that_is_lost_is_said(root: Path) -> None:
    (root / "views/0/receipts/2.json").unlink()
    with pytest.raises(StoreCorrupt, match=r"row \d+ is stored but its geometry is not; run 'hdcache repair"):
        look(root, 80)

"""Digests of pixels: of one row in 32, in views that begin with them, and in no others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdcache.arrays import ArrayReader
from hdcache.datasets import open_dataset
from hdcache.extract.pixel_digests import EVERY, PIXEL_DIGESTS, keeps_digests, pixel_digests
from hdcache.extract.run import extract
from hdcache.geometry import read_geometry
from hdcache.integrity import verify
from hdcache.reader import TeacherReader
from hdcache.samples import open_sample
from hdcache.store import Store

COMMON: dict[str, Any] = {"taps": ["final"], "precision": "fp32", "batch": 8, "threads": 2, "device": "cpu"}


def test_of_every_thirty_second_row_that_could_be_read() -> None:
    pixels = [np.full((3, 4, 4), row, np.uint8) for row in range(70)]
    found = pixel_digests([None if row == 32 else value for row, value in enumerate(pixels)])
    assert found.shape == (70, 32)
    assert np.flatnonzero(found.any(1)).tolist() == [0, 64]
    expected = hashlib.sha256(b"|u1 (3, 4, 4)\n" + pixels[64].tobytes()).digest()
    assert found[64].tobytes() == expected
    assert pixel_digests([]).shape == (0, 32)


@pytest.mark.parametrize("shard", [8, 40])
def test_they_are_those_of_what_the_teacher_saw(
    shard: int, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    data = make_npz(tmp_path / "d.npz", 40)
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], num_views=2, rows_per_shard=shard, **COMMON)
    store = Store.open(tmp_path / "s")
    reader, dataset, size = TeacherReader(store, "t"), open_dataset(data), store.card.rows_per_shard
    for view in (0, 1):
        key, objects = f"teachers/t/views/{view}/{PIXEL_DIGESTS}", reader.manifest(view).objects
        stored = ArrayReader(store.path, key, (40, 32), "uint8", objects, size).rows(0, 40)
        geometry, digests = read_geometry(store, view)
        for row in range(40):
            recorded = (geometry[row], digests[row].tobytes())
            opened = open_sample(dataset, store.ids[geometry[row][0]], store.card.views, view, recorded)
            expected = pixel_digests([opened.pixels(reader.record.card.preprocessing)])[0]
            assert np.array_equal(stored[row], expected if row % size % EVERY == 0 else np.zeros(32))


def test_a_view_that_was_begun_without_stays_without(tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    """Whatever is left of it; a new view beside it has them."""
    extract(make_npz(tmp_path / "d.npz", 24), store=tmp_path / "s", teachers=[f"t={tiny}"], rows_per_shard=8, **COMMON)
    folder = tmp_path / "s/teachers/t/views/0"
    assert keeps_digests(folder)
    (folder / "pixels/digest/zarr.json").unlink()
    assert keeps_digests(folder), "its receipts say so"
    shutil.rmtree(folder / "pixels")
    for path in folder.glob("receipts/*.json"):
        receipt = json.loads(path.read_text())
        receipt["objects"] = {key: value for key, value in receipt["objects"].items() if not key.startswith("pixels/")}
        del receipt["check"]
        path.write_text(json.dumps(receipt))
    (folder / "manifest.json").unlink()
    (folder / "receipts/1.json").unlink()
    extract(store=tmp_path / "s", teachers=[f"t={tiny}"], num_views=2, **COMMON)
    assert not keeps_digests(folder)
    reader = TeacherReader(Store.open(tmp_path / "s"), "t")
    assert not any(PIXEL_DIGESTS in key for key in reader.manifest(0).objects)
    assert any(PIXEL_DIGESTS in key for key in reader.manifest(1).objects)
    assert verify(Store.open(tmp_path / "s")).good
    shutil.rmtree(folder / "receipts")
    assert not keeps_digests(folder)
    shutil.rmtree(folder)
    assert keeps_digests(folder)

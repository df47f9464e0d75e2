"""A store at a URL is read as if it lay here; what arrives is proven, once fetched it is not fetched again."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hdcache.api import open_store as open_api
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.durable import durable_write
from hdcache.errors import InputNotFound, StoreCorrupt, Unreachable, UsageError
from hdcache.extract.run import extract
from hdcache.index import HELD, Held, write_index
from hdcache.info import describe_store
from hdcache.ledgers import teacher_ledger
from hdcache.object_files import ObjectFiles
from hdcache.packed import packed_dataset
from hdcache.schema import StoredObject
from hdcache.sharing import objects, streaming
from hdcache.sharing.folder import Folder
from hdcache.sharing.places import open_place
from hdcache.sharing.streaming import StreamedFiles, open_store, warn_of_small_cache
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from hdcache.stored_rows import StoredRows
from hdcache.target_sources import open_targets
from travelling import SECRET, bucket_server, web_server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the objects that were asked of a place, in order."""
    keys: list[str] = []
    real = Folder.parts

    def parts(self: Folder, key: str, listed: StoredObject) -> Iterator[bytes]:
        keys.append(key)
        return real(self, key, listed)

    monkeypatch.setattr(Folder, "parts", parts)
    return keys


def url(root: Path) -> str:
    return f"file://{root}"


def same(one: Store, other: Store) -> None:
    assert one.ids == other.ids
    assert np.array_equal(one.labels, other.labels)
    mine, theirs = StoredRows(one, "t"), StoredRows(other, "t")
    for tap, card in mine.record.taps.items():
        for name, value in mine.rows(0, tap, 0, 20).items():
            assert np.array_equal(value, theirs.rows(0, tap, 0, 20)[name])
            into = [np.empty(card.arrays[name].shape, card.arrays[name].dtype) for _ in range(20)]
            theirs.copy_rows(0, f"{tap}/{name}", 0, 20, into)
            assert np.array_equal(value, np.stack(into))


def test_it_reads_as_the_store_itself(sealed_store: Path, fetched: list[str]) -> None:
    store, far = Store.open(sealed_store), open_store(url(sealed_store))
    same(store, far)
    assert far.files.where == str(sealed_store)
    first = len(fetched)
    same(store, open_store(url(sealed_store)))
    assert not [key for key in fetched[first:] if "/c." in key], "objects come from the cache"
    facts = describe_store(far) | {"path": ""}
    assert facts == describe_store(store) | {"path": ""}


def test_nothing_is_fetched_before_it_is_read(sealed_store: Path, fetched: list[str]) -> None:
    far = open_store(url(sealed_store))
    assert not [key for key in fetched if "/c." in key]
    StoredRows(far, "t").rows(0, "final", 0, 3)
    objects = sorted(key for key in fetched if "/c." in key)
    assert objects == [f"teachers/t/views/0/final/{name}/c.0.0.0" for name in ("prefix", "values")]


def test_what_will_be_read_is_fetched_meanwhile(sealed_store: Path, fetched: list[str]) -> None:
    far = open_store(url(sealed_store))
    rows = StoredRows(far, "t")
    for _ in range(3):
        rows.expect_rows(0, "final/values", 0, 20)
    into = [np.empty((9, 6), np.float32) for _ in range(20)]
    rows.copy_rows(0, "final/values", 0, 20, into)
    objects = [key for key in fetched if "/c." in key]
    assert sorted(objects) == [f"teachers/t/views/0/final/values/c.{shard}.0.0" for shard in range(3)]


@pytest.mark.parametrize("damage", ["flip", "swap", "short", "gone"])
def test_a_damaged_object_is_refused_and_not_kept(sealed_store: Path, cache: Path, damage: str) -> None:
    folder = sealed_store / "teachers/t/views/0/final/values"
    path = folder / "c.1.0.0"
    whole = path.read_bytes()
    far = StoredRows(open_store(url(sealed_store)), "t")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"flip": bytes([whole[0] ^ 1]) + whole[1:], "swap": (folder / "c.0.0.0").read_bytes(), "short": whole[:-1]}[
                damage
            ]
        )
    with pytest.raises(
        StoreCorrupt, match=r"final/values/c\.1\.0\.0: (sha256|missing|\d+ bytes).*nothing of it was kept"
    ):
        far.rows(0, "final", 8, 16)
    far.expect_rows(0, "final/values", 8, 16)
    with pytest.raises(StoreCorrupt, match=r"c\.1\.0\.0"):
        far.copy_rows(0, "final/values", 8, 9, [np.empty((9, 6), np.float32)])
    if damage in ("flip", "short"):
        assert not [held for held in cache.rglob("*") if held.is_file() and held.read_bytes() == path.read_bytes()]
    path.write_bytes(whole)
    assert len(far.rows(0, "final", 8, 16)["values"]) == 8


def test_new_views_are_seen_and_old_records_forgotten(
    sealed_store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(sealed_store)
    write_index(store)
    assert open_store(url(sealed_store)).views("t") == [0]
    seal = (sealed_store / "teachers/t/views/0/manifest.json").read_bytes()
    teacher_ledger(store, "t", 0).unseal()
    write_index(store)
    assert open_store(url(sealed_store)).views("t") == []
    durable_write(sealed_store / "teachers/t/views/0/manifest.json", seal)
    write_index(store)
    assert open_store(url(sealed_store)).views("t") == [0]
    assert len([path for path in (cache / "stores").iterdir() if path.is_dir()]) == 2
    monkeypatch.setattr(streaming, "_FORGOTTEN", -1)
    (sealed_store / "teachers/t" / HELD).write_bytes(Held(taps=("final",)).canonical())
    assert list(StoredRows(open_store(url(sealed_store)), "t").record.taps) == ["final"]
    assert len([path for path in (cache / "stores").iterdir() if path.is_dir()]) == 1


def test_records_that_a_kill_cut_short_are_copied_again(sealed_store: Path, cache: Path) -> None:
    open_store(url(sealed_store))
    (folder,) = (path for path in (cache / "stores").iterdir() if path.is_dir())
    (folder / "zarr.json").unlink()
    (folder / "teachers/t/zarr.json").write_text("cut")
    same(Store.open(sealed_store), open_store(url(sealed_store)))


@pytest.mark.parametrize(
    "damage",
    [
        "views/0/manifest.json",
        "teachers/t/views/0/manifest.json",
        "teachers/t",
        "teachers/t/views/0/final/values/zarr.json",
    ],
)
def test_records_that_a_cleaner_took_are_copied_again(sealed_store: Path, cache: Path, damage: str) -> None:
    open_store(url(sealed_store))
    (folder,) = (path for path in (cache / "stores").iterdir() if path.is_dir())
    if (folder / damage).is_dir():
        shutil.rmtree(folder / damage)
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes().replace(b"0", b"1"))
    same(Store.open(sealed_store), open_store(url(sealed_store)))
    (folder / "teachers/t" / HELD).write_bytes(Held(taps=("final",)).canonical())
    same(Store.open(sealed_store), open_store(url(sealed_store)))


def test_a_place_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="no store there"):
        open_store(f"file://{tmp_path}/nothing")


def test_a_folder_is_opened_where_it_lies(sealed_store: Path) -> None:
    for where in (sealed_store, str(sealed_store)):
        found = open_store(where)
        assert found.path == sealed_store
        assert type(found.files) is ObjectFiles
    assert isinstance(open_api(url(sealed_store)).store.files, StreamedFiles)


def test_extraction_names_the_way_to_a_url() -> None:
    with pytest.raises(
        UsageError, match=r"extraction writes to a folder of this machine; .*hdcache push FOLDER s3://b/s"
    ):
        extract("x", store="s3://b/s", teachers=["t=m"])


def test_a_cache_that_is_too_small_is_said(tiny_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    for size, said in (("1GB", 0), ("1KB", 1)):
        far = open_store(url(tiny_store), cache_size=size)
        stored, _ = open_targets(far, {"t": ["final"]})
        with caplog.at_level(logging.WARNING):
            warn_of_small_cache(stored, 0)
        assert caplog.text.count("objects are fetched several times in each epoch; raise --cache-size") == said


def test_kept_samples_are_streamed_too(
    tmp_path: Path, make_folder: Callable[..., Path], tiny: str, cache: Path
) -> None:
    data = make_folder(tmp_path / "d")
    extract(
        str(data), store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], pixels="source", rows_per_shard=8,
        precision="fp32", device="cpu",
    )  # fmt: skip
    near, far = packed_dataset(Store.open(tmp_path / "s")), packed_dataset(open_store(url(tmp_path / "s")))
    assert near is not None
    assert far is not None
    assert [near.read(name) for name in near.ids] == [far.read(name) for name in far.ids]


def test_batches_of_a_streamed_store_are_those_of_the_store(tiny_store: Path) -> None:
    """Images, targets, order and views: an epoch of each, bit for bit, through a cache that holds a part of it."""
    data = f"npz:{tiny_store.parent / 'data.npz'}"
    near, far = (
        open_api(where, **more).loader({"t": ["final", "block3.rel.qk"]}, batch_size=8, size=32, data=data)
        for where, more in ((tiny_store, {}), (url(tiny_store), {"cache_size": "50KB"}))
    )
    for _ in range(2):
        for one, other in zip(near, far, strict=True):
            assert one.ids == other.ids
            assert torch.equal(one.images, other.images)
            for name in ("final", "block3.rel.qk"):
                mine, theirs = one.targets["t"][name], other.targets["t"][name]
                if isinstance(mine, torch.Tensor):
                    assert torch.equal(mine, theirs)
                else:
                    assert torch.equal(mine.patches, theirs.patches)
                    assert torch.equal(mine.prefix, theirs.prefix)


# Over the network


FAULTS = ["404", "403", "429", "500", "503", "cut", "cutnorange", "html", "flip", "short", "long", "norange", "slow"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_asked_again_or_named(
    sealed_store: Path, fault: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """What is read is right, or one error says what was wrong; the cache holds nothing else."""
    pytest.importorskip("obstore")
    monkeypatch.setattr(objects, "WAITS", (0.0, 0.0, 0.0))
    store = Store.open(sealed_store)
    write_index(store)
    key = "teachers/t/views/0/final/values/c.1.0.0"
    with web_server(sealed_store) as server:
        far = StoredRows(open_store(server.url), "t")
        near = StoredRows(store, "t").rows(0, "final", 8, 16)["values"]
        passing = {"429", "500", "503", "cut", "cutnorange", "norange", "slow"}
        for times, right in ((1, passing), (50, {"norange", "slow"})):
            server.faults, said = {key: [fault] * times}, ""
            try:
                assert np.array_equal(far.rows(0, "final", 8, 16)["values"], near)
            except (StoreCorrupt, Unreachable) as error:
                said = str(error)
            assert not said or key in said
            assert not (said and fault in right)
            shutil.rmtree(cache / "objects")
        server.faults = {}
        assert np.array_equal(far.rows(0, "final", 8, 16)["values"], near)
    kept = [path for path in (cache / "objects").glob("??/*") if not path.name.startswith(".")]
    assert kept
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in kept)
    # What was fetched is served without the server.
    assert np.array_equal(far.rows(0, "final", 8, 16)["values"], near)


def test_a_student_learns_from_a_bucket_what_it_learns_from_the_folder(
    tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"npz:{tiny_store.parent / 'data.npz'}"
    with bucket_server(monkeypatch):
        copy_store(open_place(tiny_store), open_place("s3://team/store"), quiet=True)
        results = [
            distill(small_recipe(), out=tmp_path / name, store=where, data=data, device="cpu", threads=2, **more)
            for name, where, more in (
                ("near", tiny_store, {}), ("far", "s3://team/store", {"cache_size": "1MB"})
            )
        ]  # fmt: skip
    assert results[1]["store"] == "s3://team/store"
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("near", "far")]
    assert weights[0] == weights[1]
    for path in (tmp_path / "far").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_cache_size_without_a_url_is_refused(
    tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(UsageError, match="--cache-size is for a --store at a URL; leave it out"):
        distill(small_recipe(), out=tmp_path / "x", store=tiny_store, cache_size="1GB")


def test_a_whole_check_of_a_store_at_a_url_names_the_way(sealed_store: Path) -> None:
    with pytest.raises(UsageError, match=r"its objects are proven as they are read; .* hdcache pull"):
        open_api(url(sealed_store)).verify()

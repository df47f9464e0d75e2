"""The samples that a store keeps: every sample comes back as its data set gave it, and nothing damaged ever does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hdcache.arrays import ShardWriter
from hdcache.datasets import Dataset, open_dataset, store_dataset
from hdcache.errors import InputNotFound, StoreCorrupt, UnreadableImage
from hdcache.extract.packing import pack
from hdcache.packed import _unpacked, bytes_key, packed, packed_dataset, packed_order, pixels_ledger
from hdcache.pixels import digest
from hdcache.schema import ArrayCard, Receipt, StoreCard, StoredObject, ViewSpec
from hdcache.shards import Codec
from hdcache.store import Store

COUNT = 20


def empty_store(data: Path, path: Path) -> tuple[Dataset, Store]:
    """A folder of images, and a store of them in shards of 8 that holds nothing yet."""
    dataset = open_dataset(str(data))
    card = StoreCard(dataset=dataset.card, views=ViewSpec(seed=3), rows_per_shard=8, rows_per_chunk=8)
    return dataset, Store.create(path, card, dataset.ids, dataset.labels)


@pytest.fixture
def kept(tmp_path: Path, make_folder: Callable[..., Path]) -> Store:
    """The 20 images of ``tmp_path/d`` in shards of 8, kept by a store without teachers."""
    root = make_folder(tmp_path / "d", COUNT)
    dataset, store = empty_store(root, tmp_path / "s")
    pack(store, dataset, threads=2)
    return store


def tampered(store: Store, shard: int, index: list[list[int]]) -> None:
    """Other numbers in the index of a shard, listed with their right sizes and sha256: as an attacker would."""
    ledger = pixels_ledger(store)
    writer = ShardWriter(COUNT, ArrayCard(shape=(2,), dtype="int64"), 8, 8, codec=Codec(), attributes={})
    data = writer.encode(shard, np.array(index, np.int64))
    key = f"index/c.{shard}.0"
    (ledger.folder / key).write_bytes(data)
    manifest = ledger.manifest()
    entry = StoredObject(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    changed = manifest.model_copy(update={"objects": manifest.objects | {f"{ledger.key}/{key}": entry}})
    (ledger.folder / "manifest.json").write_bytes(changed.canonical())


IMAGES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9).flatmap(
    lambda shape: st.sampled_from([shape, (*shape, 1), (*shape, 3), (*shape, 4)])
)


@given(st.one_of(st.binary(), IMAGES.flatmap(lambda shape: arrays.arrays(np.uint8, shape))))
def test_what_is_stored_of_a_sample_gives_it_back(source: bytes | np.ndarray) -> None:
    """To the byte and to the shape, so that its sha256 is the same too."""
    data, form = packed(source)
    found = _unpacked(data, form)
    assert isinstance(found, type(source))
    assert digest(found) == digest(source)


def test_an_array_that_is_no_image_is_not_kept() -> None:
    with pytest.raises(UnreadableImage, match=r"array float64 \[2, 2\]; expected uint8"):
        packed(np.zeros((2, 2)))  # type: ignore[arg-type]  # what a broken data set may give


def test_every_sample_is_the_one_of_the_data_set(kept: Store, tmp_path: Path) -> None:
    whole, own = open_dataset(str(tmp_path / "d")), store_dataset(kept)
    assert own.card == whole.card.model_copy(update={"spec": f"store:{tmp_path}/s"})
    assert own.ids == whole.ids
    assert own.labels.tolist() == whole.labels.tolist()
    assert [own.read(name) for name in own.ids] == [whole.read(name) for name in whole.ids]
    named = open_dataset(f"store:{tmp_path}/s")
    assert (named.card, named.ids) == (own.card, own.ids)
    assert store_dataset(kept, str(tmp_path / "d")).card == whole.card
    with pytest.raises(InputNotFound, match=r"no sample 'a/zz\.png'"):
        own.read("a/zz.png")


def test_classes_of_another_data_set_renumber_the_labels(kept: Store, tmp_path: Path) -> None:
    found = open_dataset(f"store:{tmp_path}/s", classes=["z", "b"])
    assert found.card.classes == ("z", "b", "a")
    whole = open_dataset(str(tmp_path / "d"), classes=["z", "b"])
    assert found.labels.tolist() == whole.labels.tolist()


def test_plain_zarr_and_tensorstore_read_the_bytes(kept: Store, tmp_path: Path) -> None:
    """In the order of view 0's rows, at the places that the index says."""
    tensorstore = pytest.importorskip("tensorstore")
    whole, order = open_dataset(str(tmp_path / "d")), packed_order(kept)
    group = zarr.open_group(str(kept.path / "samples/pixels"), mode="r")
    index = np.asarray(group["index"])
    for shard in range(3):
        rows = range(8 * shard, min(COUNT, 8 * shard + 8))
        expected = b"".join(bytes(whole.read(kept.ids[order[row]])) for row in rows)
        assert np.asarray(group[f"bytes/{shard}"]).tobytes() == expected
        where = {"driver": "file", "path": str(kept.path / f"samples/pixels/bytes/{shard}")}
        found = tensorstore.open({"driver": "zarr3", "kvstore": where}).result()
        assert found[...].read().result().tobytes() == expected
        assert index[rows, 0].sum() == len(expected)
        assert (kept.path / "samples/pixels" / bytes_key(shard)).read_bytes() == expected
    assert group["index"].attrs["hdcache"]["columns"] == ["bytes", "form"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index[0].__setitem__(0, -1), "does not fit its bytes"),
        (lambda index: index[0].__setitem__(0, 2**62), "does not fit its bytes"),
        (lambda index: index[3].__setitem__(0, index[3][0] + 1), "does not fit its bytes"),
        (lambda index: index[2].__setitem__(1, 9), "does not fit its bytes"),
        (lambda index: index[2].__setitem__(1, 1), "is a PNG of mode RGB, expected L"),
        (
            lambda index: (
                index[0].__setitem__(0, index[0][0] + 1),
                index[1].__setitem__(0, index[1][0] - 1),
            ),
            "are not those that were stored",
        ),
    ],
)
def test_lengths_and_forms_of_a_hostile_index_are_refused(
    kept: Store, change: Callable[[list[list[int]]], object], message: str
) -> None:
    index = np.asarray(zarr.open_array(str(kept.path / "samples/pixels/index"), mode="r")[:8]).tolist()
    change(index)
    tampered(kept, 0, index)
    own, order = store_dataset(kept), packed_order(kept)
    with pytest.raises(StoreCorrupt, match=message):
        [own.read(kept.ids[order[row]]) for row in range(8)]


def test_damaged_bytes_name_the_object_and_the_others_are_still_read(kept: Store) -> None:
    order = packed_order(kept)
    path = kept.path / "samples/pixels" / bytes_key(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    own = store_dataset(kept)
    with pytest.raises(StoreCorrupt, match=r"pixels/bytes/1/c\.0: bytes \d+ to \d+ \(row 15\) are not those"):
        own.read(kept.ids[order[15]])
    assert own.read(kept.ids[order[14]])
    path.write_bytes(data[:-40])
    with pytest.raises(StoreCorrupt, match=r"pixels/bytes/1/c\.0: \d+ bytes, expected \d+; copy the store again"):
        store_dataset(kept).read(kept.ids[order[15]])
    with pytest.raises(StoreCorrupt, match=r"pixels/bytes/1/c\.0: \d+ bytes, expected \d+; copy the store again"):
        own.read(kept.ids[order[15]])
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreCorrupt, match=r"pixels/bytes/1/c\.0: \d+ bytes, expected \d+; copy the store again"):
        own.read(kept.ids[order[15]])
    path.rmdir()
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="are not those that were stored"):
        store_dataset(kept).read(kept.ids[order[15]])
    path.unlink()
    with pytest.raises(StoreCorrupt, match=r"missing, expected .* copy the store again"):
        store_dataset(kept).read(kept.ids[order[15]])


def test_a_store_without_samples_says_how_to_add_them(kept: Store, tmp_path: Path) -> None:
    (kept.path / "samples/pixels/manifest.json").unlink()
    with pytest.raises(
        StoreCorrupt, match=r"samples/pixels/manifest\.json: missing, though it was there when index\.json was written"
    ):
        packed_dataset(kept)
    (kept.path / "index.json").unlink()
    assert packed_dataset(kept) is None
    with pytest.raises(InputNotFound, match=r"does not keep its samples.*hdcache extract --store .* --pixels source"):
        open_dataset(f"store:{kept.path}")
    with pytest.raises(InputNotFound, match="no store there"):
        open_dataset(f"store:{tmp_path}/nowhere")
    assert store_dataset(kept).card.spec == f"folder:{tmp_path}/d"


def test_a_seal_for_other_samples_is_refused(kept: Store) -> None:
    path = kept.path / "samples/pixels/manifest.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"rows": COUNT + 1, "check": ""}))
    with pytest.raises(StoreCorrupt, match="does not fit the samples of the store"):
        packed_dataset(kept)


def test_a_sample_that_could_not_be_read_keeps_its_reason(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", COUNT)
    dataset, store = empty_store(root, tmp_path / "s")
    (root / "a/04.png").unlink()
    (root / "b/05.png").write_bytes(b"")
    own = pack(store, dataset, threads=1)
    assert pixels_ledger(store).manifest().failed
    with pytest.raises(UnreadableImage, match=r"^a/04.png: cannot be read: No such file or directory$"):
        own.read("a/04.png")
    assert own.read("b/05.png") == b"", "an empty file is what the data set gives, and not yet an error"


def test_one_shard_may_hold_no_bytes_at_all(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", 4)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    dataset, store = empty_store(root, tmp_path / "s")
    own = pack(store, dataset, threads=1)
    assert [own.read(name) for name in own.ids] == [b""] * 4
    assert np.asarray(zarr.open_array(str(tmp_path / "s/samples/pixels/bytes/0"), mode="r")).shape == (0,)


def test_a_copied_store_is_read_where_it_is(kept: Store, tmp_path: Path) -> None:
    shutil.copytree(kept.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "d")
    shutil.rmtree(kept.path)
    own = store_dataset(Store.open(tmp_path / "copy"))
    assert own.card.spec == f"store:{tmp_path}/copy"
    assert len({own.read(name) for name in own.ids}) == COUNT


def test_receipts_alone_do_not_make_samples(kept: Store) -> None:
    ledger = pixels_ledger(kept)
    receipts = [ledger.receipt(shard) for shard in range(3)]
    assert [receipt.rows for receipt in receipts if isinstance(receipt, Receipt)] == [(0, 8), (8, 16), (16, 20)]
    ledger.unseal()
    (kept.path / "index.json").unlink()
    assert packed_dataset(kept) is None

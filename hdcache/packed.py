"""The samples that a store keeps itself: the bytes that its data set gave, read one sample at a time.

::

    samples/pixels/index    int64 [samples, 2]: bytes of each sample; its form, 0 for a file as it was, else an array's
    samples/pixels/digest   uint8 [samples, 32]: sha256 of these bytes
    samples/pixels/bytes/N  uint8 [bytes of shard N]: its samples, one after the other, in one chunk without any codec

Row r is the sample of row r of view 0, whose epochs read the file from end to end. Reading a sample is one ranged read of
its shard's only object, held to its own sha256: compressed images would not shrink further. Arrays are kept as PNG and come
back as they were, so that a sample, its sha256 and all that was made of it are the same from the store and from the data
set. No torch here.
"""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.arrays import ArrayReader, ShardWriter
from hdcache.dataset_rows import Listed
from hdcache.dataset_specs import Spec
from hdcache.errors import StoreCorrupt, UnreadableImage
from hdcache.index import check_seal
from hdcache.ledgers import Ledger
from hdcache.pixels import Proven, Source, check_array
from hdcache.records import canonical_json
from hdcache.schema import ArrayCard, StoredObject
from hdcache.shards import Codec
from hdcache.store import PIXELS, Store
from hdcache.views import row_order

INDEX, DIGEST, BYTES = (f"{PIXELS}/{name}" for name in ("index", "digest", "bytes"))
COLUMNS = ("bytes", "form")
_FILE, _GREY, _GREY_CHANNEL = 0, 1, 2
_MODES = {_GREY: "L", _GREY_CHANNEL: "L", 3: "RGB", 4: "RGBA"}
"""Form -> Pillow's mode of an array's PNG: [H, W], [H, W, 1], [H, W, 3], [H, W, 4]."""


def pixels_ledger(store: Store) -> Ledger:
    """The ledger of a store's own samples."""
    return Ledger(store.path, PIXELS)


def packed_order(store: Store) -> NDArray[np.int64]:
    """int64 [samples]: which sample each row holds."""
    return row_order(store.card.dataset.count, store.card.views.seed, 0)


def bytes_key(shard: int) -> str:
    """Key of the object that holds a shard's bytes, relative to the ledger's folder."""
    return f"bytes/{shard}/c.0"


def bytes_metadata(count: int) -> bytes:
    """``zarr.json`` of ``count`` bytes whose one chunk is the file itself."""
    return canonical_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [count],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, count)]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes"}],
            "fill_value": 0,
            "attributes": {},
        }
    )


def array_writers(store: Store) -> dict[str, ShardWriter]:
    """Of :data:`INDEX` and :data:`DIGEST`, by key."""
    count, shard = store.card.dataset.count, store.card.rows_per_shard
    named = {"hdcache": {"columns": list(COLUMNS)}}
    found = {
        INDEX: ShardWriter(count, ArrayCard(shape=(2,), dtype="int64"), shard, shard, codec=Codec(), attributes=named),
        DIGEST: ShardWriter(count, ArrayCard(shape=(32,), dtype="uint8"), shard, shard, codec=None, attributes={}),
    }
    for key, writer in found.items():
        writer.follow(store.path / key / "zarr.json")
    return found


def packed(source: Source) -> tuple[bytes, int]:
    """What is stored of a sample, and its form; :class:`UnreadableImage` for an array that is no image."""
    if isinstance(source, bytes):
        return source, _FILE
    check_array(source)
    form = _GREY if source.ndim == 2 else _GREY_CHANNEL if source.shape[2] == 1 else source.shape[2]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(source[..., 0] if form == _GREY_CHANNEL else source)).save(file, "PNG")
    return file.getvalue(), form


def _unpacked(data: bytes, form: int) -> Source:
    """The sample that :func:`packed` made ``data`` of; ValueError where it cannot have."""
    if form == _FILE:
        return data
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.array(image)
            found = image.mode
    except Exception as error:  # Pillow's decoders raise nearly every class of exception on bad bytes.
        raise ValueError(f"not the PNG of an array ({type(error).__name__})") from None
    if found != _MODES[form]:
        raise ValueError(f"a PNG of mode {found}, expected {_MODES[form]}")
    return pixels[..., None] if form == _GREY_CHANNEL else pixels


class _Shard(NamedTuple):
    """Where the samples of one shard lie."""

    ends: NDArray[np.int64]
    forms: NDArray[np.int64]
    digests: NDArray[np.uint8]


class Packed:
    """Reads samples by row. A shard's index is read with its first sample, and kept."""

    def __init__(self, store: Store, objects: Mapping[str, StoredObject], failed: Mapping[int, str]) -> None:
        """``objects`` and ``failed`` are those of a manifest, or of receipts, with keys relative to the store's root."""
        self._root, self._files, self._objects, self._failed = store.path, store.files, objects, failed
        self._rows, self._size = store.card.dataset.count, store.card.rows_per_shard
        self._index, self._digest = (
            ArrayReader(store.files, key, (self._rows, width), dtype, objects, self._size)
            for key, width, dtype in ((INDEX, len(COLUMNS), "int64"), (DIGEST, 32, "uint8"))
        )
        self._shards: dict[int, _Shard] = {}

    def read(self, row: int) -> Source:
        """The sample of a row.

        Raises
        ------
        UnreadableImage
            with the recorded reason, when the data set could not give it.
        StoreCorrupt
            when its bytes are not those that were stored.
        """
        if row in self._failed:
            raise UnreadableImage(self._failed[row])
        number, place = divmod(int(row), self._size)
        if number not in self._shards:
            self._shards[number] = self._open(number)
        shard = self._shards[number]
        start, stop = int(shard.ends[place - 1]) if place else 0, int(shard.ends[place])
        path = self._root / PIXELS / bytes_key(number)
        key = f"{PIXELS}/{bytes_key(number)}"
        try:
            with self._files.unproved(key, self._objects.get(key)) as file:
                data = Proven(_range(file.fileno(), start, stop))
        except OSError as error:
            raise StoreCorrupt(f"{path}: cannot be read ({error.strerror}); check the disk and permissions") from None
        data.sha256 = shard.digests[place].tobytes()
        if hashlib.sha256(data).digest() != data.sha256:
            raise StoreCorrupt(
                f"{path}: bytes {start} to {stop} (row {row}) are not those that were stored; run 'hdcache verify' to list "
                "the damaged objects, then copy the store again"
            )
        try:
            return _unpacked(data, int(shard.forms[place]))
        except ValueError as error:
            raise StoreCorrupt(f"{path}: row {row} is {error}; copy the store again") from None

    def digest(self, row: int) -> bytes:
        """sha256 of the stored bytes of a row."""
        return self._digest.rows(row, row + 1).tobytes()

    def _open(self, number: int) -> _Shard:
        start = number * self._size
        stop = min(start + self._size, self._rows)
        sizes, forms = self._index.rows(start, stop).astype(np.int64).T
        listed = self._objects.get(f"{PIXELS}/{bytes_key(number)}")
        # Numbers of a store are untrusted: lengths that lie within the object cannot overflow their sum, which must fill it.
        sound = listed is not None and bool(((sizes >= 0) & (sizes <= listed.size)).all())
        if listed is None or not sound or int(sizes.sum()) != listed.size or not np.isin(forms, (_FILE, *_MODES)).all():
            raise StoreCorrupt(f"{self._root / INDEX}: shard {number} does not fit its bytes; copy the store again")
        return _Shard(np.cumsum(sizes), forms, self._digest.rows(start, stop).astype(np.uint8))


def _range(file: int, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)`` of an open file, as far as there are any."""
    parts = []
    while start < stop and (part := os.pread(file, stop - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def packed_dataset(store: Store) -> Listed | None:
    """The store's own samples as a data set with the store's ids, labels and fingerprint; None where it has not got them all.

    Raises
    ------
    StoreCorrupt
        where they are not the store's, or their seal is lost.
    """
    ledger, card = pixels_ledger(store), store.card.dataset
    if not ledger.sealed:
        check_seal(store, PIXELS)
        return None
    store.check_count()
    manifest = ledger.proved_manifest()
    if manifest.rows != card.count:
        raise StoreCorrupt(f"{ledger.folder}: does not fit the samples of the store; copy the store again")
    rows = np.empty(card.count, np.int64)
    rows[packed_order(store)] = np.arange(card.count)
    where = Spec("", "store", str(store.path.absolute()), {}).canonical()
    reader = Packed(store, manifest.objects, manifest.failed)
    places = array("q", rows.tobytes())
    return Listed(card.model_copy(update={"spec": where}), store.ids, store.labels, places, reader.read)

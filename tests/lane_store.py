"""One store, written and read in full by whatever versions are at hand: `make lanes` compares what several of them make of it.

    python tests/lane_store.py write FOLDER     the same bytes with every version of Python, NumPy and zarr
    python tests/lane_store.py check FOLDER     every row, by every way of reading that is installed; a JSON line of what read it

Rows go through hdcache's own writer, samples through its packer. No torch here, and no number that a version may change.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from hdcache.arrays import ArrayReader
from hdcache.errors import UnreadableImage
from hdcache.extract.packing import pack
from hdcache.extract.writer import Row, ViewWriter
from hdcache.geometry import read_geometry
from hdcache.integrity import verify
from hdcache.masks import draw_visible, pack_visible
from hdcache.packed import packed_dataset
from hdcache.row_arrays import MASK_ARRAY
from hdcache.schema import DatasetCard, MaskSpec, StoreCard
from hdcache.store import Store
from hdcache.stored_rows import StoredRows
from hdcache.views import draw, row_order
from small_store import IDS, ROWS, SHARD, TOKENS, WIDTH, Array, MadeTap, make_tap, numbers, store_card, write_record

VIEWS = 2
MASK = MaskSpec(kind="random", ratio=0.34, seed=5)
SEEN = 6
"""Patch tokens that the masked teacher sees: 9 less 34 %."""
LOST, FAILED = IDS[7], 5
"""A sample that cannot be read, and a row of the plain teacher's view 1 whose features were not finite."""
LABELS = np.arange(ROWS, dtype=np.int64) % 3 - 1
SIDES = (61, 47)
WEIGHTS = {
    f"block1/{name}": numbers("float32", *shape, key=name)
    for name, shape in (("qkv_weight", (3 * WIDTH, WIDTH)), ("qkv_bias", (3 * WIDTH,)))
}


class Samples:
    """A data set without files."""

    ids, labels = IDS, LABELS

    def __init__(self, card: DatasetCard) -> None:
        self.card = card

    def read(self, sample_id: str) -> bytes:
        if sample_id == LOST:
            raise UnreadableImage("cannot be read: it was never there")
        return sample_bytes(sample_id)


def sample_bytes(sample_id: str) -> bytes:
    return numbers("uint8", 100 + 7 * IDS.index(sample_id), key=sample_id).tobytes()


def taps_of(teacher: str, view: int) -> list[MadeTap]:
    """Every encoding, with and without a DCT and wide codes; the masked teacher's taps have the tokens that it sees."""
    if teacher == "masked":
        return [
            make_tap("final", "klt", view, tokens=SEEN, typesize=0),
            make_tap("block1.out", "fp32", view, tokens=SEEN),
        ]
    return [
        make_tap("block1.attn_in", "klt", view, wide=2, grid=(3, 3)),
        make_tap("block2.attn_in", "klt", view, block_bytes=0, typesize=0),
        make_tap("block1.out", "int8", view),
        make_tap("block2.out", "bf16", view),
        make_tap("block2.qkv", "fp16", view),
        make_tap("block2.rel.vv", "sqrt8", view),
        make_tap("final", "fp32", view),
        make_tap("pooled", "fp16", view),
        make_tap("logits", "topk", view),
    ]


@contextmanager
def few_taps() -> Iterator[None]:
    """For as long as this lasts, teachers have some taps only: for tests that read a store many times."""
    kept = ("block1.attn_in", "final", "logits", "pooled")
    whole = taps_of
    with mock.patch(
        f"{__name__}.taps_of", lambda teacher, view: [t for t in whole(teacher, view) if t.card.tap in kept]
    ):
        yield


def masks_of(card: StoreCard, view: int) -> Array:
    ids = [IDS[sample] for sample in row_order(ROWS, card.views.seed, view)]
    return pack_visible(draw_visible(MASK, ids, view, TOKENS), TOKENS)


def rows_of(card: StoreCard, view: int) -> list[Row]:
    """The rows of a view, drawn as every extraction draws them. One sample has none."""
    rows = []
    for sample in row_order(ROWS, card.views.seed, view).tolist():
        name = IDS[sample]
        if name == LOST:
            rows.append(Row(sample, None, reason=f"{name}: cannot be read"))
            continue
        box, flip = draw(card.views, name, view, *SIDES)
        pixels = np.zeros((3, 4, 4), np.uint8)
        rows.append(Row(sample, pixels, box, flip, SIDES, hashlib.sha256(sample_bytes(name)).digest()))
    return rows


def failed_rows(card: StoreCard, teacher: str, view: int) -> dict[int, str]:
    failed = {i: row.reason for i, row in enumerate(rows_of(card, view)) if row.reason}
    return failed | ({FAILED: "not finite"} if (teacher, view) == ("plain", 1) else {})


def write(root: Path) -> None:
    """Write the whole store: samples, two teachers, two views of each, sealed."""
    card = store_card(classes=("ä", "b"))
    store = Store.create(root, card, IDS, LABELS)
    pack(store, Samples(card.dataset), threads=2)
    for teacher in ("plain", "masked"):
        mask, weights = (MASK, None) if teacher == "masked" else (None, WEIGHTS)
        record = write_record(store, teacher, taps_of(teacher, 0), mask, weights)
        for view in range(VIEWS):
            taps = taps_of(teacher, view)
            parts = {tap.card.tap: tap.parts for tap in taps}
            if teacher == "masked":
                parts[MASK_ARRAY.split("/")[0]] = {MASK_ARRAY.split("/")[1]: masks_of(card, view)}
            # The writer looks at the cards of the encoders alone.
            encoders: Any = {tap.card.tap: SimpleNamespace(card=tap.card) for tap in taps}
            writer = ViewWriter(store, record, encoders, view)
            writer.open()
            rows, failed = rows_of(card, view), failed_rows(card, teacher, view)
            for shard in writer.todo():
                span = slice(shard * SHARD, (shard + 1) * SHARD)
                block = {tap: {name: part[span] for name, part in arrays.items()} for tap, arrays in parts.items()}
                here = {row: why for row, why in failed.items() if span.start <= row < span.stop}
                writer.write(shard, rows[span], block, here, saturated=shard)
            writer.seal()


def ways() -> list[str | None]:
    """How rows can be read here; None: as hdcache does by itself."""
    return [None, "zarr", *(["zarrs"] if importlib.util.find_spec("zarrs") else [])]


def same(found: Any, expected: Array, what: str) -> None:
    if found.dtype != expected.dtype or found.shape != expected.shape or found.tobytes() != expected.tobytes():
        raise SystemExit(f"{what}: other values than were written")


def stored(card: StoreCard) -> Iterator[tuple[str, int, str, Array]]:
    """Teacher, view, array and rows of all that teachers hold."""
    for teacher in ("plain", "masked"):
        for view in range(VIEWS):
            for tap in taps_of(teacher, view):
                for name, part in tap.parts.items():
                    yield teacher, view, f"{tap.card.tap}/{name}", part
            if teacher == "masked":
                yield teacher, view, MASK_ARRAY, masks_of(card, view)


def check(root: Path) -> dict[str, Any]:
    """Verify the store and compare every row, by each way of reading; what was compared."""
    store = Store.open(root)
    for quick in (True, False):
        found = verify(store, quick=quick)
        if found.faults or found.unsealed or found.unlisted:
            raise SystemExit(f"{root}: {[*found.faults, *found.unsealed, *found.unlisted]}")
    same(store.labels, LABELS, "labels")
    if store.ids != IDS:
        raise SystemExit("ids: others than were written")
    arrays = 0
    for way in ways():
        readers = {name: StoredRows(store, name, way) for name in ("plain", "masked")}
        for teacher, view, key, expected in stored(store.card):
            reader, (tap, name) = readers[teacher], key.split("/")
            what = f"{teacher}/{view}/{key} by {way or 'chunks'}"
            if key == MASK_ARRAY:
                same(reader.packed_masks(view, 0, ROWS), expected, what)
            else:
                same(reader.rows(view, tap, 0, ROWS)[name], expected, what)
            into = np.zeros_like(expected)
            reader.copy_rows(view, key, 0, ROWS, list(into))
            same(into, expected, what)
            if way is None and reader._array(view, tap, name)._layout is None:
                raise SystemExit(f"{what}: chunks are not read straight from the file")
            arrays += 1
        _check_views(store, readers, way)
        _check_constants(store, readers, way)
    _check_plain_zarr(root, store.card)
    _check_samples(store)
    versions = {name: version(name) for name in ("zarr", "numcodecs", "numpy", "zarrs") if _installed(name)}
    return {"python": platform.python_version(), **versions, "rows": ROWS, "arrays": arrays, "objects": found.objects}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _check_views(store: Store, readers: dict[str, StoredRows], way: str | None) -> None:
    for view in range(VIEWS):
        geometry, digests = read_geometry(store, view, way)
        rows = rows_of(store.card, view)
        same(geometry, np.array([row.geometry(8) for row in rows], np.int32), f"geometry of view {view}")
        hashes = b"".join(row.digest for row in rows)
        same(digests, np.frombuffer(hashes, np.uint8).reshape(-1, 32), f"digests of view {view}")
        for name, reader in readers.items():
            if reader.manifest(view).failed != failed_rows(store.card, name, view):
                raise SystemExit(f"{name}/{view}: other rows failed than were written")


def _check_constants(store: Store, readers: dict[str, StoredRows], way: str | None) -> None:
    for name, reader in readers.items():
        for tap in taps_of(name, 0):
            for key, value in tap.constants.items():
                where = f"encodings/{tap.card.tap}/{key}"
                array = ArrayReader(
                    store.teacher_path(name), where, value.shape, "float32", reader.record.objects, None, way
                )
                same(array.rows(0, len(value)), value, f"{name}/{where}")
    for key, value in WEIGHTS.items():
        same(StoredRows(store, "plain", way).weights[key], value, f"plain/weights/{key}")


def _check_plain_zarr(root: Path, card: StoreCard) -> None:
    """Without hdcache: what anybody reads who has zarr alone, and tensorstore where it is installed."""
    import zarr

    for teacher, view, key, expected in stored(card):
        where = f"teachers/{teacher}/views/{view}/{key}"
        same(np.asarray(zarr.open_array(root / where, mode="r")[...]), expected, f"{where} by zarr alone")
        if _installed("tensorstore"):
            import tensorstore

            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root / where}/"}}
            same(tensorstore.open(spec, read=True).result().read().result(), expected, f"{where} by tensorstore")


def _check_samples(store: Store) -> None:
    dataset = packed_dataset(store)
    if dataset is None:
        raise SystemExit("the store does not keep its samples")
    for name in IDS:
        try:
            data = dataset.read(name)
        except UnreadableImage as error:
            if name != LOST:
                raise SystemExit(f"{name}: {error}") from None
            continue
        if name == LOST or data != sample_bytes(name):
            raise SystemExit(f"{name}: another sample than was written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "check"])
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "write":
        write(asked.folder)
    else:
        print(json.dumps(check(asked.folder)))
    if "torch" in sys.modules:
        raise SystemExit("torch was loaded")


if __name__ == "__main__":
    main()

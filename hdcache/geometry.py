"""The geometry of a view: which sample, box, flip and frames each row is, as stored. No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hdcache.array_metadata import names_in
from hdcache.arrays import ArrayReader
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch
from hdcache.index import check_seal
from hdcache.ledgers import view_ledger
from hdcache.schema import Manifest, StoredObject
from hdcache.store import GEOMETRY_COLUMNS, Store, geometry_columns, is_view

CHECKED_ROWS = 1 << 16
"""Rows of a view's geometry that are checked at a time."""


def sealed_geometry(store: Store) -> list[int]:
    """Views whose geometry is sealed, ascending, whichever teachers have rows of them."""
    folder = store.path / "views"
    found = (name for name in names_in(folder) if is_view(name) and (folder / name / "manifest.json").is_file())
    return sorted(int(name) for name in found)


def geometry_manifest(store: Store, view: int) -> Manifest:
    """The seal of a view's geometry; ``failed`` are the rows whose image could not be read.

    Raises
    ------
    InputNotFound
        when the view is not sealed.
    StoreCorrupt
        when the seal is of something else.
    """
    ledger = view_ledger(store, view)
    if not ledger.sealed:
        check_seal(store, ledger.key)
        raise InputNotFound(
            f"{ledger.folder}: view {view} is not complete; run the same 'hdcache extract' command again"
        )
    manifest, count = ledger.proved_manifest(), store.card.dataset.count
    if (manifest.teacher, manifest.view, manifest.rows) != ("", view, count) or not all(
        0 <= row < count for row in manifest.failed
    ):
        raise StoreCorrupt(
            f"{ledger.folder}/manifest.json: seals {manifest.rows} rows of {manifest.teacher or 'the views'}/{manifest.view}, "
            f"not the {count} of view {view}; copy the store again"
        )
    return manifest


def read_geometry(store: Store, view: int, pipeline: str | None = None) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The rows of a view: int32 [rows, columns], and sha256 uint8 [rows, 32] of the sources.

    The columns are those of :func:`~hdcache.store.geometry_columns`. A row whose image could not be read has a source width of 0.
    """
    store.check_count()
    listed: dict[str, StoredObject] = dict(geometry_manifest(store, view).objects)
    count, shard = store.card.dataset.count, store.card.rows_per_shard
    columns = geometry_columns(store.card.views)
    geometry = ArrayReader(
        store.files, f"views/{view}/geometry", (count, len(columns)), "int32", listed, shard, pipeline
    ).rows(0, count)
    digests = ArrayReader(
        store.files, f"views/{view}/source_digest", (count, 32), "uint8", listed, shard, pipeline
    ).rows(0, count)
    samples = geometry[:, columns.index("sample")].astype(np.int64)
    named = np.zeros(count, bool)
    named[samples[(samples >= 0) & (samples < count)]] = True
    if not named.all():
        raise StoreMismatch(f"{store.path}/views/{view}: its rows do not name every sample once")
    for first in range(0, count, CHECKED_ROWS):
        _check_geometry(store, view, first, geometry[first : first + CHECKED_ROWS])
    return geometry.astype(np.int32, copy=False), digests.astype(np.uint8, copy=False)


def read_shard_geometry(store: Store, view: int, shard: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]] | None:
    """The recorded geometry and digests of one shard, sealed or not; None where no teacher has written it."""
    ledger = view_ledger(store, view)
    receipt = ledger.receipt(shard)
    if receipt is None:
        return None
    listed = {f"{ledger.key}/{key}": value for key, value in receipt.objects.items()}
    count, size = store.card.dataset.count, store.card.rows_per_shard
    start, stop = receipt.rows
    shape = (count, len(geometry_columns(store.card.views)))
    geometry = ArrayReader(store.path, f"{ledger.key}/geometry", shape, "int32", listed, size).rows(start, stop)
    digests = ArrayReader(store.path, f"{ledger.key}/source_digest", (count, 32), "uint8", listed, size).rows(
        start, stop
    )
    _check_geometry(store, view, start, geometry)
    return geometry.astype(np.int32), digests.astype(np.uint8)


def _check_geometry(store: Store, view: int, first: int, geometry: NDArray[np.generic]) -> None:
    """:class:`StoreCorrupt` names the first row, counted from ``first``, that no drawing could have given."""
    spec = store.card.views
    rows = geometry.astype(np.int64)
    _, left, top, width, height, flip, source_width, source_height = rows[:, : len(GEOMETRY_COLUMNS)].T
    frames = rows[:, len(GEOMETRY_COLUMNS) :]
    good = (left >= 0) & (top >= 0) & (width >= 1) & (height >= 1) & (source_height >= 1) & (source_width >= 1)
    good &= (left + width <= source_width) & (top + height <= source_height) & ((flip == 0) | (flip == 1))
    good &= (frames >= 0).all(axis=1) & (np.diff(frames, axis=1) == spec.stride).all(axis=1)
    wrong = np.flatnonzero(~good & (source_width != 0))
    if len(wrong):
        columns = zip(geometry_columns(spec), rows[wrong[0]].tolist(), strict=True)
        raise StoreCorrupt(
            f"{store.path}/views/{view}/geometry: row {first + int(wrong[0])} is no view of a sample "
            f"({', '.join(f'{name} {value}' for name, value in list(columns)[:12])}); copy the store again"
        )

"""Rows of one teacher, as stored and decoded; what every reader of a store goes through."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.arrays import ArrayReader
from hdcache.encodings import Encoder, codec_of
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.integrity import teacher_ledger, view_ledger
from hdcache.masks import check_tubes, unpack_visible, visible_count
from hdcache.records import check_key
from hdcache.schema import ITEM_BYTES, ArrayCard, Manifest, StoredObject, TeacherCard, TeacherRecord
from hdcache.shards import rows_together
from hdcache.store import GEOMETRY_COLUMNS, Store, geometry_columns, is_view
from hdcache.taps import Coded, Tokens, parse_tap

MASK_ARRAY = "mask/visible"
"""Where a masked teacher's rows hold the tokens that it saw, beside its taps."""

CHECKED_ROWS = 1 << 16
"""Rows of a view's geometry that are checked at a time."""

Parts = dict[str, NDArray[np.generic]]
"""Opening an array sets zarr's one global configuration for a moment."""


def mask_array(card: TeacherCard) -> ArrayCard:
    """One row of :data:`MASK_ARRAY`: packed bits, one per patch token of a whole input."""
    return ArrayCard(shape=(-(-card.tokens // 8),), dtype="uint8")


class TeacherReader:
    """One teacher of a store: its record, encoders, frozen weights and the sealed rows of its views."""

    def __init__(self, store: Store, name: str, pipeline: str | None = None) -> None:
        self.store, self.name = store, name
        self.record: TeacherRecord = store.teacher(name)
        if fault := _tap_fault(self.record):
            raise StoreCorrupt(f"{store.teacher_path(name)}/zarr.json: {fault}; copy the store again")
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._manifests: dict[int, Manifest] = {}
        self._arrays: dict[tuple[int, str, str], ArrayReader] = {}

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder of each stored tap."""
        return {
            tap: Encoder(
                card,
                {
                    name: self._constant(f"encodings/{tap}/{name}", *self._shape(value))
                    for name, value in card.constants.items()
                },
            )
            for tap, card in self.record.taps.items()
        }

    @cached_property
    def weights(self) -> dict[str, NDArray[np.generic]]:
        """The frozen pieces that derive targets, float32, by the names of ``record.weights``."""
        return {
            name: self._constant(f"weights/{name}", *self._shape(card)) for name, card in self.record.weights.items()
        }

    @staticmethod
    def _shape(card: ArrayCard) -> tuple[tuple[int, ...], str]:
        return card.shape, card.dtype

    def _constant(self, key: str, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
        folder = self.store.teacher_path(self.name)
        return ArrayReader(folder, check_key(key), shape, dtype, self.record.objects, None, self._pipeline).rows(
            0, shape[0]
        )

    def manifest(self, view: int) -> Manifest:
        """The seal of one view.

        Raises
        ------
        InputNotFound
            when the view is not sealed, with the command that completes it.
        StoreCorrupt
            when the seal belongs to another teacher.
        """
        if view not in self._manifests:
            ledger = teacher_ledger(self.store, self.name, view)
            if not ledger.sealed:
                have = self.store.views(self.name)
                raise InputNotFound(
                    f"{self.store.path}: view {view} of teacher {self.name!r} is not complete (sealed views: {have or 'none'}); "
                    "run the same 'hdcache extract' command again to finish it"
                )
            manifest = ledger.manifest()
            expected = self.record.identity_digest()
            if (manifest.teacher, manifest.view, manifest.identity) != (self.name, view, expected):
                raise StoreCorrupt(
                    f"{ledger.folder}/manifest.json: seals {manifest.teacher!r} view {manifest.view} "
                    f"(identity {manifest.identity[:12]}), not {self.name!r} view {view} ({expected[:12]}); copy the store again"
                )
            count = self.store.card.dataset.count
            if manifest.rows != count or not all(0 <= row < count for row in manifest.failed):
                raise StoreCorrupt(f"{ledger.folder}/manifest.json: its rows are not the {count} of the store")
            self._manifests[view] = manifest
        return self._manifests[view]

    def _array(self, view: int, tap: str, name: str) -> ArrayReader:
        key = (view, tap, name)
        with self._lock:
            if key not in self._arrays:
                masked = f"{tap}/{name}" == MASK_ARRAY
                card = mask_array(self.record.card) if masked else self.record.taps[tap].arrays[name]
                manifest = self.manifest(view)
                self._arrays[key] = ArrayReader(
                    self.store.path,
                    f"teachers/{self.name}/views/{view}/{check_key(tap)}/{check_key(name)}",
                    (self.store.card.dataset.count, *card.shape),
                    card.dtype,
                    manifest.objects,
                    self.store.card.rows_per_shard,
                    self._pipeline,
                )
            return self._arrays[key]

    def rows(self, view: int, tap: str, start: int, stop: int) -> Parts:
        """Stored arrays of rows ``[start, stop)`` of a tap, each [rows, ...].

        Raises
        ------
        InputNotFound
            for a tap that is not stored, or a view that is not sealed.
        UsageError
            for rows that do not exist.
        """
        if tap not in self.record.taps:
            raise InputNotFound(
                f"{self.store.path}: teacher {self.name!r} holds {', '.join(self.record.taps)}, not {tap!r}"
            )
        count = self.store.card.dataset.count
        if not 0 <= start < stop <= count:
            raise UsageError(f"rows {start} to {stop}: choose a range inside 0 to {count}")
        return {name: self._array(view, tap, name).rows(start, stop) for name in self.record.taps[tap].arrays}

    def copy_rows(self, view: int, key: str, start: int, stop: int, into: Sequence[NDArray[np.generic] | None]) -> None:
        """Copy rows ``[start, stop)`` of one stored array, ``tap/array`` or :data:`MASK_ARRAY`, to where each is wanted.

        ``into`` are arrays of one row's shape, one for each row; None: nowhere. :meth:`unpacked` reads masks.

        Raises
        ------
        StoreCorrupt
            naming the object, when one is missing, has the wrong size or fails its checksum.
        """
        self._array(view, *key.split("/")).copy_rows(start, stop, into)

    def expect_rows(self, view: int, key: str, start: int, stop: int) -> None:
        """Have the system fetch what :meth:`copy_rows` will read soon."""
        self._array(view, *key.split("/")).expect_rows(start, stop)

    def packed_masks(self, view: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Packed masks of rows ``[start, stop)`` of a masked teacher; :meth:`unpacked` reads them."""
        return self._array(view, *MASK_ARRAY.split("/")).rows(start, stop).astype(np.uint8, copy=False)

    def unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Ascending indices int64 [R, M] of the patch tokens that a masked teacher saw.

        Raises
        ------
        StoreCorrupt
            when a row's mask does not have as many visible tokens as its taps, or a tube mask is no tube.
        """
        card = self.record.card
        assert card.mask is not None  # noqa: S101  # programmer invariant
        cells = card.grid[0] * card.grid[1]
        try:
            visible = unpack_visible(packed, card.tokens, visible_count(card.mask, cells, card.slots))
            if card.mask.kind == "tube":
                check_tubes(visible, cells, card.slots)
            return visible
        except ValueError as error:
            raise StoreCorrupt(f"{self.store.path}: teacher {self.name!r}: {error}; copy the store again") from None

    def decode(self, tap: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tokens | Tensor:
        """Decode stored arrays of any number of rows, on the device they are on."""
        return self.encoders[tap].decode(parts, dtype)

    def coded(
        self, tap: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tokens | Tensor | Coded:
        """As :meth:`decode`, but klt short of its last step, which may be joined with what follows."""
        return self.encoders[tap].coded(parts, dtype)

    def tap(self, view: int, tap: str, start: int, stop: int) -> Tokens | Tensor:
        """Rows ``[start, stop)`` of a tap, decoded to float32 on the CPU (for looking at; loading has its own path)."""
        parts = {name: torch.from_numpy(value) for name, value in self.rows(view, tap, start, stop).items()}
        return self.decode(tap, parts)

    def chunk_bytes(self, taps: Sequence[str]) -> int:
        """Uncompressed bytes of the largest compressed chunk of ``taps``, at most."""
        sizes = [0]
        for card in (self.record.taps[tap] for tap in taps):
            for name, array in card.arrays.items():
                if (codec := codec_of(card, name)) is not None:
                    each = row_bytes(array)
                    sizes.append(rows_together(self.store.card.rows_per_chunk, each, codec) * each)
        return max(sizes)

    def bytes_per_row(self, taps: Sequence[str]) -> int:
        """Uncompressed bytes of one row of ``taps`` in a reader's buffer."""
        cards = [card for tap in taps for card in self.record.taps[tap].arrays.values()]
        masks = [mask_array(self.record.card)] if self.record.card.mask is not None else []
        return sum(map(row_bytes, cards + masks))


def row_bytes(card: ArrayCard) -> int:
    """Uncompressed bytes of one row of an array."""
    return math.prod(card.shape) * ITEM_BYTES[card.dtype]


def sealed_geometry(store: Store) -> list[int]:
    """Views whose geometry is sealed, ascending, whichever teachers have rows of them."""
    found = (store.path / "views").glob("*/manifest.json")
    return sorted(int(path.parent.name) for path in found if is_view(path.parent.name))


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
        raise InputNotFound(f"{store.path}: view {view} is not complete; run the same 'hdcache extract' command again")
    manifest, count = ledger.manifest(), store.card.dataset.count
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
    listed: dict[str, StoredObject] = dict(geometry_manifest(store, view).objects)
    count, shard = store.card.dataset.count, store.card.rows_per_shard
    columns = geometry_columns(store.card.views)
    geometry = ArrayReader(
        store.path, f"views/{view}/geometry", (count, len(columns)), "int32", listed, shard, pipeline
    ).rows(0, count)
    digests = ArrayReader(
        store.path, f"views/{view}/source_digest", (count, 32), "uint8", listed, shard, pipeline
    ).rows(0, count)
    samples = geometry[:, columns.index("sample")].astype(np.int64)
    named = np.zeros(count, bool)
    named[samples[(samples >= 0) & (samples < count)]] = True
    if not named.all():
        raise StoreMismatch(f"{store.path}/views/{view}: its rows do not name every sample once")
    for first in range(0, count, CHECKED_ROWS):
        _check_geometry(store, view, first, geometry[first : first + CHECKED_ROWS])
    return geometry.astype(np.int32, copy=False), digests.astype(np.uint8, copy=False)


def _tap_fault(record: TeacherRecord) -> str:
    """What is impossible about the taps of a record, if anything: tokens and channels that its network does not have."""
    card = record.card
    tokens = card.tokens
    try:
        if card.mask is not None:
            tokens = visible_count(card.mask, card.grid[0] * card.grid[1], card.slots)
        for name, tap in record.taps.items():
            if name != tap.tap:
                return f"tap {name} has the card of {tap.tap}"
            parsed = parse_tap(name, card.depth)
            # The heads of some networks are narrower than their share of the width.
            expected = (tokens, tap.channels if parsed.what == "qkv" else card.width, card.prefix_tokens)
            found = (tap.tokens, tap.channels, tap.prefix_tokens)
            if parsed.is_tokens and found != expected:
                return (
                    f"tap {name} has {found[0]} tokens of {found[1]} channels and {found[2]} prefix tokens, "
                    f"its teacher {expected[0]} of {expected[1]} and {expected[2]}"
                )
    except UsageError as error:
        return str(error)
    return ""


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

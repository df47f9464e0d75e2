"""Rows of one teacher, as stored: what needs no network. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hdcache.arrays import ArrayReader
from hdcache.errors import InputNotFound, StoreCorrupt, UsageError
from hdcache.index import check_records, held_taps
from hdcache.ledgers import teacher_ledger
from hdcache.masks import check_tubes, unpack_visible, visible_count
from hdcache.records import check_key
from hdcache.row_arrays import MASK_ARRAY, Parts, codec_of, mask_array, row_bytes
from hdcache.schema import ArrayCard, Manifest, TeacherRecord
from hdcache.shards import rows_together
from hdcache.store import Store
from hdcache.tap_names import parse_tap


class StoredRows:
    """One teacher of a store: its record, frozen weights and the sealed rows of its views, as they are stored."""

    def __init__(self, store: Store, name: str, pipeline: str | None = None) -> None:
        self.store, self.name = store, name
        try:
            record, held = store.teacher(name), held_taps(store, name)
        except InputNotFound:
            check_records(store, [name])  # it may be lost
            raise
        if fault := _tap_fault(record):
            raise StoreCorrupt(f"{store.teacher_path(name)}/zarr.json: {fault}; copy the store again")
        taps = {tap: card for tap, card in record.taps.items() if held is None or tap in held}
        self.record: TeacherRecord = record.model_copy(update={"taps": taps})
        """Without the taps that this copy of the store does not have."""
        self.elsewhere = tuple(sorted(record.taps.keys() - taps.keys()))
        """Taps that the store has and this copy of it does not."""
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._manifests: dict[int, Manifest] = {}
        self._arrays: dict[tuple[int, str, str], ArrayReader] = {}
        self._prove_record()

    def _prove_record(self) -> None:
        """A record that no seal lists, where there are any, is none of theirs. A seal that is damaged concerns its own view."""
        fault = None
        for view in self.store.views(self.name):
            try:
                self.manifest(view)
                return
            except StoreCorrupt as error:
                fault = fault or error
        if fault is not None:
            raise fault

    def pull_advice(self) -> str:
        """How taps that this copy of the store lacks are added to it; empty where it has all."""
        if not self.elsewhere:
            return ""
        return (
            f"; this copy was made without {', '.join(self.elsewhere)}: add what is needed with 'hdcache pull URL "
            f"{self.store.path} --teacher {self.name} --tap TAP'"
        )

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
        files = self.store.files.below(f"teachers/{self.name}")
        return ArrayReader(files, check_key(key), shape, dtype, self.record.objects, None, self._pipeline).rows(
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
                check_records(self.store, [self.name])
                have = self.store.views(self.name)
                raise InputNotFound(
                    f"{self.store.path}: view {view} of teacher {self.name!r} is not complete (sealed views: {have or 'none'}); "
                    "run the same 'hdcache extract' command again to finish it"
                )
            manifest = ledger.proved_manifest()
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
                    self.store.files,
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
                f"{self.store.path}: teacher {self.name!r} holds {', '.join(self.record.taps)}, not {tap!r}{self.pull_advice()}"
            )
        count = self.store.card.dataset.count
        if not 0 <= start < stop <= count:
            raise UsageError(f"rows {start} to {stop}: choose a range inside 0 to {count}")
        found = {name: self._array(view, tap, name).rows(start, stop) for name in self.record.taps[tap].arrays}
        if "classes" in found:
            self._check_classes(tap, [found["classes"]])
        return found

    def copy_rows(self, view: int, key: str, start: int, stop: int, into: Sequence[NDArray[np.generic] | None]) -> None:
        """Copy rows ``[start, stop)`` of one stored array, ``tap/array`` or :data:`MASK_ARRAY`, to where each is wanted.

        ``into`` are arrays of one row's shape, one for each row; None: nowhere. :meth:`unpacked` reads masks.

        Raises
        ------
        StoreCorrupt
            naming the object, when one is missing, has the wrong size or fails its checksum.
        """
        tap, name = key.split("/")
        self._array(view, tap, name).copy_rows(start, stop, into)
        if name == "classes":
            self._check_classes(tap, into)

    def _check_classes(self, tap: str, rows: Sequence[NDArray[np.generic] | None]) -> None:
        """Whether stored classes are some that there are: a GPU that is sent to others takes the process down."""
        count = self.record.taps[tap].channels
        for row in rows:
            if row is not None and (row.min() < 0 or row.max() >= count):
                raise StoreCorrupt(
                    f"{self.store.path}: teacher {self.name!r}: tap {tap} holds a class that is none of its {count}; copy the "
                    "store again"
                )

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

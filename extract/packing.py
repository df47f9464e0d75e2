"""Copies every sample's bytes into the store, shard by shard, and seals them: ``hdcache extract --pixels``.

Samples lie in the order of view 0's rows (:mod:`hdcache.packed`). A shard is written sample by sample beside what is there
and takes its place at once, so a killed run loses nothing and, rerun, ends in the same bytes; no more than a few samples
are in memory.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hdcache import stopping
from hdcache.arrays import ShardWriter, group_metadata
from hdcache.datasets import Dataset, Source, digest
from hdcache.durable import durable_parts, durable_write, partial_files
from hdcache.errors import InputNotFound, OutOfSpace, StoreLocked, StoreMismatch, UnreadableImage
from hdcache.extract.writer import is_recorded, salvaged, write_once
from hdcache.geometry import read_shard_geometry
from hdcache.index import write_index
from hdcache.ledgers import view_ledger
from hdcache.packed import (
    BYTES,
    DIGEST,
    INDEX,
    Packed,
    array_writers,
    bytes_key,
    bytes_metadata,
    packed,
    packed_dataset,
    packed_order,
    pixels_ledger,
)
from hdcache.progress import Progress, size
from hdcache.schema import Receipt, StoredObject
from hdcache.store import PIXELS, Store

ENOUGH_TO_JUDGE = 8
"""Rows of one shard that, all of them gone, condemn the data set."""
PROBED = 32
"""Samples that are read to estimate the bytes of all."""
WAIT_SECONDS = 0.2
_NOTHING = hashlib.sha256().digest()
"""Digest of a sample that could not be read."""


def pack(store: Store, dataset: Dataset, *, threads: int, quiet: bool = True) -> Dataset:
    """Copy the samples of ``dataset``, the one that the store was made from, into the store where they are not there yet.

    Samples that could not be read, or not be decoded, by an earlier run are tried again. Processes that do this at once
    wait for each other.

    Returns
    -------
    Dataset
        the same samples, read from the store.

    Raises
    ------
    OutOfSpace
        before anything is written, when the samples will not fit.
    StoreMismatch
        when a sample is not (or no longer) what a teacher of this store has seen, or what this store kept before its
        bytes were lost.
    InputNotFound
        when the system can read no file of a whole shard: the data set is gone, not its images broken.
    Interrupted
        when a signal asked for a stop; finished shards are kept.
    """
    with _turn(store, quiet=quiet):
        Packer(store, dataset, threads).run(quiet=quiet)
    found = packed_dataset(store)
    if found is None:
        raise StoreLocked(
            f"{store.path}: another process has begun to write its samples anew; run the same command again"
        )
    return found


def bytes_per_sample(dataset: Dataset) -> float:
    """What a sample will need in the store, by a few that lie far apart."""
    count = dataset.card.count
    sizes = [0]
    for place in sorted({round(place) for place in np.linspace(0, count - 1, min(PROBED, count))}):
        try:
            sizes.append(len(packed(dataset.read(dataset.ids[place]))[0]))
        except UnreadableImage:
            continue
    return sum(sizes) / max(1, len(sizes) - 1)


@contextmanager
def _turn(store: Store, *, quiet: bool) -> Iterator[None]:
    told = quiet
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(store.lock(PIXELS))
                break
            except StoreLocked as error:
                if not told:
                    sys.stderr.write(f"{error}\n")
                told = True
                if stopping.requested():
                    raise stopping.stop("nothing of it was written") from None
                time.sleep(WAIT_SECONDS)
        yield


@dataclass
class _Written:
    """The rows of a shard as they are written."""

    entries: list[tuple[int, int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    gone: int = 0


_Read = tuple[bytes, int, str, bool]
"""Bytes to store, their form, why there are none, and whether the system could not read the file."""


def write_metadata(store: Store, writers: Mapping[str, ShardWriter]) -> dict[str, StoredObject]:
    """Write the metadata of groups and arrays where it is not there; its objects by key relative to the store's root."""
    static = {key: writer.metadata for key, writer in writers.items()}
    static |= {key: group_metadata({}) for key in (PIXELS, BYTES)}
    return {f"{key}/zarr.json": write_once(store.path / key / "zarr.json", data) for key, data in static.items()}


class Packer:
    """Copies the samples of ``dataset`` into a store, shard by shard."""

    def __init__(self, store: Store, dataset: Dataset, threads: int) -> None:
        self.store, self.dataset, self.threads = store, dataset, threads
        self.ledger, self.order = pixels_ledger(store), packed_order(store)
        count, shard = store.card.dataset.count, store.card.rows_per_shard
        self.count, self.shard, self.shards = count, shard, -(-count // shard)
        self._geometry: tuple[NDArray[np.int32], NDArray[np.uint8]] | None = None
        """Of the shard in hand, where a teacher has seen it in view 0."""
        self._digests: NDArray[np.uint8] | None = None
        """Of the shard in hand, where it was kept before and its bytes are lost."""
        self._doubtful: set[int] = set()
        """Its rows that a teacher could not decode: these may be mended."""
        self.writers = array_writers(store)

    def run(self, *, quiet: bool) -> None:
        for number in range(self.shards):
            self.ledger.settle(number)
        for unfinished in partial_files(self.ledger.folder):
            unfinished.unlink(missing_ok=True)
        known = {number: self.ledger.receipt(number) for number in range(self.shards)}
        missing = sum(self._span(number)[1] - self._span(number)[0] for number, found in known.items() if found is None)
        self._check_space(missing)
        listed = write_metadata(self.store, self.writers)
        what = f"keep the {self.dataset.card.noun} of {self.store.path.name}"
        with (
            ThreadPoolExecutor(self.threads, "pack") as pool,
            Progress(what, self.count, "samples", quiet=quiet or not missing) as bar,
        ):
            bar.skip(self.count - missing)
            for number, receipt in known.items():
                if receipt is None:
                    self.restore(pool, number, bar.advance)
                elif mended := self._mended(receipt):
                    self._rewrite(pool, receipt, mended)
        receipts = [receipt for number in range(self.shards) if (receipt := self.ledger.receipt(number)) is not None]
        self.ledger.seal(receipts, listed, teacher="", identity="", view=0, rows=self.count)
        write_index(self.store)

    def _span(self, number: int) -> tuple[int, int]:
        return number * self.shard, min(self.count, (number + 1) * self.shard)

    def _check_space(self, missing: int) -> None:
        if not missing:
            return
        need, free = missing * bytes_per_sample(self.dataset), shutil.disk_usage(self.store.path).free
        if need > free:
            raise OutOfSpace(
                f"{self.store.path}: about {size(need)} are needed to keep {missing:,} {self.dataset.card.noun}, {size(free)} "
                "are free; free space, shrink them (--pixels 256), or leave --pixels out and read them from where they are"
            )

    def _name(self, row: int) -> str:
        return self.store.ids[int(self.order[row])]

    def _read(self, row: int) -> _Read:
        name = self._name(row)
        try:
            source = self.dataset.read(name)
            self._check_recorded(row, source)
            return *packed(source), "", False
        except UnreadableImage as error:
            cause = error.__context__
            gone = isinstance(cause, OSError) and cause.errno is not None
            reason = f"{name}: {str(error).removeprefix(f'{name}: ')}"
            if self._recorded(row) is not None:
                raise StoreMismatch(
                    f"{reason}; it could be read when its view was recorded: bring it back and run the same command again"
                ) from None
            return b"", 0, reason, gone

    def _recorded(self, row: int) -> bytes | None:
        """sha256 of the source that a teacher has seen in view 0."""
        geometry = self._geometry
        place = row % self.shard
        return geometry[1][place].tobytes() if geometry is not None and is_recorded(geometry[0][place]) else None

    def _check_recorded(self, row: int, source: Source) -> None:
        recorded = self._recorded(row)
        if recorded is not None and recorded != digest(source):
            raise StoreMismatch(
                f"{self._name(row)}: it changed since its view was recorded (sha256 {digest(source).hex()[:12]}..., was "
                f"{recorded.hex()[:12]}...); restore it, or extract to a new store"
            )

    def restore(
        self, pool: ThreadPoolExecutor, number: int, advance: Callable[[int], None],
        failed: Mapping[int, str] | None = None, *, trusted: bool = True,
    ) -> None:  # fmt: skip
        """Write a shard that is not there, or no longer whole, from the data set.

        Rows that ``failed`` stay so. Old digests that can be read are ``trusted``, but where they are what is damaged.
        """
        key = self.writers[DIGEST].key(number)
        old = salvaged(self.store, DIGEST, key, (self.count, 32), "uint8", self._span(number)) if trusted else None
        self._digests = old
        unread = view_ledger(self.store, 0).receipt(number)
        self._doubtful = {*unread.failed} if unread is not None else set()
        lost = failed or {}
        self._write(
            pool, number, lambda row: (b"", 0, lost[row], False) if row in lost else self._read_again(row), advance
        )

    def _read_again(self, row: int) -> _Read:
        found = self._read(row)
        kept = self._digests[row % self.shard].tobytes() if self._digests is not None else _NOTHING
        now = hashlib.sha256(found[0]).digest()
        # Arrays have their pixels in the fingerprint, and other versions of Pillow spell their PNG otherwise.
        if kept not in (_NOTHING, now) and not found[1] and row not in self._doubtful:
            raise StoreMismatch(
                f"{self._name(row)}: it is not what was kept here before its bytes were lost (sha256 {kept.hex()[:12]}...): "
                f"{found[2] or f'sha256 {now.hex()[:12]}...'}; bring it back and run the same command again"
            )
        return found

    def _write(
        self,
        pool: ThreadPoolExecutor,
        number: int,
        read: Callable[[int], _Read],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Write a shard beside what is there: bytes, index, digests. Its receipt puts them in place."""
        start, stop = self._span(number)
        self._geometry = read_shard_geometry(self.store, 0, number)
        written = _Written()
        key = bytes_key(number)
        objects = {key: durable_parts(self.ledger.aside(key), self._parts(pool, range(start, stop), read, written))}
        total = objects[key].size
        metadata = key.replace("c.0", "zarr.json")
        objects[metadata] = durable_write(self.ledger.aside(metadata), bytes_metadata(total))
        index = np.array(written.entries, np.int64)
        digests = np.frombuffer(b"".join(written.digests), np.uint8).reshape(-1, 32)
        for array, block in ((INDEX, index), (DIGEST, digests)):
            writer = self.writers[array]
            path = f"{array.removeprefix(f'{PIXELS}/')}/{writer.key(number)}"
            objects[path] = durable_write(self.ledger.aside(path), writer.encode(number, block))
        self.ledger.replace(Receipt(shard=number, rows=(start, stop), objects=objects, failed=written.failed))
        advance(stop - start)

    def _parts(
        self, pool: ThreadPoolExecutor, rows: Sequence[int], read: Callable[[int], _Read], written: _Written
    ) -> Iterator[bytes]:
        """The bytes of rows, in order, a few of them read ahead."""
        ahead: deque[Future[_Read]] = deque()
        waiting = iter(rows)
        try:
            for row in rows:
                if stopping.requested():
                    raise stopping.stop(f"all finished shards of samples are in {self.store.path}")
                while len(ahead) < 2 * self.threads and (following := next(waiting, None)) is not None:
                    ahead.append(pool.submit(read, following))
                data, form, reason, gone = ahead.popleft().result()
                if reason:
                    written.failed[row] = reason
                    written.gone += gone
                written.entries.append((len(data), form))
                written.digests.append(hashlib.sha256(data).digest())
                yield data
            if written.gone == len(rows) >= ENOUGH_TO_JUDGE:
                raise InputNotFound(
                    f"{self.dataset.card.spec}: none of the {self.dataset.card.noun} of shard {rows[0] // self.shard} could be "
                    f"read ({written.failed[rows[0]]}); is the data set still there? Finished shards are safe: bring it back "
                    "and run the same command again"
                )
        finally:
            for future in ahead:
                future.cancel()

    def _mended(self, receipt: Receipt) -> dict[int, _Read]:
        """Rows of a finished shard that the data set gives otherwise now, and that no teacher could see before."""
        unread = view_ledger(self.store, 0).receipt(receipt.shard)
        doubtful = {*receipt.failed, *(unread.failed if unread is not None else ())}
        if not doubtful:
            return {}
        self._geometry = read_shard_geometry(self.store, 0, receipt.shard)
        kept, found = self._kept(receipt), {row: self._read(row) for row in sorted(doubtful)}
        return {
            row: new
            for row, new in found.items()
            if not new[2] and (row in receipt.failed or hashlib.sha256(new[0]).digest() != kept.digest(row))
        }

    def _kept(self, receipt: Receipt) -> Packed:
        objects: Mapping[str, StoredObject] = {f"{PIXELS}/{key}": value for key, value in receipt.objects.items()}
        return Packed(self.store, objects, receipt.failed)

    def _rewrite(self, pool: ThreadPoolExecutor, receipt: Receipt, mended: Mapping[int, _Read]) -> None:
        """Write a shard again with some rows mended; the others are those that it has."""
        kept = self._kept(receipt)

        def read(row: int) -> _Read:
            if row in mended:
                return mended[row]
            if row in receipt.failed:
                return b"", 0, receipt.failed[row], False
            return *packed(kept.read(row)), "", False

        self._write(pool, receipt.shard, read)

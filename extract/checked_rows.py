"""Which stored rows a check looks at, and their images, opened again as they were when the rows were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from hdcache import draws
from hdcache.datasets import Dataset, store_dataset
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.extract.opening import dataset_differences
from hdcache.extract.rows import decode_row, shard_rows
from hdcache.extract.writer import Row
from hdcache.schema import Manifest, Preprocessing
from hdcache.store import Store


class RowPlace(NamedTuple):
    """One stored row."""

    view: int
    row: int


def images_of(store: Store, data: str | None, *, kept: bool = True) -> Dataset:
    """The data set that a store was made from: at ``data``, else the samples that it keeps (if ``kept``), else where it was.

    Raises
    ------
    InputNotFound
        when it is not there.
    StoreMismatch
        when what is there is another one.
    """
    try:
        dataset = store_dataset(store, data, kept=kept)
    except InputNotFound as error:
        if data is not None:
            raise
        raise InputNotFound(f"{error}; if the data set has moved, name it: --data DATA") from None
    if lines := dataset_differences(dataset, store):
        raise StoreMismatch(f"{store.path} was made from other data than {dataset.card.spec} ({'; '.join(lines)})")
    store.adopt_ids(dataset.card.fingerprint, dataset.ids)
    return dataset


def check_asked(
    store: Store, rows: int, teachers: Sequence[str], data: Dataset | str | None, threads: int | None
) -> Dataset | None:
    """Refuse what cannot be meant before any object of the store is looked at.

    Returns
    -------
    Dataset | None
        the images, as :func:`images_of`; None where the store is too damaged to say what they were: that comes first.

    Raises
    ------
    UsageError
        for a sample of nothing, or threads that are none.
    InputNotFound
        for a teacher that is not there, or images that are not.
    StoreMismatch
        for images that are others.
    """
    _check_count(rows)
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} must be at least 1")
    try:
        if teachers:
            asked_teachers(store, teachers)
        return images_of(store, data) if data is None or isinstance(data, str) else data
    except StoreCorrupt:
        return None


def asked_teachers(store: Store, asked: Sequence[str]) -> dict[str, str | None]:
    """Name -> where its weights are now, if that is said, of ``NAME`` or ``NAME=MODEL``; all sealed ones where none is asked for.

    Raises
    ------
    InputNotFound
        when there is none with that name, or nothing of it is sealed.
    """
    found: dict[str, str | None] = {}
    for text in asked or store.teachers():
        name, _, spec = text.partition("=")
        store.teacher(name)
        if store.views(name):
            found[name] = spec or None
        elif asked:
            raise InputNotFound(
                f"{store.path}: no view of teacher {name!r} is complete yet; finish it: {store.extract_command()} "
                f"--teacher {name}=MODEL"
            )
    if not found:
        raise InputNotFound(
            f"{store.path}: it holds no complete view of any teacher; {store.extract_command()} --teacher NAME=MODEL"
        )
    return found


def draw_rows(
    store: Store,
    manifests: Mapping[int, Manifest],
    count: int,
    *key: object,
    first: Callable[[int], bool] = lambda place: True,
) -> list[RowPlace]:
    """``count`` rows that did not fail (or all of them), spread evenly over shards of all views, ascending: the same for the same ``key``.

    ``manifests`` are those of a teacher's sealed views. Of a shard, places (from 0) that are ``first`` are drawn before others.
    """
    _check_count(count)
    size, rows = store.card.rows_per_shard, store.card.dataset.count
    cells = [(view, shard) for view in sorted(manifests) for shard in range(-(-rows // size))]

    def of_shard(view: int, shard: int) -> Iterator[RowPlace]:
        start = shard * size
        places = [int(place) for place in draws.permutation(min(size, rows - start), *key, view, shard, "checked rows")]
        for place in sorted(places, key=lambda place: not first(place)):
            if start + place not in manifests[view].failed:
                yield RowPlace(view, start + place)

    fresh = (of_shard(*cells[int(number)]) for number in draws.permutation(len(cells), *key, "checked shards"))
    turns = list(islice(fresh, count))
    drawn: list[RowPlace] = []
    while turns and len(drawn) < count:
        for shard in tuple(turns):
            if len(drawn) == count:
                break
            if (place := next(shard, None)) is not None:
                drawn.append(place)
                continue
            turns.remove(shard)  # all its rows are drawn, or failed
            turns += islice(fresh, 1)
    return sorted(drawn)


def _check_count(rows: int) -> None:
    if rows < 1:
        raise UsageError(f"{rows} rows are no sample; ask for at least 1")


def open_rows(
    store: Store, dataset: Dataset, preprocessing: Preprocessing, places: Sequence[RowPlace], pool: ThreadPoolExecutor
) -> list[Row]:
    """The images of some rows, under the geometry that is recorded for them; a failure is the row's reason.

    Raises
    ------
    StoreCorrupt
        when no geometry is recorded for a row.
    InputNotFound
        when the system can read none of the files: the data set is gone.
    """
    size = store.card.rows_per_shard
    known = {(place.view, place.row // size) for place in places}
    entries = {shard: shard_rows(store, *shard) for shard in sorted(known)}

    def opened(place: RowPlace) -> Row:
        sample, recorded = entries[place.view, place.row // size][place.row % size]
        if recorded is None:
            raise StoreCorrupt(
                f"{store.path}/views/{place.view}: row {place.row} is stored but its geometry is not; run 'hdcache repair {store.path}'"
            )
        return decode_row(store, dataset, preprocessing, place.view, sample, recorded)

    rows = list(pool.map(opened, places))
    if rows and all(row.gone for row in rows):
        raise InputNotFound(
            f"{dataset.card.spec}: none of {len(rows)} {dataset.card.noun} could be read ({rows[0].reason}); bring the data set "
            "back, or name where it is now: --data DATA"
        )
    return rows

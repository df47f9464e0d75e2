"""``hdcache verify --replay``: stored rows' images are opened again, and compared with what they were when they were recorded.

The file, by its sha256; and what decoding and resizing make of it, by the digests that :mod:`hdcache.extract.pixel_digests` keeps of
some rows. A library that decodes otherwise by now changes no stored feature, but what ``--online`` runs, students and repaired rows see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hdcache.arrays import ArrayReader
from hdcache.datasets import Dataset
from hdcache.extract.checked_rows import RowPlace, asked_teachers, check_asked, draw_rows, images_of, open_rows
from hdcache.extract.pixel_digests import DIGEST_CARD, EVERY, PIXEL_DIGESTS
from hdcache.pixels import digest
from hdcache.progress import Progress, counted
from hdcache.resources import available_cores
from hdcache.store import Store
from hdcache.stored_rows import StoredRows

TOGETHER = 64
"""Rows whose pixels are in memory at once."""
DECODERS = ("av", "numpy", "pillow")
"""Packages whose versions decide pixels."""
NAMED = 20
"""Rows that a result lists."""


def replay(
    store: Store,
    rows: int,
    *,
    teachers: Sequence[str] = (),
    data: Dataset | str | None = None,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Open the images of ``rows`` stored rows of each teacher (``NAME``; by default all), drawn from ``seed``.

    Rows that have a digest of their pixels are drawn before others.

    Returns
    -------
    dict
        ``teachers``: name -> ``rows``, ``sources_changed`` (count), ``pixels_compared``, ``pixels_changed`` (count), ``changed`` (one
        line for each of the first :data:`NAMED`), ``without_digests`` (views). ``notes`` and ``faults``: one line each.

    Raises
    ------
    UsageError
        for a sample of nothing, or threads that are none.
    InputNotFound
        when the data set is not where it was.
    StoreMismatch
        when what is there is another data set.
    """
    opened = check_asked(store, rows, teachers, data, threads)
    asked = asked_teachers(store, teachers)
    dataset = images_of(store, data if isinstance(data, str) else None) if opened is None else opened
    found: dict[str, Any] = {"seed": seed, "teachers": {}, "notes": [], "faults": []}
    for name in asked:
        reader = StoredRows(store, name)
        manifests = {view: reader.manifest(view) for view in store.views(name)}
        kept = {view: digests for view in manifests if (digests := _digests(reader, view)) is not None}
        places = draw_rows(store, manifests, rows, seed, name, "replay", first=lambda place: place % EVERY == 0)
        changed: list[str] = []
        sources = pixels = compared = 0
        with (
            ThreadPoolExecutor(threads or available_cores(), "replay") as pool,
            Progress(f"open the {dataset.card.noun} of {name} again", len(places), "rows", quiet=quiet) as bar,
        ):
            for start in range(0, len(places), TOGETHER):
                part = places[start : start + TOGETHER]
                for place, row in zip(
                    part, open_rows(store, dataset, reader.record.card.preprocessing, part, pool), strict=True
                ):
                    if row.pixels is None:
                        sources += 1
                        changed.append(row.reason)
                        continue
                    known = _digest(kept, place)
                    compared += known is not None
                    if known is not None and known != digest(row.pixels):
                        pixels += 1
                        changed.append(f"{store.ids[row.sample]}: other pixels from the same file")
                bar.advance(len(part))
        old = [view for view in manifests if view not in kept]
        found["teachers"][name] = {
            "rows": len(places), "sources_changed": sources, "pixels_compared": compared, "pixels_changed": pixels,
            "changed": changed[:NAMED], "without_digests": old,
        }  # fmt: skip
        if old:
            found["notes"].append(
                f"teacher {name}: no pixel digests in {counted(len(old), 'views')} ({', '.join(map(str, old))}), which an earlier version "
                "of hdcache wrote; only the sources of these rows were compared"
            )
        if sources:
            found["faults"].append(
                f"teacher {name}: {sources} of {counted(len(places), 'rows')} have another source than was recorded, or one that cannot be "
                f"read ({changed[0]}); bring the original {dataset.card.noun} back, or name where they are: --data DATA"
            )
        if pixels:
            first = next(line for line in changed if "other pixels" in line)
            found["faults"].append(
                f"teacher {name}: {pixels} of {compared} {'clips' if store.card.views.frames else 'images'} do not decode to the pixels that it saw "
                f"({first}); {_versions(store)}; stored features stay right, but students, --online runs and repaired rows see other "
                "pixels: install the versions that wrote the store"
            )
    return found


def _digests(reader: StoredRows, view: int) -> ArrayReader | None:
    """The digests of a view's rows; None where it has none."""
    key, objects = f"teachers/{reader.name}/views/{view}/{PIXEL_DIGESTS}", reader.manifest(view).objects
    if f"{key}/zarr.json" not in objects:
        return None
    card = reader.store.card
    shape = (card.dataset.count, *DIGEST_CARD.shape)
    return ArrayReader(reader.store.path, key, shape, DIGEST_CARD.dtype, objects, card.rows_per_shard)


def _digest(kept: dict[int, ArrayReader], place: RowPlace) -> bytes | None:
    if place.view not in kept:
        return None
    known = kept[place.view].rows(place.row, place.row + 1)
    return known.tobytes() if known.any() else None


def _versions(store: Store) -> str:
    """Which libraries are others than those that wrote a store, as far as it says."""
    apart = []
    for name in DECODERS:
        if (then := store.about.written_with.get(name)) is None:
            continue
        try:
            now = version(name)
        except PackageNotFoundError:
            now = "none"
        if now != then:
            apart.append(f"{name} {now} (was {then})")
    return (
        f"here are {', '.join(apart)}" if apart else "all versions are as they were, so a library was built otherwise"
    )


def format_replay(found: Mapping[str, Any]) -> list[str]:
    """A line for each teacher, then what is to be noted and what is wrong."""
    lines = [
        f"teacher {name}: the images of {counted(facts['rows'], 'rows')} opened again, {facts['sources_changed']} of other files; "
        f"pixels of {facts['pixels_compared']} compared, {facts['pixels_changed']} differ"
        for name, facts in found["teachers"].items()
    ]
    changed = [f"  {line}" for facts in found["teachers"].values() for line in facts["changed"]]
    return lines + changed + list(found["notes"]) + list(found["faults"])

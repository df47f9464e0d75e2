"""What an extraction starts from: the data set, its store, teachers that fit them, encodings that fit the teachers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import filelock
import torch

from hdcache.datasets import Dataset, open_dataset, store_dataset
from hdcache.encodings import Encoder
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.extract.calibrate import calibrate, check_unsealed, repair_constants
from hdcache.index import held_taps
from hdcache.info import MADE_BY
from hdcache.reader import TeacherReader
from hdcache.records import differences
from hdcache.rendering import input_shape
from hdcache.schema import MaskSpec, StoreCard, TapRequest, TeacherRecord, ViewSpec
from hdcache.shards import CHUNK_ROWS, LEAST_ROWS, chunk_rows
from hdcache.shrinking import parse_pixels, shrunk
from hdcache.store import ROOT_LOCK, Store
from hdcache.tap_requests import request_all
from hdcache.taps import check_readable, parse_tap
from hdcache.targets import default_block
from hdcache.teachers import Teacher, load_teacher
from hdcache.views import check_input, check_views, default_views, parse_views

SHARD_PIXELS = 256 << 20
"""Bytes of pixels that a shard may need while it is decoded and waits for its teacher."""


@dataclass(frozen=True)
class Asked:
    """How teachers are run and what of them is stored; see :func:`hdcache.extract.run.extract`."""

    taps: tuple[str, ...] = ()
    encoding: str | None = None
    fidelity: float | None = None
    top_k: int | None = None
    img_size: int | None = None
    teacher_mask: str | MaskSpec | None = None
    teacher_mask_seed: int = 0
    precision: str = "auto"
    batch: int = 32

    def prepare(
        self, spec: str, drawn: ViewSpec, on: torch.device, fixed: Path | None = None
    ) -> tuple[Teacher, list[TapRequest]]:
        """The teacher of ``spec``, and what is stored of it; refused where it does not fit the views (of store ``fixed``)."""
        teacher = load_teacher(
            spec,
            img_size=self.img_size,
            mask=self.teacher_mask,
            mask_seed=self.teacher_mask_seed,
            precision=self.precision,
            device=on,
            batch=self.batch,
            taps=list(self.taps),
        )
        check_input(drawn, teacher.card.preprocessing, f"teacher {teacher.name}", fixed)
        requests = request_all(self.taps or default_taps(teacher), self.encoding, self.fidelity, self.top_k)
        for request in requests:
            check_readable(teacher.backbone.model, parse_tap(request.tap, teacher.card.depth))
        return teacher, requests

    def as_recorded(self, requests: Sequence[TapRequest], known: TeacherRecord | None) -> list[TapRequest]:
        """``requests`` with the fidelity that the teacher was begun with, where none is asked for: its default may change."""
        begun = {entry.tap: entry for entry in known.requests} if known is not None and self.fidelity is None else {}
        return [
            entry.model_copy(update={"fidelity": begun[entry.tap].fidelity})
            if entry.encoding == "klt" and entry.tap in begun and begun[entry.tap].fidelity is not None
            else entry
            for entry in requests
        ]


def pixel_bytes(teacher: Teacher) -> int:
    """Bytes of one row's pixels."""
    return math.prod(input_shape(teacher.card.preprocessing))


def open_or_create(
    data: str | Dataset | None,
    path: Path,
    views: str | ViewSpec | None,
    seed: int,
    rows_per_shard: int,
    prepare: Callable[[ViewSpec], int] = lambda drawn: 1,
    pixels: str | int | None = None,
) -> tuple[Dataset, Store]:
    """The data set and its store; a store that holds something must have been made from the same data and views.

    ``pixels`` is what :func:`~hdcache.shrinking.parse_pixels` reads: images of a new store are shrunk to the shorter side it
    asks for, one that is there must have been made so. Left out, samples that the store keeps are read from it.

    ``prepare`` is called with the views before a store is made, refuses what would not fit them, and returns the bytes
    of one row's pixels. A store that nothing was written to, as a refused command leaves it, is made anew.
    """
    side = parse_pixels(pixels)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; give --store a folder")
    there = Store.open(path) if (path / "zarr.json").is_file() else None
    if there is None and data is None:
        raise InputNotFound(
            f"{path}: no store there yet; name the data set too: 'hdcache extract DATA --store {path} ...'"
        )
    if data is not None and (there is None or not there.begun):
        dataset = shrunk(open_dataset(data) if isinstance(data, str) else data, side)
        asked = new_views(dataset, there, views, seed)
        shard = shard_size(dataset.card.count, rows_per_shard, prepare(asked))
        card = StoreCard(dataset=dataset.card, views=asked, rows_per_shard=shard, rows_per_chunk=chunk_rows(shard))
        path.mkdir(parents=True, exist_ok=True)
        # Processes that make one store together wait for each other: the lock is held for moments.
        with filelock.FileLock(path / ROOT_LOCK):
            # Another process may have been faster; its store is then held to the same settings.
            if (path / "zarr.json").is_file():
                other = Store.open(path)
                here = other.card.model_copy(update={"dataset": card.dataset})
                if here != card or dataset_differences(dataset, other):
                    other.withdraw()
            if not (path / "zarr.json").is_file():
                return dataset, Store.create(
                    path,
                    card,
                    dataset.ids,
                    dataset.labels,
                    written_with={name: version(name) for name in decoders(dataset.card.kind)} | _maker(),
                )
    store = Store.open(path)
    return reopened(store, data, views, seed, pixels), store


def _maker() -> dict[str, str]:
    """Who makes the store, where that is to be told."""
    name = os.environ.get("HDCACHE_MADE_BY", "").strip()
    return {MADE_BY: name[:200]} if name else {}


def new_views(dataset: Dataset, there: Store | None, views: str | ViewSpec | None, seed: int) -> ViewSpec:
    """The views of a store that is made of ``dataset``, perhaps in place of one ``there`` that nothing was written to."""
    if isinstance(views, ViewSpec):
        drawn = views
    elif views is None and not seed and there is not None and not dataset_differences(dataset, there):
        drawn = there.card.views
    else:
        drawn = parse_views(views or default_views(dataset.card), seed)
    check_views(drawn, dataset.card)
    return drawn


def reopened(
    store: Store, data: str | Dataset | None, views: str | ViewSpec | None, seed: int, pixels: str | int | None
) -> Dataset:
    """The data set of a store that holds something; refused where data, views or pixels are others than it was made from."""
    check_pixels(store, pixels)
    try:
        dataset = store_dataset(store, data) if data is None or isinstance(data, str) else data
    except InputNotFound as error:
        if data is not None:
            raise
        raise InputNotFound(f"{error}; if the data set has moved, name it: 'hdcache extract DATA ...'") from None
    lines = dataset_differences(dataset, store)
    if views is not None or seed:
        found = store.card.views
        named = views if isinstance(views, ViewSpec) else parse_views(views, seed) if views is not None else None
        compared = named or found.model_copy(update={"seed": seed})
        lines += differences(compared.whole(), found.whole(), "views")
    if lines:
        raise StoreMismatch(
            f"{store.path} was made with other settings ({'; '.join(lines)}); give --store another folder, or the settings it has"
        )
    store.adopt_ids(dataset.card.fingerprint, dataset.ids)
    return dataset


def check_pixels(store: Store, pixels: str | int | None) -> None:
    """:class:`StoreMismatch` where ``--pixels`` asks for other images than the teachers of a store have seen."""
    has, asked = store.card.dataset.shorter_side, parse_pixels(pixels)
    if pixels is None or has == asked:
        return
    if has is None:
        raise StoreMismatch(
            f"{store.path}: its teachers have seen whole images, so those shrunk to {asked} pixels are other data; keep them "
            "as they are (--pixels source), or give --store another folder"
        )
    raise StoreMismatch(
        f"{store.path}: its teachers have seen images shrunk to {has} pixels, so --pixels {pixels} is other data; repeat "
        f"--pixels {has}, or give --store another folder"
    )


def decoders(kind: str) -> list[str]:
    """The packages whose versions may show in what a store of data of this kind holds."""
    return ["hdcache", "zarr", "numcodecs", "numpy", "pillow", *(["av"] if kind == "video" else [])]


def shard_size(count: int, wanted: int, pixels: int = 1) -> int:
    """Rows per shard: whole chunks of 32 (8 where they are fewer), and for a small data set so few that it still gets several shards.

    Fewer too where rows of ``pixels`` bytes are so large that a shard of them would need more than :data:`SHARD_PIXELS`.
    """
    if wanted < 1:
        raise UsageError(f"rows_per_shard {wanted} must be at least 1")
    if wanted < LEAST_ROWS:
        return wanted
    rows = max(LEAST_ROWS, min(wanted, -(-count // 8), SHARD_PIXELS // pixels))
    return rows - rows % (CHUNK_ROWS if rows >= CHUNK_ROWS else LEAST_ROWS)


def dataset_differences(dataset: Dataset, store: Store) -> list[str]:
    """What sets a data set apart from the one that the store was made from, in one line; empty if nothing does."""
    if dataset.card.fingerprint == store.card.dataset.fingerprint:
        return []
    now, then = set(dataset.ids), set(store.ids)
    if now == then:
        return ["dataset: the same samples, but labels or contents have changed"]
    new, gone = sorted(now - then), sorted(then - now)
    parts = [
        f"{len(ids)} samples are {what}, such as {ids[0]!r}" for what, ids in (("new", new), ("gone", gone)) if ids
    ]
    return [f"dataset: of {store.card.dataset.count} samples, {' and '.join(parts)}"]


def default_taps(teacher: Teacher) -> list[str]:
    """The QKV input of TinyMIM's target block (18 of 24, the last of 12), and the deepest features that were trained.

    The latter is ``final``, or for a student of relation distillation the output of its last block but one.
    """
    return [f"block{default_block(teacher.card.depth)}.attn_in", teacher.backbone.last_trained]


def open_or_calibrate(
    store: Store,
    dataset: Dataset,
    teacher: Teacher,
    requests: Sequence[TapRequest],
    known: TeacherRecord | None,
    *,
    threads: int,
    source: str,
) -> tuple[TeacherRecord, dict[str, Encoder]]:
    """A new teacher is calibrated, and nothing written; one that the store has must be the same in all that changes values."""
    if known is None:
        check_unsealed(store, teacher.name)
        return calibrate(store, dataset, teacher, requests, threads=threads, source=source)
    check_teacher(store, teacher, requests, known)
    check_whole(store, known)
    repair_constants(store, dataset, teacher, known, threads=threads)
    return known, TeacherReader(store, teacher.name).encoders


def check_whole(store: Store, known: TeacherRecord) -> None:
    """:class:`StoreMismatch` where this copy of a store has some taps of a teacher only: rows of the others cannot be added."""
    held = held_taps(store, known.name)
    if held is not None:
        raise StoreMismatch(
            f"{store.path}: this copy has {', '.join(sorted(held))} of teacher {known.name!r} and lacks "
            f"{', '.join(sorted(known.taps.keys() - held))}, so nothing can be added to it; get the rest first: hdcache pull URL "
            f"{store.path} --teacher {known.name}"
        )


def check_teacher(store: Store, teacher: Teacher, requests: Sequence[TapRequest], known: TeacherRecord) -> None:
    """:class:`StoreMismatch` where a teacher that the store has was made with other settings than are asked for."""
    asked = {
        "card": teacher.card.whole(),
        "requests": [entry.whole() for entry in requests],
        "dataset": store.card.dataset.fingerprint,
        "views": store.card.views.whole(),
    }
    found = {key: known.whole()[key] for key in asked} | {"card": known.card.told_by(teacher.card).whole()}
    found["requests"] = sorted(found["requests"], key=lambda entry: str(entry["tap"]))
    lines = differences(asked, found)
    if lines:
        raise StoreMismatch(
            f"teacher {teacher.name!r} in {store.path} was made with other settings ({'; '.join(lines)}); "
            f"repeat its settings, or add this one under another name: --teacher {store.free_name(teacher.name)}=..."
        )

"""Every way of reading the store of lane_store.py: what damage and faults are judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import lane_store
from hdcache.api import OpenedStore
from hdcache.errors import UnreadableImage
from hdcache.geometry import read_geometry
from hdcache.index import check_records, held_taps
from hdcache.info import describe_store
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.packed import packed_dataset
from hdcache.reader import TeacherReader
from hdcache.row_arrays import MASK_ARRAY
from hdcache.schema import Preprocessing
from hdcache.store import Store

TEACHERS = ("masked", "plain")
Outcome = str | Exception
"""What one way of reading gave: a digest of the values, or the error."""


def _digest(value: Any) -> str:
    hasher = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            part = part.numpy()
        if isinstance(part, np.ndarray):
            hasher.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part):
                add(str(key))
                add(part[key])
        elif isinstance(part, list | tuple):
            hasher.update(f"{len(part)}:".encode())
            for item in part:
                add(item)
        elif hasattr(part, "patches"):
            add([part.prefix, part.patches])
        else:
            hasher.update(repr(part).encode() + b"\0")

    add(value)
    return hasher.hexdigest()


def read_everything(opened: Callable[[], Store]) -> dict[str, Outcome]:
    """Open a store as a new process would, and read all of it by each way that there is; each way's outcome under its name."""
    found: dict[str, Outcome] = {}

    def way(name: str, work: Callable[[], Any]) -> Any:
        try:
            value = work()
            found[name] = _digest(value)
        except Exception as error:
            found[name] = error
            return None
        return value

    kept: list[Store] = []

    def root() -> Any:
        kept.append(opened())
        check_records(kept[0])
        return kept[0].card.model_dump(mode="json", exclude={"dataset": {"spec"}})

    way("open", root)
    if not kept:
        return found
    store, count = kept[0], lane_store.ROWS
    way("teachers", OpenedStore(store).teachers)
    way("ids", lambda: store.ids)
    way("labels", lambda: store.labels)
    way("info", lambda: _facts(store))
    for view in range(lane_store.VIEWS):
        way(f"views/{view}", lambda view=view: read_geometry(store, view))
    dataset = way("samples", lambda: packed_dataset(store))
    for name in lane_store.IDS if dataset is not None else ():
        way(f"samples/{name}", lambda name=name: _sample(dataset, name))
    found["samples"] = found["samples"] if isinstance(found["samples"], Exception) else _digest(dataset is None)
    way("loader", lambda: _loader(store))
    for teacher in TEACHERS:
        _read_teacher(store, teacher, count, way)
    return found


def _read_teacher(store: Store, teacher: str, count: int, way: Callable[[str, Callable[[], Any]], Any]) -> None:
    way(f"{teacher} held", lambda: held_taps(store, teacher))
    readers: list[TeacherReader] = []

    def record() -> Any:
        readers.append(TeacherReader(store, teacher))
        return readers[0].record.model_dump(mode="json", exclude={"source"})

    way(f"{teacher} record", record)
    if not readers:
        return
    reader = readers[0]
    way(f"{teacher} weights", lambda: reader.weights)
    for view in range(lane_store.VIEWS):
        where = f"{teacher}/{view}"
        way(f"{where} failed", lambda view=view: reader.manifest(view).failed)
        if reader.record.card.mask is not None:
            way(f"{where} masks", lambda view=view: reader.unpacked(reader.packed_masks(view, 0, count)))
        for tap, card in reader.record.taps.items():
            parts = way(f"{where} {tap} rows", lambda view=view, tap=tap: reader.rows(view, tap, 0, count))
            for name, array in card.arrays.items():
                key = f"{tap}/{name}"
                way(f"{where} {key} copied", lambda view=view, key=key, array=array: _copied(reader, view, key, array))
            if parts is not None:
                tensors = {name: torch.from_numpy(value) for name, value in parts.items()}
                way(f"{where} {tap} decoded", lambda tap=tap, tensors=tensors: reader.decode(tap, tensors))
        if reader.record.card.mask is not None:
            card = lane_store.masks_of(store.card, view)
            way(f"{where} masks copied", lambda view=view, card=card: _copied(reader, view, MASK_ARRAY, card[0]))


def _loader(store: Store) -> Any:
    """The views that training goes through, and the rows of its epochs: of each teacher, of both, of none."""
    samples: Any = lane_store.Samples(store.card.dataset)
    options = Options(batch_size=4, preprocessing=Preprocessing(size=48))
    found = []
    for teachers in ((), *((name,) for name in TEACHERS), TEACHERS):
        loader = Loader(samples, options, views=store.card.views, store=store, teachers=teachers)
        found.append([loader.views, *(loader.order(epoch) for epoch in range(len(loader.views)))])
    return found


def _copied(reader: TeacherReader, view: int, key: str, row: Any) -> Any:
    into = np.zeros((lane_store.ROWS, *row.shape), row.dtype)
    reader.expect_rows(view, key, 0, lane_store.ROWS)
    reader.copy_rows(view, key, 0, lane_store.ROWS, list(into))
    return into


def _sample(dataset: Any, name: str) -> Any:
    try:
        return dataset.read(name)
    except UnreadableImage as error:
        return str(error)


def _facts(store: Store) -> str:
    """What ``hdcache info`` says, without where the store lies, where data and weights were, and what wrote it."""
    facts = describe_store(store)
    facts["dataset"].pop("spec")
    for teacher in facts["teachers"].values():
        teacher.pop("source")
    return json.dumps(
        {key: value for key, value in facts.items() if key not in ("path", "written_with")}, sort_keys=True
    )

"""Damage to a store, and what readers make of it: shared by test_faults.py and benchmarks/faults.py.

The store is that of lane_store.py: every encoding, masks, failed rows, kept samples, two teachers, two views. One injection damages
one object (or exchanges two). Then everything is opened and read anew, by every way of reading, and compared with what was there
before, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import lane_store
import small_store
from hdcache.api import OpenedStore
from hdcache.draws import uniform
from hdcache.durable import durable_write
from hdcache.errors import HdcacheError, UnreadableImage
from hdcache.geometry import read_geometry
from hdcache.index import held_taps
from hdcache.info import describe_store
from hdcache.integrity import verify
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.packed import packed_dataset
from hdcache.reader import TeacherReader
from hdcache.row_arrays import MASK_ARRAY
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.store import ABOUT, About, Store

TEACHERS = ("masked", "plain")
UNPROTECTED = re.compile(r"(?:teachers/[^/]+/)?about\.json")
"""Keys of what no record vouches for, and no value rests on."""
Change = Mapping[str, bytes | None]
"""Key -> what lies there instead; None: nothing."""
Outcome = str | Exception
"""What one way of reading gave: a digest of the values, or the error."""


# Stores


def write_store(root: Path, version: int = 0) -> dict[str, bytes]:
    """Write the store; every object by its key.

    ``version`` 1: an earlier one, of the same identities and settings but other numbers; 2: another store of the same shape.
    """

    def other(dtype: str, *shape: int, key: str) -> Any:
        return small_numbers(dtype, *shape, key=f"{key} {version}" if version else key)

    def card(**dataset: Any) -> Any:
        found = small_card(**dataset)
        if version < 2:
            return found
        data = found.dataset.model_copy(update={"fingerprint": "e" * 64})
        return found.model_copy(update={"dataset": data, "views": ViewSpec(seed=4)})

    small_numbers, small_card = small_store.numbers, small_store.store_card
    labels = (lane_store.LABELS + version) % 3 - 1
    with (
        mock.patch.object(small_store, "numbers", other),
        mock.patch.object(lane_store, "numbers", other),
        mock.patch.object(lane_store, "store_card", card),
        mock.patch.object(lane_store, "LABELS", labels),
        mock.patch.object(lane_store.Samples, "labels", labels),
    ):
        lane_store.write(root)
    for teacher in TEACHERS:
        durable_write(root / "teachers" / teacher / ABOUT, About(source=f"made by hand {version}").canonical())
    return objects_of(root)


def objects_of(root: Path) -> dict[str, bytes]:
    """Every object of a store by its key: all files but locks."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


# Injections


@dataclass(frozen=True)
class Injection:
    """One damage."""

    kind: str
    key: str
    """The object that is damaged; of two that are exchanged, the first."""
    change: Change

    @contextmanager
    def applied(self, root: Path, objects: Mapping[str, bytes]) -> Iterator[None]:
        """The store at ``root``, damaged for as long as this lasts."""
        try:
            for key, data in self.change.items():
                if data is None:
                    (root / key).unlink()
                else:
                    (root / key).write_bytes(data)
            yield
        finally:
            for key in self.change:
                (root / key).write_bytes(objects[key])


def whole_damages(key: str, data: bytes) -> Iterator[Injection]:
    """Deleted, cut, zero-filled and extended."""
    yield Injection("deleted", key, {key: None})
    cuts = {"cut to nothing": 0, "cut to 1 byte": 1, "cut to half": len(data) // 2, "cut by 1 byte": len(data) - 1}
    seen = {len(data)}
    for kind, size in cuts.items():
        if size not in seen:
            seen.add(size)
            yield Injection(kind, key, {key: data[:size]})
    if data.strip(b"\0"):
        yield Injection("zero-filled", key, {key: bytes(len(data))})
    yield Injection("a zero byte longer", key, {key: data + b"\0"})
    if key.endswith(".json"):
        yield Injection("a line feed longer", key, {key: data + b"\n"})


def _siblings(key: str, objects: Mapping[str, bytes], seed: int) -> Iterator[tuple[str, str]]:
    """What ``key`` could be taken for: which kind of sibling, and its key."""
    folder, _, name = key.rpartition("/")
    size = len(objects[key])

    def one(found: list[str]) -> str | None:
        found = [other for other in found if objects[other] != objects[key]]
        same = [other for other in found if len(objects[other]) == size] or found
        return same[int(uniform(1, seed, "sibling", key)[0] * len(same))] if same else None

    # Shards of one array, receipts of one ledger, the bytes of kept samples.
    beside = [o for o in objects if o != key and o.rpartition("/")[0] == folder and o.rpartition("/")[2][0] == name[0]]
    if folder.startswith("samples/pixels/bytes/"):
        beside = [o for o in objects if o != key and o.startswith("samples/pixels/bytes/") and o.endswith(f"/{name}")]
    kinds = {"another shard": one([o for o in beside if name != "zarr.json"])}
    swapped = re.sub(r"views/[01]/", lambda found: "views/1/" if found[0] == "views/0/" else "views/0/", key, count=1)
    kinds["another view's"] = one([swapped] if swapped in objects else [])
    for mine, theirs in (TEACHERS, TEACHERS[::-1]):
        if key.startswith(f"teachers/{mine}/"):
            moved = f"teachers/{theirs}/{key.removeprefix(f'teachers/{mine}/')}"
            kinds["another teacher's"] = one([moved] if moved in objects else [])
    alike = [o for o in objects if len(objects[o]) == size and o not in kinds.values()]
    kinds["any of its size"] = one(alike)
    for kind, found in kinds.items():
        if found is not None:
            yield kind, found


def exchanges(objects: Mapping[str, bytes], seed: int) -> Iterator[Injection]:
    """Every object exchanged with a sibling of each kind, and overwritten by it."""
    seen = set()
    for key in objects:
        for kind, other in _siblings(key, objects, seed):
            yield Injection(f"overwritten by {kind}", key, {key: objects[other]})
            if frozenset((key, other)) not in seen:
                seen.add(frozenset((key, other)))
                yield Injection(f"exchanged with {kind}", key, {key: objects[other], other: objects[key]})


def flipped(key: str, data: bytes, seed: int, number: int) -> Injection:
    """One bit flipped at a drawn place."""
    place = int(uniform(1, seed, "flip", key, number)[0] * 8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return Injection("one bit flipped", key, {key: bytes(changed)})


def injections(
    objects: Mapping[str, bytes], others: Mapping[str, Mapping[str, bytes]], flips: int, seed: int
) -> list[Injection]:
    """All damages to a store; ``others`` are stores whose objects may lie in the place of its own, by what they are."""
    found = [damage for key, data in objects.items() for damage in whole_damages(key, data)]
    found += exchanges(objects, seed)
    for kind, store in others.items():
        found += [
            Injection(kind, key, {key: store[key]}) for key in objects if store.get(key, objects[key]) != objects[key]
        ]
    return found + [flipped(key, objects[key], seed, n) for key in objects if objects[key] for n in range(flips)]


# Reading


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


# Judging


@dataclass(frozen=True)
class Verdict:
    """What became of one injection."""

    reading: str
    """``open`` or ``read``: that refused it; ``same``: what was read is what was there; ``wrong``: it is not, and nobody said so."""
    quick: bool
    """Whether ``verify --quick`` said so."""
    full: bool
    bugs: tuple[str, ...] = ()
    """Errors of another class than ours, and messages that do not name what is damaged."""


def judge(injection: Injection, root: Path, truth: Mapping[str, Outcome], found: Mapping[str, Outcome]) -> Verdict:
    """Compare what was read of a damaged store with the truth, and verify the store as it lies there."""
    bugs = bugs_of(injection, root, found)
    reading = reading_of(truth, found)
    full, quick = (_verified(injection, root, bugs, quick=quick) for quick in (False, True))
    return Verdict(reading, quick, full, tuple(bugs))


def reading_of(truth: Mapping[str, Outcome], found: Mapping[str, Outcome]) -> str:
    """As :attr:`Verdict.reading`."""
    if isinstance(found["open"], Exception):
        return "open"
    if wrong_ways(truth, found):
        return "wrong"
    return "read" if any(isinstance(outcome, Exception) for outcome in found.values()) else "same"


def bugs_of(injection: Injection, root: Path, found: Mapping[str, Outcome]) -> list[str]:
    """As :attr:`Verdict.bugs`, of reading."""
    errors = [(name, outcome) for name, outcome in found.items() if isinstance(outcome, Exception)]
    return [fault for name, error in errors for fault in _faults(injection, root, name, error)]


def wrong_ways(truth: Mapping[str, Outcome], found: Mapping[str, Outcome]) -> list[str]:
    """Ways of reading that gave something else than was there, without an error."""
    return [name for name, outcome in found.items() if isinstance(outcome, str) and outcome != truth.get(name)]


def _faults(injection: Injection, root: Path, name: str, error: Exception) -> list[str]:
    if not isinstance(error, HdcacheError):
        return [f"{name}: {type(error).__name__}: {error}"]
    return [] if _names(injection, root, str(error)) else [f"{name}: does not name it: {error}"]


def _names(injection: Injection, root: Path, message: str) -> bool:
    """Whether a message names what is damaged, or its folder."""
    return any(str((root / key).parent) in message for key in injection.change)


def _verified(injection: Injection, root: Path, bugs: list[str], *, quick: bool) -> bool:
    name = "verify --quick" if quick else "verify"
    try:
        found = verify(Store.open(root), quick=quick)
    except Exception as error:
        bugs += _faults(injection, root, name, error)
        return True
    if found.faults and not any(_names(injection, root, fault) for fault in found.faults):
        bugs.append(f"{name}: does not name it: {found.faults[0]}")
    return not found.good

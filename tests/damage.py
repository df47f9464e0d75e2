"""Damage to a store: shared by test_faults.py and benchmarks/faults.py.

The store is that of lane_store.py: every encoding, masks, failed rows, kept samples, two teachers, two views. One injection damages
one object, exchanges two, deletes a folder, or does two of these at once. Then everything is opened and read anew, by every way of
reading (whole_reading.py), and compared with what was there before, to the bit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import lane_store
import small_store
from hdcache.draws import uniform
from hdcache.durable import durable_write, stored_object
from hdcache.ledgers import INDEX, MANIFEST
from hdcache.schema import ViewSpec
from hdcache.store import ABOUT, About
from whole_reading import TEACHERS

UNPROTECTED = re.compile(r"(?:teachers/[^/]+/)?about\.json")
"""Keys of what no record vouches for, and no value rests on."""
Change = Mapping[str, bytes | None]
"""Key -> what lies there instead; None: nothing."""


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
    """The object or folder that is damaged; of two that are exchanged, the first."""
    change: Change
    folders: tuple[str, ...] = ()
    """Folders that are gone, with all in them that ``change`` lists."""

    @contextmanager
    def applied(self, root: Path, objects: Mapping[str, bytes]) -> Iterator[None]:
        """The store at ``root``, damaged for as long as this lasts."""
        try:
            for key, data in self.change.items():
                if data is None:
                    (root / key).unlink()
                else:
                    (root / key).write_bytes(data)
            for folder in self.folders:
                shutil.rmtree(root / folder)
            yield
        finally:
            for key in self.change:
                (root / key).parent.mkdir(parents=True, exist_ok=True)
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


def folders_deleted(objects: Mapping[str, bytes]) -> Iterator[Injection]:
    """Every folder of a store, at every level."""
    for folder in sorted({str(parent) for key in objects for parent in PurePosixPath(key).parents} - {"."}):
        inside = [key for key in objects if key.startswith(f"{folder}/")]
        yield Injection("a folder deleted", folder, dict.fromkeys(inside), (folder,))


def both(kind: str, one: Injection, two: Injection) -> Injection | None:
    """Two damages at once; None where they meet in one object."""
    if one.change.keys() & two.change.keys():
        return None
    key = f"{one.key} ({one.kind}) + {two.key} ({two.kind})"
    return Injection(kind, key, {**one.change, **two.change}, one.folders + two.folders)


ROLES = {
    "a seal": re.compile(rf".*/{re.escape(MANIFEST)}"),
    "a receipt": re.compile(r".*/receipts/\d+\.json"),
    "a record": re.compile(r"(?:teachers/[^/]+/)?zarr\.json|samples/receipt\.json"),
    "the index": re.compile(re.escape(INDEX)),
}
"""What two damages at once are drawn from."""
TOGETHER = (
    ("a seal", "a receipt"),
    ("a record", "a seal"),
    ("the index", "a seal"),
    ("the index", "a folder"),
    ("the index", "anything"),
    ("a folder", "anything"),
    ("anything", "anything"),
)


def pairs(found: Sequence[Injection], number: int, seed: int) -> Iterator[Injection]:
    """So many of each kind of pair (:data:`TOGETHER`), drawn: a third of the damages are deletions."""
    for first, second in TOGETHER:
        lots = [_lot(found, role) for role in (first, second)]
        drawn = uniform(6 * 50 * number, seed, "pairs", first, second).reshape(-1, 6).tolist()
        count = 0
        for draw in drawn:
            one, two = (_drawn(lot, draw[3 * i : 3 * i + 3]) for i, lot in enumerate(lots))
            if second == "a receipt" and one.key.rpartition("/")[0] != two.key.rpartition("/receipts/")[0]:
                continue  # of one ledger
            pair = both(f"two at once: {first} and {second}", one, two)
            if pair is not None and count < number:
                count += 1
                yield pair


def _lot(found: Sequence[Injection], role: str) -> dict[str, list[Injection]]:
    lot: dict[str, list[Injection]] = {}
    for one in found:
        if role == "anything" or (
            one.folders if role == "a folder" else role in ROLES and ROLES[role].fullmatch(one.key)
        ):
            lot.setdefault(one.kind, []).append(one)
    return lot


def _drawn(lot: Mapping[str, list[Injection]], draw: Sequence[float]) -> Injection:
    kinds = sorted(lot)
    kind = "deleted" if draw[0] < 1 / 3 and "deleted" in lot else kinds[int(draw[1] * len(kinds))]
    return lot[kind][int(draw[2] * len(lot[kind]))]


def injections(
    objects: Mapping[str, bytes], others: Mapping[str, Mapping[str, bytes]], flips: int, seed: int, together: int = 0
) -> list[Injection]:
    """All damages to a store, no two of which are the same; ``others`` are stores whose objects may lie in the place of its own, by
    what they are; ``together`` is how many to draw of each kind of pair.
    """
    found = [damage for key, data in objects.items() for damage in whole_damages(key, data)]
    found += [*exchanges(objects, seed), *folders_deleted(objects)]
    for kind, store in others.items():
        found += [
            Injection(kind, key, {key: store[key]}) for key in objects if store.get(key, objects[key]) != objects[key]
        ]
    found += [flipped(key, objects[key], seed, n) for key in objects if objects[key] for n in range(flips)]
    found += list(pairs(found, together, seed))
    return list({_what(one): one for one in reversed(found)}.values())[::-1]


def _what(injection: Injection) -> Any:
    """What an injection does, whatever it is called."""
    changed = {key: None if data is None else stored_object(data).sha256 for key, data in injection.change.items()}
    return frozenset(changed.items()), frozenset(injection.folders)


def is_smaller(injection: Injection, objects: Mapping[str, bytes]) -> bool:
    """Whether what is left is a store as it was before an extraction, or a copy, was done: nothing in it says that there was more.

    The index is gone, and with it seals, and nothing but what was theirs.
    """
    gone = {key for key, data in injection.change.items() if data is None}
    left = objects.keys() - gone
    if gone != injection.change.keys() or INDEX in left:
        return False
    seals = {key for key in objects if key.endswith(f"/{MANIFEST}")}
    for key in seals & left:
        teacher = re.fullmatch(r"(teachers/[^/]+)/(views/\d+/.*)", key)
        if teacher and not {f"{teacher[1]}/zarr.json", teacher[2]} <= left:
            return False
    homes = tuple(key.removesuffix(MANIFEST) for key in seals & gone)
    homes += tuple(f"teachers/{name}/" for name in TEACHERS if f"teachers/{name}/zarr.json" in gone)
    rest = {key for key in gone - {INDEX} if not key.startswith(homes or "//")}
    # A folder's record goes with the last thing in the folder.
    return all(
        key.endswith("/zarr.json") and not any(other.startswith(key.removesuffix("zarr.json")) for other in left)
        for key in rest
    )

"""Several who copy taps of one teacher to one place at once: the note says what is there, whoever comes first."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hdcache.draws import uniform
from hdcache.errors import InputNotFound, StoreLocked
from hdcache.index import is_held
from hdcache.integrity import verify
from hdcache.schema import StoredObject
from hdcache.sharing import objects, transfer
from hdcache.sharing.folder import Folder
from hdcache.sharing.held_notes import Changed, HeldNote, covers, note_of, sealed_views
from hdcache.sharing.objects import Found, Parts, Place, Trouble
from hdcache.sharing.places import open_place
from hdcache.sharing.selection import Contents, Wanted
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from travelling import bucket_server, write_travelling

KEY = "teachers/u/held.json"
EVERY = frozenset({"block2.out", "final"})
A, B = "block2.out", "final"


class Ask(NamedTuple):
    """What one pusher asks for of teacher ``u``."""

    taps: tuple[str, ...] = ()
    views: tuple[int, ...] = ()

    @property
    def wanted(self) -> Wanted:
        return Wanted(teachers=("u",), taps=self.taps, views=self.views, pixels=False)


class Bucket(Place):
    """Objects in memory, as a bucket has them: no lease, each created once, notes by compare and swap on their md5."""

    def __init__(self, objects: dict[str, bytes], before: Callable[[str, str], None] = lambda what, key: None) -> None:
        self.url, self.objects, self._before = "s3://memory", objects, before

    def find(self, key: str) -> Found | None:
        self._before("find", key)
        data = self.objects.get(key)
        return None if data is None else Found(len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())

    def listing(self, folder: str = "") -> dict[str, Found]:
        self._before("list", folder)
        within = f"{folder}/" if folder else ""
        return {key: Found(len(data), None) for key, data in self.objects.items() if key.startswith(within)}

    def names(self, folder: str = "") -> list[str]:
        self._before("names", folder)
        within = f"{folder}/" if folder else ""
        return sorted({key.removeprefix(within).split("/")[0] for key in self.objects if key.startswith(within)})

    def write(self, key: str, listed: StoredObject, parts: Parts, *, read_back: bool = False) -> None:
        data = b"".join(parts())
        self._before("write", key)
        if self.objects.setdefault(key, data) != data:
            raise self.occupied(key)

    def replace(self, key: str, change: Callable[[bytes | None], bytes | None], limit: int) -> None:
        while True:
            self._before("read", key)
            old = self.objects.get(key)
            new = change(old)
            if new == old:
                return
            self._before("replace", key)
            if new is None:
                self.objects.pop(key, None)  # a bucket deletes whatever is there
                return
            if self.objects.get(key) == old:
                self.objects[key] = new
                return

    def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        self._before("read", key)
        if key not in self.objects:
            raise Trouble("not found", missing=True)
        data = self.objects[key]
        return len(data), iter([data[offset:]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that no test changes."""
    return write_travelling(tmp_path_factory.mktemp("held") / "source")


def push(source: Path, target: Place, ask: Ask, **more: Any) -> Any:
    return copy_store(Folder(source), target, ask.wanted, quiet=True, parallel=1, **more)


def held(data: bytes | None) -> frozenset[str]:
    return EVERY if data is None else frozenset(json.loads(data)["taps"])


def complete(keys: dict[str, int], view: int, source: Path) -> frozenset[str]:
    """The taps of a view that are there, object by object."""
    manifest = json.loads((source / f"teachers/u/views/{view}/manifest.json").read_bytes())["objects"]
    found = set()
    for tap in EVERY:
        own = {key: entry for key, entry in manifest.items() if not is_held(key, "u", EVERY - {tap})}
        assert own
        if all(keys.get(key) == entry["size"] for key, entry in own.items()):
            found.add(tap)
    return frozenset(found)


def check_note(bucket: dict[str, bytes], source: Path) -> None:
    """It says of all sealed views what is there, and the index lists them."""
    place = Bucket(bucket)
    views = sealed_views(place, "u")
    keys = {key: len(data) for key, data in bucket.items()}
    assert held(bucket.get(KEY)) == frozenset.intersection(*(complete(keys, view, source) for view in views))
    assert Contents.read(place).views("u") == views


def check_bucket(bucket: dict[str, bytes], source: Path, folder: Path) -> None:
    """The note is exact, and what is pulled is good."""
    place = Bucket(bucket)
    check_note(bucket, source)
    copy_store(place, Folder(folder), Wanted(), quiet=True)
    found = verify(Store.open(folder))
    assert (found.faults, found.unsealed, found.unlisted) == ([], [], [])


class Turns:
    """Lets several pushers go on one request at a time, in an order that is drawn: some of them stall for long."""

    def __init__(self, names: int, seed: str, after: Callable[[], None]) -> None:
        self._seed, self._after = seed, after
        self._changed, self._waiting, self._alive = threading.Condition(), set[int](), set(range(names))
        self._turn, self._left, self._drawn = -1, 0, 0

    def take(self, name: int) -> None:
        with self._changed:
            self._waiting.add(name)
            self._choose()
            self._changed.wait_for(lambda: self._turn == name)
            self._turn = -1
            self._waiting.discard(name)
            self._after()

    def leave(self, name: int) -> None:
        with self._changed:
            self._alive.discard(name)
            self._left = 0
            self._choose()

    def _draw(self) -> float:
        self._drawn += 1
        return float(uniform(1, self._seed, self._drawn, "turn")[0])

    def _choose(self) -> None:
        if self._waiting != self._alive or not self._alive:
            return
        if not self._left:
            self._next = sorted(self._alive)[int(self._draw() * len(self._alive))]
            self._left = int(400 ** self._draw())
        self._left -= 1
        self._turn = self._next
        self._changed.notify_all()


def race(source: Path, asks: list[Ask], seed: str, bucket: dict[str, bytes]) -> list[BaseException | None]:
    """What became of each pusher; a reader looks after every request."""
    faults: list[BaseException | None] = [None] * len(asks)

    def look() -> None:
        if "index.json" in bucket:
            keys = {key: len(data) for key, data in bucket.items()}
            for view in (0, 1):
                if f"teachers/u/views/{view}/manifest.json" in json.loads(bucket["index.json"])["objects"]:
                    assert held(bucket.get(KEY)) <= complete(keys, view, source)

    lies: list[BaseException] = []

    def reader() -> None:
        try:
            look()
        except AssertionError as error:
            lies.append(error)

    turns = Turns(len(asks), seed, reader)

    def run(number: int) -> None:
        try:
            push(source, Bucket(bucket, lambda what, key: turns.take(number)), asks[number])
        except BaseException as error:
            faults[number] = error
        finally:
            turns.leave(number)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not lies
    return faults


RACES = {
    "one tap each": [Ask((A,)), Ask((B,))],
    "all and one": [Ask(), Ask((B,))],
    "one tap of one view each": [Ask((A,), (0,)), Ask((B,), (1,))],
    "all of one view, one tap of the other": [Ask((), (0,)), Ask((B,), (1,))],
    "three": [Ask((A,), (1,)), Ask((B,), (0,)), Ask((), (1,))],
}


@pytest.mark.parametrize("name", RACES)
def test_pushers_in_any_order_leave_a_note_that_is_exact(name: str, source: Path, tmp_path: Path) -> None:
    for seed in range(12):
        bucket: dict[str, bytes] = {}
        assert race(source, RACES[name], f"{name} {seed}", bucket) == [None] * len(RACES[name])
        check_bucket(bucket, source, tmp_path / f"{seed}")


def test_whoever_stops_at_whatever_request_the_next_mends_it(source: Path, tmp_path: Path) -> None:
    """One pusher ends at its n-th request; another, with another tap, comes after it; then the first runs again."""
    count = 0

    def stop(what: str, key: str) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt

    for first in range(1, 400, 23):
        bucket: dict[str, bytes] = {}
        count = first
        try:
            push(source, Bucket(bucket, stop), Ask((A,), (0,)))
        except KeyboardInterrupt:
            count = 0
        push(source, Bucket(bucket), Ask((B,)))
        check_bucket(bucket, source, tmp_path / f"{first}")
        push(source, Bucket(bucket), Ask((A,), (0,)))
        assert KEY not in bucket
        check_bucket(bucket, source, tmp_path / f"{first}-again")


def within(target: Bucket, what: str, key: str, action: Callable[[], object]) -> Bucket:
    """``target``, whose first request of a kind another pusher comes before with all that it does."""
    seen = []

    def before(which: str, where: str) -> None:
        if (which, where) == (what, key) and not seen:
            seen.append(where)
            action()

    return Bucket(target.objects, before)


PAIRS = {
    "one tap, all": (Ask((A,)), Ask()),
    "one tap each": (Ask((A,)), Ask((B,))),
    "one tap, all of one view": (Ask((A,)), Ask((), (1,))),
    "one tap of one view, all of the other": (Ask((A,), (1,)), Ask((), (0,))),
    "one tap of one view each": (Ask((A,), (1,)), Ask((B,), (0,))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_who_is_done_between_anothers_look_and_its_write(name: str, source: Path, tmp_path: Path) -> None:
    """At each request of the first that is about the note, a seal or the index, the second does all that it does."""
    first, second = PAIRS[name]
    number, came = 0, True
    while came:
        bucket, left, came = Bucket({}), number, False

        def before(what: str, key: str, bucket: Bucket = bucket) -> None:
            nonlocal left, came
            about = key in (KEY, "teachers/u/views", "index.json") or key.endswith("/manifest.json")
            if about and not came:
                left -= 1
                if left < 0:
                    came = True
                    push(source, bucket, second)

        push(source, Bucket(bucket.objects, before), first)
        if came:
            assert held(bucket.objects.get(KEY)) == EVERY
            check_note(bucket.objects, source)
            if number % 6 == 0:
                check_bucket(bucket.objects, source, tmp_path / f"{number}")
        number += 1
    assert number > 20


def test_a_view_that_somebody_sealed_and_died_gets_what_the_next_one_says(source: Path) -> None:
    bucket, sealed = Bucket({}), "teachers/u/views/1/manifest.json"

    def die(what: str, key: str) -> None:
        if sealed in bucket.objects:
            raise KeyboardInterrupt

    def other() -> None:
        with pytest.raises(KeyboardInterrupt):
            push(source, Bucket(bucket.objects, die), Ask((B,), (1,)))

    push(source, within(bucket, "write", "teachers/u/views/0/manifest.json", other), Ask((A,), (0,)))
    assert held(bucket.objects[KEY]) == {A}
    check_note(bucket.objects, source)


@pytest.mark.parametrize("moment", [("names", "teachers/u/views"), ("write", "teachers/u/views/1/receipts/0.json")])
def test_a_source_that_lacks_what_the_others_have_seals_nothing(
    moment: tuple[str, str], source: Path, tmp_path: Path
) -> None:
    """Its view would need the tap that another, who came between, has said to be there."""
    part = tmp_path / "part"
    copy_store(Folder(source), Folder(part), Ask((A,), (1,)).wanted, quiet=True)
    bucket = Bucket({})
    with pytest.raises(InputNotFound, match="lacks tap 'final' of view 1 of teacher 'u'"):
        push(part, within(bucket, *moment, lambda: push(source, bucket, Ask((), (0,)))), Ask((A,)))
    assert "teachers/u/views/1/manifest.json" not in bucket.objects
    assert KEY not in bucket.objects
    check_bucket(bucket.objects, source, tmp_path / "a")


def test_others_who_never_stop_are_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ROUNDS", 3)
    calls = []

    def busy(note: HeldNote, taps: object) -> None:
        calls.append(taps)
        raise Changed

    monkeypatch.setattr(HeldNote, "begin", busy)
    with pytest.raises(
        StoreLocked, match="others change what it has of teacher 'u' all the time; run the same command"
    ):
        push(source, Bucket({}), Ask((A,)))
    assert len(calls) == 3


def test_taps_that_cannot_be_proven_are_not_claimed(source: Path) -> None:
    """What another has left is of the right size and something else."""
    bucket = Bucket({})

    def leave() -> None:
        push(source, bucket, Ask())
        for key, data in bucket.objects.items():
            if not is_held(key, "u", EVERY - {B}):
                bucket.objects[key] = data[:-1] + bytes([data[-1] ^ 1])

    note = HeldNote(within(bucket, "replace", KEY, leave), "u", EVERY, frozenset({A}))
    with pytest.raises(Changed):
        note.begin(frozenset({A}))
    assert held(bucket.objects[KEY]) == {A}


def test_covers_and_notes() -> None:
    some, none = frozenset({A}), frozenset[str]()
    assert [covers(None, None), covers(None, some), covers(some, none), covers(some, some)] == [True] * 4
    assert [covers(some, None), covers(none, some), covers(some, EVERY)] == [False] * 3
    assert note_of(None) is None
    assert json.loads(note_of(EVERY) or b"") == {"taps": sorted(EVERY)}


# Folders: the lease orders who comes; what the second does is decided when it has it


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Ask((A,)), Ask((B,)), EVERY),
        (Ask(), Ask((B,)), EVERY),
        (Ask((B,)), Ask(), EVERY),
        (Ask((A,), (0,)), Ask((A,), (1,)), frozenset({A})),
        (Ask((A,), (0,)), Ask((B,), (1,)), EVERY),
        (Ask((), (0,)), Ask((B,), (1,)), EVERY),
    ],
)
def test_a_copy_to_a_folder_decides_when_it_has_the_lease(
    first: Ask, second: Ask, expected: frozenset[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look at an empty folder; then one is done before the other begins to write."""
    target, run = Folder(tmp_path / "a"), transfer._Copy.run
    waiting = [first]

    def late(copy: transfer._Copy) -> None:
        if waiting:
            push(source, target, waiting.pop())
        run(copy)

    monkeypatch.setattr(transfer._Copy, "run", late)
    push(source, target, second)
    note = target.path / KEY
    assert held(note.read_bytes() if note.is_file() else None) == expected
    found = verify(Store.open(target.path))
    assert (found.faults, found.unsealed, found.unlisted) == ([], [], [])
    assert {view for ask in (first, second) for view in ask.views or (0, 1)} == {*Store.open(target.path).views("u")}


# A real server


def test_pushers_to_a_server_by_compare_and_swap(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.01,) * 5)
    with bucket_server(monkeypatch):
        for number, asks in enumerate(RACES.values()):
            url = f"s3://team/{number}"
            threads = [
                threading.Thread(
                    target=copy_store, args=(Folder(source), open_place(url), ask.wanted), kwargs={"quiet": True}
                )
                for ask in asks
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            place = open_place(url)
            bucket = {key: place.read(key, 1 << 30) or b"" for key in place.listing()}
            check_bucket(bucket, source, tmp_path / f"{number}")


def test_a_note_that_somebody_removed_meanwhile_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.01,) * 5)
    with bucket_server(monkeypatch):
        place = open_place("s3://team/note")
        place.replace("held.json", lambda _: b"1", 9)
        told = []

        def change(old: bytes | None) -> bytes:
            if not told:
                open_place("s3://team/note").replace("held.json", lambda _: None, 9)
            told.append(old)
            return b"2"

        place.replace("held.json", change, 9)
        assert told == [b"1", None]
        assert place.read("held.json", 9) == b"2"

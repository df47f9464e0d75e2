"""Objects by key: proven reading, attempts, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache import stopping
from hdcache.durable import stored_object
from hdcache.errors import Interrupted, StoreCorrupt, Unreachable
from hdcache.schema import StoredObject
from hdcache.sharing import objects
from hdcache.sharing.objects import Found, Parts, Place, RangeIgnored, Trouble, checked_key

BODY = bytes(range(256)) * 3


class Scripted(Place):
    """A place with one object, whose attempts go as a script says: (steps of so many bytes, how it ends)."""

    url = "test://place"

    def __init__(self, body: bytes, script: list[tuple[int, str]]) -> None:
        self.body, self.script = body, list(script)
        self.offsets: list[int] = []

    def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        count, end = self.script.pop(0) if self.script else (len(self.body) + 1, "")
        self.offsets.append(offset)
        if end == "busy":
            raise Trouble("the server is busy or broken (503)", again=True)
        if end == "missing":
            raise Trouble("not found (404)", missing=True)
        if end == "denied":
            raise Trouble("not allowed (403)", denied=True, advice="log in")
        if end == "norange" and offset:
            raise RangeIgnored

        def read() -> Iterator[bytes]:
            left = self.body[offset:][:count]
            for start in range(0, len(left), 50):
                yield left[start : start + 50]
            if end == "cut":
                raise Trouble("the connection was cut", again=True)

        return len(self.body), read()

    def find(self, key: str) -> Found | None:
        raise NotImplementedError

    def listing(self, folder: str = "") -> dict[str, Found]:
        raise NotImplementedError

    def names(self, folder: str = "") -> list[str]:
        raise NotImplementedError

    def write(self, key: str, listed: StoredObject, parts: Parts, *, read_back: bool = False) -> None:
        raise NotImplementedError

    def replace(self, key: str, change: Callable[[bytes | None], bytes | None], limit: int) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.0,) * 5)


attempts = st.lists(
    st.tuples(st.integers(0, len(BODY)), st.sampled_from(["cut", "busy", "norange", "silent"])), max_size=5
)


@given(attempts)
def test_whatever_happens_between_the_object_arrives_as_it_is(script: list[tuple[int, str]]) -> None:
    objects.WAITS = (0.0,) * 5
    place = Scripted(BODY, script)
    assert b"".join(place.parts("a", stored_object(BODY))) == BODY


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b"x", BODY[:-1] + b"y", b""])
def test_another_object_is_refused_before_its_last_part_comes(body: bytes) -> None:
    place, got = Scripted(body, []), []
    with pytest.raises(
        StoreCorrupt, match=r"test://place/a: .* is not what the store lists, and nothing of it was kept"
    ):
        got.extend(place.parts("a", stored_object(BODY)))
    assert len(b"".join(got)) < len(BODY)


def test_an_endless_object_is_left_as_soon_as_it_is_too_long() -> None:
    class Endless(Scripted):
        def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
            return len(BODY), iter(lambda: b"x" * 100, b"")

    with pytest.raises(StoreCorrupt, match="longer than the 768 bytes that are listed"):
        list(Endless(BODY, []).parts("a", stored_object(BODY)))


def test_a_missing_object_is_named() -> None:
    with pytest.raises(StoreCorrupt, match="test://place/a: missing, expected 768 bytes"):
        list(Scripted(BODY, [(0, "missing")]).parts("a", stored_object(BODY)))


def test_what_was_cut_goes_on_where_it_was_cut() -> None:
    place = Scripted(BODY, [(300, "cut"), (100, "cut")])
    assert b"".join(place.parts("a", stored_object(BODY))) == BODY
    assert place.offsets == [0, 300, 400]


def test_after_six_attempts_without_a_byte_it_is_unreachable() -> None:
    place = Scripted(BODY, [(0, "busy")] * 9)
    with pytest.raises(
        Unreachable,
        match=r"test://place/a: cannot be read: the server is busy or broken \(503\) \(6 attempts\); run the same",
    ):
        list(place.parts("a", stored_object(BODY)))
    assert len(place.offsets) == 6


def test_attempts_are_counted_anew_once_a_megabyte_has_come() -> None:
    body = bytes(4 << 20)
    place = Scripted(
        body, [*[(0, "busy")] * 4, (1 << 20, "cut"), *[(0, "busy")] * 4, (1 << 20, "cut"), *[(0, "busy")] * 4]
    )
    assert sum(map(len, place.parts("a", stored_object(body)))) == len(body)


def test_a_stop_is_heard_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (60.0,))
    monkeypatch.setattr(stopping, "_received", [15])
    with pytest.raises(Interrupted, match="stopped by SIGTERM with what has arrived kept"):
        list(Scripted(BODY, [(0, "busy")]).parts("a", stored_object(BODY)))


def test_small_objects_are_read_whole_or_not_at_all() -> None:
    assert Scripted(BODY, [(0, "busy"), (10, "cut"), (10, "silent")]).read("a", 1000) == BODY
    assert Scripted(BODY, [(0, "missing")]).read("a", 1000) is None
    assert Scripted(BODY, [(0, "denied")]).read("a", 1000, optional=True) is None
    with pytest.raises(Unreachable, match=r"test://place/a: cannot be read: not allowed \(403\); log in"):
        Scripted(BODY, [(0, "denied")]).read("a", 1000)
    with pytest.raises(StoreCorrupt, match="768 bytes, a record has 700 at most"):
        Scripted(BODY, []).read("a", 700)


@pytest.mark.parametrize("key", ["../a", "/etc/passwd", "a//b", "a/./b", "a/..", "", "a\\b", "ü", "x" * 600])
def test_keys_that_lead_out_of_a_store_are_refused(key: str) -> None:
    with pytest.raises(StoreCorrupt, match="which leads out of a store"):
        checked_key(key, "s3://b/index.json")


@pytest.mark.parametrize("key", [".lock", ".t.lock", "a/.b", "views/.0.lock", "x.lease", ".x.partial"])
def test_keys_of_locks_and_leftovers_are_refused(key: str) -> None:
    with pytest.raises(StoreCorrupt, match="which is no object's"):
        checked_key(key, "s3://b/index.json")

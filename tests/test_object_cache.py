"""What a cache serves is whole and proven; what does not fit goes, oldest first."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.durable import stored_object
from hdcache.errors import OutOfSpace, StoreCorrupt, UsageError
from hdcache.sharing import object_cache
from hdcache.sharing.object_cache import ObjectCache, cache_folder, cache_limit


class Source:
    """Gives an object in parts, and counts how often it was asked."""

    def __init__(self, data: bytes, fault: Exception | None = None) -> None:
        self.data, self.listed, self.fault, self.asked = data, stored_object(data), fault, 0

    def parts(self) -> Iterator[bytes]:
        self.asked += 1
        yield self.data[: len(self.data) // 2]
        if self.fault is not None:
            raise self.fault
        yield self.data[len(self.data) // 2 :]


def read(cache: ObjectCache, source: Source) -> bytes:
    with cache.open(source.listed, source.parts) as file:
        return file.read()


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("??/*")}


@given(data=st.binary(max_size=3000))
def test_an_object_is_fetched_once_and_served_whole(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, source = tmp_path_factory.mktemp("c"), Source(data)
    cache = ObjectCache(folder, 1 << 20)
    assert [read(cache, source) for _ in range(3)] == [data] * 3
    assert read(ObjectCache(folder, 1 << 20), source) == data, "another process finds it"
    assert source.asked == 1
    assert cache.fetched == len(data)
    assert held(folder) == {hashlib.sha256(data).hexdigest(): data}


@pytest.mark.parametrize("fault", [StoreCorrupt("x: another object"), OSError(5, "I/O error"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(tmp_path: Path, fault: Exception) -> None:
    cache, source = ObjectCache(tmp_path, 1 << 20), Source(b"0123456789", fault)
    with pytest.raises(type(fault)):
        cache.open(source.listed, source.parts)
    assert not [path for path in tmp_path.glob("*/*") if path.is_file()]
    source.fault = None
    assert read(cache, source) == b"0123456789"


@pytest.mark.parametrize("damage", [b"", b"0", b"9999999999", b"0123456789more"])
def test_an_altered_file_is_fetched_again(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    source = Source(b"0123456789")
    read(ObjectCache(tmp_path, 1 << 20), source)
    path = next(tmp_path.glob("??/*"))
    path.write_bytes(damage)
    assert read(ObjectCache(tmp_path, 1 << 20), source) == source.data
    assert source.asked == 2
    assert "altered since it was cached; it is fetched again" in caplog.text
    # The same process sees it too, where the file was exchanged or has another length.
    cache = ObjectCache(tmp_path, 1 << 20)
    read(cache, source)
    path.unlink()
    path.write_bytes(damage)
    assert read(cache, source) == source.data


def test_the_oldest_goes_when_the_limit_is_passed(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, 1000)
    sources = [Source(bytes([number]) * 100) for number in range(9)]
    for number, source in enumerate(sources):
        read(cache, source)
        os.utime(tmp_path / source.listed.sha256[:2] / source.listed.sha256, (number, number))
    sources += [Source(b"new" * 50)]
    assert read(cache, sources[-1]) == b"new" * 50
    kept = held(tmp_path)
    assert sum(map(len, kept.values())) <= 1000 * object_cache.KEEP
    assert sources[0].listed.sha256 not in kept
    assert {source.listed.sha256 for source in sources[2:]} == kept.keys()
    assert read(cache, sources[0]) == sources[0].data
    assert sources[0].asked == 2


def test_an_object_larger_than_the_limit_is_still_served(tmp_path: Path) -> None:
    cache, source = ObjectCache(tmp_path, 10), Source(b"x" * 1000)
    assert read(cache, source) == source.data
    assert not held(tmp_path)


def test_an_open_file_stays_readable_when_it_is_removed(tmp_path: Path) -> None:
    cache, first = ObjectCache(tmp_path, 150), Source(b"a" * 100)
    with cache.open(first.listed, first.parts) as file:
        read(cache, Source(b"b" * 100))
        assert first.listed.sha256 not in held(tmp_path)
        assert file.read() == first.data


def test_unfinished_files_of_the_dead_go_with_time(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, 100)
    (tmp_path / "ab").mkdir(parents=True)
    for name, age in (("old", 2 * 86400), ("new", 0)):
        path = tmp_path / "ab" / f".{name}.1-1.partial"
        path.write_bytes(b"x")
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    read(cache, Source(b"y" * 200))
    assert [path.name for path in (tmp_path / "ab").glob(".*.partial")] == [".new.1-1.partial"]


def test_threads_that_want_the_same_object_fetch_it_once(tmp_path: Path) -> None:
    cache, source = ObjectCache(tmp_path, 1 << 20), Source(b"z" * 5000)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(read(cache, source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [source.data] * 8
    assert source.asked == 1


def test_a_full_disk_makes_room_and_else_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ObjectCache(tmp_path, 1 << 20)
    old, new = Source(b"old" * 100), Source(b"new" * 100)
    read(cache, old)
    real, full = object_cache.durable_parts, [True]

    def parts(path: Path, given: Iterator[bytes]) -> object:
        if full[0]:
            full[0] = len(full) > 1
            raise OutOfSpace(28, "no space left")
        return real(path, given)

    monkeypatch.setattr(object_cache, "durable_parts", parts)
    assert read(cache, new) == new.data
    assert held(tmp_path).keys() == {new.listed.sha256}
    full[:] = [True, True]
    with pytest.raises(
        OutOfSpace,
        match=r"no space for an object of 3 bytes; free some, or put the cache elsewhere \(HDCACHE_CACHE=DIR\)",
    ):
        read(cache, Source(b"123"))


def test_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HDCACHE_CACHE", raising=False)
    monkeypatch.delenv("HDCACHE_CACHE_BYTES", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "hdcache"
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder("~/x") == Path.home() / "x"
    assert 0 < cache_limit(tmp_path / "objects") <= object_cache.MOST_BYTES
    monkeypatch.setenv("HDCACHE_CACHE_BYTES", "3GB")
    assert cache_limit(tmp_path) == 3 * 10**9
    assert cache_limit(tmp_path, "2MB") == 2_000_000
    with pytest.raises(UsageError, match="--cache-size 'much' is no number of bytes"):
        cache_limit(tmp_path, "much")


def test_processes_share_a_cache(tmp_path: Path, python: Callable[..., object]) -> None:
    """Several processes fetch through one small cache at a time: each gets every object right."""
    code = """
        import sys
        from pathlib import Path
        from hdcache.durable import stored_object
        from hdcache.sharing.object_cache import ObjectCache
        cache = ObjectCache(Path(sys.argv[1]), 3000)
        for turn in range(4):
            for number in range(12):
                data = bytes([number]) * (200 + number)
                with cache.open(stored_object(data), lambda: iter([data[:7], data[7:]])) as file:
                    assert file.read() == data
        print("done")
    """
    import textwrap

    started = [python(textwrap.dedent(code), tmp_path) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in started] == ["done\n"] * 3  # type: ignore[attr-defined]
    assert sum(map(len, held(tmp_path).values())) <= 3000


def test_a_disk_that_garbles_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = ObjectCache(tmp_path, 1 << 20), Source(b"0123456789")
    real = object_cache.durable_parts
    monkeypatch.setattr(
        object_cache, "durable_parts", lambda path, parts: real(path, [b"9876543210" for _ in [*parts]][:1])
    )
    with pytest.raises(StoreCorrupt, match="the disk gives other bytes than were written; put the cache elsewhere"):
        cache.open(source.listed, source.parts)
    assert source.asked == 1


def test_what_others_fetch_counts_too(tmp_path: Path) -> None:
    caches = [ObjectCache(tmp_path, 10_000) for _ in range(8)]
    for number in range(400):
        read(caches[number % 8], Source(number.to_bytes(2) * 50))
    assert sum(map(len, held(tmp_path).values())) <= 10_000 * 1.5

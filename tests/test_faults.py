"""Damaged stores: whatever happens to any object, what is read is what was there, or an error that names it."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import damage
import lane_store
import verdicts
from damage import Injection
from hdcache.errors import StoreCorrupt
from hdcache.index import check_records, check_seals
from hdcache.ledgers import INDEX, Ledger
from hdcache.object_files import ObjectFiles
from hdcache.sharing.streaming import open_store
from hdcache.store import Store
from whole_reading import Outcome, read_everything

Made = tuple[Path, dict[str, bytes], dict[str, Outcome]]
OTHERS = {"of an earlier version": 1, "of another store": 2}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Made, dict[str, dict[str, bytes]]]]:
    """A store with its objects and all that is read of it; the objects of two others of its shape."""
    root = tmp_path_factory.mktemp("faults")
    with lane_store.few_taps():
        objects = damage.write_store(root / "store")
        others = {name: damage.write_store(root / str(version), version) for name, version in OTHERS.items()}
        truth = read_everything(lambda: Store.open(root / "store"))
        assert not [found for found in truth.values() if isinstance(found, Exception)]
        yield (root / "store", objects, truth), others


@pytest.fixture(scope="module")
def made(stores: tuple[Made, dict[str, dict[str, bytes]]]) -> Made:
    return stores[0]


@st.composite
def damages(draw: st.DrawFn, objects: dict[str, bytes], others: dict[str, dict[str, bytes]]) -> Injection:
    """One damage, or two at once."""
    one = draw(single_damages(objects, others))
    two = draw(single_damages(objects, others)) if draw(st.booleans()) else None
    return (two and damage.both("two at once", one, two)) or one


@st.composite
def single_damages(draw: st.DrawFn, objects: dict[str, bytes], others: dict[str, dict[str, bytes]]) -> Injection:
    """Any object or folder, and what becomes of it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(list(damage.folders_deleted(objects))))
    key = draw(st.sampled_from(sorted(objects)))
    data = objects[key]
    kind = draw(st.sampled_from(["deleted", "cut", "extended", "flipped", "blanked", "replaced", "exchanged", *others]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    changed: bytes | None = data
    if kind == "deleted":
        changed = None
    elif kind == "cut":
        changed = data[:place]
    elif kind == "extended":
        changed = data + draw(st.binary(min_size=1, max_size=20))
    elif kind == "flipped" and data:
        changed = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
    elif kind == "blanked":
        stop = draw(st.integers(place, len(data)))
        changed = data[:place] + bytes(stop - place) + data[stop:]
    elif kind in others:
        changed = others[kind].get(key, data)
    elif kind in ("replaced", "exchanged"):
        alike = sorted(other for other in objects if len(objects[other]) == len(data)) if draw(st.booleans()) else []
        other = draw(st.sampled_from(alike or sorted(objects)))
        return Injection(kind, key, {key: objects[other]} | ({other: data} if kind == "exchanged" else {}))
    return Injection(kind, key, {key: changed})


def undone(injection: Injection, objects: dict[str, bytes]) -> bool:
    """Whether nothing was changed after all, or only what nobody vouches for."""
    changed = [key for key, data in injection.change.items() if data != objects[key]]
    return all(damage.UNPROTECTED.fullmatch(key) for key in changed)


@settings(max_examples=40, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_was_there_or_an_error(
    data: st.DataObject, stores: tuple[Made, dict[str, dict[str, bytes]]]
) -> None:
    (root, objects, truth), others = stores
    injection = data.draw(damages(objects, others))
    with injection.applied(root, objects):
        found = read_everything(lambda: Store.open(root))
        verdict = verdicts.judge(injection, root, objects, truth, found)
    assert verdicts.wrong_ways(truth, found) == [] or verdict.reading == "fewer"
    assert verdict.reading in ("open", "read", "same", "fewer")
    assert verdict.bugs == ()
    assert verdict.full or verdict.reading == "fewer" or undone(injection, objects)


@pytest.fixture
def streamed(made: Made, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Outcome]]:
    """Reads the store at a URL through a cache."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(logging.getLogger("hdcache.sharing.object_cache"), "disabled", True)
    url = f"file://{made[0]}"
    return lambda cache: read_everything(lambda: open_store(url, cache=cache, cache_size="1GB"))


STREAMED = settings(
    max_examples=12, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@STREAMED
@given(data=st.data())
def test_so_it_is_of_a_store_at_a_url(
    data: st.DataObject,
    stores: tuple[Made, dict[str, dict[str, bytes]]],
    streamed: Callable[[Path], dict[str, Outcome]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    (root, objects, truth), others = stores
    injection, cache = data.draw(damages(objects, others)), tmp_path_factory.mktemp("cache")
    with injection.applied(root, objects):
        found = streamed(cache)
    reading = verdicts.reading_of(injection, objects, truth, found)
    assert reading != "wrong"
    assert verdicts.bugs_of(injection, root, found, reading) == []
    found = streamed(cache)
    assert verdicts.wrong_ways(truth, found) == []
    assert found == truth, "nothing of the damage was kept"


def test_so_it_is_in_a_cache(made: Made, streamed: Callable[[Path], dict[str, Outcome]], tmp_path: Path) -> None:
    """What a file of the cache has become is not read; an object is fetched again."""
    assert streamed(tmp_path) == made[2]
    cached = damage.objects_of(tmp_path)

    @STREAMED
    @given(data=st.data())
    def damaged(data: st.DataObject) -> None:
        injection = data.draw(damages(cached, {}))
        with injection.applied(tmp_path, cached):
            found = streamed(tmp_path)
        assert verdicts.wrong_ways(made[2], found) == []
        assert verdicts.bugs_of(injection, tmp_path, found) == []
        if all(key.startswith("objects/") for key in injection.change):
            assert found == made[2]

    damaged()


def test_a_silently_wrong_read_would_be_seen(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge judges: without the comparison of sha256, an exchanged shard of the same size is read as if it were right."""
    root, objects, truth = made
    one, two = (f"teachers/plain/views/0/final/values/c.{shard}.0.0" for shard in (0, 1))
    injection = Injection("exchanged", one, {one: objects[two], two: objects[one]})
    monkeypatch.setattr(ObjectFiles, "_prove", lambda *_: None)
    with injection.applied(root, objects):
        found = read_everything(lambda: Store.open(root))
        verdict = verdicts.judge(injection, root, objects, truth, found)
    assert verdict.reading == "wrong"
    assert "plain/0 final rows" in verdicts.wrong_ways(truth, found)
    assert (verdict.quick, verdict.full) == (False, True)
    assert read_everything(lambda: Store.open(root)) == truth, "it was mended"


def test_injections_are_the_same_everywhere_and_change_something(
    stores: tuple[Made, dict[str, dict[str, bytes]]],
) -> None:
    (_, objects, _), others = stores
    found = damage.injections(objects, others, 2, 7, 4)
    assert found == damage.injections(objects, others, 2, 7, 4)
    assert found != damage.injections(objects, others, 2, 8, 4)
    assert {injection.key for injection in found} > objects.keys()
    assert all(objects[key] != data for injection in found for key, data in injection.change.items())
    changes = [(tuple(sorted(injection.change.items())), injection.folders) for injection in found]
    assert len({repr(change) for change in changes}) == len(changes), "no two of them are the same"
    kinds = Counter(injection.kind for injection in found)
    assert {"deleted", "cut to nothing", "cut to half", "zero-filled", "one bit flipped", *others} < kinds.keys()
    for kind in ("another shard", "another view's", "another teacher's", "any of its size"):
        assert {f"exchanged with {kind}", f"overwritten by {kind}"} <= kinds.keys()
    assert {kinds[f"two at once: {one} and {two}"] for one, two in damage.TOGETHER} <= {3, 4}
    folders = {injection.key for injection in found if injection.kind == "a folder deleted"}
    assert folders >= {"teachers", "teachers/plain/views/1", "samples/pixels", "views/0/receipts"}
    assert ".lock" not in objects


LOST = {
    "teachers/plain/views/1/manifest.json": "a view that was sealed",
    "views/1/manifest.json": "the geometry of one",
    "samples/pixels/manifest.json": "kept samples",
    "teachers/plain/zarr.json": "a teacher",
}


@pytest.mark.parametrize("key", LOST)
def test_a_lost_record_is_no_smaller_store(key: str, made: Made, tmp_path: Path) -> None:
    """Readers would go on with the views and teachers that are left."""
    root, objects, truth = made
    with Injection("deleted", key, {key: None}).applied(root, objects):
        store = Store.open(root)
        with pytest.raises(StoreCorrupt, match=rf"{re.escape(key)}: missing, though it was there"):
            check_records(store)
        found = read_everything(lambda: Store.open(root))
        assert verdicts.wrong_ways(truth, found) == []
        for way in ("info", "loader"):
            assert isinstance(found[way], Exception) or (way, key) == ("loader", "samples/pixels/manifest.json")
    check_seals(Store.open(root))
    if key.endswith("manifest.json"):
        # A seal that is withdrawn, since failed rows are tried again, is none that was lost.
        copy = Path(shutil.copytree(root, tmp_path / "copy"))
        Ledger(copy, key.removesuffix("/manifest.json")).unseal()
        assert not (copy / key).exists()
        check_seals(Store.open(copy))


FOLDERS = ("teachers", "teachers/plain", "teachers/plain/views", "teachers/plain/views/1", "views/1", "samples/pixels")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_lost_folder_is_no_smaller_store_unless_the_index_went_with_it(folder: str, made: Made) -> None:
    root, objects, truth = made
    inside = [key for key in objects if key.startswith(f"{folder}/")]
    lost = Injection("a folder deleted", folder, dict.fromkeys(inside), (folder,))
    with lost.applied(root, objects):
        assert not (root / folder).exists()
        found = read_everything(lambda: Store.open(root))
        verdict = verdicts.judge(lost, root, objects, truth, found)
    assert (verdict.reading, verdict.quick, verdict.full, verdict.bugs) == ("open", True, True, ())
    with (both := both_gone(lost)).applied(root, objects):
        found = read_everything(lambda: Store.open(root))
        reading = verdicts.reading_of(both, objects, truth, found)
    # What a teacher's seals rest on is missed without an index too.
    assert reading == ("open" if folder == "views/1" else "fewer")
    assert read_everything(lambda: Store.open(root)) == truth, "it was mended"


def both_gone(lost: Injection) -> Injection:
    """A loss, and that of the index."""
    found = damage.both("two at once", lost, Injection("deleted", INDEX, {INDEX: None}))
    assert found is not None
    return found


def test_what_is_left_tells_of_more_unless_nothing_is_left_of_it(made: Made) -> None:
    _, objects, _ = made
    view = [key for key in objects if key.startswith("teachers/plain/views/1/")]
    seal = "teachers/plain/views/1/manifest.json"

    def smaller(change: dict[str, bytes | None]) -> bool:
        return damage.is_smaller(Injection("", "", change), objects)

    assert smaller(dict.fromkeys([INDEX, *view]))
    assert smaller(dict.fromkeys([INDEX, seal]))
    assert smaller(dict.fromkeys([INDEX]))
    assert not smaller(dict.fromkeys(view))
    assert not smaller(dict.fromkeys([INDEX, *view, "samples/label/c.0"]))
    assert not smaller({**dict.fromkeys(view), INDEX: b""})
    assert not smaller(dict.fromkeys([INDEX, "teachers/plain/views/1/receipts/0.json"]))
    assert not smaller(dict.fromkeys([INDEX, "teachers/plain/zarr.json"]))
    assert not smaller(dict.fromkeys([INDEX, *(key for key in objects if key.startswith("views/1/"))]))


def test_a_message_names_what_is_damaged_and_not_all_that_is_around_it(tmp_path: Path) -> None:
    def named(key: str, message: str, *folders: str) -> bool:
        return verdicts.names(Injection("", key, {key: None}, folders), tmp_path, message)

    shard = "teachers/t/views/0/final/values/c.1.0.0"
    assert named(shard, f"{tmp_path}/{shard}: missing")
    assert named(shard, f"{tmp_path}/teachers/t/views/0/final/values: not the shape")
    assert not named(shard, f"{tmp_path}/teachers/t/views/0/final/values/c.0.0.0: missing")
    assert not named(shard, f"{tmp_path}/teachers/t: no such view")
    assert not named("teachers/t/zarr.json", f"{tmp_path}/teachers/t/views/0/manifest.json: another identity")
    assert named("index.json", f"{tmp_path}/index.json: not valid JSON")
    assert not named("index.json", f"{tmp_path}: not valid JSON")
    assert not named("zarr.json", f"{tmp_path}/teachers/zarr.json: missing")
    assert named("teachers/t/zarr.json", f"{tmp_path}/teachers/t: missing", "teachers/t")

"""Damaged stores: whatever happens to any object, what is read is what was there, or an error that names it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import damage
import lane_store
from damage import Injection
from hdcache.index import check_records, check_seals
from hdcache.object_files import ObjectFiles
from hdcache.sharing.streaming import open_store
from hdcache.store import Store

Made = tuple[Path, dict[str, bytes], dict[str, damage.Outcome]]
OTHERS = {"of an earlier version": 1, "of another store": 2}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Made, dict[str, dict[str, bytes]]]]:
    """A store with its objects and all that is read of it; the objects of two others of its shape."""
    root = tmp_path_factory.mktemp("faults")
    with lane_store.few_taps():
        objects = damage.write_store(root / "store")
        others = {name: damage.write_store(root / str(version), version) for name, version in OTHERS.items()}
        truth = damage.read_everything(lambda: Store.open(root / "store"))
        assert not [found for found in truth.values() if isinstance(found, Exception)]
        yield (root / "store", objects, truth), others


@pytest.fixture(scope="module")
def made(stores: tuple[Made, dict[str, dict[str, bytes]]]) -> Made:
    return stores[0]


@st.composite
def damages(draw: st.DrawFn, objects: dict[str, bytes], others: dict[str, dict[str, bytes]]) -> Injection:
    """Any object, and what becomes of it."""
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


@settings(max_examples=60, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_was_there_or_an_error(
    data: st.DataObject, stores: tuple[Made, dict[str, dict[str, bytes]]]
) -> None:
    (root, objects, truth), others = stores
    injection = data.draw(damages(objects, others))
    with injection.applied(root, objects):
        found = damage.read_everything(lambda: Store.open(root))
        verdict = damage.judge(injection, root, truth, found)
    assert damage.wrong_ways(truth, found) == []
    assert verdict.reading in ("open", "read", "same")
    assert verdict.bugs == ()
    assert verdict.full or undone(injection, objects)


@pytest.fixture
def streamed(made: Made, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, damage.Outcome]]:
    """Reads the store at a URL through a cache."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(logging.getLogger("hdcache.sharing.object_cache"), "disabled", True)
    url = f"file://{made[0]}"
    return lambda cache: damage.read_everything(lambda: open_store(url, cache=cache, cache_size="1GB"))


STREAMED = settings(
    max_examples=12, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@STREAMED
@given(data=st.data())
def test_so_it_is_of_a_store_at_a_url(
    data: st.DataObject,
    stores: tuple[Made, dict[str, dict[str, bytes]]],
    streamed: Callable[[Path], dict[str, damage.Outcome]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    (root, objects, truth), others = stores
    injection, cache = data.draw(damages(objects, others)), tmp_path_factory.mktemp("cache")
    with injection.applied(root, objects):
        found = streamed(cache)
    assert damage.wrong_ways(truth, found) == []
    assert damage.bugs_of(injection, root, found) == []
    found = streamed(cache)
    assert damage.wrong_ways(truth, found) == []
    assert found == truth, "nothing of the damage was kept"


def test_so_it_is_in_a_cache(made: Made, streamed: Callable[[Path], dict[str, damage.Outcome]], tmp_path: Path) -> None:
    """What a file of the cache has become is not read; an object is fetched again."""
    assert streamed(tmp_path) == made[2]
    cached = damage.objects_of(tmp_path)

    @STREAMED
    @given(data=st.data())
    def damaged(data: st.DataObject) -> None:
        injection = data.draw(damages(cached, {}))
        with injection.applied(tmp_path, cached):
            found = streamed(tmp_path)
        assert damage.wrong_ways(made[2], found) == []
        assert damage.bugs_of(injection, tmp_path, found) == []
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
        found = damage.read_everything(lambda: Store.open(root))
        verdict = damage.judge(injection, root, truth, found)
    assert verdict.reading == "wrong"
    assert "plain/0 final rows" in damage.wrong_ways(truth, found)
    assert (verdict.quick, verdict.full) == (False, True)
    assert damage.read_everything(lambda: Store.open(root)) == truth, "it was mended"


def test_injections_are_the_same_everywhere_and_change_something(
    stores: tuple[Made, dict[str, dict[str, bytes]]],
) -> None:
    (_, objects, _), others = stores
    found = damage.injections(objects, others, 2, 7)
    assert found == damage.injections(objects, others, 2, 7)
    assert found != damage.injections(objects, others, 2, 8)
    assert {injection.key for injection in found} == objects.keys()
    assert all(objects[key] != data for injection in found for key, data in injection.change.items())
    kinds = {injection.kind for injection in found}
    assert {"deleted", "cut to nothing", "cut to half", "zero-filled", "one bit flipped", *others} < kinds
    for kind in ("another shard", "another view's", "another teacher's", "any of its size"):
        assert {f"exchanged with {kind}", f"overwritten by {kind}"} <= kinds
    assert ".lock" not in objects


LOST = {
    "teachers/plain/views/1/manifest.json": "a view that was sealed",
    "views/1/manifest.json": "the geometry of one",
    "samples/pixels/manifest.json": "kept samples",
    "teachers/plain/zarr.json": "a teacher",
}


@pytest.mark.parametrize("key", LOST)
def test_a_lost_record_is_no_smaller_store(key: str, made: Made) -> None:
    """Readers would go on with the views and teachers that are left."""
    root, objects, truth = made
    injection = Injection("deleted", key, {key: None})
    with injection.applied(root, objects):
        store = Store.open(root)
        with pytest.raises(Exception, match=rf"{re.escape(key)}: missing, and all that it speaks of is there"):
            check_records(store)
        found = damage.read_everything(lambda: Store.open(root))
        assert damage.wrong_ways(truth, found) == []
        for way in ("info", "loader"):
            assert isinstance(found[way], Exception) or (way, key) == ("loader", "samples/pixels/manifest.json")
        # A view whose failed rows are tried again has lost its seal and a receipt, and is none that was lost.
        receipt = root / key.replace("manifest.json", "receipts/1.json")
        if key.endswith("manifest.json"):
            receipt.rename(receipt.with_suffix(".away"))
            check_seals(store)
            receipt.with_suffix(".away").rename(receipt)
    check_seals(Store.open(root))

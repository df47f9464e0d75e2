"""Damaged stores: whatever happens to any object, what is read is what was there, or an error that names it."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_so_it_is_through_a_cache(
    data: st.DataObject,
    stores: tuple[Made, dict[str, dict[str, bytes]]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a store at a URL: damage at its source and, once all was read, in the cache."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(logging.getLogger("hdcache"), "disabled", True)
    (root, objects, truth), others = stores
    cache = tmp_path_factory.mktemp("cache")

    def read() -> dict[str, damage.Outcome]:
        return damage.read_everything(lambda: open_store(f"file://{root}", cache=cache, cache_size="1GB"))

    injection = data.draw(damages(objects, others))
    with injection.applied(root, objects):
        found = read()
    assert damage.wrong_ways(truth, found) == []
    assert damage.bugs_of(injection, root, found) == []
    shutil.rmtree(cache)
    assert read() == truth, "nothing of the damage was kept"
    cached = damage.objects_of(cache)
    injection = data.draw(damages(cached, {}))
    with injection.applied(cache, cached):
        found = read()
    assert damage.wrong_ways(truth, found) == []
    assert damage.bugs_of(injection, cache, found) == []


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

"""What a place holds, by records that anybody may have written; what of that is meant."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.durable import stored_object
from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, StoreMismatch
from hdcache.index import write_index
from hdcache.ledgers import Index, Ledger, total_of
from hdcache.schema import Manifest, Receipt
from hdcache.sharing.folder import Folder
from hdcache.sharing.selection import (
    RECORD_BYTES,
    Contents,
    Wanted,
    bounded_json,
    ledger_of,
    listed_index,
    read_index,
    seal_faults,
)
from hdcache.store import Store
from test_objects import Scripted
from travelling import write_travelling


class Served(Folder):
    """A folder as a web server gives it: by its index alone."""

    listable = False


# Contents.read lists a folder; as a place without a listing it is believed what its index says.
class Listed(Contents):
    @staticmethod
    def _index(place: Any) -> dict[str, Any]:
        found = read_index(place)
        if found is None:
            raise InputNotFound(f"{place.url}: no index")
        return found


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_travelling(tmp_path_factory.mktemp("selection") / "store")


@pytest.fixture
def store(_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_store, tmp_path / "store")


def reindex(root: Path, **changed: Any) -> None:
    """Write the index of a hostile store: it lists what lies there as it now is, and what ``changed`` says."""
    objects = {
        key: stored_object((root / key).read_bytes())
        for key in Index.parse(json.loads((root / "index.json").read_bytes()), "").objects
    }
    value = {"format": 1, "objects": {key: entry.model_dump() for key, entry in objects.items()}}
    value["objects"] |= changed.pop("objects", {})
    (root / "index.json").write_text(json.dumps(value | changed))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, without its check."""
    value = json.loads(path.read_bytes())
    value.pop("check", None)
    change(value)
    path.write_text(json.dumps(value))


def test_a_store_says_what_it_holds(store: Path) -> None:
    for contents in (Contents.read(Folder(store)), Listed.read(Served(store))):
        assert (sorted(contents.teachers), contents.views(), contents.views("u"), contents.pixels) == (
            ["t", "u"],
            [0, 1],
            [0, 1],
            True,
        )
        assert contents.unsealed == []
        assert [*contents.receipts("views/1", contents.manifest("views/1"))] == [
            f"views/1/receipts/{n}.json" for n in range(3)
        ]
        for key in ("views/0", "views/1", "samples/pixels", "teachers/t/views/0", "teachers/u/views/1"):
            assert contents.manifest(key).objects


def test_the_index_of_a_listing_is_the_one_that_was_written(store: Path) -> None:
    assert listed_index(Folder(store)) == read_index(Folder(store))


def test_what_is_not_complete_is_named(store: Path) -> None:
    for key in ("teachers/u/views/1", "teachers/t/views/0"):
        Ledger(store, key).unseal()
    contents = Contents.read(Folder(store))
    assert contents.unsealed == ["teachers/t", "teachers/t/views/0", "teachers/u/views/1"]
    assert contents.choose(Wanted()).keys() == {"u"}
    with pytest.raises(InputNotFound, match="teacher 't' is not complete; finish it with 'hdcache extract'"):
        contents.choose(Wanted(teachers=("t",)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(teachers=("v",)), "teacher 'v' is not there; "),
        (Wanted(teachers=("t",), views=(1,)), r"teacher 't' has no sealed view 1 \(sealed: \[0\]\)"),
        (Wanted(taps=("finall",)), "no tap 'finall' of t, u; did you mean 'final'"),
        (
            Wanted(taps=("pooled",)),
            r"teacher 'u' has none of these taps \(block2.out, final\); name the teachers .* with --teacher",
        ),
    ],
)
def test_what_is_not_there_is_refused(store: Path, wanted: Wanted, message: str) -> None:
    with pytest.raises(InputNotFound, match=message):
        Contents.read(Folder(store)).choose(wanted)


def test_taps_of_a_store_without_teachers(store: Path) -> None:
    contents = Contents.read(Folder(store))
    contents.teachers.clear()
    with pytest.raises(InputNotFound, match="holds no complete teacher, so that --tap says nothing; leave it out"):
        contents.choose(Wanted(taps=("final",)))


def test_shares(store: Path) -> None:
    contents = Contents.read(Folder(store))
    shares = contents.choose(Wanted(taps=("final",), views=(0,)))
    assert {name: (share.taps, share.views) for name, share in shares.items()} == {
        name: ({"final"}, (0,)) for name in "tu"
    }
    assert contents.choose(Wanted(teachers=("u",), taps=("final", "block2.out")))["u"].taps is None
    kept = contents.objects("teachers/u/views/0", contents.manifest("teachers/u/views/0"), frozenset({"final"}))
    assert not [key for key in kept if "block2.out" in key]
    assert "teachers/u/views/0/final/values/zarr.json" in kept


def test_a_part_gives_no_more_than_it_has(store: Path) -> None:
    (store / "teachers/u/held.json").write_text('{"taps":["final"]}')
    contents = Contents.read(Folder(store))
    assert contents.choose(Wanted())["u"].taps == {"final"}
    with pytest.raises(
        InputNotFound,
        match=r"holds a part of teacher 'u' \(final\), without 'block2.out'; copy it from where the whole",
    ):
        contents.choose(Wanted(teachers=("u",), taps=("block2.out",)))


# Records that were written to do harm.


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b", ".t.lock", "views/.0.lock", "x/.y.partial"])
@pytest.mark.parametrize("where", ["index", "manifest", "samples"])
def test_keys_that_lead_elsewhere(store: Path, key: str, where: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    if where == "manifest":
        rewrite(store / "views/0/manifest.json", lambda value: value["objects"].update({key: entry}))
    if where == "samples":
        rewrite(store / "samples/receipt.json", lambda value: value["objects"].update({key: entry}))
    reindex(store, objects={key: entry} if where == "index" else {})
    with pytest.raises(StoreCorrupt):
        Listed.read(Served(store)).manifest("views/0")


@pytest.mark.parametrize(
    "key",
    [
        "teachers/t/views/0/final/values/c.0",
        "samples/label/c.0",
        "views/1/geometry/zarr.json",
        "new",
        "views/0/receipts/9.json",
        "zarr.json",
    ],
)
def test_a_manifest_may_list_only_what_is_its_own(store: Path, key: str) -> None:
    rewrite(
        store / "views/0/manifest.json", lambda value: value["objects"].update({key: {"size": 1, "sha256": "0" * 64}})
    )
    reindex(store)
    with pytest.raises(StoreCorrupt, match=r"views/0/manifest.json: lists .* which is not its own"):
        Listed.read(Served(store)).manifest("views/0")


@pytest.mark.parametrize("key", ["views/0/x/c.0", "about.json", "held.json", "views/0/receipts/0.json"])
def test_nor_may_that_of_a_teacher(store: Path, key: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    rewrite(
        store / "teachers/u/views/1/manifest.json", lambda value: value["objects"].update({f"teachers/u/{key}": entry})
    )
    reindex(store)
    with pytest.raises(StoreCorrupt, match="which is not its own"):
        Listed.read(Served(store)).manifest("teachers/u/views/1")


@pytest.mark.parametrize("change", [{"teacher": "u"}, {"view": 1}, {"rows": 19}, {"identity": "0" * 64}, {"format": 0}])
def test_the_seal_of_something_else(store: Path, change: dict[str, Any]) -> None:
    rewrite(store / "teachers/t/views/0/manifest.json", lambda value: value.update(change))
    reindex(store)
    with pytest.raises(StoreCorrupt, match="the seal of another ledger or store"):
        Listed.read(Served(store)).manifest("teachers/t/views/0")


def test_another_teachers_record(store: Path) -> None:
    (store / "teachers/t/zarr.json").write_bytes((store / "teachers/u/zarr.json").read_bytes())
    reindex(store)
    with pytest.raises(StoreCorrupt, match=r"teachers/t/zarr.json: the record of teacher 'u'"):
        Listed.read(Served(store))


def test_samples_that_claim_the_kept_ones(store: Path) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    rewrite(store / "samples/receipt.json", lambda value: value["objects"].update({"pixels/digest/c.0.0": entry}))
    reindex(store)
    with pytest.raises(StoreCorrupt, match=r"lists samples/pixels/digest/c.0.0, which is not its own"):
        Listed.read(Served(store))


def test_newer_formats_say_what_to_install(store: Path) -> None:
    reindex(store, format=2)
    with pytest.raises(StoreMismatch, match="store format 2, this hdcache reads up to 1; 'pip install -U hdcache'"):
        Listed.read(Served(store))


def test_no_store() -> None:
    with pytest.raises(InputNotFound, match="no store there"):
        Contents.read(Folder(Path("/nowhere/at/all")))


def test_a_server_without_an_index() -> None:
    class Empty(Scripted):
        listable = False

    with pytest.raises(
        InputNotFound, match=r"no store there, since it has no index.json; check the URL, or copy the store there"
    ):
        Contents.read(Empty(b"", [(0, "missing")]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!doctype html>", "a page of HTML, not a record"),
        (b'{"a": 1, "a": 2}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b"[" * 400_000, "not valid JSON"),
        (b'{"a":[' + b"{}," * 500_000 + b"{}]}", "more than 450,000 entries"),
        (b"[" * (8 << 20), "more than 450,000 entries"),
        (b'["a"' + b',"a"' * 2_000_000 + b"]", "more than 450,000 entries"),
    ],
)
def test_texts_that_are_no_records(data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StoreCorrupt, match=message):
            bounded_json("s3://b/index.json", data)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_ten_million_entries_are_refused_by_their_size(store: Path) -> None:
    with open(store / "views/0/manifest.json", "wb") as file:
        file.truncate(10_000_000 * 100)  # a hole: nothing of it is on the disk
    listed = {"views/0/manifest.json": {"size": 10_000_000 * 100, "sha256": "0" * 64}}
    (store / "index.json").write_text(json.dumps({"format": 1, "objects": _entries(store) | listed}))
    with pytest.raises(StoreCorrupt, match="1000000000 bytes are too large for a record"):
        Listed.read(Served(store)).manifest("views/0")
    with open(store / "index.json", "wb") as file:
        file.truncate(RECORD_BYTES + 1)
    with pytest.raises(StoreCorrupt, match="a record has 67108864 at most"):
        Listed.read(Served(store))


def _entries(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store / "index.json").read_bytes())["objects"]
    return found


@pytest.fixture(scope="module")
def saved_records(_store: Path) -> dict[str, bytes]:
    names = (
        "index.json",
        "zarr.json",
        "samples/receipt.json",
        "teachers/u/zarr.json",
        "teachers/u/views/0/manifest.json",
    )
    return {name: (_store / name).read_bytes() for name in names}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_records_are_refused_or_mean_the_same(
    store: Path,
    saved_records: dict[str, bytes],
    mutations: Callable[[bytes], st.SearchStrategy[bytes]],
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(sorted(saved_records)))
    for other, whole in saved_records.items():
        (store / other).write_bytes(whole)
    (store / name).write_bytes(data.draw(mutations(saved_records[name])))
    if name != "index.json":
        reindex(store)
    try:
        contents = Listed.read(Served(store))
        for key in _ledgers(contents):
            contents.manifest(key)
        contents.choose(Wanted())
    except HdcacheError:
        pass


def _ledgers(contents: Contents) -> Iterator[str]:
    return (key for key in map(ledger_of, contents.index) if key is not None)


def test_receipts_and_manifest_must_agree(store: Path) -> None:
    folder = store / "views/0"
    manifest = Manifest.parse(json.loads((folder / "manifest.json").read_bytes()), "")
    receipts = [Receipt.parse(json.loads((folder / f"receipts/{n}.json").read_bytes()), "") for n in range(3)]
    assert seal_faults(manifest, total_of("views/0", receipts)) == []
    assert seal_faults(manifest, total_of("views/0", receipts[:2])) == ["its receipts cover 16 of 20 rows"]
    other = receipts[0].model_copy(update={"objects": {key: stored_object(b"") for key in receipts[0].objects}})
    assert "differs" in seal_faults(manifest, total_of("views/0", [other, *receipts[1:]]))[0]
    failed = receipts[0].model_copy(update={"failed": {1: "unreadable"}})
    assert seal_faults(manifest, total_of("views/0", [failed, *receipts[1:]])) == [
        "failed rows or saturated values differ from its receipts"
    ]


@pytest.mark.parametrize(
    ("key", "ledger"),
    [
        ("views/0/manifest.json", "views/0"),
        ("views/00/manifest.json", None),
        ("views/manifest.json", None),
        ("teachers/t/views/3/manifest.json", "teachers/t/views/3"),
        ("teachers/.t/views/3/manifest.json", None),
        ("samples/pixels/manifest.json", "samples/pixels"),
        ("samples/manifest.json", None),
        ("zarr.json", None),
    ],
)
def test_ledgers_by_their_manifests(key: str, ledger: str | None) -> None:
    assert ledger_of(key) == ledger


def test_a_store_that_lost_a_view_is_not_copied_as_one_that_never_had_it(store: Path) -> None:
    write_index(Store.open(store))
    shutil.rmtree(store / "views/1")
    with pytest.raises(StoreCorrupt, match=r"views/1/manifest\.json: missing, though it was there"):
        Contents.read(Folder(store))

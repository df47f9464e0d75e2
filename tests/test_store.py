"""Stores: made and opened again, refused with a clear line, and locked by one live process at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.array_metadata import names_in
from hdcache.arrays import write_constant
from hdcache.errors import InputNotFound, StoreCorrupt, StoreLocked, StoreMismatch, UsageError
from hdcache.schema import DatasetCard, Receipt, StoreCard, ViewSpec
from hdcache.store import Store, is_view


def card(count: int) -> StoreCard:
    dataset = DatasetCard(spec="folder:/x", kind="folder", fingerprint="0" * 64, count=count, classes=("a", "ü"))
    return StoreCard(dataset=dataset, views=ViewSpec(seed=4))


def edit(path: Path, **changes: Any) -> None:
    """Change fields of the hdcache record of a group, as one does who knows of its check."""
    found = json.loads(path.read_bytes())
    found["attributes"].pop("hdcache_check", None)
    found["attributes"]["hdcache"] |= changes
    path.write_text(json.dumps(found))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.sets(names, min_size=1, max_size=6).map(sorted), data=st.data())
def test_what_was_created_is_opened(
    ids: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ids of any Unicode, labels and the card."""
    root = tmp_path_factory.mktemp("s") / "store"
    labels = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=len(ids), max_size=len(ids))), np.int64)
    made = Store.create(root, card(len(ids)), ids, labels)
    opened = Store.open(str(root))
    assert opened.card == made.card == card(len(ids))
    assert opened.ids == made.ids == tuple(ids)
    np.testing.assert_array_equal(opened.labels, labels)
    assert opened.labels.dtype == np.int64
    assert opened.teachers() == []


def test_any_zarr_opens_a_store(sealed_store: Path) -> None:
    group = zarr.open_group(sealed_store, mode="r")
    assert group["samples/label"].shape == (20,)  # type: ignore[union-attr]
    assert group["teachers/t/views/0/final/values"].shape == (20, 9, 6)  # type: ignore[union-attr]


def test_a_store_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Store.create("~/s", card(1), ["a"], np.zeros(1, np.int64))
    assert Store.open("~/s").path == tmp_path / "s"


def test_ids_labels_and_count_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 ids and 2 labels for 2 samples"):
        Store.create(tmp_path / "s", card(2), ["a"], np.zeros(2, np.int64))


def test_folders_that_hold_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"no store there; make one with 'hdcache extract DATA --store"):
        Store.open(tmp_path / "none")
    zarr.create_group(tmp_path / "group")
    with pytest.raises(InputNotFound, match="a Zarr group, but not an hdcache store"):
        Store.open(tmp_path / "group")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(b"")
    with pytest.raises(StoreMismatch, match="not empty and not a store; give --store another folder"):
        Store.create(tmp_path / "photos", card(1), ["a"], np.zeros(1, np.int64))
    with pytest.raises(StoreMismatch, match=r"x\.jpg: exists already; give --store another folder"):
        Store.create(tmp_path / "photos" / "x.jpg", card(1), ["a"], np.zeros(1, np.int64))


def test_a_store_is_never_made_twice(sealed_store: Path) -> None:
    before = (sealed_store / "zarr.json").read_bytes()
    with pytest.raises(StoreMismatch, match="exists already"):
        Store.create(sealed_store, card(1), ["a"], np.zeros(1, np.int64))
    assert (sealed_store / "zarr.json").read_bytes() == before


def test_a_creation_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    """The root record is the last file, so what is half made says so and can be made again."""
    Store.create(tmp_path / "s", card(2), ["a", "b"], np.zeros(2, np.int64))
    (tmp_path / "s" / "zarr.json").unlink()
    with pytest.raises(InputNotFound, match="a store whose creation was cut short; run the same 'hdcache extract'"):
        Store.open(tmp_path / "s")
    Store.create(tmp_path / "s", card(2), ["a", "b"], np.zeros(2, np.int64))
    assert Store.open(tmp_path / "s").ids == ("a", "b")


def test_a_newer_format_is_refused_before_its_fields_are(sealed_store: Path) -> None:
    edit(sealed_store / "zarr.json", format=2, novelty=1)
    for about, advice in (
        ('{"written_with": {"hdcache": "2.1.0"}, "novelty": 1}', "pip install 'hdcache>=2.1.0'"),
        ('{"written_with": {"hdcache": "2; rm -r"}}', "pip install -U hdcache"),
        ("[]", "pip install -U hdcache"),
        ("{", "pip install -U hdcache"),
    ):
        (sealed_store / "about.json").write_text(about)
        with pytest.raises(StoreMismatch, match=rf"store format 2, this hdcache reads up to 1; {re.escape(advice)}$"):
            Store.open(sealed_store)


def test_a_record_with_a_wrong_field_is_named(sealed_store: Path) -> None:
    edit(sealed_store / "zarr.json", rows_per_shard=0)
    with pytest.raises(StoreCorrupt, match=r"zarr\.json: rows_per_shard: .* \(found 0\)"):
        Store.open(sealed_store)


# Samples


def rewrite(root: Path, name: str, value: Any) -> None:
    """Replace a sample array and have the receipt vouch for it."""
    path = root / "samples" / "receipt.json"
    receipt = Receipt.parse(json.loads(path.read_bytes()), path)
    listed = {**receipt.objects, **write_constant(root / "samples", name, value)}
    path.write_bytes(receipt.model_copy(update={"objects": listed}).canonical())


def test_sample_ids_that_do_not_fit(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    length = len("".join(store.ids).encode())
    for ends in (np.arange(21), np.full(21, length), np.linspace(0, length, 21).astype(np.int64)[::-1]):
        rewrite(sealed_store, "id_offsets", np.ascontiguousarray(ends, np.int64))
        with pytest.raises(StoreCorrupt, match="id offsets do not fit the id bytes"):
            _ = Store.open(sealed_store).ids
    rewrite(sealed_store, "id_bytes", np.full(21, 0xFF, np.uint8))
    rewrite(sealed_store, "id_offsets", np.array([*range(20), 21], np.int64))
    with pytest.raises(StoreCorrupt, match="id_bytes: not UTF-8"):
        _ = Store.open(sealed_store).ids


def test_samples_that_are_not_listed_or_gone(sealed_store: Path) -> None:
    path = sealed_store / "samples" / "receipt.json"
    receipt = json.loads(path.read_bytes()) | {"check": ""}
    short = receipt | {"objects": {k: v for k, v in receipt["objects"].items() if not k.startswith("id_bytes")}}
    path.write_text(json.dumps(short))
    with pytest.raises(StoreCorrupt, match=r"receipt\.json: id_bytes is not listed"):
        _ = Store.open(sealed_store).ids
    path.write_text(json.dumps(receipt))
    (sealed_store / "samples" / "label" / "c.0").unlink()
    with pytest.raises(StoreCorrupt, match=r"label/c\.0: missing, expected 164 bytes"):
        _ = Store.open(sealed_store).labels
    path.unlink()
    with pytest.raises(StoreCorrupt, match=r"receipt\.json: missing"):
        _ = Store.open(sealed_store).labels


# Teachers and views


def test_teachers_are_listed_and_read(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    (sealed_store / "teachers" / "a b").mkdir()
    (sealed_store / "teachers" / "a b" / "zarr.json").write_text("{}")
    (sealed_store / "teachers" / "begun").mkdir()
    assert store.teachers() == ["t"]
    assert store.teacher("t").taps.keys() == {"block1.attn_in", "final", "pooled"}
    with pytest.raises(InputNotFound, match=r"no teacher 'u' \(teachers: t\); add it: hdcache extract .*u=MODEL$"):
        store.teacher("u")
    assert store.free_name("t") == "t-2"
    shutil.copytree(store.teacher_path("t"), store.teacher_path("t-2"))
    assert (store.free_name("t"), store.free_name("t-2"), store.free_name("u")) == ("t-3", "t-2-2", "u-2")
    with pytest.raises(UsageError, match=r"teacher '\.\./t' may hold only"):
        store.teacher("../t")


def test_a_teacher_that_was_renamed_by_hand(sealed_store: Path) -> None:
    (sealed_store / "teachers" / "t").rename(sealed_store / "teachers" / "u")
    with pytest.raises(StoreCorrupt, match=r"the record of teacher 't'; rename the folder back"):
        Store.open(sealed_store).teacher("u")


def test_sealed_views_are_those_with_a_manifest(sealed_store: Path) -> None:
    views = sealed_store / "teachers" / "t" / "views"
    for name in ("10", "2", "x", "03", "٣", "5"):
        (views / name).mkdir()
        if name != "5":
            (views / name / "manifest.json").write_text("{}")
    assert Store.open(sealed_store).views("t") == [0, 2, 10]
    assert [name for name in ("0", "12", "01", "-1", "1.0", "", "²", "٣") if is_view(name)] == ["0", "12"]


# Records that were changed


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.sampled_from(["zarr.json", "teachers/t/zarr.json", "samples/receipt.json"]))
def test_a_changed_record_opens_or_says_why(
    data: st.DataObject, which: str, sealed_store: Path, mutations: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    """One JSON value becomes another, or disappears: never a traceback of another kind."""
    path = sealed_store / which
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutations(whole)))
        message = str(sealed_store)
        try:
            store = Store.open(sealed_store)
            assert len(store.ids) == len(store.labels) == store.card.dataset.count
            for name in store.teachers():
                store.teacher(name).identity_digest()
                store.views(name)
        except (InputNotFound, StoreCorrupt, StoreMismatch) as error:
            message = str(error)
        assert message.startswith(str(sealed_store))
        assert "\n" not in message
    finally:
        path.write_bytes(whole)


# Locks


def holder(root: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of teacher ``t`` until it is killed."""
    code = f"""
        import time
        from hdcache.store import Store
        with Store.open({str(root)!r}).lock("t"):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_process_keeps_its_lock_and_a_killed_one_does_not(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    process = holder(sealed_store)
    try:
        with (
            pytest.raises(StoreLocked, match=rf"is being written by \S+, process {process.pid} on .*; wait for it"),
            store.lock("t"),
        ):
            pass
        with store.lock("other"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        with store.lock("t"), pytest.raises(StoreLocked, match=rf"written by \S+, process {os.getpid()} on"):
            store.lock("t").__enter__()
    finally:
        process.kill()
        process.wait(timeout=20)
        assert process.stdout is not None
        process.stdout.close()
    with store.lock("t"):
        pass


def test_a_lock_has_a_name_that_is_no_path(sealed_store: Path) -> None:
    with pytest.raises(UsageError, match=r"teacher '\.\./x' may hold only"), Store.open(sealed_store).lock("../x"):
        pass


# A store that nothing was written to


def fresh(root: Path, seed: int) -> Store:
    dataset = DatasetCard(kind="folder", fingerprint="0" * 64, count=2)
    return Store.create(root, StoreCard(dataset=dataset, views=ViewSpec(seed=seed)), ["a", "b"], np.zeros(2, np.int64))


def test_a_store_that_nothing_was_written_to_is_withdrawn(tmp_path: Path) -> None:
    store = fresh(tmp_path, 1)
    with store.lock("t"):
        assert not store.withdraw(), "somebody is about to write"
    assert store.withdraw()
    with pytest.raises(InputNotFound, match="creation was cut short"):
        Store.open(tmp_path)
    fresh(tmp_path, 2)
    refused = pytest.raises(
        StoreMismatch, match="another process made it anew with other settings; run the same command"
    )
    with refused, store.lock("t"):
        pytest.fail("its rows would be of other views")
    with Store.open(tmp_path).lock("t"):
        pass


@pytest.mark.parametrize("gone", ["teachers/t/zarr.json", "views/0/geometry"])
def test_a_store_that_holds_something_is_not_withdrawn(sealed_store: Path, gone: str) -> None:
    path = sealed_store / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    store = Store.open(sealed_store)
    assert store.begun
    assert not store.withdraw()
    assert (sealed_store / "zarr.json").is_file()


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a teacher would be missing from what is derived, and a store seem to be one that nothing was written to."""
    store, listdir = Store.open(sealed_store), os.listdir
    assert (store.teachers(), store.views("t"), store.begun) == (["t"], [0], True)
    refused = [sealed_store / "teachers", sealed_store / "teachers/t/views", sealed_store / "views"]

    def failing(path: Any) -> list[str]:
        if path in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", failing)
    for look in (store.teachers, lambda: store.views("t"), lambda: store.begun):
        with pytest.raises(PermissionError):
            look()
    assert names_in(sealed_store / "nothing") == names_in(sealed_store / "zarr.json") == []


def test_a_url_is_no_folder() -> None:
    with pytest.raises(
        UsageError, match=r"s3://b/s: this needs the store in a folder; get it first: hdcache pull s3://b/s FOLDER"
    ):
        Store.open("s3://b/s")

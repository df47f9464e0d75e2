"""Several processes at once: one of them writes, the others wait or are told who does; one seal, no lost shard, the right bytes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import racing
from hdcache.arrays import ShardWriter
from hdcache.durable import durable_write
from hdcache.errors import StoreLocked
from hdcache.index import write_index
from hdcache.integrity import verify
from hdcache.leases import Owner
from hdcache.ledgers import teacher_ledger, view_ledger
from hdcache.store import Store
from hdcache.stored_rows import StoredRows
from racing import PROCESSES, view_writer, write_shard
from travelling import bucket_server, snapshot, write_travelling

Tree = Callable[[Path], dict[str, bytes]]
Race = Callable[..., list[Any]]


@pytest.fixture
def race() -> Race:
    """What becomes of processes that do the same thing at once."""

    def run(what: str, **arguments: object) -> list[Any]:
        command = [sys.executable, racing.__file__ or "", what, json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout)
        assert len(found) == PROCESSES
        return found

    return run


def good(root: Path) -> bool:
    found = verify(Store.open(root))
    return not (found.faults or found.unsealed or found.unlisted)


def test_one_of_many_creates_a_file(race: Race, tmp_path: Path) -> None:
    found = race("create", path=str(tmp_path / "file"))
    winners = [number for number, outcome in enumerate(found) if outcome == 100_000]
    assert len(winners) == 1
    assert [outcome[0] for outcome in found if outcome != 100_000] == ["FileExistsError"] * 3
    assert (tmp_path / "file").read_bytes() == bytes(winners) * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_of_many_has_the_lease_and_the_others_are_told_who(race: Race, sealed_store: Path) -> None:
    found = race("hold", root=str(sealed_store))
    held = [outcome for outcome in found if isinstance(outcome, int)]
    refused = [outcome for outcome in found if not isinstance(outcome, int)]
    assert held
    for kind, text in refused:
        assert kind == "StoreLocked"
        assert (match := re.search(rf"written by \S+, process (\d+) on {re.escape(platform.node())}, since 20", text))
        assert int(match[1]) in held
    assert len(refused) == PROCESSES - 1


@pytest.mark.parametrize("same", [True, False])
def test_shards_that_all_write_without_a_lease_are_whole_and_none_is_lost(
    same: bool, race: Race, sealed_store: Path, tmp_path: Path, tree: Tree
) -> None:
    """As tasks that were given out twice do; the last bits of their values may differ."""
    alone = shutil.copytree(sealed_store, tmp_path / "alone")
    writer = view_writer(str(alone), 1)
    writer.open()
    for shard in range(writer.shards):
        write_shard(writer, shard, 1)
    writer.seal()
    found = race("write", root=str(sealed_store), view=1, same=same)
    assert all(isinstance(outcome, int) for outcome in found), found
    assert sum(found) == writer.shards
    assert good(sealed_store)
    rows = StoredRows(Store.open(sealed_store), "t")
    for shard in range(writer.shards):
        start, stop = 8 * shard, min(20, 8 * shard + 8)
        values = [part for tap in rows.record.taps for part in rows.rows(1, tap, start, stop).values()]
        assert len({float(value) for part in values for value in np.unique(part)}) == 1
    assert not same or tree(sealed_store) == tree(alone)


def test_all_may_seal_what_is_the_same_and_one_what_is_not(race: Race, sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    ledger = teacher_ledger(store, "t", 0)
    for same in (True, False):
        ledger.unseal()
        found = race("seal", root=str(sealed_store), view=0, same=same)
        seals = [outcome for outcome in found if isinstance(outcome, str)]
        assert {*seals} == {ledger.manifest().digest()}
        refused = [outcome for outcome in found if not isinstance(outcome, str)]
        assert len(refused) == (0 if same else PROCESSES - 1)
        for kind, text in refused:
            assert (kind, "already sealed with other content; run 'hdcache verify'" in text) == ("StoreCorrupt", True)
        assert not list(ledger.folder.rglob("*.partial"))


def test_who_lost_a_lease_changes_nothing_more(sealed_store: Path, tree: Tree) -> None:
    """Suspended, and taken over from another machine; wherever the writer was."""
    writer = view_writer(str(sealed_store), 1)
    sealed = teacher_ledger(writer.store, "t", 0)
    receipt = sealed.receipt(0)
    assert receipt is not None
    note = sealed_store / ".t.owner"
    taker = json.dumps(asdict(replace(Owner.here(), host="elsewhere", process=7))).encode()

    with writer.store.lock("t"):
        writer.open()
        real, turn, seen = ShardWriter.encode, threading.Lock(), []

        def suspended(*arguments: Any) -> bytes:
            with turn:  # several arrays are encoded at once
                durable_write(note, taker)
                seen.append(tree(sealed_store))
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ShardWriter, "encode", suspended)
            with pytest.raises(
                StoreLocked, match=r"taken over by .*process 7 on elsewhere.* while this process was su"
            ):
                write_shard(writer, 0, 1)
        assert tree(sealed_store) == seen[0]
        static, told = sealed.manifest().objects, {"teacher": "t", "identity": "x", "view": 0, "rows": 20}
        for act in (
            lambda: write_shard(writer, 0, 1),
            lambda: sealed.record(receipt),
            sealed.unseal,
            lambda: sealed.withdraw(0),
            lambda: sealed.replace(receipt),
            lambda: sealed.seal([receipt], static, **told),
        ):
            with pytest.raises(StoreLocked, match="while this process was suspended; run the same command again"):
                act()
        assert tree(sealed_store) == seen[0]
    assert note.read_bytes() == taker


def test_copies_to_one_folder_end_in_one_store(race: Race, tmp_path: Path) -> None:
    source = write_travelling(tmp_path / "source")
    found = race("copy", source=str(source), target=str(tmp_path / "target"))
    done = [outcome for outcome in found if isinstance(outcome, int)]
    assert done
    assert {outcome[0] for outcome in found if not isinstance(outcome, int)} <= {"StoreLocked"}, found
    assert snapshot(tmp_path / "target") == snapshot(source)
    assert good(tmp_path / "target")


def test_pushes_to_one_bucket_end_in_one_store(race: Race, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_travelling(tmp_path / "source")
    with bucket_server(monkeypatch):
        found = race("copy", source=str(source), target="s3://team/raced")
        assert len({*found}) == 1, found
        from hdcache.sharing.places import open_place
        from hdcache.sharing.transfer import copy_store

        copy_store(open_place("s3://team/raced"), open_place(tmp_path / "back"), quiet=True)
    assert snapshot(tmp_path / "back") == snapshot(source)


def test_extractions_of_one_store_are_one(
    race: Race, tmp_path: Path, tiny: str, make_npz: Callable[..., str], tree: Tree
) -> None:
    from hdcache.extract.run import extract

    settings: dict[str, Any] = {
        "data": make_npz(tmp_path / "d.npz", 40), "teachers": [f"t={tiny}"], "taps": ["final"], "precision": "fp32",
        "rows_per_shard": 8, "batch": 8, "threads": 1, "device": "cpu",
    }  # fmt: skip
    extract(store=tmp_path / "alone", **settings)
    found = race("extract", store=str(tmp_path / "s"), **settings)
    # Who comes when the first one is done finds nothing left to do.
    assert sorted(outcome for outcome in found if isinstance(outcome, int))[-1:] == [40]
    assert sum(outcome for outcome in found if isinstance(outcome, int)) == 40
    for outcome in found:
        if not isinstance(outcome, int):
            assert outcome[0] == "StoreLocked", outcome
            assert f"on {platform.node()}, since 20" in outcome[1]
            assert f"process {outcome[2]} " not in outcome[1]
    assert tree(tmp_path / "s") == tree(tmp_path / "alone")
    assert good(tmp_path / "s")


def test_tasks_that_are_given_out_many_times_are_harmless(
    race: Race, tmp_path: Path, tiny: str, make_npz: Callable[..., str], tree: Tree
) -> None:
    from hdcache.extract.machines import fingerprint, versions
    from hdcache.extract.run import extract
    from hdcache.extract.worker import Recipe, lease
    from hdcache.teachers import load_teacher

    data = make_npz(tmp_path / "d.npz", 40)
    extract(
        data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], precision="fp32", rows_per_shard=8, batch=8,
        threads=1, device="cpu",
    )  # fmt: skip
    store = Store.open(tmp_path / "s")
    before, seals = tree(store.path), {}
    for ledger in (teacher_ledger(store, "t", 0), view_ledger(store, 0)):
        seals[ledger.key] = ledger.manifest()
        ledger.unseal()
        for shard in range(5):
            ledger.withdraw(shard)
    record = store.teacher("t")
    lease(store.path, "t").write_text("run 1", encoding="utf-8")
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8)
    recipe = Recipe(
        run="run 1", node=platform.node(), store=str(store.path), data=store.card.dataset.spec, teacher="t", source=tiny,
        identity=record.identity_digest(), device="cpu", gpus=False, threads=1, torch_threads=1, processes=2,
        versions=versions("npz"), fingerprint=fingerprint(teacher, list(record.taps)),
    )  # fmt: skip
    found = race("task", recipe=recipe.model_dump(mode="json"), shards=5)
    assert found == [[["difference", "loading", "node", "seconds", "timing"]] * 5] * PROCESSES
    writer = view_writer(str(store.path), 0)
    writer.open()
    writer.seal()
    lease(store.path, "t").unlink()
    write_index(store)
    assert tree(store.path) == before
    assert good(store.path)

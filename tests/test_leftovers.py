"""What a killed process leaves is removed, and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import pytest

from hdcache import leases, leftovers
from hdcache.cli import main
from hdcache.errors import StoreLocked
from hdcache.integrity import verify
from hdcache.leases import Owner, lease
from hdcache.leftovers import collect, format_leftovers
from hdcache.store import GC_LOCK, ROOT_LOCK, Store

PARTIALS = [
    "teachers/t/views/0/final/values/.c.1.0.0.77-5.partial",
    "samples/.receipt.json.1-1.partial",
    ".zarr.json.2-2.partial",
]


def litter(root: Path) -> None:
    for key in PARTIALS:
        (root / key).write_bytes(b"12345")
    (root / ".t.lease").write_text("{}")
    (root / "teachers/t/notes.txt").write_text("mine")


def test_unfinished_files_go_and_all_else_stays(sealed_store: Path, tree: Callable[[Path], dict[str, bytes]]) -> None:
    before = tree(sealed_store)
    store = Store.open(sealed_store)
    assert format_leftovers(collect(store)) == "nothing left over"
    litter(sealed_store)
    planned = collect(store, dry_run=True)
    assert sorted(planned.partial) == sorted([*PARTIALS, ".t.lease"])
    assert planned.bytes == 17
    assert format_leftovers(planned).startswith("would remove 4 files, 17 B\n")
    assert (sealed_store / PARTIALS[0]).exists()
    done = collect(store)
    assert done.partial == planned.partial
    assert format_leftovers(done).startswith("removed 4 files, 17 B\n")
    assert tree(sealed_store) == before | {"teachers/t/notes.txt": b"mine"}
    assert not collect(store).partial


def test_what_no_record_lists_goes_when_asked(sealed_store: Path, tree: Callable[[Path], dict[str, bytes]]) -> None:
    before = tree(sealed_store)
    litter(sealed_store)
    (sealed_store / "teachers/t/away").symlink_to("/etc/hostname")
    done = collect(Store.open(sealed_store), unlisted=True)
    assert sorted(done.unlisted) == ["teachers/t/away", "teachers/t/notes.txt"]
    assert tree(sealed_store) == before
    assert Path("/etc/hostname").exists()
    assert verify(Store.open(sealed_store)).good


def test_a_store_that_is_being_written_is_left_alone(sealed_store: Path) -> None:
    litter(sealed_store)
    with lease(sealed_store / ".newcomer.lock"):
        found = collect(Store.open(sealed_store), unlisted=True)
    assert not found.partial
    assert not found.removed
    assert "is being written by" in found.busy[0]
    assert format_leftovers(found).startswith("nothing was removed:\n")
    assert (sealed_store / PARTIALS[0]).exists()


@pytest.mark.parametrize("key", ["teachers/new/c.0", "teachers/new/.c.0.7-7.partial"])
def test_who_begins_meanwhile_waits(key: str, sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new teacher's lease is none of those that there were."""
    begun, threads = threading.Event(), []

    def begin() -> None:
        with Store.open(sealed_store).lock("new"):
            (sealed_store / "teachers/new").mkdir()
            (sealed_store / key).write_bytes(b"12345")
            begun.set()

    def listed(*arguments: Any, **more: Any) -> Any:
        threads.append(threading.Thread(target=begin))
        threads[0].start()
        begun.wait(0.4)
        return real(*arguments, **more)

    where, name = (leftovers, "verify") if key.endswith("c.0") else (Path, "rglob")
    real = getattr(where, name)
    monkeypatch.setattr(where, name, listed)
    done = collect(Store.open(sealed_store), unlisted=True)
    monkeypatch.undo()
    threads[0].join()
    assert not {**done.unlisted, **done.partial}
    assert (sealed_store / key).read_bytes() == b"12345"


def test_what_vanishes_meanwhile_is_gone(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    litter(sealed_store)
    found = verify(Store.open(sealed_store), quick=True)
    found.unlisted.append("teachers/t/gone")
    monkeypatch.setattr(leftovers, "verify", lambda *_, **__: found)
    assert list(collect(Store.open(sealed_store), unlisted=True).unlisted) == ["teachers/t/notes.txt"]


def test_one_collects_at_a_time_on_whichever_machine(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "PATIENCE", 0.05)
    litter(sealed_store)
    store = Store.open(sealed_store)
    with filelock.FileLock(sealed_store / ROOT_LOCK):
        assert collect(store).busy == [f"{sealed_store} is being written by another process; wait for it"]
    (sealed_store / GC_LOCK).touch()
    elsewhere = replace(Owner.here(), host="elsewhere", process=7)
    (sealed_store / ".+gc.owner").write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(StoreLocked, match=r"process 7 on elsewhere.* last sign of life"), store.lock("new"):
        pass
    assert "process 7 on elsewhere" in collect(store).busy[0]
    assert (sealed_store / PARTIALS[0]).exists()
    monkeypatch.setattr(leases, "STALE", -1.0)
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    with store.lock("new"):
        pass
    assert collect(store).removed


def test_the_command(sealed_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    litter(sealed_store)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["gc", str(sealed_store), *arguments])
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    assert run("--dry-run")[1].startswith("would remove 4 files")
    with lease(sealed_store / ".t.lock"):
        code, out, err = run()
    assert code == 5
    assert out.startswith("nothing was removed:\n")
    assert "is being written by" in err
    code, out, _ = run("--json", "--unlisted")
    assert code == 0
    assert json.loads(out)["unlisted"] == {"teachers/t/notes.txt": 4}
    assert run()[1] == "nothing left over\n"

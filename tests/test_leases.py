"""A lease is one living process's, on this machine or another; a dead one's is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hdcache import leases
from hdcache.errors import StoreLocked
from hdcache.leases import Owner, alive, lease


def note(folder: Path, **changes: object) -> Path:
    """A note that another machine's owner left just now."""
    folder.mkdir(exist_ok=True)
    path = folder / ".t.owner"
    path.write_text(json.dumps(asdict(replace(Owner.here(), **{"host": "elsewhere", "process": 7, **changes}))))  # type: ignore[arg-type]
    return path


def test_a_lease_names_owner_host_and_time_and_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "store" / ".t.lock"
    with lease(path):
        owner = Owner.read(path.with_suffix(".owner"))
        assert owner is not None
        assert (owner.process, owner.host) == (os.getpid(), Owner.here().host)
        said = (
            rf"store is being written by {owner.user}, process {os.getpid()} on {owner.host}, since 20\S+; wait for it"
        )
        with pytest.raises(StoreLocked, match=said), lease(path):
            pass
        assert alive(path)
    assert not path.with_suffix(".owner").exists()
    assert not alive(path)


def test_an_error_gives_it_back_and_an_owner_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "PATIENCE", 0.02)
    with pytest.raises(ZeroDivisionError), lease(tmp_path / ".t.lock"):
        _ = 1 / 0
    for text in (None, b"", b"process 3 on x", b"[]", b'{"user": 1}', b"\xff" * 9000):
        with lease(tmp_path / ".t.lock"):
            if text is None:
                (tmp_path / ".t.owner").unlink()
            else:
                (tmp_path / ".t.owner").write_bytes(text)
            with (
                pytest.raises(StoreLocked, match="is being written by another process; wait"),
                lease(tmp_path / ".t.lock"),
            ):
                pass


def test_a_killed_owner_is_followed_at_once(tmp_path: Path, python: Callable[..., subprocess.Popen[str]]) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom hdcache.leases import lease\n"
        "with lease(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = python(code, tmp_path / ".t.lock")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StoreLocked, match=f"process {process.pid} on"), lease(tmp_path / ".t.lock"):
        pass
    process.kill()
    process.communicate(timeout=20)
    assert (tmp_path / ".t.owner").exists(), "it could not tidy up"
    with lease(tmp_path / ".t.lock"):
        owner = Owner.read(tmp_path / ".t.owner")
        assert owner is not None
        assert owner.process == os.getpid()


def test_an_owner_that_has_just_begun_is_waited_for(
    tmp_path: Path, python: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock comes before the note: there is none yet, or that of a process that was killed."""
    gone = python("pass")
    gone.communicate(timeout=20)
    monkeypatch.setattr(leases, "PATIENCE", 20.0)
    for old in (None, replace(Owner.here(), process=gone.pid)):
        path = tmp_path / str(old is None) / ".t.lock"
        with lease(path):
            owner = path.with_suffix(".owner")
            now = owner.read_text()
            owner.unlink() if old is None else owner.write_text(json.dumps(asdict(old)))
            late = threading.Timer(0.2, owner.write_text, (now,))
            late.start()
            with pytest.raises(StoreLocked, match=f"process {os.getpid()} on"), lease(path):
                pass
            late.join()


def test_an_owner_on_another_machine_lives_while_its_note_is_fresh(tmp_path: Path) -> None:
    path = note(tmp_path)
    said = (
        r"by \S+, process 7 on elsewhere, since \S+; last sign of life \d+ s ago; wait for it, or stop it .* 60 s later"
    )
    with pytest.raises(StoreLocked, match=said), lease(tmp_path / ".t.lock"):
        pass
    assert Owner.read(path).process == 7  # type: ignore[union-attr]
    old = path.stat().st_mtime - leases.STALE - 5
    os.utime(path, (old, old))
    with lease(tmp_path / ".t.lock"):
        assert Owner.read(path) != Owner.read(note(tmp_path / "other"))
        assert Owner.read(path).process == os.getpid()  # type: ignore[union-attr]


def test_a_note_of_this_machine_without_its_lock_is_a_dead_one(tmp_path: Path) -> None:
    note(tmp_path, host=Owner.here().host)
    with lease(tmp_path / ".t.lock"):
        pass


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    with lease(tmp_path / ".t.lock"):
        path = tmp_path / ".t.owner"
        os.utime(path, (1, 1))
        beaten = threading.Event()
        for _ in range(1000):
            if path.stat().st_mtime > 1:
                beaten.set()
                break
            threading.Event().wait(0.01)
        assert beaten.is_set()
        # A note that another has written since is neither touched nor removed.
        note(tmp_path)
    assert Owner.read(path).host == "elsewhere"  # type: ignore[union-attr]


def test_a_folder_where_no_note_can_be_written_is_still_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leases, "_write", full)
    with lease(tmp_path / ".t.lock"), pytest.raises(StoreLocked, match="another process"), lease(tmp_path / ".t.lock"):
        pass

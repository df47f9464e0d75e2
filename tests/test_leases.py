"""A lease is one living process's, on this machine or another; a dead one's is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from hdcache import leases
from hdcache.errors import StoreLocked
from hdcache.leases import Owner, alive, check_held, lease


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


def test_machines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Containers and clones; a note of an earlier version knows the name alone."""
    here = Owner.here()
    assert bool(here.machine) == Path("/proc/self/ns/pid").exists()
    path = note(tmp_path, host=here.host, process=os.getpid(), machine="another")
    if here.machine:
        with pytest.raises(StoreLocked, match="last sign of life"), lease(tmp_path / ".t.lock"):
            pass
    fields = asdict(here)
    del fields["machine"]
    path.write_text(json.dumps(fields))
    assert Owner.read(path) == replace(here, machine="")
    with lease(tmp_path / ".t.lock"):
        assert Owner.read(path).machine == here.machine  # type: ignore[union-attr]


APART = """
import platform, sys
from pathlib import Path
from types import SimpleNamespace
import filelock
from hdcache import leases
leases.BEAT, leases.STALE, leases.PATIENCE = 0.05, 0.3, 0.05
leases.platform = SimpleNamespace(node=lambda: "one")
leases.filelock = SimpleNamespace(
    FileLock=lambda path, timeout: filelock.FileLock(f"{path}.one", timeout=timeout), Timeout=filelock.Timeout
)
path = Path(sys.argv[1])
with leases.lease(path):
    for _ in iter(sys.stdin.readline, ""):
        try:
            leases.check_held(path.parent)
            print("goes on", flush=True)
        except leases.StoreLocked as error:
            print(error, flush=True)
"""
"""An owner on a machine whose locks reach no other, which asks for each line that it reads."""


@pytest.mark.parametrize("meanwhile", ["nobody", "writes", "has written"])
def test_an_owner_that_was_suspended_stops_if_another_has_taken_over(
    meanwhile: str, tmp_path: Path, python: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE", 0.3)
    monkeypatch.setattr(leases, "platform", SimpleNamespace(node=lambda: "two"))
    own = SimpleNamespace(FileLock=lambda path, timeout: filelock.FileLock(f"{path}.two"), Timeout=filelock.Timeout)
    monkeypatch.setattr(leases, "filelock", own)
    path = tmp_path / ".t.lock"
    path.touch()
    process = python(APART, path)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask() -> str:
        print(file=process.stdin, flush=True)
        return process.stdout.readline()  # type: ignore[union-attr]

    try:
        assert ask() == "goes on\n"
        with pytest.raises(StoreLocked, match="on one, since"), lease(path):
            pass
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        if meanwhile == "nobody":
            process.send_signal(signal.SIGCONT)
            assert ask() == "goes on\n"
            return
        with lease(path):
            if meanwhile == "writes":
                process.send_signal(signal.SIGCONT)
                said = ask()
                assert f"process {os.getpid()} on two, since" in said
        process.send_signal(signal.SIGCONT)
        said = ask()
        assert said.startswith(f"{tmp_path} was taken over by ")
        assert said.endswith(" while this process was suspended; run the same command again\n")
        assert ("another process" in said) == (meanwhile == "has written")
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_takeover_is_noticed_by_the_file_systems_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused machine does not know how long it was; what others did says so, or when the lock was touched."""
    monkeypatch.setattr(leases.time, "monotonic", lambda: 0.0)
    path = tmp_path / ".t.lock"
    with lease(path):
        (tmp_path / ".t.owner").unlink()
        check_held(tmp_path)
        assert Owner.read(tmp_path / ".t.owner").process == os.getpid()  # type: ignore[union-attr]
        note(tmp_path)
        with pytest.raises(StoreLocked, match=r"taken over by .*process 7 on elsewhere"):
            check_held(tmp_path)
        (tmp_path / ".t.owner").unlink()
        with pytest.raises(StoreLocked, match=r"taken over by .*process 7 on elsewhere"):
            check_held(tmp_path / ".." / tmp_path.name)
        check_held(tmp_path.parent)
    check_held(tmp_path)
    monkeypatch.setattr(leases, "STALE", 0.1)
    with lease(path):
        time.sleep(0.3)
        (tmp_path / ".t.owner").unlink()
        with pytest.raises(StoreLocked, match="taken over by another process while"):
            check_held(tmp_path)


def test_a_takeover_that_has_begun_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who found the note stale before this one went on writes its own a moment later."""
    with lease(tmp_path / ".t.lock"):
        monkeypatch.setattr(leases, "STALE", -1.0)
        monkeypatch.setattr(leases.time, "sleep", lambda _: note(tmp_path))
        with pytest.raises(StoreLocked, match=r"taken over by .*process 7 on elsewhere"):
            check_held(tmp_path)


def test_signs_of_life_notice_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    with lease(tmp_path / ".t.lock"):
        path = note(tmp_path)
        time.sleep(0.3)
        path.unlink()
        with pytest.raises(StoreLocked, match=r"taken over by .*process 7 on elsewhere"):
            check_held(tmp_path)

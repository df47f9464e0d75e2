"""push and pull: whole and in parts, over buckets and web servers, killed, interrupted, poisoned, hindered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import strategies as st  # noqa: F401

from hdcache import durable
from hdcache.cli import cli, main
from hdcache.draws import uniform
from hdcache.durable import stored_object
from hdcache.errors import HdcacheError, Interrupted, StoreCorrupt, StoreLocked, StoreMismatch, Unreachable, UsageError
from hdcache.integrity import verify
from hdcache.ledgers import Ledger, read_index
from hdcache.sharing import objects, transfer
from hdcache.sharing.folder import Folder
from hdcache.sharing.places import open_place
from hdcache.sharing.selection import Contents, Wanted
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from travelling import KEY, SECRET, FaultyServer, bucket_server, snapshot, web_server, write_travelling


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.01,) * 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that no test changes."""
    return write_travelling(tmp_path_factory.mktemp("transfer") / "source")


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "own")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, bucket_server(patch) as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> str:
    """The URL of a folder of its own in a bucket of an S3 server."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return f"s3://team/{name}"


@pytest.fixture
def web(source: Path) -> Iterator[FaultyServer]:
    pytest.importorskip("obstore")
    with web_server(source) as server:
        yield server


def move(source: str | Path, target: str | Path, *, parallel: int = 8, read_back: bool = False, **wanted: Any) -> Any:
    places = open_place(source), open_place(target)
    return copy_store(*places, Wanted(**wanted), parallel=parallel, read_back=read_back, quiet=True)


def good(root: Path) -> bool:
    found = verify(Store.open(root))
    return found.good and not found.unsealed


def run(*command: str | Path) -> Any:
    """What a command prints as JSON."""
    result = CliRunner().invoke(cli, [*map(str, command), "--json", "-q"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# Buckets


def test_a_store_goes_to_a_bucket_and_comes_back_byte_for_byte(source: Path, bucket: str, tmp_path: Path) -> None:
    pushed = run("push", source, bucket)
    again = run("push", source, bucket)
    assert (again["moved"]["objects"], again["whole"]) == (0, pushed["whole"])
    pulled = run("pull", bucket, tmp_path / "a")
    assert pulled["moved"] == pushed["moved"] == pushed["whole"]
    assert snapshot(tmp_path / "a") == snapshot(source)
    assert good(tmp_path / "a")


def test_what_was_written_is_read_back_where_that_is_asked_for(
    source: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_place(bucket)
    read: list[str] = []
    parts = place.parts
    monkeypatch.setattr(place, "parts", lambda key, listed: read.append(key) or parts(key, listed))
    copy_store(Folder(source), place, quiet=True)
    assert read == []  # every object's md5 is named
    copy_store(Folder(source), place, quiet=True)
    assert read == []
    other = open_place(f"{bucket}-2")
    monkeypatch.setattr(other, "parts", lambda key, listed: read.append(key) or type(other).parts(other, key, listed))
    found = copy_store(Folder(source), other, quiet=True, read_back=True)
    assert len(set(read)) == found.whole.objects


def test_teachers_are_pushed_one_after_the_other(source: Path, bucket: str, tmp_path: Path) -> None:
    move(source, bucket, teachers=("t",), pixels=False)
    assert Contents.read(open_place(bucket)).teachers.keys() == {"t"}
    assert open_place(bucket).size("croissant.json") is None
    move(source, bucket, teachers=("u",), taps=("final",))
    move(bucket, tmp_path / "a")
    assert json.loads((tmp_path / "a/teachers/u/held.json").read_bytes()) == {"taps": ["final"]}
    move(source, bucket)
    move(bucket, tmp_path / "b")
    assert snapshot(tmp_path / "b") == snapshot(source)
    assert {key: place.size for key, place in open_place(bucket).listing().items()} == {
        key: len(data) for key, data in snapshot(source).items()
    }


def test_parts_are_pulled_until_the_copy_is_whole(source: Path, bucket: str, tmp_path: Path) -> None:
    move(source, bucket)
    told = run(
        "pull", bucket, tmp_path / "a", "--teacher", "u", "--tap", "final", "--view", "0", "--no-pixels", "--dry-run"
    )
    assert not (tmp_path / "a").exists()
    assert (
        run("pull", bucket, tmp_path / "a", "--teacher", "u", "--tap", "final", "--view", "0", "--no-pixels")["moved"]
        == told["moved"]
    )
    assert good(tmp_path / "a")
    assert run("pull", bucket, tmp_path / "a", "--teacher", "t", "--no-pixels")["teachers"].keys() == {"t"}
    run("pull", bucket, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


def test_a_bucket_without_an_index_is_listed(source: Path, bucket: str, tmp_path: Path) -> None:
    move(source, bucket)
    open_place(bucket).replace("index.json", lambda old: None, 1 << 20)
    move(bucket, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)
    open_place(bucket).replace("index.json", lambda old: b"broken", 1 << 20)
    move(source, bucket, teachers=("t",))
    assert read_index(source).objects == Contents.read(open_place(bucket)).index  # type: ignore[union-attr]


def test_another_object_in_the_bucket_is_not_overwritten(source: Path, bucket: str) -> None:
    place = open_place(bucket)
    key, other = "views/0/geometry/c.0.0", b"x" * (source / "views/0/geometry/c.0.0").stat().st_size
    place.replace(key, lambda old: other, 1 << 20)
    with pytest.raises(
        StoreMismatch, match=r"s3://team/.*/views/0/geometry/c.0.0: is there already with other content"
    ):
        move(source, bucket)
    assert place.read(key, 1 << 20) == other
    assert place.size("views/0/manifest.json") is None
    assert place.size("index.json") is None


def test_no_credential_is_ever_written_down(
    source: Path,
    endpoint: str,
    bucket: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command in (
        ["push", source, bucket, "-vv"],
        ["pull", bucket, tmp_path / "a", "-vv"],
        ["push", source, "s3://none/x"],
    ):
        with pytest.raises(SystemExit):
            main([*map(str, command)])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET}@127.0.0.1:9")
    with pytest.raises(SystemExit):
        main(["push", str(source), "s3://none/x"])
    said = "".join(capfd.readouterr())
    assert "copied" in said
    assert "no such bucket" in said
    there = open_place(bucket, endpoint_url=endpoint)
    written = [there.read(key, 1 << 30) or b"" for key in there.listing()]
    written += [said.encode(), *snapshot(tmp_path).values(), *snapshot(source).values()]
    assert len(written) > 200
    assert not [data for data in written if SECRET.encode() in data or KEY.encode() in data]


# Web servers


def test_a_store_comes_from_a_web_server(web: FaultyServer, source: Path, tmp_path: Path) -> None:
    run("pull", web.url, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


@pytest.mark.parametrize("fault", ["503", "cut", "html"])
def test_faults_of_every_first_request_are_waited_out(
    web: FaultyServer, source: Path, tmp_path: Path, fault: str
) -> None:
    web.every = fault
    move(web.url, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


def test_a_server_that_ignores_ranges(web: FaultyServer, source: Path, tmp_path: Path) -> None:
    for key in snapshot(source):
        web.faults[key] = ["cut", "norange"]
    move(web.url, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


OBJECT = "teachers/u/views/1/final/values/c.2.0.0"
RECORDS = (
    "index.json",
    "zarr.json",
    "samples/label/c.0",
    "views/0/receipts/1.json",
    "teachers/t/views/0/manifest.json",
)
FAULTS = ("404", "403", "429", "500", "503", "cut", "html", "short", "long", "flip", "nolength")


@pytest.mark.parametrize(
    ("key", "fault"),
    [(OBJECT, fault) for fault in FAULTS] + [(key, fault) for key in RECORDS for fault in ("404", "html", "flip")],
)
def test_a_lasting_fault_is_one_error_and_no_bad_seal(
    web: FaultyServer, source: Path, tmp_path: Path, key: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.0,))
    web.faults[key] = [fault] * 999
    with pytest.raises(HdcacheError) as error:
        move(web.url, tmp_path / "a")
    assert isinstance(error.value, StoreCorrupt | Unreachable | FileNotFoundError)
    assert str(error.value).startswith(f"{web.url}")
    assert _faults(tmp_path / "a") == []
    assert not list((tmp_path).rglob("*.partial"))
    web.faults.clear()
    move(web.url, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


# Damage


def test_a_poisoned_object_is_refused_by_its_name(own: Path, bucket: str, tmp_path: Path) -> None:
    path = own / "teachers/u/views/0/final/values/c.1.0.0"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for target in (tmp_path / "a", bucket):
        with pytest.raises(
            StoreCorrupt,
            match=r"own/teachers/u/views/0/final/values/c.1.0.0: sha256 .*, expected .*nothing of it was kept",
        ):
            move(own, target)
    assert not (tmp_path / "a" / path.relative_to(own)).exists()
    assert open_place(bucket).size(path.relative_to(own).as_posix()) is None
    assert Store.open(tmp_path / "a").views("u") == []
    path.write_bytes(data)
    move(own, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(own)


def test_a_receipt_that_says_something_else_seals_nothing(own: Path, tmp_path: Path) -> None:
    path = own / "views/1/receipts/2.json"
    value = json.loads(path.read_bytes())
    value.pop("check")
    path.write_text(json.dumps(value | {"saturated": 7}))
    with pytest.raises(StoreCorrupt, match=r"own/views/1/receipts/2.json: .*; it is not what the store lists"):
        move(own, tmp_path / "a")
    seal = json.loads((own / "views/1/manifest.json").read_bytes())
    seal.pop("check")
    seal["objects"]["views/1/receipts/2.json"] = stored_object(path.read_bytes()).model_dump()
    (own / "views/1/manifest.json").write_text(json.dumps(seal))
    with pytest.raises(
        StoreCorrupt,
        match=r"own/views/1/manifest.json: failed rows or saturated values differ from its receipts; run 'hdcache verify'",
    ):
        move(own, tmp_path / "a")
    assert not (tmp_path / "a/views/1/manifest.json").exists()


def test_a_damaged_copy_is_not_taken_for_whole(source: Path, tmp_path: Path) -> None:
    move(source, tmp_path / "a")
    path = tmp_path / "a/teachers/t/views/0/final/values/c.0.0.0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        StoreMismatch, match=r"c.0.0.0: is there already with other content.*delete it and run the same command again"
    ):
        move(source, tmp_path / "a")
    path.unlink()
    assert move(source, tmp_path / "a").moved.objects == 1
    assert path.read_bytes() == whole


def test_notes_about_where_things_came_from_stay(own: Path, tmp_path: Path) -> None:
    move(own, tmp_path / "a", teachers=("t",))
    (own / "about.json").write_text('{"data":"folder:/elsewhere"}')
    move(own, tmp_path / "a")
    assert "folder:/data" in (tmp_path / "a/about.json").read_text()
    (own / "about.json").write_text("no JSON")
    move(own, tmp_path / "b")
    assert not (tmp_path / "b/about.json").exists()


# Kills, interruptions, failing disks


PULL = (
    "import sys, hdcache.sharing.transfer, hdcache.sharing.places; from hdcache.cli import main; "
    "print('ready', flush=True); main(['pull', *sys.argv[1:], '-q', '--parallel', '2'])"
)


def _kill(
    start: Callable[[], subprocess.Popen[str]],
    seed: str,
    kills: int,
    check: Callable[[], None],
    done: Callable[[], None],
) -> None:
    """Kill a command at random moments and run it again. When it ends by itself, ``done`` looks at it and begins anew."""
    killed = number = 0
    while killed <= kills:
        number += 1
        process = start()
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin, process.stdout:
            said = process.stdout.readline()
            try:
                code = process.wait(60 if killed == kills else 0.6 * float(uniform(1, "kill", seed, number)[0]))
                assert (code, said) == (0, "ready\n"), said + process.stdout.read()
                done()
                killed += killed == kills
                continue
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        killed += 1
        check()


def _faults(target: Path) -> list[str]:
    """What is wrong with a copy that is not finished, but for a teacher whose record has not come yet."""
    if not (target / "zarr.json").is_file():
        return []
    return [fault for fault in verify(Store.open(target)).faults if ": no teacher " not in fault]


def _harmless(target: Path) -> None:
    assert _faults(target) == []
    for path in target.rglob("*"):
        assert not path.is_file() or path.stat().st_size or path.name.endswith((".partial", ".lock", ".owner"))


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_pull_that_is_killed_goes_on(
    web: FaultyServer, source: Path, tmp_path: Path, python: Callable[..., subprocess.Popen[str]], kills: int
) -> None:
    target, whole = tmp_path / "a", snapshot(source)

    def begin() -> subprocess.Popen[str]:
        web.faults = {key: ["slow"] for key in [*whole][::8]}
        return python(PULL, web.url, target)

    def done() -> None:
        assert {key: data for key, data in snapshot(target).items() if not key.endswith(".partial")} == whole
        shutil.rmtree(target)

    _kill(begin, f"pull {kills}", kills, lambda: _harmless(target), done)


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_push_that_is_killed_goes_on(
    source: Path, bucket: str, tmp_path: Path, python: Callable[..., subprocess.Popen[str]], kills: int
) -> None:
    turns = [0]
    listed = read_index(source)
    assert listed is not None

    def check() -> None:
        found = open_place(f"{bucket}-{len(turns)}").listing()
        if "index.json" in found:  # the last word
            assert listed.objects.keys() <= found.keys()

    def done() -> None:
        move(f"{bucket}-{len(turns)}", tmp_path / f"{len(turns)}")
        assert snapshot(tmp_path / f"{len(turns)}") == snapshot(source)
        turns.append(0)

    begin = PULL.replace("'pull'", "'push'")
    _kill(lambda: python(begin, source, f"{bucket}-{len(turns)}"), f"push {kills}", kills, check, done)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_at_a_safe_point(
    web: FaultyServer,
    source: Path,
    tmp_path: Path,
    python: Callable[..., subprocess.Popen[str]],
    number: int,
    code: int,
) -> None:
    web.faults = {key: ["slow"] for key in [*snapshot(source)][::4]}
    process = python(PULL, web.url, tmp_path / "a")
    while not (tmp_path / "a/zarr.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert f"stopped by {signal.Signals(number).name} with what" in said
    assert "run the same command again to go on" in said
    assert not list(tmp_path.rglob("*.partial"))
    move(web.url, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


@pytest.mark.usefixtures("signals")
def test_a_stop_leaves_no_partial_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []

    def stop(*given: Any, **more: Any) -> Any:
        count.append(1)
        if len(count) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **more)

    real = durable.durable_parts
    monkeypatch.setattr("hdcache.sharing.folder.durable_parts", stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM with what has arrived kept"):
        move(source, tmp_path / "a", parallel=1)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_that_fails_at_any_moment_leaves_no_bad_store(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that makes something durable fails once, with another reason each; the copy goes on from there."""
    real, calls, fail = os.fsync, [0], [0]
    reasons = (28, 5, 13, 110)

    def failing(number: int) -> None:
        calls[0] += 1
        if calls[0] == fail[0]:
            reason = reasons[fail[0] % len(reasons)]
            raise OSError(reason, os.strerror(reason))
        real(number)

    monkeypatch.setattr(os, "fsync", failing)
    whole = snapshot(source)
    target = tmp_path / "a"
    for step in range(1, 400, 7):
        calls[0], fail[0] = 0, step
        try:
            move(source, target, parallel=1)
        except (OSError, HdcacheError):
            assert not list(target.rglob("*.partial"))
            assert _faults(target) == []
    fail[0] = 0
    move(source, target)
    assert snapshot(target) == whole


# Who may write


def test_a_teacher_that_is_being_written_is_left_alone(source: Path, tmp_path: Path) -> None:
    move(source, tmp_path / "a", teachers=("t",))
    with Store.open(tmp_path / "a").lock("u"), pytest.raises(StoreLocked):
        move(source, tmp_path / "a")
    assert Store.open(tmp_path / "a").teachers() == ["t"]
    move(source, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


def test_two_who_push_at_once_write_one_store(source: Path, bucket: str, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(move, source, bucket, teachers=(name,)) for name in "tutu"]
        for other in several:
            other.result()
    move(bucket, tmp_path / "a")
    assert snapshot(tmp_path / "a") == snapshot(source)


# What is said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["push", "s3://b/x", "{a}"], "hdcache push: STORE is a folder, 's3://b/x' is none; copy by way of one"),
        (["pull", "{source}", "s3://b/x"], "hdcache pull: STORE is a folder, 's3://b/x' is none; copy by way of one"),
        (["push", "{source}", "http://127.0.0.1:9/x"], "a web server has no listing and takes no objects"),
        (["push", "{source}", "{source}"], "source and target are the same folder"),
        (["push", "{source}", "{a}", "--parallel", "0"], "--parallel 0: choose from 1 to 64"),
        (["push", "{a}", "{b}"], "a: no store there; make one with 'hdcache extract"),
    ],
)
def test_refusals(source: Path, tmp_path: Path, command: list[str], message: str) -> None:
    pytest.importorskip("obstore")
    places = {"source": str(source), "a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    result = CliRunner().invoke(cli, [part.format(**places) for part in command])
    assert isinstance(result.exception, UsageError | FileNotFoundError)
    assert message in str(result.exception)


def test_what_was_copied_is_told(own: Path, tmp_path: Path) -> None:
    Ledger(own, "teachers/u/views/1").unseal()
    result = CliRunner().invoke(cli, ["push", str(own), str(tmp_path / "a"), "--dry-run"])
    lines = result.stdout.splitlines()
    assert lines[0].startswith("would copy 10")
    assert lines[0].endswith("; 0 objects there already, 0 B")
    assert "  teacher t, views 0" in lines
    assert "  teacher u, views 0" in lines
    assert any(line.startswith("    final ") for line in lines)
    assert lines[-1] == "  left behind, not complete: teachers/u/views/1"
    assert transfer.format_copied(move(own, tmp_path / "a"), dry_run=False).startswith("copied 10")


@pytest.mark.parametrize("name", ["index.json", "croissant.json"])
def test_a_foreign_note_is_not_overwritten(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(StoreMismatch, match=name):
        move(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_a_bucket_that_lost_its_index_keeps_its_teachers(own: Path, bucket: str, tmp_path: Path) -> None:
    move(own, bucket, teachers=("t",))
    open_place(bucket).replace("index.json", lambda _: None, 1 << 20)
    move(own, bucket, teachers=("u",))
    assert set(move(bucket, tmp_path / "both").teachers) == {"t", "u"}

"""Workers of a real scheduler: the store of the inline engine, whoever dies on the way, and clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config as dask_config
import distributed
import pytest
from distributed.comm.tcp import TCP

from hdcache import stopping
from hdcache.errors import Interrupted, StoreMismatch, TooManyFailures, WorkersFailed
from hdcache.extract import dask_engine
from hdcache.extract.machines import fingerprint, versions
from hdcache.extract.run import extract
from hdcache.extract.summary import ExtractSummary
from hdcache.extract.task_window import TaskWindow
from hdcache.integrity import verify
from hdcache.ledgers import teacher_ledger
from hdcache.store import Store, read_about
from hdcache.teachers import Teacher

Tree = Callable[[Path], dict[str, bytes]]
ROWS, SHARD = 40, 4
SHARDS = ROWS // SHARD

# A worker dies of a shard as often as there are files kill-SHARD-* in the folder, all written but the receipt; it takes its
# time for each shard where there is a file slow.
FAULTS = """
import os, signal, time
from pathlib import Path
from hdcache.ledgers import Ledger
import hdcache.extract.worker
folder = Path({folder!r})
def faulty(self, receipt, record=Ledger.record):
    if self.key.startswith("teachers/"):
        for order in sorted(folder.glob(f"kill-{{receipt.shard}}-*")):
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder / "slow").exists():
            time.sleep(0.3)
    record(self, receipt)
if Ledger.record.__name__ == "record":  # a preload may be run twice
    Ledger.record = faulty
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cluster(faults: Path) -> Iterator[distributed.LocalCluster]:
    """Two processes of one task each, with the resource GPU=1."""
    preload = faults / "faults.py"
    preload.write_text(FAULTS.format(folder=str(faults)))
    patient = {"distributed.deploy.lost-worker-timeout": "10 minutes"}
    with dask_config.set(patient), distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0", resources={"GPU": 1},
        preload=[str(preload)], silence_logs=60, scheduler_kwargs={"allowed_failures": 0},
    ) as found:  # fmt: skip
        yield found


@pytest.fixture
def address(cluster: distributed.LocalCluster, faults: Path) -> Iterator[str]:
    yield str(cluster.scheduler_address)
    for path in [*faults.glob("kill-*"), *faults.glob("slow")]:
        path.unlink()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path_factory.mktemp("data") / "d.npz", ROWS)


def run(data: str | Path | None, store: Path, *teachers: str, **settings: Any) -> ExtractSummary:
    common = {
        "encoding": "klt",
        "precision": "fp32",
        "rows_per_shard": SHARD,
        "batch": 8,
        "threads": 1,
        "device": "cpu",
    }
    return extract(None if data is None else str(data), store=store, teachers=list(teachers), **common | settings)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, data: str, tiny: str, tree: Tree) -> dict[str, bytes]:
    """Every file of the store that the inline engine makes: one teacher, one view."""
    root = tmp_path_factory.mktemp("inline") / "s"
    run(data, root, f"t={tiny}")
    return tree(root)


def files(root: Path, tree: Tree) -> dict[str, bytes]:
    """Those of a store, without what processes leave that were killed."""
    return {key: value for key, value in tree(root).items() if not key.endswith(".partial")}


def written(root: Path, view: int = 0) -> list[int]:
    ledger = teacher_ledger(Store.open(root), "t", view)
    return [shard for shard in range(SHARDS) if ledger.receipt(shard)]


# The same store


def test_two_workers_write_the_inline_store(
    address: str, data: str, tmp_path: Path, tiny: str, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two teachers one after the other, two views; few tasks fly at once, and little goes over the wire."""
    flying: list[int] = []
    sent: list[int] = []
    submit, write = TaskWindow._submit, TCP.write

    def counted(self: TaskWindow, task: Any) -> None:
        submit(self, task)
        flying.append(len(self.flying))

    async def weighed(self: TCP, *given: Any, **more: Any) -> int:
        count = await write(self, *given, **more)
        sent.append(count)
        return int(count)

    teachers = [f"t={tiny}", f"u={tiny}&seed=1"]
    whole = run(data, tmp_path / "inline", *teachers, num_views=2)
    monkeypatch.setattr(TaskWindow, "_submit", counted)
    monkeypatch.setattr(TCP, "write", weighed)
    found = run(data, tmp_path / "dask", *teachers, num_views=2, scheduler=address, worker_resource="GPU=1")
    monkeypatch.undo()
    assert tree(tmp_path / "dask") == tree(tmp_path / "inline")
    for name in ("t", "u"):
        facts = found.teachers[name]
        assert {key: facts[key] for key in ("rows", "rows_written", "bytes", "manifests")} == {
            key: whole.teachers[name][key] for key in ("rows", "rows_written", "bytes", "manifests")
        }
        assert facts["workers"] | {"seconds_loading": 0} == {
            "engine": "dask", "workers": 2, "seconds_loading": 0, "lost": 0, "differing": {},
        }  # fmt: skip
        assert whole.teachers[name]["workers"] is None
    assert len(flying) == 4 * SHARDS
    assert max(flying) == 4, "one that runs and one that waits for each worker"
    # Both ways, all that a task needs and the scheduler's own talk: heartbeats, versions, the list of workers.
    assert sum(sent) / len(flying) < 30_000
    assert verify(Store.open(tmp_path / "dask")).good
    again = run(data, tmp_path / "dask", *teachers, num_views=2, scheduler=address)
    assert again.teachers["t"]["bottleneck"] == "nothing left to do"


def test_local_processes_write_the_inline_store(
    data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(data, tmp_path / "s", f"t={tiny}", engine="local", workers=2)
    assert tree(tmp_path / "s") == inline
    assert found.teachers["t"]["workers"]["engine"] == "local"
    monkeypatch.setattr(dask_engine, "local_client", lambda workers: pytest.fail("workers for no work"))
    again = run(data, tmp_path / "s", f"t={tiny}", engine="local", workers=2)
    assert again.teachers["t"]["workers"] is None


def test_failed_rows_are_those_of_the_inline_engine(
    address: str, tmp_path: Path, tiny: str, tree: Tree, make_folder: Callable[..., Path]
) -> None:
    """Also after they were mended in part, and counted over all workers."""
    root = make_folder(tmp_path / "d")
    good = {}
    for name in ("a/00.png", "b/03.png", "a/08.png"):
        good[name] = (root / name).read_bytes()
        (root / name).write_bytes(b"no image".ljust(len(good[name]), b"!"))
    with pytest.raises(
        TooManyFailures, match=r"[23] images failed, more than --max-failures 1; the first: [ab]/0\d\.png: "
    ):
        run(root, tmp_path / "dask", f"t={tiny}", scheduler=address, max_failures=1)
    first = [
        run(root, tmp_path / name, f"t={tiny}", **more)
        for name, more in (("dask", {"scheduler": address}), ("inline", {}))
    ]
    assert first[0].failed == first[1].failed
    assert set(first[0].failed) == set(good)
    assert tree(tmp_path / "dask") == tree(tmp_path / "inline")
    (root / "b/03.png").write_bytes(good["b/03.png"])
    second = [
        run(root, tmp_path / name, f"t={tiny}", **more)
        for name, more in (("dask", {"scheduler": address}), ("inline", {}))
    ]
    assert set(second[0].failed) == set(second[1].failed) == {"a/00.png", "a/08.png"}
    assert second[0].teachers["t"]["rows_written"] == second[1].teachers["t"]["rows_written"]
    assert tree(tmp_path / "dask") == tree(tmp_path / "inline")


# Whatever happens on the way


def test_a_worker_killed_in_mid_shard(
    address: str, faults: Path, data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes]
) -> None:
    (faults / "kill-3-1").touch()
    found = run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    assert not list(faults.glob("kill-*"))
    assert found.teachers["t"]["workers"]["lost"] >= 1
    assert files(tmp_path / "s", tree) == inline


@pytest.mark.slow
def test_a_shard_that_keeps_killing_is_named_and_the_others_are_written(
    address: str, faults: Path, data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes]
) -> None:
    for number in range(9):
        (faults / f"kill-7-{number}").touch()
    with pytest.raises(
        WorkersFailed, match=r"1 shard failed on every worker that tried.*view 0 shard 7 \(rows 28 to 31: \d{7}, "
    ):
        run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    assert len(list(faults.glob("kill-7-*"))) == 9 - 3
    assert written(tmp_path / "s") == [shard for shard in range(SHARDS) if shard != 7]
    for path in faults.glob("kill-*"):
        path.unlink()
    assert run(data, tmp_path / "s", f"t={tiny}").teachers["t"]["rows_written"] == SHARD, "any engine goes on"
    assert files(tmp_path / "s", tree) == inline


@pytest.mark.usefixtures("signals")
def test_a_stop_at_the_border_of_a_shard(
    address: str, faults: Path, data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes]
) -> None:
    (faults / "slow").touch()

    def stop() -> None:
        while not list((tmp_path / "s").glob("teachers/t/views/0/receipts/*.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM with all finished shards written to") as caught:
        run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    watcher.join()
    assert caught.value.exit_code == 75
    done = written(tmp_path / "s")
    assert 0 < len(done) < SHARDS
    time.sleep(0.7)
    assert written(tmp_path / "s") == done, "nobody goes on writing"
    stopping._received.clear()
    (faults / "slow").unlink()
    run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    assert files(tmp_path / "s", tree) == inline


# Refusals


def test_a_resource_that_no_worker_has(address: str, data: str, tmp_path: Path, tiny: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        WorkersFailed, match=r"none of [12] workers? of .* has the resource TPU=1 \(their resources: GPU=1\)"
    ):
        run(data, tmp_path / "s", f"t={tiny}", scheduler=address, worker_resource="TPU=1")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "s").exists()


def test_workers_of_other_versions(
    address: str, data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_engine, "versions", lambda kind: versions(kind) | {"torch": "1.0"})
    with pytest.raises(
        StoreMismatch, match=r"the worker on .* has torch .*, this command 1\.0: their rows could differ"
    ):
        run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    assert written(tmp_path / "s") == []


def test_machines_that_round_otherwise_are_recorded(
    address: str,
    data: str,
    tmp_path: Path,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def elsewhere(teacher: Teacher, taps: list[str]) -> Any:
        found = fingerprint(teacher, taps)
        values = {tap: tuple(value * (1 + 1e-6) for value in values) for tap, values in found.values.items()}
        return found.model_copy(update={"sha256": "other", "values": values})

    monkeypatch.setattr(dask_engine, "fingerprint", elsewhere)
    found = run(data, tmp_path / "s", f"t={tiny}", scheduler=address)
    ((node, apart),) = found.teachers["t"]["workers"]["differing"].items()
    assert 0 < apart < 1e-5
    about = read_about(tmp_path / "s/teachers/t")
    assert about.written_with[f"features on {node}"] == f"relative difference {apart:.1e}"
    assert "other last bits than here" in caplog.text
    assert verify(Store.open(tmp_path / "s")).good


# The scheduler in a process of its own


def dask(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_cluster(folder: Path, faults: Path) -> tuple[list[subprocess.Popen[bytes]], str]:
    """A scheduler and two workers, as a user starts them; the address that the scheduler chose."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    started = [dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file)]
    while not (file.is_file() and file.read_bytes().endswith(b"}")):
        time.sleep(0.05)
    where = json.loads(file.read_text())["address"]
    worker = ["worker", where, "--nthreads", 1, "--no-dashboard", "--preload", faults / "faults.py"]
    return started + [dask(*worker, "--local-directory", folder) for _ in range(2)], str(where)


def stop_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


@pytest.mark.slow
def test_a_scheduler_killed_and_started_again(
    faults: Path, data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes]
) -> None:
    (faults / "faults.py").write_text(FAULTS.format(folder=str(faults)))
    (faults / "slow").touch()
    command = [
        sys.executable, "-m", "hdcache", "extract", data, "--store", str(tmp_path / "s"), "--teacher", f"t={tiny}", "--encoding", "klt",
        "--precision", "fp32", "--rows-per-shard", str(SHARD), "--batch", "8", "--device", "cpu",
    ]  # fmt: skip
    processes, where = start_cluster(tmp_path, faults)
    try:
        running = subprocess.Popen([*command, "--scheduler", where], stderr=subprocess.PIPE, text=True)
        while not list((tmp_path / "s").glob("teachers/t/views/0/receipts/*.json")):
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.02)
        processes[0].kill()
        errors = running.communicate(timeout=60)[1]
        assert running.returncode == 75, errors
        lines = [line for line in errors.splitlines() if not line.startswith("extract t")]
        assert len(lines) == 1, errors
        assert lines[0].startswith(f"hdcache: the Dask scheduler {where} is gone; all finished shards are written to")
        assert 0 < len(written(tmp_path / "s")) < SHARDS
        (faults / "slow").unlink()
        stop_all(processes)
        processes, where = start_cluster(tmp_path, faults)
        again = subprocess.run(
            [*command, "--scheduler", str(tmp_path / "scheduler.json")], capture_output=True, text=True, timeout=120
        )
        assert again.returncode == 0, again.stderr
        assert files(tmp_path / "s", tree) == inline
    finally:
        (faults / "slow").unlink(missing_ok=True)
        stop_all(processes)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_whole_group_lets_local_workers_finish(
    number: signal.Signals, code: int, data: str, tmp_path: Path, tiny: str, tree: Tree, inline: dict[str, bytes]
) -> None:
    """Every process gets the signal, as from a terminal, from scancel or from timeout."""
    command = [
        sys.executable, "-m", "hdcache", "extract", data, "--store", str(tmp_path / "s"), "--teacher", f"t={tiny}", "--encoding", "klt",
        "--precision", "fp32", "--rows-per-shard", "1", "--batch", "8", "--device", "cpu", "--workers", "2",
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "s").glob("teachers/t/views/0/receipts/*.json")):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    os.killpg(running.pid, number)
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == code, errors
    assert not list((tmp_path / "s").rglob("*.partial")), "a shard that was begun was cut off"
    lines = [line for line in errors.splitlines() if line and not line.startswith("extract t")]
    assert [line.partition(";")[0] for line in lines] == [
        "hdcache: stopping at the next safe point",
        f"hdcache: stopped by {number.name} with all finished shards written to {tmp_path / 's'}",
    ], errors
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    whole = run(data, tmp_path / "inline", f"t={tiny}", rows_per_shard=1)
    assert Store.open(tmp_path / "s").views("t") == [0]
    assert files(tmp_path / "s", tree) == tree(tmp_path / "inline")
    assert whole.teachers["t"]["rows"] == ROWS

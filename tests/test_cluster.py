"""Workers that are started here, and those of a scheduler: which of them take tasks, and what is said when none does."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import pytest

from hdcache.errors import StoreMismatch, WorkersFailed
from hdcache.extract import cluster
from hdcache.extract.cluster import await_workers, local_client, per_machine, remote_client, slots, workers_of

TCP = "tcp://127.0.0.1:8786"


def workers(**resources: dict[str, float]) -> dict[str, dict[str, Any]]:
    return {name: {"nthreads": 2, "resources": have, "host": name[0]} for name, have in resources.items()}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"a1": 2, "a2": 2, "b1": 2}),
        ({"GPU": 1.0}, {"a1": 1, "b1": 2}),
        ({"GPU": 0.5}, {"a1": 2, "b1": 2}),
        ({"GPU": 1.0, "MEMORY": 5.0}, {"b1": 1}),
        ({"TPU": 1.0}, {}),
    ],
)
def test_tasks_that_a_worker_takes_at_once(asked: dict[str, float], expected: dict[str, int]) -> None:
    assert slots(workers(a1={"GPU": 1}, a2={}, b1={"GPU": 4, "MEMORY": 9}), asked) == expected


def test_workers_that_share_a_machine() -> None:
    assert per_machine(workers(a1={}, a2={}, b1={})) == 2
    assert per_machine({}) == 1


class Answers:
    """A client whose scheduler has these workers from a moment on, and whose workers answer so about their version."""

    def __init__(self, found: dict[str, dict[str, Any]], answer: Any = None, after: float = 0.0) -> None:
        self.found, self.answer, self.since = found, answer or version("hdcache"), time.monotonic() + after

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": self.found if time.monotonic() > self.since else {}}

    def sync(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return asyncio.run(function())  # type: ignore[arg-type]

    async def run(self, function: Callable[..., Any], *given: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        assert (function, given, on_error) == (version, ("hdcache",), "return")
        (address,) = workers
        answer = self.answer[address] if isinstance(self.answer, dict) else self.answer
        if answer is None:
            await asyncio.sleep(1000)
        if isinstance(answer, OSError):
            raise answer
        return {address: answer}


def test_no_worker_at_all() -> None:
    began = time.monotonic()
    message = r"no worker connected to tcp://127.0.0.1:8786 within 0.2 seconds; start some with 'dask worker tcp://127.0.0.1:8786"
    with pytest.raises(WorkersFailed, match=message) as caught:
        await_workers(Answers({}), {}, 0.2, TCP)
    assert time.monotonic() - began < 5
    assert caught.value.exit_code == 4


def test_a_worker_that_comes_later_is_awaited() -> None:
    await_workers(Answers(workers(a={}), after=0.2), {}, 20, TCP)


def test_a_label_that_no_worker_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.LABEL_SECONDS < 10
    monkeypatch.setattr(cluster, "LABEL_SECONDS", 0.1)
    message = r"none of 3 workers of tcp://.* has the resource GPV=1 \(their resources: GPU=1, GPU=4\); start workers with 'dask worker tcp://127.0.0.1:8786 --resources GPV=1', or change --worker-resource"
    with pytest.raises(WorkersFailed, match=message):
        await_workers(Answers(workers(a={"GPU": 1}, b={"GPU": 4}, c={})), {"GPV": 1.0}, 60, TCP)
    with pytest.raises(WorkersFailed, match=r"none of 1 worker of .* \(their resources: none\)"):
        await_workers(Answers(workers(a={})), {"GPU": 1.0}, 60, TCP)


def test_workers_of_another_version_are_refused() -> None:
    with pytest.raises(StoreMismatch, match=r"the worker a has hdcache 0\.0\.1, this command .*start the worker again"):
        await_workers(Answers(workers(a={}), "0.0.1"), {}, 1, TCP)
    with pytest.raises(StoreMismatch, match=r"the worker a has hdcache none, this command"):
        await_workers(Answers(workers(a={}), PackageNotFoundError("hdcache")), {}, 1, TCP)


def test_a_worker_that_does_not_answer_is_nobody_elses_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Stopped, or dying: neither waited for beyond the time, nor read as a version."""
    began = time.monotonic()
    own = version("hdcache")
    answer = {"a": own, "b": None, "c": OSError("Timed out trying to connect to tcp://c"), "d": ValueError("odd")}
    with caplog.at_level(logging.WARNING):
        await_workers(Answers(workers(a={}, b={}, c={}, d={}), answer), {}, 0.2, TCP)
    assert time.monotonic() - began < 5
    assert caplog.messages == [f"3 workers of {TCP} did not answer: b, c, d"]
    with pytest.raises(StoreMismatch, match=r"the worker e has hdcache 0\.0\.1"):
        await_workers(Answers(workers(b={}, e={}), {"b": None, "e": "0.0.1"}), {}, 0.2, TCP)


def test_workers_none_of_which_answers() -> None:
    message = r"none of 2 workers of tcp://.* answers within 0.2 seconds \(b: TimeoutError\); start them again, or wait longer"
    with pytest.raises(WorkersFailed, match=message):
        await_workers(Answers(workers(b={}, c={}), {"b": None, "c": OSError("gone")}), {}, 0.2, TCP)


def test_workers_that_answer_later_are_enough() -> None:
    """As while those that died are started again."""
    client = Answers(workers(a={}), OSError("gone"))
    run = client.run

    async def later(*given: Any, **more: Any) -> dict[str, Any]:
        await asyncio.sleep(0.05)
        asked.append(given)
        client.answer = version("hdcache") if len(asked) > 3 else client.answer
        return await run(*given, **more)

    asked: list[Any] = []
    client.run = later  # type: ignore[method-assign]
    await_workers(client, {}, 20, TCP)
    assert len(asked) == 4


def test_without_cryptography_the_open_port_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ImportError("no cryptography")

    monkeypatch.setattr(cluster.distributed.Security, "temporary", missing)
    monkeypatch.setattr(cluster.distributed, "LocalCluster", lambda **given: (_ for _ in ()).throw(OSError("enough")))
    with caplog.at_level(logging.WARNING), pytest.raises(WorkersFailed, match="enough"), local_client(1):
        pass
    (line,) = caplog.messages
    assert line.startswith(
        "other users of this machine can reach the workers and run programs as you: pip install crypt"
    )


def test_workers_that_dask_leaves_behind_are_ended() -> None:
    """They block the signal that Python would end them with, and it would wait for them for ever."""
    spawn = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    left, other = (
        spawn.Process(target=time.sleep, args=(60,), name=name, daemon=True) for name in ("Dask Worker", "x")
    )
    for process in (left, other):
        process.start()
    try:
        cluster._end_workers({*before, left})
        assert left.is_alive()
        cluster._end_workers(before)
        assert not left.is_alive()
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    message = (
        r"no Dask scheduler answers at tcp://127.0.0.1:9 \(.*\); start one with 'dask scheduler' and give --scheduler"
    )
    with pytest.raises(WorkersFailed, match=message), remote_client("tcp://127.0.0.1:9"):
        pass


def blocked(process: psutil.Process) -> int:
    """The set of signals that a process's first thread blocks."""
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))


def test_local_workers_are_private_threaded_and_deaf_to_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine reaches them, Dask's one OpenMP thread is not forced on them, and nothing is left behind."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    me = psutil.Process()
    known = set(me.children(recursive=True))
    listening = {found.laddr.port for found in me.net_connections() if found.status == "LISTEN"}
    with local_client(1) as client:
        (address,) = workers_of(client)
        assert slots(workers_of(client), {}) == {address: cluster.TASKS}
        await_workers(client, {}, 5, "this machine")
        threads = client.run(os.getenv, "OMP_NUM_THREADS")[address]
        assert threads == str(len(os.sched_getaffinity(0)))
        pid = client.run(os.getpid)[address]
        started = set(me.children(recursive=True)) - known
        sockets = [
            found.laddr
            for process in (me, *started)
            for found in process.net_connections()
            if found.status == "LISTEN" and found.laddr.port not in listening
        ]
        assert len(sockets) >= 3
        assert {found.ip for found in sockets} == {"127.0.0.1"}
        if os.path.isdir("/proc"):
            mask = blocked(psutil.Process(pid))
            assert all(mask >> (number - 1) & 1 for number in (2, 10, 15)), "SIGINT, SIGUSR1 and SIGTERM"
            assert not blocked(me) >> 1 & 1, "this process still hears Ctrl-C"
        assert client.scheduler.address.startswith("tls://" if has_cryptography() else "tcp://")
    left = {name: value for name, value in os.environ.items() if not name.startswith("__DASK")}
    assert left == {name: value for name, value in before.items() if not name.startswith("__DASK")}
    assert not psutil.pid_exists(pid)


def has_cryptography() -> bool:
    try:
        version("cryptography")
    except PackageNotFoundError:
        return False
    return True

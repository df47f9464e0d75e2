"""Where tasks run: processes that are started here, or the workers of a Dask scheduler; and which of them take tasks."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask

from hdcache import stopping
from hdcache.errors import WorkersFailed
from hdcache.extract.machines import check_versions
from hdcache.extract.worker import own_threads
from hdcache.progress import counted

distributed: Any = import_module("distributed")
"""Half of what it exports has no types."""
log = logging.getLogger(__name__)
LABEL_SECONDS = 5.0
"""How long workers without the resource that is asked for are taken for the first ones of a cluster that starts."""
CONNECT_SECONDS = 10.0
TASKS = 2
"""Shards in a process that is started here: the teacher computes one while another is decoded or written."""
POLL_SECONDS = 0.05
NAMED = 4
"""Workers that a message names."""


@contextmanager
def local_client(workers: int) -> Iterator[Any]:
    """A scheduler and ``workers`` processes of :data:`TASKS` each on this machine, reachable from this machine alone.

    Raises
    ------
    WorkersFailed
        when they do not start.
    """
    # In place of Dask's own: one thread each, and memory given back at once. What the user has set goes before.
    environment = {
        name: own_threads(workers) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    settings = {
        "distributed.nanny.pre-spawn-environ": environment,
        "distributed.worker.profile.enabled": False,
        # One that died is started again at once, but on a busy machine may need longer for that than Dask's 15 s.
        "distributed.deploy.lost-worker-timeout": "10 minutes",
    }
    before = {name: os.environ.get(name) for name in (*environment, "PYTHONHASHSEED")}
    security = None
    try:
        # With it, other users of this machine cannot talk to the workers.
        security = distributed.Security.temporary()
    except ImportError:
        log.warning(
            "other users of this machine can reach the workers and run programs as you: pip install cryptography, with which "
            "they speak TLS, or use --engine inline here"
        )
    before_us = set(multiprocessing.active_children())
    with ExitStack() as stack:
        stack.callback(_end_workers, before_us)
        stack.enter_context(dask.config.set(settings))
        stack.enter_context(_quiet())
        try:
            with _signals_kept_here():
                cluster = distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=TASKS,
                    memory_limit=None,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    security=security,
                    silence_logs=logging.CRITICAL,
                    # A shard that dies with its worker comes back at once; dask_engine.py counts.
                    scheduler_kwargs={"allowed_failures": 0},
                )
        except (RuntimeError, OSError) as error:
            raise WorkersFailed(
                f"{counted(workers, 'worker processes')} did not start ({str(error).splitlines()[0][:200]}); in a script of "
                "your own put the call under: if __name__ == '__main__':"
            ) from None
        finally:
            # Dask sets what workers inherit in the environment of this process too.
            stack.callback(_restore, before)
        stack.callback(cluster.close, timeout=10)
        yield stack.enter_context(distributed.Client(cluster, set_as_default=False, direct_to_workers=False))


@contextmanager
def remote_client(scheduler: str) -> Iterator[Any]:
    """A connection to a scheduler: ``tcp://HOST:PORT``, ``tls://HOST:PORT``, or the file that it wrote.

    Raises
    ------
    WorkersFailed
        when none answers.
    """
    where: dict[str, Any] = {"address": scheduler}
    if not re.match(r"\w+://", scheduler):
        where = {"scheduler_file": str(Path(scheduler).expanduser())}
    with _quiet():
        try:
            client = distributed.Client(
                **where, timeout=CONNECT_SECONDS, set_as_default=False, direct_to_workers=False, name="hdcache"
            )
        except (OSError, ValueError, TypeError) as error:
            raise WorkersFailed(
                f"no Dask scheduler answers at {scheduler} ({str(error).splitlines()[0][:160]}); start one with 'dask scheduler' and "
                "give --scheduler the address it prints; tls:// needs the certificates of Dask's own configuration"
            ) from None
        try:
            yield client
        finally:
            with suppress(TimeoutError, OSError):
                client.close(timeout=2)


def workers_of(client: Any) -> dict[str, dict[str, Any]]:
    """Address -> what the scheduler knows of each worker."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def slots(workers: Mapping[str, Mapping[str, Any]], resources: Mapping[str, float]) -> dict[str, int]:
    """Address -> tasks that a worker runs at once, of those that have the resources for one."""

    def of(facts: Mapping[str, Any]) -> int:
        have = facts.get("resources", {})
        return min([int(facts["nthreads"]), *(int(have.get(name, 0) / need) for name, need in resources.items())])

    return {address: count for address, facts in workers.items() if (count := of(facts)) > 0}


def per_machine(workers: Mapping[str, Mapping[str, Any]]) -> int:
    """The most workers that share a machine."""
    return max(Counter(str(facts.get("host", "")) for facts in workers.values()).values(), default=1)


def await_workers(client: Any, resources: Mapping[str, float], timeout: float, scheduler: str) -> None:
    """Wait for a first worker that takes tasks, and refuse workers of another hdcache.

    Raises
    ------
    WorkersFailed
        after ``timeout`` seconds without any worker, or :data:`LABEL_SECONDS` with none that has the resources, or where
        none of them answers.
    StoreMismatch
        for a worker with another version of hdcache, or none.
    Interrupted
        when a signal asks for a stop.
    """
    began = time.monotonic()
    known: dict[str, str | PackageNotFoundError] = {}
    while not known:
        able = _able(client, resources, began, timeout, scheduler)
        found = answers(client, able, min(CONNECT_SECONDS, timeout), version, "hdcache")
        known = {address: each for address, each in found.items() if isinstance(each, str | PackageNotFoundError)}
        # One that is stopped, or dying: the scheduler will notice, and every task checks versions again.
        silent = sorted(found.keys() - known.keys())
        if not known and time.monotonic() - began > timeout:
            raise WorkersFailed(
                f"none of {counted(len(silent), 'workers')} of {scheduler} answers within {timeout:g} seconds ({silent[0]}: "
                f"{type(found[silent[0]]).__name__}); start them again, or wait longer with --worker-timeout"
            )
    for address, answer in known.items():
        there = {"hdcache": answer} if isinstance(answer, str) else {}
        check_versions({"hdcache": version("hdcache")}, there, f"the worker {address}")
    if silent:
        names = ", ".join(silent[:NAMED])
        log.warning("%s of %s did not answer: %s", counted(len(silent), "workers"), scheduler, names)


def _able(client: Any, resources: Mapping[str, float], began: float, timeout: float, scheduler: str) -> list[str]:
    """Addresses of the workers that take tasks, as soon as there are some."""
    while True:
        if stopping.requested():
            raise stopping.stop("nothing begun")
        workers = workers_of(client)
        if able := slots(workers, resources):
            return list(able)
        waited = time.monotonic() - began
        if workers and waited > min(LABEL_SECONDS, timeout):
            labels = sorted(
                {f"{name}={have:g}" for facts in workers.values() for name, have in facts.get("resources", {}).items()}
            )
            asked = ",".join(f"{name}={need:g}" for name, need in resources.items())
            raise WorkersFailed(
                f"none of {counted(len(workers), 'workers')} of {scheduler} has the resource {asked} (their resources: "
                f"{', '.join(labels) or 'none'}); start workers with 'dask worker {scheduler} --resources {asked}', or change "
                "--worker-resource"
            )
        if waited > timeout:
            raise WorkersFailed(
                f"no worker connected to {scheduler} within {timeout:g} seconds; start some with 'dask worker {scheduler} "
                "--nthreads 1', or wait longer with --worker-timeout"
            )
        time.sleep(POLL_SECONDS)


def answers(
    client: Any, addresses: Collection[str], seconds: float, function: Callable[..., Any], *given: Any
) -> dict[str, Any]:
    """What ``function`` returns on each worker, or the error there; a ``TimeoutError`` where none answers in time."""

    async def ask(address: str) -> Any:
        try:
            asked = client.run(function, *given, workers=[address], on_error="return")
            return (await asyncio.wait_for(asked, seconds))[address]
        except Exception as error:
            return error

    async def ask_all() -> list[Any]:
        return list(await asyncio.gather(*map(ask, addresses)))

    return dict(zip(addresses, client.sync(ask_all), strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask speaks of every lost connection; what matters of it is said by our own errors. ``-v`` lets it speak."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("distributed", "tornado")]
    before = {name: logging.getLogger(name).level for name in names}
    try:
        if logging.getLogger().getEffectiveLevel() > logging.INFO:
            for name in names:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _signals_kept_here() -> Iterator[None]:
    """Ctrl-C on a terminal, SLURM's warning and its end go to every process; workers that block them finish their shards.

    Blocked signals are inherited: by the thread that Dask starts workers from, and by the workers.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    resource_tracker.ensure_running()  # it ignores the other two, and unblocks them where it is started first
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(others: Collection[Any]) -> None:
    """Python ends children with the SIGTERM that these block, and then waits for them; Dask has had its time by now."""
    for process in multiprocessing.active_children():
        if process not in others and process.name.startswith("Dask Worker"):
            process.kill()
            process.join()


def _restore(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

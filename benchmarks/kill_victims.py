"""What is killed in benchmarks/kills.py: commands that write stores, from a fresh folder to a result that is known to the byte."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import psutil
from forked import answer, command, ended, fork

from hdcache import draws
from hdcache.cli import main
from hdcache.ledgers import RECEIPTS
from hdcache.sharing import places
from hdcache.store import ABOUT

TEACHER = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3"
IMAGES, SIDE = 40, 40
EXTRACT = ["--rows-per-shard=8", "--batch=8", "--threads=2", "--device=cpu", "--precision=fp32", "--num-views=2"]
FIRST = [f"--teacher=t={TEACHER}", "--tap=block3.attn_in", "--tap=final", *EXTRACT]
SECOND = [f"--teacher=u={TEACHER}&seed=1", "--tap=final", "--tap=pooled", "--encoding=fp32", *EXTRACT]
BUCKET = {"ACCESS_KEY_ID": "none", "SECRET_ACCESS_KEY": "none", "REGION": "us-east-1"}
SERVED_SECONDS = 30.0


@dataclass(frozen=True)
class Victim:
    """A command, and what it starts from."""

    name: str
    arguments: Callable[[Path], list[str]]
    """The command line, given the folder of a round. Its result is the store ``s`` there."""
    wanted: str
    """Which store that is to be."""
    start: str = ""
    """Which store is there before; empty: none."""
    workers: Callable[[int], list[psutil.Process]] | None = None
    """Processes that work for the command of a process id, where one of them is killed and not the command."""
    orders: bool = False
    """Whether these die at the call that a file says (:class:`forked.Ordered`)."""
    more: tuple[tuple[Any, str], ...] = ()
    """Calls that count beside those of the system."""
    settle: Callable[[Path], None] = lambda work: None
    """Brings the result to ``s`` from where the command has put it."""
    damaged: bool = False
    """Whether what is there before is damaged: then what was good must stay so, and the rest is the command's to mend."""

    def prepare(self, work: Path, stores: Path) -> None:
        """Make the folder of a round."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if self.start:
            shutil.copytree(stores / self.start, work / "s")


def make_stores(folder: Path) -> None:
    """Stores to begin with, and to end with.

    ``first``: teacher t, two views, the samples kept; ``unsealed``: the same without its last seals; ``both``: and teacher u; ``damaged``:
    the same with damage of all kinds; ``ruined``: the same without whole folders; ``littered``: with what killed processes have left, and strange files.
    """
    folder.mkdir(parents=True)
    coarse = (draws.uniform(IMAGES * 4 * 4 * 3, "kills") * 256).astype(np.uint8).reshape(IMAGES, 4, 4, 3)
    grid = np.ix_(np.arange(IMAGES), np.arange(SIDE) * 4 // SIDE, np.arange(SIDE + 4) * 4 // (SIDE + 4))
    np.savez(folder / "data.npz", images=coarse[grid], labels=np.arange(IMAGES) % 3)
    log = folder / "log"
    for name, arguments in (("first", _first(folder, folder)), ("second", _second(folder, folder))):
        if ended(fork(command(arguments), log)) != 0:
            raise SystemExit(f"the store cannot be made: {log.read_text()[-2000:]}")
        shutil.copytree(folder / "s", folder / {"first": "first", "second": "both"}[name])
    shutil.rmtree(folder / "s")
    shutil.copytree(folder / "first", folder / "unsealed")
    for key in ("index.json", "croissant.json", "views/1/manifest.json", "teachers/t/views/1/manifest.json"):
        (folder / "unsealed" / key).unlink()
    for name in ("damaged", "ruined", "littered"):
        shutil.copytree(folder / "both", folder / name)
    _damage(folder / "damaged")
    for key in ("teachers/t/views/1", "teachers/u", "views/0", "samples/pixels"):
        shutil.rmtree(folder / "ruined" / key)
    shutil.copytree(
        folder / "both/teachers/u", folder / "ruined/teachers/u", ignore=lambda _, names: {*names} - {ABOUT}
    )
    _litter(folder / "littered")


def _damage(root: Path) -> None:
    """Rows, constants, geometry, kept samples, metadata, a receipt, seals and the index, by zeros, cuts and deletion."""
    for key in ("teachers/u/views/1/manifest.json", "teachers/t/views/0/receipts/3.json", "croissant.json"):
        (root / key).unlink()
    for key in (
        "teachers/t/views/0/final/codes/c.1.0.0", "teachers/u/views/0/pooled/values/c.4.0",
        "teachers/t/encodings/final/mean/c.0", "views/1/geometry/c.2.0", "samples/pixels/bytes/3/c.0", "samples/label/c.0",
    ):  # fmt: skip
        path = root / key
        path.write_bytes(bytes(path.stat().st_size))
    for key in ("teachers/u/views/1/final/values/zarr.json", "views/0/manifest.json", "index.json"):
        path = root / key
        path.write_bytes(path.read_bytes()[:-9])


def _litter(root: Path) -> None:
    for number, folder in enumerate(sorted(path for path in root.rglob("*") if path.is_dir())):
        (folder / f".c.{number}.0.7-{number}.partial").write_bytes(b"x" * number)
        if number % 3 == 0 and folder.name != RECEIPTS:
            (folder / f"c.{number}.77.0").write_bytes(b"x")


def _first(folder: Path, work: Path, *more: str) -> list[str]:
    return ["extract", f"npz:{folder / 'data.npz'}", f"--store={work / 's'}", *FIRST, *(more or ["--pixels=source"])]


def _second(folder: Path, work: Path) -> list[str]:
    return ["extract", f"--store={work / 's'}", *SECOND]


def _repair(folder: Path, work: Path) -> list[str]:
    return ["repair", str(work / "s"), f"--data=npz:{folder / 'data.npz'}", "--device=cpu", "--threads=2"]


class Services:
    """What victims need beside them: a bucket, a web server, workers. Processes that end with this one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, name: str, work: Callable[[], object]) -> int:
        child = fork(work, self._folder / f"{name}.log")

        def stop() -> None:
            for process in [*psutil.Process(child).children(recursive=True), psutil.Process(child)]:
                process.kill()
            ended(child)

        self._stack.callback(stop)
        return child

    def _await(self, name: str, found: Callable[[], bool]) -> None:
        until = time.monotonic() + SERVED_SECONDS
        while time.monotonic() < until:
            if found():
                return
            time.sleep(0.1)
        raise SystemExit(f"{name} does not answer: {(self._folder / f'{name}.log').read_text()[-2000:]}")

    def bucket(self) -> str:
        """An S3 server with the bucket ``team``; the environment knows it. Empty where its library is not installed."""
        try:
            import moto.server  # noqa: F401
        except ImportError:
            return ""
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        self._start("bucket", partial(_serve_bucket, port))
        self._await("bucket", lambda: _answers(url))
        urllib.request.urlopen(urllib.request.Request(f"{url}/team", method="PUT")).close()
        os.environ |= {f"AWS_{name}": value for name, value in {**BUCKET, "ENDPOINT_URL": url}.items()}
        return "s3://team"

    def web(self, root: Path) -> str:
        """``hdcache serve`` of the stores below ``root``."""
        port = _free_port()
        self._start("serve", command(["serve", str(root), f"--port={port}"]))
        self._await("serve", lambda: _answers(f"http://127.0.0.1:{port}/"))
        return f"http://127.0.0.1:{port}"

    def cluster(self, orders: Path) -> tuple[str, int]:
        """A Dask scheduler with two workers, one of which dies at the call that a file in ``orders`` says; its process id."""
        told = self._folder / "scheduler"
        child = self._start("cluster", partial(_serve_cluster, told, orders))
        self._await("cluster", lambda: told.is_file() and bool(told.read_text()))
        return told.read_text(), child


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


def _serve_bucket(port: int) -> None:
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    time.sleep(86400)


def _serve_cluster(told: Path, orders: Path) -> None:
    """A scheduler, and two workers that are started again whenever they die: Dask's own nanny gives up on one that dies early."""
    preload = told.with_name("preload.py")
    preload.write_text(f"import forked\nforked.Ordered({str(orders)!r}).install()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with distributed.LocalCluster(
        n_workers=0, dashboard_address=None, silence_logs=60, scheduler_kwargs={"allowed_failures": 0}
    ) as found:
        start = [sys.executable, "-m", "distributed.cli.dask_worker", str(found.scheduler_address), "--no-nanny"]
        start += ["--nthreads=1", "--no-dashboard", f"--preload={preload}"]
        workers = [subprocess.Popen(start, env=environment) for _ in range(2)]
        told.write_text(str(found.scheduler_address))
        while True:
            workers = [
                subprocess.Popen(start, env=environment) if worker.poll() is not None else worker for worker in workers
            ]
            time.sleep(0.2)


def workers_of(process: int) -> list[psutil.Process]:
    """Dask's worker processes below a process."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        try:
            if {"spawn_main", "distributed.cli.dask_worker"} & set(re.split(r"[^\w.]+", " ".join(child.cmdline()))):
                found.append(child)
        except psutil.Error:
            continue
    return found


def _pull_back(work: Path, url: str) -> None:
    """Compare a bucket with what is wanted by what comes out of it."""
    shutil.rmtree(work / "s", ignore_errors=True)
    answer(lambda: _quietly(["pull", f"{url}/{work.name}", str(work / "s")]), work / "log")
    listed = answer(lambda: sorted(places.open_place(f"{url}/{work.name}").listing()), work / "log")
    there = sorted(path.relative_to(work / "s").as_posix() for path in (work / "s").rglob("*") if path.is_file())
    if stray := [key for key in listed if key not in there]:
        raise SystemExit(f"{url}/{work.name} holds more than the store: {stray[:5]}")


def _quietly(arguments: Sequence[str]) -> int:
    try:
        main([*arguments, "--quiet"])
    except SystemExit as done:
        if done.code:
            raise
    return 0


def make_victims(stores: Path, services: Services, *, quick: bool) -> list[tuple[Victim, int]]:
    """The victims, and how many parts of a campaign's kills each gets."""
    both = str(stores / "both")
    first = partial(_first, stores)
    found = [
        (Victim("extractor, a new store", first, "first"), 16),
        (Victim("extractor, a second teacher", partial(_second, stores), "both", start="first"), 10),
        (Victim("sealer", first, "first", start="unsealed"), 10),
        (Victim("push to a folder", lambda work: ["push", both, str(work / "s")], "both"), 8),
        (Victim("pull from a folder", lambda work: ["pull", both, str(work / "s")], "both"), 8),
        (Victim("repair", partial(_repair, stores), "both", start="damaged", damaged=True), 12),
        (
            Victim(
                "repair --from",
                lambda work: [*_repair(stores, work), f"--from={both}"],
                "both",
                start="ruined",
                damaged=True,
            ),
            8,
        ),
        (Victim("gc --unlisted", lambda work: ["gc", "--unlisted", str(work / "s")], "both", start="littered"), 4),
    ]
    if quick:
        return found
    web, bucket = services.web(stores), services.bucket()
    found.append((Victim("pull from hdcache serve", lambda work: ["pull", f"{web}/both", str(work / "s")], "both"), 8))
    if bucket:
        push = Victim(
            "push to a bucket",
            lambda work: ["push", both, f"{bucket}/{work.name}"],
            "both",
            more=((places.Cloud, "_put"), (places.Cloud, "_call")),
            settle=lambda work: _pull_back(work, bucket),
        )
        found.append((push, 10))
    scheduler, cluster = services.cluster(stores)
    dask = partial(_first, stores)
    engine = [f"--scheduler={scheduler}", "--pixels=source"]
    local = ["--workers=2", "--pixels=source"]
    dying = Victim(
        "Dask: a worker", lambda work: dask(work, *engine), "first", workers=lambda _: workers_of(cluster), orders=True
    )
    found += [
        (Victim("Dask: the command", lambda work: dask(work, *engine), "first"), 10),
        (dying, 10),
        (Victim("--workers 2: the command", lambda work: dask(work, *local), "first"), 4),
        (Victim("--workers 2: a worker", lambda work: dask(work, *local), "first", workers=workers_of), 4),
    ]
    return found

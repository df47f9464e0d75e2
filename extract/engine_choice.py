"""Which engine a command asks for, and that engine, ready to write."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from hdcache.errors import UsageError, nearest
from hdcache.extract.engines import WORKER_TIMEOUT, Engine, EngineRequest, Inline

ENGINES = ("inline", "local", "dask")


def parse_engine(
    engine: str | None,
    workers: int | None,
    scheduler: str | None,
    worker_resource: str | Sequence[str] = (),
    worker_timeout: float | None = None,
) -> EngineRequest:
    """Check what was asked for; ``workers`` alone means ``local``, ``scheduler`` alone ``dask``, nothing ``inline``.

    Raises
    ------
    UsageError
        for settings that do not belong together.
    """
    if engine is None:
        engine = "dask" if scheduler is not None else "local" if workers is not None else "inline"
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; {nearest(engine, ENGINES)}")
    texts = [worker_resource] if isinstance(worker_resource, str) else list(worker_resource)
    for option, given, belongs, why in (
        ("--workers", workers is not None, "local", "how many processes to start here"),
        ("--scheduler", scheduler is not None, "dask", "whose workers to use"),
        ("--worker-resource", bool(texts), "dask", "what a task takes of its worker"),
        ("--worker-timeout", worker_timeout is not None, "dask", "how long to wait for workers"),
    ):
        if given and engine != belongs:
            raise UsageError(
                f"{option} says {why}, which --engine {engine} does not do; leave it out, or say --engine {belongs}"
            )
    if workers is not None and workers < 1:
        raise UsageError(f"workers {workers} must be at least 1")
    if worker_timeout is not None and not worker_timeout > 0:
        raise UsageError(f"worker_timeout {worker_timeout} must be more than 0 seconds")
    if engine == "dask":
        if scheduler is None:
            raise UsageError("--engine dask needs the address of a scheduler: --scheduler tcp://HOST:PORT")
        if not re.fullmatch(r"[a-z]+://[^\s/]+:\d+", scheduler) and not Path(scheduler).expanduser().is_file():
            raise UsageError(
                f"scheduler {scheduler!r} must be tcp://HOST:PORT, tls://HOST:PORT, or the file that 'dask scheduler "
                "--scheduler-file FILE' wrote"
            )
    return EngineRequest(
        engine, workers, scheduler or "", dict(map(_resource, texts)),
        WORKER_TIMEOUT if worker_timeout is None else worker_timeout,
    )  # fmt: skip


def _resource(text: str) -> tuple[str, float]:
    name, sign, amount = text.partition("=")
    try:
        need = float(amount)
    except ValueError:
        need = 0.0
    if not (sign and name and need > 0):
        raise UsageError(f"worker_resource {text!r} must be NAME=AMOUNT with an amount above 0, such as GPU=1")
    return name, need


@contextmanager
def open_engine(asked: EngineRequest, device: torch.device) -> Iterator[Engine]:
    """The engine, for all teachers of a command.

    A scheduler is asked at once whether it has workers for this, before anything is computed; processes are started
    when there is work for them.

    Raises
    ------
    HdcacheError
        what :mod:`hdcache.extract.cluster` raises.
    """
    if asked.engine == "inline":
        yield Inline()
        return
    if asked.engine == "local" and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "a worker imports the script that starts it; put the script's own work under: if __name__ == '__main__':"
        )
    if asked.engine == "local" and asked.workers is None:
        if device.type != "cuda":
            raise UsageError(
                "--engine local needs the number of processes: --workers N (on CUDA devices one each, if left out)"
            )
        asked = EngineRequest("local", torch.cuda.device_count())
    from hdcache.extract.dask_engine import DaskEngine

    with DaskEngine(asked) as engine:
        yield engine

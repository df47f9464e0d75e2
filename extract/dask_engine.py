"""Views written by workers: those of a Dask scheduler, or processes that are started here.

This process calibrates, holds the teacher's lock, and seals; :mod:`hdcache.extract.worker` is the other side, and
:mod:`hdcache.extract.task_window` what goes on between them.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

import torch

from hdcache.durable import durable_write
from hdcache.extract.cluster import TASKS, answers, await_workers, local_client, per_machine, remote_client, workers_of
from hdcache.extract.engines import Advance, EngineRequest, Job, Pending
from hdcache.extract.machines import fingerprint, versions
from hdcache.extract.task_window import TaskWindow
from hdcache.extract.worker import Recipe, forget, lease
from hdcache.store import ABOUT, Store, read_about

log = logging.getLogger(__name__)
FORGET_SECONDS = 2.0
"""How long workers may take to let a teacher go."""


class DaskEngine:
    """Workers of one scheduler, for all teachers of a command."""

    def __init__(self, asked: EngineRequest) -> None:
        self.asked = asked
        self._stack = ExitStack()
        self._client: Any = None
        self._report: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        if self.asked.engine == "dask":
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> Any:
        if self._client is None:
            if self.asked.engine == "local":
                self._client = self._stack.enter_context(local_client(self.asked.workers or 1))
            else:
                self._client = self._stack.enter_context(remote_client(self.asked.scheduler))
            scheduler = self.asked.scheduler or "this machine"
            await_workers(self._client, self.asked.resources, self.asked.timeout, scheduler)
        return self._client

    def at_once(self) -> int:
        """:data:`TASKS` of each process that is started here; the workers of a scheduler count for themselves."""
        return TASKS * (self.asked.workers or 1) if self.asked.engine == "local" else 1

    def report(self) -> dict[str, Any] | None:
        """``engine``, ``workers``, ``seconds_loading`` (of all together), ``lost`` (shards that were given out again) and
        ``differing`` (machine -> relative difference of its features from this one's, where not every bit is the same)."""
        return self._report

    def write(self, job: Job, pending: Pending, advance: Advance) -> None:
        """See :class:`~hdcache.extract.engines.Engine`.

        Raises
        ------
        WorkersFailed
            for shards that kill their workers, named when all others are written.
        Interrupted
            when a signal asked for a stop, or scheduler or workers are gone; running shards are finished where they can be.
        HdcacheError
            that a worker met; the others finish the shards that they have begun.
        """
        self._report = None
        for writer, _ in pending:
            writer.open()
            job.pipeline.repair(writer)
        if not any(todo for _, todo in pending):
            for writer, _ in pending:
                writer.seal()
            return
        client = self._start()
        path = lease(job.pipeline.store.path, job.record.name)
        recipe = self._recipe(job)
        path.write_text(recipe.run, encoding="utf-8")
        window = TaskWindow(client, self.asked, job, pending, recipe, advance)
        try:
            window.run()
        finally:
            path.unlink(missing_ok=True)
            self._report = window.report(self.asked.engine)
            note_differences(job.pipeline.store, job.record.name, self._report["differing"])
            if self.asked.engine == "dask" and client.status == "running":
                with suppress(OSError, RuntimeError):
                    answers(client, list(workers_of(client)), FORGET_SECONDS, forget)

    def _recipe(self, job: Job) -> Recipe:
        store, teacher = job.pipeline.store, job.pipeline.teacher
        own = fingerprint(teacher, list(job.record.taps))
        # The network has done its part here; workers may need the device's memory.
        teacher.backbone.model.to("cpu")
        if teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        local = self.asked.engine == "local"
        threads = os.environ.get("OMP_NUM_THREADS", "") if local else ""
        return Recipe(
            run=f"process {os.getpid()} on {platform.node()}, {time.time_ns()}",
            node=platform.node(),
            store=str(store.path.absolute()),
            data=job.pipeline.dataset.card.spec,
            teacher=job.record.name,
            source=job.source,
            identity=job.record.identity_digest(),
            device=job.device,
            gpus=local,
            threads=job.threads,
            torch_threads=int(threads) if threads.isdecimal() else None,
            processes=per_machine(workers_of(self._client)),
            versions=versions(store.card.dataset.kind),
            fingerprint=own,
        )


def note_differences(store: Store, teacher: str, differing: Mapping[str, float]) -> None:
    """Say and record which machines rounded otherwise: their rows are right, but would not be made again to the bit."""
    if not differing:
        return
    folder = store.teacher_path(teacher)
    about = read_about(folder)
    notes = {f"features on {node}": f"relative difference {found:.1e}" for node, found in differing.items()}
    new = about.model_copy(update={"written_with": {**about.written_with, **notes}})
    durable_write(folder / ABOUT, new.canonical())
    log.warning(
        "teacher %s: other last bits than here on %s; their rows are as right as any, but other machines will not make the "
        "same bytes again (noted in %s)", teacher, ", ".join(differing), folder / ABOUT
    )  # fmt: skip

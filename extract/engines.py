"""Who extracts the shards: this process, processes started here, or the workers of a Dask scheduler.

Every engine leaves the same store, to the byte where torch gives a batch the same bits: that may depend on the machine and,
on a CPU, on how many threads one operation has (:mod:`hdcache.extract.lanes`). What is done stands in the store's receipts,
so any engine goes on where another one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.writer import ViewWriter
from hdcache.schema import TeacherRecord

WORKER_TIMEOUT = 60.0
Advance = Callable[[int, Timing], None]
Pending = Sequence[tuple[ViewWriter, list[int]]]
"""Views that are not sealed, each with the shards that are left."""


@dataclass(frozen=True)
class EngineRequest:
    """Which engine is asked for; made by :func:`~hdcache.extract.engine_choice.parse_engine`."""

    engine: str = "inline"
    workers: int | None = None
    scheduler: str = ""
    resources: dict[str, float] = field(default_factory=dict)
    """What a task takes of its worker's Dask resources."""
    timeout: float = WORKER_TIMEOUT
    """Seconds to wait for a first worker, and for another one when all are gone."""


@dataclass(frozen=True)
class Job:
    """The turn of one teacher."""

    pipeline: Pipeline
    """The rows of all workers are counted in its ``timing``."""
    record: TeacherRecord
    source: str
    """Model spec with absolute paths."""
    device: str
    """As asked for: every worker chooses its own."""
    threads: int | None
    """Decoding threads of each process, as asked for."""


class Engine(Protocol):
    """Writes and seals views."""

    def write(self, job: Job, pending: Pending, advance: Advance) -> None:
        """Write what is left of a teacher's views and seal them; on any error what was finished stays."""

    def at_once(self) -> int:
        """Shards that are in this machine's memory at once, each in a pipeline of its own."""

    def report(self) -> dict[str, Any] | None:
        """What the last job's workers were, for the summary; None where there were none."""


class Inline:
    """One view after the other, in this process."""

    def write(self, job: Job, pending: Pending, advance: Advance) -> None:
        """See :class:`Engine`."""
        for writer, todo in pending:
            writer.open()
            job.pipeline.repair(writer)
            job.pipeline.run(writer, todo, advance)
            writer.seal()

    def at_once(self) -> int:
        """1."""
        return 1

    def report(self) -> dict[str, Any] | None:
        """None."""
        return None

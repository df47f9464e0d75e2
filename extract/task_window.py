"""One teacher's shards as tasks: a few in flight for each worker, counted as they finish, given out again when one dies.

Dask remembers nothing that matters. Whatever is lost, a worker, the scheduler or this process: a shard with a receipt
is done, and the same command does the rest.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

from distributed.scheduler import KilledWorker

from hdcache import errors, stopping
from hdcache.errors import HdcacheError, Interrupted, WorkersFailed
from hdcache.extract.cluster import POLL_SECONDS, slots, workers_of
from hdcache.extract.engines import Advance, EngineRequest, Job, Pending
from hdcache.extract.pipeline import Timing
from hdcache.extract.worker import Recipe, lease, write_shard
from hdcache.progress import counted
from hdcache.views import row_order

log = logging.getLogger(__name__)
KILLS = 3
"""Times that a shard may fail on its worker or take it with it, the last one while nothing else runs, before it is left alone."""
IN_A_ROW = 8
"""Shards that failed on their workers or were lost with them, none finished in between, after which it is not the shards' fault."""
AVOID_SECONDS = 60.0
"""How long a worker on which a shard failed gets no other, where there are others."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""The store's own disk; no other worker has more room on it."""
LOOK_SECONDS = 2.0
"""How often the scheduler is asked which workers it has."""
GATHER_SECONDS = 10.0
SEEN_SECONDS = 60.0
"""How long one machine's file may take to be seen on another (caches of network file systems)."""
NAMED = 4
"""Samples of a shard that a message names."""


class Task(NamedTuple):
    """One shard of one view."""

    view: int
    shard: int


class TaskWindow:
    """From the first task of one teacher to the seal of its last view."""

    def __init__(
        self, client: Any, asked: EngineRequest, job: Job, pending: Pending, recipe: Recipe, advance: Advance
    ) -> None:
        self.client, self.asked, self.job, self.advance = client, asked, job, advance
        self.recipe = recipe.model_dump(mode="json")
        self.store = job.pipeline.store
        self.writers = {writer.view: writer for writer, _ in pending}
        self.left = {writer.view: set(todo) for writer, todo in pending}
        self.waiting = [Task(writer.view, shard) for writer, todo in pending for shard in todo][::-1]
        self.fresh = {task for task in self.waiting if self.writers[task.view].ledger.receipt(task.shard) is None}
        self.flying: dict[Any, Task] = {}
        self.unseen: dict[Task, tuple[float, str]] = {}
        """Written on another machine, as it says, but not to be seen here yet: since when, and where."""
        self.later: list[tuple[float, Task]] = []
        """Given back by workers that do not see the lease yet: not before that time."""
        self.kills: Counter[Task] = Counter()
        self.reasons: dict[Task, str] = {}
        """What became of a shard's last try."""
        self.able: list[str] = []
        self.avoided: dict[str, float] = {}
        """Address of a worker on which a shard failed: since when."""
        self.suspects: list[Task] = []
        self.alone = False
        """Whether a suspect runs with nothing beside it, so that a dead worker can be nobody else's doing."""
        self.condemned: list[Task] = []
        self.error: BaseException | None = None
        self.ending = False
        self.began = self.had_workers = time.monotonic()
        self.looked = -LOOK_SECONDS
        self.window, self.workers, self.submitted, self.lost, self.in_a_row = 1, 0, 0, 0, 0
        self.loading = 0.0
        self.differing: dict[str, float] = {}

    def report(self, engine: str) -> dict[str, Any]:
        """See :meth:`hdcache.extract.dask_engine.DaskEngine.report`."""
        return {
            "engine": engine,
            "workers": self.workers,
            "seconds_loading": round(self.loading, 3),
            "lost": self.lost,
            "differing": {node: found for node, found in sorted(self.differing.items()) if found},
        }

    def run(self) -> None:
        """Until everything that can be written is written, and every whole view sealed."""
        for view in self.left:
            self._seal(view)
        while True:
            self._heed_a_stop()
            self._look()
            self._take_up()
            if not self.flying:
                self.alone = not self.waiting and not self.later and bool(self.suspects)
                if self.alone:
                    self.waiting.append(self.suspects.pop(0))
            while self.waiting and len(self.flying) < (1 if self.alone else self.window):
                self._submit(self.waiting.pop())
            if not self.flying and not self.unseen and not self.later:
                break
            finished = [future for future in self.flying if future.status != "pending"]
            for future in finished:
                self._collect(future, self.flying[future])
            self._see()
            if not finished:
                time.sleep(POLL_SECONDS)
        if self.error is not None:
            raise self.error
        if self.ending:
            raise stopping.stop(f"all finished shards written to {self.store.path}")
        if self.condemned:
            raise self._verdict()

    def _end(self, error: BaseException | None = None) -> None:
        """Begin nothing more; workers finish what they have begun and return the tasks that wait with them."""
        self.error = self.error or error
        self.ending = True
        self.waiting.clear()
        self.later.clear()
        self.suspects.clear()
        lease(self.store.path, self.job.record.name).unlink(missing_ok=True)

    def _heed_a_stop(self) -> None:
        if stopping.requested() and not self.ending:
            self._end()

    def _look(self) -> None:
        """See which workers there are; how many tasks fly follows them."""
        now = time.monotonic()
        if self.client.status != "running":
            raise self.error or self._disconnected()
        if now - self.looked < LOOK_SECONDS:
            return
        try:
            able = slots(workers_of(self.client), self.asked.resources)
        except (OSError, CancelledError):
            raise self.error or self._disconnected() from None
        self.looked = now
        self.able = list(able)
        self.workers = max(self.workers, len(able))
        # One more for each worker than it runs at once, so that none waits for this process.
        self.window = max(1, sum(able.values()) + len(able))
        if able:
            self.had_workers = now
        elif now - self.had_workers > self.asked.timeout:
            raise self.error or Interrupted(
                f"no worker is left and none came back within {self.asked.timeout:g} seconds; all finished shards are written to "
                f"{self.store.path}: start workers and run the same command again to go on"
            )

    def _take_up(self) -> None:
        now = time.monotonic()
        self.waiting[:0] = [task for due, task in self.later if due <= now]
        self.later = [(due, task) for due, task in self.later if due > now]

    def _elsewhere(self) -> dict[str, Any]:
        """Where a task may go, while some workers are avoided: to any of the others as long as there is one."""
        now = time.monotonic()
        others = [each for each in self.able if now - self.avoided.get(each, -AVOID_SECONDS) >= AVOID_SECONDS]
        return {"workers": others, "allow_other_workers": True} if 0 < len(others) < len(self.able) else {}

    def _submit(self, task: Task) -> None:
        self.submitted += 1
        key = f"write_shard-{self.recipe['run'].rpartition(' ')[2]}-{self.submitted}"
        resources = self.asked.resources or None
        future = self.client.submit(
            write_shard, self.recipe, *task, key=key, pure=False, resources=resources, **self._elsewhere()
        )
        self.flying[future] = task

    def _collect(self, future: Any, task: Task) -> None:
        if future.status in ("cancelled", "lost"):
            raise self.error or self._disconnected()
        try:
            found = future.result(timeout=GATHER_SECONDS)
        except KilledWorker as error:
            del self.flying[future]
            self._bury(task, f"its worker {error.last_worker.address} died", int(error.allowed_failures) + 1)
        except CancelledError:
            raise self.error or self._disconnected() from None
        except Exception as error:
            if isinstance(error, OSError) and future.status != "error":
                # Its worker died with the answer, and Dask asks another one; or the scheduler is gone.
                time.sleep(POLL_SECONDS)
                return
            del self.flying[future]
            self._bury(task, f"{type(error).__name__}: {error}")
        else:
            del self.flying[future]
            if "crash" in found or ("os_error" in found and found["os_error"][0] not in FULL):
                self._failed(future, task, found)
            else:
                self._count(task, found)

    def _failed(self, future: Any, task: Task, found: dict[str, Any]) -> None:
        """A worker lives but could not do it: its machine may be at fault (a stale mount, a full /tmp), so others try."""
        with suppress(OSError, CancelledError, TimeoutError):
            for addresses in self.client.who_has([future]).values():
                self.avoided |= dict.fromkeys(addresses, time.monotonic())
        if "crash" in found:
            log.info("shard %d of view %d on %s:\n%s", task.shard, task.view, found["node"], found["crash"])
            what = str(found["crash"]).strip().rpartition("\n")[2] + " (-v prints where)"
        else:
            number, text, file = found["os_error"]
            what = f"[Errno {number}] {text}" + (f": {file}" if file else "")
        self._bury(task, f"on {found['node']}: {what}")

    def _count(self, task: Task, found: dict[str, Any]) -> None:
        if "error" in found:
            kind, text = found["error"]
            known = getattr(errors, str(kind), HdcacheError)
            self._end((known if isinstance(known, type) and issubclass(known, HdcacheError) else HdcacheError)(text))
        elif "os_error" in found:
            self._end(OSError(*found["os_error"]))
        elif "stopped" in found:
            self._given_back(task, str(found["node"]))
        else:
            self.in_a_row = 0
            self.loading += found["loading"]
            self.differing[found["node"]] = max(found["difference"], self.differing.get(found["node"], 0.0))
            self._add(task, found["timing"])
            self.unseen[task] = (time.monotonic(), str(found["node"]))

    def _given_back(self, task: Task, node: str) -> None:
        """A worker that does not find the run's lease: it has been withdrawn, or is not to be seen there (yet)."""
        if self.ending:
            return
        path = lease(self.store.path, self.job.record.name)
        if time.monotonic() - self.began > SEEN_SECONDS or not path.is_file():
            self._end(
                WorkersFailed(
                    f"the worker on {node} does not see {path}, which this command wrote; the store must lie in a folder that "
                    "all machines share, under the same path on each"
                )
            )
            return
        self.later.append((time.monotonic() + LOOK_SECONDS, task))

    def _add(self, task: Task, found: dict[str, Any]) -> None:
        """Add a worker's seconds and failures to the run's.

        Rows and bytes of a new shard are taken from its receipt: the task that wrote it may not be the one that answers.
        """
        timing = self.job.pipeline.timing
        for entry in fields(Timing):
            value = found.get(entry.name)
            if isinstance(value, dict):
                getattr(timing, entry.name).update(value)
            elif value is not None and not (task in self.fresh and entry.name in ("rows", "bytes")):
                setattr(timing, entry.name, getattr(timing, entry.name) + value)

    def _see(self) -> None:
        """Count the shards whose receipts are to be seen here, and seal the views that are whole."""
        for task, (since, node) in list(self.unseen.items()):
            receipt = self.writers[task.view].ledger.receipt(task.shard)
            if receipt is None:
                if time.monotonic() - since > SEEN_SECONDS:
                    del self.unseen[task]
                    self._end(
                        WorkersFailed(
                            f"{self.store.path}: the worker on {node} has written shard {task.shard} of view {task.view}, but its receipt "
                            "is not to be seen here; the store must lie in a folder that all machines share"
                        )
                    )
                continue
            del self.unseen[task]
            self.left[task.view].discard(task.shard)
            rows = receipt.rows[1] - receipt.rows[0]
            timing = self.job.pipeline.timing
            if task in self.fresh:
                timing.rows += rows
                timing.bytes += sum(entry.size for entry in receipt.objects.values())
            self.advance(rows, timing)
            try:
                self.job.pipeline.check_failures()
                self._seal(task.view)
            except (HdcacheError, OSError) as error:
                self._end(error)

    def _seal(self, view: int) -> None:
        if not self.left[view]:
            self.writers[view].seal()

    def _bury(self, task: Task, reason: str, times: int = 1) -> None:
        """A shard failed, or its worker died: perhaps of it, perhaps of another task, perhaps of nothing at all."""
        self.lost += 1
        self.in_a_row += 1
        self.kills[task] += times
        self.reasons[task] = reason
        if self.ending:
            return
        log.warning("shard %d of view %d is tried again: %s", task.shard, task.view, reason)
        if self.alone and self.kills[task] >= KILLS:
            self.condemned.append(task)
        else:
            self.suspects.append(task)
        if not self.alone and self.in_a_row >= max(IN_A_ROW, 2 * self.window):
            self._end(
                WorkersFailed(
                    f"workers fail whatever shard they are given: {self.in_a_row} in a row, the last time {reason}; is there memory enough "
                    f"for each of {counted(self.workers, 'workers')}, and do all of them reach data and store? Start fewer, or give --batch "
                    "a lower number with a new teacher name; finished shards are safe, and the same command goes on"
                )
            )

    def _disconnected(self) -> Interrupted:
        where = self.asked.scheduler or "of this command"
        return Interrupted(
            f"the Dask scheduler {where} is gone; all finished shards are written to {self.store.path}: run the same command "
            "again to go on, with the address of a scheduler that runs"
        )

    def _verdict(self) -> WorkersFailed:
        """Names the shards that nobody survives."""
        card = self.store.card
        lines = []
        for task in sorted(self.condemned):
            start = task.shard * card.rows_per_shard
            order = row_order(card.dataset.count, card.views.seed, task.view)[start : start + card.rows_per_shard]
            names = sorted(self.store.ids[int(sample)] for sample in order)
            few = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            lines.append(
                f"view {task.view} shard {task.shard} (rows {start} to {start + len(names) - 1}: {few}): {self.reasons[task]}"
            )
        return WorkersFailed(
            f"{counted(len(lines), 'shards')} failed on every worker that tried, the last one while nothing else ran: {'; '.join(lines)}. "
            f"All other shards are written to {self.store.path}. Give workers more memory, or find the {card.dataset.noun} that crash "
            "with --engine inline, and run the same command again"
        )

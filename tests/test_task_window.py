"""Tasks in flight: how many, what becomes of those whose worker dies, and when to give up. The cluster is a stand-in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.scheduler import KilledWorker

from hdcache import stopping
from hdcache.errors import Interrupted, StoreMismatch, TooManyFailures, WorkersFailed
from hdcache.extract import task_window
from hdcache.extract.engines import EngineRequest, Job
from hdcache.extract.machines import Fingerprint
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.run import extract
from hdcache.extract.task_window import Task, TaskWindow
from hdcache.extract.worker import Recipe, lease
from hdcache.extract.writer import ViewWriter
from hdcache.ledgers import Ledger
from hdcache.reader import TeacherReader
from hdcache.schema import Receipt
from hdcache.store import Store
from hdcache.teachers import load_teacher

SHARDS = 12
TCP = "tcp://127.0.0.1:8786"
Answer = Callable[[Task], dict[str, Any] | BaseException | None]


class Future:
    """Pending where the answer is None."""

    def __init__(self, answer: dict[str, Any] | BaseException | None) -> None:
        self.answer = answer

    @property
    def status(self) -> str:
        return "pending" if self.answer is None else "error" if isinstance(self.answer, BaseException) else "finished"

    def result(self, timeout: float) -> dict[str, Any]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        assert self.answer is not None
        return self.answer


class Cluster:
    """A client whose tasks are answered at once."""

    def __init__(self, answer: Answer, workers: int = 2, nthreads: int = 1) -> None:
        self.answer, self.status = answer, "running"
        self.info = {f"tcp://{n}": {"nthreads": nthreads, "resources": {}, "host": "h"} for n in range(workers)}
        self.given: list[Task] = []
        self.restricted: list[tuple[Task, list[str]]] = []
        self.at = "tcp://0"
        """Where whatever fails has failed."""

    def who_has(self, futures: list[Future]) -> dict[str, tuple[str, ...]]:
        return {f"key {number}": (self.at,) for number, _ in enumerate(futures)}

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1
        return {"workers": self.info}

    def submit(self, function: Any, recipe: dict[str, Any], view: int, shard: int, **more: Any) -> Future:
        self.given.append(Task(view, shard))
        if "workers" in more:
            assert more["allow_other_workers"]
            self.restricted.append((Task(view, shard), more["workers"]))
        return Future(self.answer(Task(view, shard)))


def killed() -> KilledWorker:
    return KilledWorker(task="x", last_worker=SimpleNamespace(address="tcp://0"), allowed_failures=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    root = tmp_path_factory.mktemp("window")
    extract(
        make_npz(root / "d.npz", 2 * SHARDS), store=root / "s", teachers=[f"t={tiny}"], taps=["pooled"], encoding="fp32",
        precision="fp32", rows_per_shard=2, batch=8, device="cpu", threads=1,
    )  # fmt: skip
    return root / "s"


class Scene:
    """A store whose receipts are kept aside; a task that is answered with :meth:`done` puts its own back."""

    def __init__(self, root: Path, tiny: str) -> None:
        self.store = Store.open(root)
        record = self.store.teacher("t")
        teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8)
        pipeline = Pipeline(self.store, None, teacher, threads=1, max_failures=None)  # type: ignore[arg-type]
        self.job = Job(pipeline, record, tiny, "cpu", 1)
        self.writer = ViewWriter(self.store, record, TeacherReader(self.store, "t").encoders, 0)
        self.writer.open()
        self.ledger: Ledger = self.writer.ledger
        self.ledger.unseal()
        self.receipts: dict[int, Receipt] = {}
        for shard in range(SHARDS):
            receipt = self.ledger.receipt(shard)
            assert receipt is not None
            self.receipts[shard] = receipt
            self.ledger.withdraw(shard)
        self.advanced: list[int] = []
        lease(self.store.path, "t").write_text("r 1")

    def done(self, task: Task, **timing: Any) -> dict[str, Any]:
        self.ledger.record(self.receipts[task.shard])
        return {"node": "h", "timing": {"forward": 1.0, **timing}, "seconds": 1.0, "loading": 0.5, "difference": 0.0}

    def window(self, cluster: Cluster, **asked: Any) -> TaskWindow:
        recipe = Recipe(
            run="r 1", node="h", store=str(self.store.path), data="", teacher="t", source="", identity="", device="cpu",
            gpus=False, threads=1, torch_threads=1, processes=1, versions={}, fingerprint=Fingerprint(sha256="", values={}),
        )  # fmt: skip
        return TaskWindow(
            cluster, EngineRequest("dask", None, TCP, **asked), self.job, [(self.writer, list(range(SHARDS)))], recipe,
            lambda rows, timing: self.advanced.append(rows),
        )  # fmt: skip


@pytest.fixture
def scene(whole: Path, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(task_window, "POLL_SECONDS", 0.001)
    return Scene(shutil.copytree(whole, tmp_path / "s"), tiny)


def test_every_shard_is_given_out_once_and_counted(scene: Scene) -> None:
    cluster = Cluster(scene.done)
    window = scene.window(cluster)
    window.run()
    assert sorted(cluster.given) == [Task(0, shard) for shard in range(SHARDS)]
    assert cluster.given == sorted(cluster.given), "in the order of the shards"
    timing = scene.job.pipeline.timing
    assert (timing.rows, timing.forward, sum(scene.advanced)) == (2 * SHARDS, float(SHARDS), 2 * SHARDS)
    assert timing.bytes == sum(entry.size for receipt in scene.receipts.values() for entry in receipt.objects.values())
    assert scene.ledger.sealed
    expected = {"engine": "dask", "workers": 2, "seconds_loading": 6.0, "lost": 0, "differing": {}}
    assert window.report("dask") == expected


@pytest.mark.parametrize(("workers", "nthreads", "most"), [(1, 1, 2), (2, 1, 4), (1, 4, 5), (3, 2, 9)])
def test_no_more_fly_than_a_few_for_each_worker(workers: int, nthreads: int, most: int, scene: Scene) -> None:
    flying: list[Task] = []
    seen: list[int] = []

    def answer(task: Task) -> dict[str, Any]:
        flying.append(task)
        seen.append(len(flying))
        return scene.done(task)

    class Slow(Cluster):
        def submit(self, *given: Any, **more: Any) -> Future:
            found = super().submit(*given, **more)
            task = self.given[-1]
            result = found.result

            def gathered(timeout: float) -> dict[str, Any]:
                flying.remove(task)
                return result(timeout)

            found.result = gathered  # type: ignore[method-assign]
            return found

    scene.window(Slow(answer, workers, nthreads)).run()
    assert max(seen) == most


def test_a_shard_that_keeps_killing_is_left_alone_and_named(scene: Scene) -> None:
    cluster = Cluster(lambda task: killed() if task.shard == 3 else scene.done(task))
    with pytest.raises(WorkersFailed) as caught:
        scene.window(cluster).run()
    assert cluster.given.count(Task(0, 3)) == task_window.KILLS
    assert sorted({*range(SHARDS)} - {3}) == [shard for shard in range(SHARDS) if scene.ledger.receipt(shard)]
    assert not scene.ledger.sealed
    text = str(caught.value)
    assert text.startswith(
        "1 shard failed on every worker that tried, the last one while nothing else ran: view 0 shard 3 (rows 6 to 7: 00000"
    )
    assert "): its worker tcp://0 died. All other shards" in text
    assert "All other shards are written to" in text
    assert "with --engine inline, and run the same command again" in text
    assert caught.value.exit_code == 4


def test_workers_that_always_die_are_not_the_shards_fault(scene: Scene) -> None:
    cluster = Cluster(lambda task: killed())
    with pytest.raises(
        WorkersFailed,
        match=r"workers fail whatever shard they are given: 8 in a row, the last time its worker tcp://0 died; is there",
    ):
        scene.window(cluster).run()
    assert len(cluster.given) < SHARDS
    assert not lease(scene.store.path, "t").exists()


def test_too_many_failures_are_counted_over_all_workers(scene: Scene) -> None:
    scene.job.pipeline.max_failures = 2
    scene.job.pipeline.dataset = SimpleNamespace(card=SimpleNamespace(noun="images"))  # type: ignore[assignment]
    cluster = Cluster(lambda task: scene.done(task, failed={f"{task.shard}.png": f"{task.shard}.png: broken"}))
    with pytest.raises(
        TooManyFailures, match=r"[34] images failed, more than --max-failures 2; the first: 0.png: broken"
    ):
        scene.window(cluster).run()
    assert len(cluster.given) < SHARDS


def test_an_error_of_a_worker_is_the_commands(scene: Scene) -> None:
    def answer(task: Task) -> dict[str, Any]:
        return {"node": "h", "error": ["StoreMismatch", "what it says"]} if task.shard == 2 else scene.done(task)

    cluster = Cluster(answer)
    with pytest.raises(StoreMismatch, match=r"^what it says$"):
        scene.window(cluster).run()
    assert all(scene.ledger.receipt(task.shard) for task in cluster.given if task.shard != 2), (
        "begun shards are finished"
    )
    assert not lease(scene.store.path, "t").exists(), "tasks that wait with workers return at once"


def test_a_full_disk_keeps_its_number(scene: Scene) -> None:
    cluster = Cluster(lambda task: {"node": "h", "os_error": [28, "No space left on device", "f"]})
    with pytest.raises(OSError, match="No space left") as caught:
        scene.window(cluster).run()
    assert (caught.value.errno, caught.value.filename) == (28, "f")


STALE: dict[str, Any] = {"node": "far", "os_error": [116, "Stale file handle", "/data/a.png"]}
CRASH: dict[str, Any] = {"node": "far", "crash": "Traceback (most recent call last):\n  ...\nValueError: odd\n"}


@pytest.mark.parametrize("failure", [STALE, CRASH, ZeroDivisionError("x"), "killed"])
def test_what_one_worker_cannot_do_another_one_does(failure: Any, scene: Scene) -> None:
    """It dies of it, or lives: then it gets nothing else, where there are others. The shard is tried alone."""
    failed: list[Task] = []

    def answer(task: Task) -> Any:
        if task.shard in (3, 4) and task not in failed:
            failed.append(task)
            return killed() if failure == "killed" else failure
        return scene.done(task)

    cluster = Cluster(answer)
    window = scene.window(cluster)
    window.run()
    assert cluster.given[-2:] == [Task(0, 3), Task(0, 4)]
    assert window.report("dask")["lost"] == 2
    assert scene.ledger.sealed
    if isinstance(failure, dict):
        assert cluster.restricted[-2:] == [(Task(0, 3), ["tcp://1"]), (Task(0, 4), ["tcp://1"])]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (STALE, r"on far: \[Errno 116\] Stale file handle: /data/a.png"),
        (CRASH, r"on far: ValueError: odd \(-v prints where\)"),
        (ZeroDivisionError("x"), "ZeroDivisionError: x"),
    ],
)
def test_what_no_worker_can_do_is_one_clean_line(failure: Any, reason: str, scene: Scene) -> None:
    """The shard, named with the reason when all others are written; or the workers, where it is all shards."""
    cluster = Cluster(lambda task: failure if task.shard == 3 else scene.done(task))
    with pytest.raises(
        WorkersFailed, match=rf"1 shard failed on every .* shard 3 \(rows 6 to 7: .*\): {reason}\. All other"
    ):
        scene.window(cluster).run()
    assert cluster.given.count(Task(0, 3)) == task_window.KILLS
    assert sorted({*range(SHARDS)} - {3}) == [shard for shard in range(SHARDS) if scene.ledger.receipt(shard)]
    for shard in range(SHARDS):
        scene.ledger.withdraw(shard)
    lease(scene.store.path, "t").write_text("r 1")
    with pytest.raises(
        WorkersFailed, match=rf"whatever shard they are given: 8 in a row, the last time {reason}; is there"
    ):
        scene.window(Cluster(lambda task: failure)).run()


def test_a_worker_is_avoided_for_a_while(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(task_window.time, "monotonic", lambda: now[0])
    window = scene.window(Cluster(scene.done, workers=3))
    assert window._elsewhere() == {}
    window.able = ["tcp://0", "tcp://1", "tcp://2"]
    assert window._elsewhere() == {}
    window.avoided = {"tcp://1": 990.0}
    assert window._elsewhere() == {"workers": ["tcp://0", "tcp://2"], "allow_other_workers": True}
    now[0] += 49
    assert window._elsewhere()
    now[0] += 2
    assert window._elsewhere() == {}
    window.avoided = dict.fromkeys(window.able, now[0])
    assert window._elsewhere() == {}, "there is no other"


def test_a_task_that_was_given_back_waits_beside_the_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease may be seen late; who waits for it must not hold up a stop, nor what others have finished."""
    monkeypatch.setattr(task_window, "LOOK_SECONDS", 0.2)
    blind = set(range(6))
    began = time.monotonic()

    def answer(task: Task) -> dict[str, Any]:
        if task.shard in blind:
            blind.discard(task.shard)
            return {"node": "h", "stopped": True}
        return scene.done(task)

    slept: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(task_window.time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
    cluster = Cluster(answer)
    scene.window(cluster).run()
    assert scene.ledger.sealed
    assert len(cluster.given) == SHARDS + 6
    assert cluster.given[6:SHARDS] == [Task(0, shard) for shard in range(6, SHARDS)], "those are not kept waiting"
    assert time.monotonic() - began >= 0.2
    assert set(slept) == {task_window.POLL_SECONDS}


@pytest.mark.parametrize("gone", ["workers", "scheduler"])
def test_the_first_error_is_the_one_that_is_told(gone: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the workers, or the scheduler, went away afterwards."""
    monkeypatch.setattr(task_window, "LOOK_SECONDS", 0.01)

    def answer(task: Task) -> dict[str, Any] | None:
        if gone == "workers":
            cluster.info = {}
        elif task.shard == 3:
            cluster.status = "closed"
        return {"node": "h", "error": ["StoreMismatch", "what it says"]} if task.shard == 0 else None

    cluster = Cluster(answer)
    window = scene.window(cluster, timeout=0.05)
    look, looked = window._look, []

    def late() -> None:
        # The error is there before anyone is missed.
        looked.append(window.error)
        if len(looked) < 2 or window.error is not None:
            look()

    monkeypatch.setattr(window, "_look", late)
    with pytest.raises(StoreMismatch, match=r"^what it says$"):
        window.run()
    assert window.flying, "what flies was not waited for"


def test_a_view_that_cannot_be_sealed_lets_the_others_finish(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scene.writer, "seal", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device", "m"))
    )
    with pytest.raises(OSError, match="No space left") as caught:
        scene.window(Cluster(scene.done)).run()
    assert caught.value.filename == "m"
    assert not lease(scene.store.path, "t").exists(), "withdrawn as at any end"
    assert all(scene.ledger.receipt(shard) for shard in range(SHARDS))


def test_a_lost_scheduler_says_what_to_do(scene: Scene) -> None:
    cluster = Cluster(scene.done)

    def answer(task: Task) -> dict[str, Any]:
        if task.shard == 5:
            cluster.status = "connecting"
        return scene.done(task)

    cluster.answer = answer
    message = r"the Dask scheduler tcp://127.0.0.1:8786 is gone; all finished shards are written to .*/s: run the same command again"
    with pytest.raises(Interrupted, match=message) as caught:
        scene.window(cluster).run()
    assert caught.value.exit_code == 75


def test_workers_that_never_come_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_window, "LOOK_SECONDS", 0.01)
    cluster = Cluster(lambda task: None)
    window = scene.window(cluster, timeout=0.05)
    cluster.info = {}
    with pytest.raises(
        Interrupted, match=r"no worker is left and none came back within 0.05 seconds; all finished shards"
    ):
        window.run()


def test_a_worker_that_sees_another_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_window, "SEEN_SECONDS", 0.05)
    monkeypatch.setattr(task_window, "LOOK_SECONDS", 0.06)
    blind = scene.window(Cluster(lambda task: {"node": "h", "stopped": True}))
    with pytest.raises(WorkersFailed, match=r"the worker on h does not see .*\.t\.lease, which this command wrote"):
        blind.run()
    done = {"node": "far", "timing": {}, "seconds": 0.0, "loading": 0.0, "difference": 0.0}
    lease(scene.store.path, "t").write_text("r 1")
    with pytest.raises(
        WorkersFailed, match=r"the worker on far has written shard \d+ of view 0, but its receipt is not to be"
    ):
        scene.window(Cluster(lambda task: done)).run()


def test_a_receipt_may_be_seen_late(scene: Scene) -> None:
    late: list[tuple[float, Task]] = []

    def answer(task: Task) -> dict[str, Any]:
        found = scene.done(task)
        if task.shard == 4:
            scene.ledger.withdraw(4)
            late.append((time.monotonic() + 0.1, task))
        return found

    class Later(Cluster):
        @property
        def status(self) -> str:
            if late and time.monotonic() > late[0][0]:
                scene.done(late.pop()[1])
            return "running"

        @status.setter
        def status(self, value: str) -> None:
            pass

    scene.window(Later(answer)).run()
    assert scene.ledger.sealed


@pytest.fixture
def _asked_to_stop() -> Iterator[None]:
    yield
    stopping._received.clear()


@pytest.mark.usefixtures("_asked_to_stop")
def test_a_stop_waits_for_what_has_begun(scene: Scene) -> None:
    def answer(task: Task) -> dict[str, Any]:
        if task.shard == 3:
            stopping._received.append(15)
        return scene.done(task)

    cluster = Cluster(answer)
    with pytest.raises(
        Interrupted, match=r"stopped by SIGTERM with all finished shards written to .*; run the same command"
    ) as caught:
        scene.window(cluster).run()
    assert caught.value.exit_code == 75
    written = [shard for shard in range(SHARDS) if scene.ledger.receipt(shard)]
    assert written == [task.shard for task in cluster.given]
    assert 4 <= len(written) < SHARDS


def test_timings_of_workers_are_added(scene: Scene) -> None:
    window = scene.window(Cluster(scene.done))
    window._add(Task(0, 1), {"forward": 2.0, "encode": 1.0, "rows": 5, "bytes": 7, "failed": {"a": "b"}, "later": 1.0})
    assert scene.job.pipeline.timing == Timing(forward=2.0, encode=1.0, failed={"a": "b"}), "rows come from receipts"
    window.fresh.clear()
    window._add(Task(0, 1), {"rows": 5, "bytes": 7})
    assert (scene.job.pipeline.timing.rows, scene.job.pipeline.timing.bytes) == (5, 7), "but for rows that are mended"

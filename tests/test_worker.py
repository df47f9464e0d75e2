"""What a worker process does with a task, here without any scheduler."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hdcache.extract import worker
from hdcache.extract.machines import fingerprint, versions
from hdcache.extract.run import extract
from hdcache.extract.worker import Recipe, forget, lease, own_threads, write_shard
from hdcache.extract.writer import ViewWriter
from hdcache.ledgers import teacher_ledger
from hdcache.store import PIXELS, Store
from hdcache.teachers import load_teacher

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, world = torch.get_num_threads(), os.environ.get("LOCAL_WORLD_SIZE")
    yield
    forget()
    torch.set_num_threads(threads)
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if world is not None:
        os.environ["LOCAL_WORLD_SIZE"] = world


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """A sealed store of 20 rows in shards of 8."""
    root = tmp_path_factory.mktemp("worker")
    extract(
        make_npz(root / "d.npz", 20), store=root / "s", teachers=[f"t={tiny}"], encoding="klt", precision="fp32",
        rows_per_shard=8, batch=8, device="cpu", threads=1,
    )  # fmt: skip
    return root / "s"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Store:
    return Store.open(shutil.copytree(whole, tmp_path / "s"))


@pytest.fixture
def recipe(store: Store, tiny: str) -> dict[str, Any]:
    record = store.teacher("t")
    lease(store.path, "t").write_text("run 1", encoding="utf-8")
    return Recipe(
        run="run 1", node=os.uname().nodename, store=str(store.path), data=store.card.dataset.spec, teacher="t", source=tiny,
        identity=record.identity_digest(), device="cpu", gpus=False, threads=1, torch_threads=1, processes=2,
        versions=versions("npz"), fingerprint=fingerprint(load_teacher(f"t={tiny}", precision="fp32", batch=8), list(record.taps)),
    ).model_dump(mode="json")  # fmt: skip


def lose(store: Store, shard: int) -> None:
    """Forget a shard as a killed process leaves it."""
    ledger = teacher_ledger(store, "t", 0)
    ledger.unseal()
    ledger.withdraw(shard)


def test_a_shard_is_written_as_the_inline_engine_writes_it(store: Store, recipe: dict[str, Any], tree: Tree) -> None:
    before = tree(store.path)
    lose(store, 1)
    (store.path / "teachers/t/views/0/final/codes/c.1.0.0").unlink()
    found = write_shard(recipe, 0, 1)
    assert (found["timing"]["rows"], found["timing"]["failed"], found["difference"]) == (8, {}, 0.0)
    after = tree(store.path)
    assert after == {key: before[key] for key in before if key != "teachers/t/views/0/manifest.json"}
    assert json.loads(json.dumps(found)) == found, "plain data"
    assert len(json.dumps(found)) < 1000
    assert len(json.dumps(recipe)) < 4000


def test_the_teacher_is_loaded_once(store: Store, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = worker.reload_teacher
    monkeypatch.setattr(worker, "reload_teacher", lambda *given: loaded.append(1) or load(*given))
    for run in ("run 1", "run 2"):
        lease(store.path, "t").write_text(run, encoding="utf-8")
        for shard in range(3):
            lose(store, shard)
            assert "timing" in write_shard(recipe | {"run": run}, 0, shard)
    assert loaded == [1]
    lose(store, 0)
    assert "timing" in write_shard(recipe | {"run": "run 2", "torch_threads": 2}, 0, 0)
    assert loaded == [1, 1], "another recipe"
    assert len(worker._kept) == 1, "the former teacher is let go"


def test_a_complete_shard_needs_no_teacher(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_load", lambda *_: pytest.fail("the teacher was loaded"))
    assert write_shard(recipe, 0, 1)["timing"] == {}


def test_a_run_that_has_ended_writes_nothing(store: Store, recipe: dict[str, Any]) -> None:
    lose(store, 1)
    lease(store.path, "t").write_text("another run", encoding="utf-8")
    assert "stopped" in write_shard(recipe, 0, 1)
    lease(store.path, "t").unlink()
    assert "stopped" in write_shard(recipe, 0, 1)
    assert "stopped" in write_shard(recipe | {"store": str(store.path / "elsewhere")}, 0, 1)
    assert teacher_ledger(store, "t", 0).receipt(1) is None


def test_who_takes_the_lock_of_a_dead_command_ends_its_run(store: Store, recipe: dict[str, Any]) -> None:
    lose(store, 1)
    with store.lock("u"):
        assert lease(store.path, "t").exists(), "that of another teacher"
    with store.lock("t"):
        assert "stopped" in write_shard(recipe, 0, 1)
    assert "stopped" in write_shard(recipe, 0, 1)


names = st.text("ab.-_", min_size=0, max_size=3).map(lambda text: f"t{text}") | st.sampled_from(
    ["t.run", "t.owner", "t.lock", "t.lease", "t.run.owner", "samples.pixels", "samples"]
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(teacher=names, other=names | st.just(PIXELS))
def test_a_lease_is_touched_by_no_other_lock(teacher: str, other: str, store: Store) -> None:
    assume(teacher != other)
    lease(store.path, teacher).write_text("run 1", encoding="utf-8")
    with store.lock(other):
        assert lease(store.path, teacher).read_text(encoding="utf-8") == "run 1"
        with store.lock(teacher):
            pass


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"versions": {"hdcache": "9.9"}}, "StoreMismatch", "has hdcache 0.1.0, this command 9.9"),
        ({"source": "random:vit_tiny_patch16_224?seed=1"}, "StoreMismatch", "is not the network that the store was made with"),
        ({"identity": "0" * 64}, "StoreMismatch", "finds another teacher 't' there; is it the same folder?"),
        ({"data": "npz:/no/such.npz"}, "InputNotFound", "no such file"),
        ({"device": "cuda:7"}, "UsageError", "device 'cuda:7' cannot be used here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changes: dict[str, Any], kind: str, message: str, store: Store, recipe: dict[str, Any], tree: Tree
) -> None:
    lose(store, 1)
    before = tree(store.path)
    found = write_shard({**recipe, **changes}, 0, 1)
    assert found["error"][0] == kind
    assert message in found["error"][1]
    assert tree(store.path) == before


def test_other_data_and_other_features_are_refused(
    store: Store, recipe: dict[str, Any], tmp_path: Path, make_npz: Callable[..., str]
) -> None:
    lose(store, 1)
    other = make_npz(tmp_path / "other.npz", 20, seed=5)
    kind, text = write_shard({**recipe, "data": other}, 0, 1)["error"]
    assert kind == "StoreMismatch"
    assert "finds other data there than the store was made from" in text
    values = {tap: [-value for value in values] for tap, values in recipe["fingerprint"]["values"].items()}
    kind, text = write_shard({**recipe, "fingerprint": {"sha256": "x", "values": values}}, 0, 1)["error"]
    assert kind == "StoreMismatch"
    assert "the teacher gives other features there (relative difference 2 in fp32)" in text
    assert teacher_ledger(store, "t", 0).receipt(1) is None


def test_an_error_names_another_machine(store: Store, recipe: dict[str, Any]) -> None:
    lose(store, 1)
    text = write_shard({**recipe, "node": "login1", "device": "cuda:7"}, 0, 1)["error"][1]
    assert text.endswith(f" (on {os.uname().nodename})")


def test_errors_of_the_system_keep_their_number(
    store: Store, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("hdcache.extract.writer.ViewWriter.write", full)
    assert write_shard(recipe, 0, 1)["os_error"] == [28, "No space left on device", "somewhere"]


def test_a_crash_travels_as_text(store: Store, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lose(store, 1)
    monkeypatch.setattr(worker, "reload_teacher", lambda *_: 1 / 0)
    text = write_shard(recipe, 0, 1)["crash"]
    assert text.startswith("Traceback")
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")


def test_two_tasks_for_one_shard_wait_for_each_other(
    store: Store, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one finds the shard done, and writes nothing."""
    lose(store, 1)
    within: list[int] = []
    write = ViewWriter._write_shard

    def counted(self: ViewWriter, shard: int, *rest: Any) -> int:
        within.append(threading.get_ident())
        assert len(set(within)) == 1, "two at once"
        count = write(self, shard, *rest)
        within.clear()
        return count

    monkeypatch.setattr(ViewWriter, "_write_shard", counted)
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(write_shard(recipe, 0, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(part) for part in found] == [["node", "timing", "seconds", "loading", "difference"]] * 4
    assert sum(part["timing"].get("rows", 0) for part in found) == 8


@pytest.mark.parametrize(
    ("asked", "processes", "expected"), [("", 1, None), ("1", 1, None), ("6", 4, 6), ("x", 1, None)]
)
def test_threads_of_torch(asked: str, processes: int, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask gives its workers OMP_NUM_THREADS=1; that is taken for nobody's wish."""
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    cores = len(os.sched_getaffinity(0))
    assert own_threads(processes) == (expected or cores)
    assert own_threads(10 * cores) == (expected or 1)

"""What a worker process does: load one teacher once, then write shard after shard of its views.

    recipe (plain data) + view + shard  ->  rows in the store, receipt last  ->  a few numbers

Only those travel. What is true stands on disk: a shard with a receipt is done, whoever wrote it.
"""

from __future__ import annotations

import gc
import os
import platform
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker

from hdcache.datasets import Dataset, store_dataset
from hdcache.encodings import Encoder
from hdcache.errors import HdcacheError, StoreMismatch
from hdcache.extract.lanes import lanes_for
from hdcache.extract.machines import Fingerprint, check_difference, check_versions, difference, fingerprint, versions
from hdcache.extract.opening import dataset_differences
from hdcache.extract.pipeline import Pipeline
from hdcache.extract.writer import ViewWriter
from hdcache.ledgers import teacher_ledger
from hdcache.reader import TeacherReader
from hdcache.records import Record
from hdcache.resources import available_cores, keep_freed_memory
from hdcache.store import LEASE, Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, choose_device, reload_teacher


class Recipe(Record):
    """All that a worker needs to know. The teacher's settings it reads from the teacher's record."""

    run: str
    """Name of the run; the lease in the store says whether it still goes on."""
    node: str
    """The machine that the command runs on."""
    store: str
    data: str
    teacher: str
    """Name in the store."""
    source: str
    """Model spec."""
    identity: str
    """Digest of the record's identity."""
    device: str
    gpus: bool
    """Whether the workers are numbered and share this machine's GPUs: worker n takes the n-th, round and round."""
    threads: int | None
    """Decoding threads; None: the worker's share of the cores."""
    torch_threads: int | None
    """Threads of torch on a CPU; None: the worker's share of the cores."""
    processes: int
    """Workers that share a machine."""
    versions: dict[str, str]
    fingerprint: Fingerprint


def lease(store: Path, teacher: str) -> Path:
    """The file that holds the name of the run that writes a teacher, as long as its tasks may go on."""
    return store / f".{teacher}{LEASE}"


@dataclass
class _Loaded:
    """What a process keeps from one task to the next."""

    key: str
    store: Store
    dataset: Dataset
    teacher: Teacher
    lanes: int
    """Batches that the process has under way at once, those of all its tasks together."""
    threads: int
    """Of torch, for all lanes together."""
    encoders: dict[str, Encoder]
    difference: float
    """How far its features are from those of the command's machine."""
    writers: dict[int, ViewWriter] = field(default_factory=dict)


_kept: list[_Loaded] = []
_loading = threading.Lock()


@dataclass(frozen=True)
class _SharedTeacher(Teacher):
    """A teacher that tasks of one process take turns with, so that one decodes and writes while another computes."""

    turns: threading.Semaphore

    def forward(self, *given: Any, **more: Any) -> dict[str, Tokens | torch.Tensor]:
        with self.turns:
            return super().forward(*given, **more)


def write_shard(recipe: dict[str, Any], view: int, shard: int) -> dict[str, Any]:
    """The task: one shard of one view.

    Returns
    -------
    dict
        plain data. ``node``, and one of: ``stopped`` (the run has ended, or its store is not here), ``error`` ([class of
        :mod:`hdcache.errors`, message]), ``os_error`` ([number, text, file]), ``crash`` (a traceback), ``timing`` (fields of
        :class:`~hdcache.extract.pipeline.Timing`) with ``seconds``, ``loading`` seconds and ``difference``.
    """
    node = platform.node()
    try:
        return {"node": node} | _write_shard(recipe, view, shard, f"the worker on {node}")
    except HdcacheError as error:
        text = str(error.args[-1]) if error.args else ""
        where = f" (on {node})" if node != recipe["node"] else ""
        return {"node": node, "error": [type(error).__name__, text + where]}
    except OSError as error:
        return {"node": node, "os_error": [error.errno, error.strerror or str(error), error.filename]}
    except Exception:
        # Dask would pickle it, and lose the task where that fails.
        return {"node": node, "crash": traceback.format_exc(limit=-8)}


def _write_shard(given: dict[str, Any], view: int, shard: int, where: str) -> dict[str, Any]:
    began = time.perf_counter()
    # First of all: a recipe of another version may have other fields.
    check_versions({"hdcache": given["versions"]["hdcache"]}, versions(""), where)
    recipe = Recipe.model_validate(given)
    root = Path(recipe.store)
    if not _goes_on(root, recipe):
        return {"stopped": True}
    receipt = teacher_ledger(Store.open(root), recipe.teacher, view).receipt(shard)
    if receipt is not None and not receipt.failed:
        return {"timing": {}, "seconds": time.perf_counter() - began, "loading": 0.0, "difference": 0.0}
    with _loading:
        loaded = _load(recipe, where)
        writer = loaded.writers.get(view)
        if writer is None:
            record = loaded.store.teacher(recipe.teacher)
            writer = loaded.writers[view] = ViewWriter(loaded.store, record, loaded.encoders, view)
    loading = time.perf_counter() - began
    # Each thread that runs tasks has a number of its own.
    torch.set_num_threads(loaded.threads)
    threads = recipe.threads or available_cores()
    pipeline = Pipeline(
        loaded.store, loaded.dataset, loaded.teacher, threads=threads, max_failures=None, lanes=loaded.lanes
    )
    pipeline.run(writer, [shard], lambda rows, timing: None)
    return {
        "timing": asdict(pipeline.timing), "seconds": time.perf_counter() - began, "loading": loading,
        "difference": loaded.difference,
    }  # fmt: skip


def _goes_on(store: Path, recipe: Recipe) -> bool:
    try:
        return lease(store, recipe.teacher).read_text(encoding="utf-8") == recipe.run
    except FileNotFoundError:
        return False


def _load(recipe: Recipe, where: str) -> _Loaded:
    """The teacher, data set and store of ``recipe``; those of another one are let go first."""
    key = recipe.model_copy(update={"run": ""}).digest()
    if _kept and _kept[0].key == key:
        return _kept[0]
    forget()
    # Dask has its workers give all of it back at once, which costs a ViT-S on a CPU a third more.
    keep_freed_memory()
    # How many share this machine is known to the command alone.
    os.environ["LOCAL_WORLD_SIZE"] = str(recipe.processes)
    store = Store.open(recipe.store)
    check_versions(recipe.versions, versions(store.card.dataset.kind), where)
    device = choose_device(recipe.device)
    if recipe.gpus and str(device) == "cuda":
        device = torch.device("cuda", int(get_worker().name) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if device.type == "cpu":
        torch.set_num_threads(recipe.torch_threads or own_threads(recipe.processes))
    reader = TeacherReader(store, recipe.teacher)
    if reader.record.identity_digest() != recipe.identity:
        raise StoreMismatch(
            f"{store.path}: {where} finds another teacher {recipe.teacher!r} there; is it the same folder?"
        )
    dataset = store_dataset(store, recipe.data)
    if lines := dataset_differences(dataset, store):
        raise StoreMismatch(f"{recipe.data}: {where} finds other data there than the store was made from ({lines[0]})")
    teacher = reload_teacher(reader.record, recipe.source, device)
    apart = difference(fingerprint(teacher, list(reader.record.taps)), recipe.fingerprint)
    check_difference(apart, teacher.card.precision, where)
    lanes = lanes_for(teacher, [card.encoding for card in reader.record.taps.values()])
    own = {entry.name: getattr(teacher, entry.name) for entry in fields(teacher)}
    shared = _SharedTeacher(**own, turns=threading.Semaphore(lanes))
    _kept.append(_Loaded(key, store, dataset, shared, lanes, torch.get_num_threads(), reader.encoders, apart))
    return _kept[0]


def own_threads(processes: int) -> int:
    """Threads of torch for one of ``processes`` on this machine; OMP_NUM_THREADS goes before, but for Dask's own 1."""
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdecimal() and int(asked) > 1 else max(1, cores // processes)


def forget() -> None:
    """Let go of what this process has loaded."""
    _kept.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

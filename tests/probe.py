"""One process that uses stores as a user would, and says what became of it: errors, processor time, memory.

Reads paths of stores from stdin, a line each, and answers each with a line of JSON. The first store should be a good one: what is
imported and kept for it is not counted for those that follow. No more than a gigabyte is given out after that.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from hdcache.errors import HdcacheError, UnreadableImage
from hdcache.geometry import read_geometry, sealed_geometry
from hdcache.info import describe_store, format_store
from hdcache.integrity import verify
from hdcache.leftovers import collect
from hdcache.packed import packed_dataset
from hdcache.reader import TeacherReader
from hdcache.store import Store

SPARE = 1 << 30
MOST_ROWS = 64


def steps(path: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that is done with a store, by name; each step is run before the next is asked for."""
    held: dict[str, Any] = {}
    yield "open", lambda: held.setdefault("store", Store.open(path))
    store = held.get("store")
    if store is None:
        return
    yield "info", lambda: format_store(describe_store(store))
    yield "ids", lambda: store.ids
    yield "labels", lambda: store.labels
    yield "views", lambda: held.setdefault("views", sealed_geometry(store))
    for view in held.get("views", ()):
        yield f"view {view}", lambda view=view: read_geometry(store, view)
    yield "samples", lambda: held.setdefault("samples", packed_dataset(store))
    if held.get("samples") is not None:
        yield "a sample", lambda: _every_sample(held["samples"])
    yield "teachers", lambda: held.setdefault("teachers", store.teachers())
    for name in held.get("teachers", ()):
        yield name, lambda name=name: held.setdefault(name, TeacherReader(store, name))
        if name in held:
            yield from _teacher_steps(store, held[name])
    for quick in (True, False):
        yield f"verify {quick=}", lambda quick=quick: _verify(store, quick)
    yield "gc", lambda: collect(store, unlisted=True, dry_run=True)


def _teacher_steps(store: Store, reader: TeacherReader) -> Iterator[tuple[str, Callable[[], Any]]]:
    count = min(MOST_ROWS, store.card.dataset.count)
    yield f"{reader.name} weights", lambda: reader.weights
    for view in store.views(reader.name):
        if reader.record.card.mask is not None:
            yield f"{reader.name}/{view} masks", lambda view=view: reader.unpacked(reader.packed_masks(view, 0, count))
        for tap, card in reader.record.taps.items():
            where, parts = f"{reader.name}/{view}/{tap}", {}
            yield (
                f"{where} rows",
                lambda view=view, tap=tap, parts=parts: parts.update(reader.rows(view, tap, 0, count)),
            )
            if parts:
                tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
                yield f"{where} decoded", lambda tap=tap, tensors=tensors: reader.decode(tap, tensors)
            for name, array in card.arrays.items():
                yield (
                    f"{where}/{name} copied",
                    lambda view=view, key=f"{tap}/{name}", array=array: reader.copy_rows(
                        view, key, 0, count, list(np.empty((count, *array.shape), array.dtype))
                    ),
                )


def _every_sample(dataset: Any) -> None:
    for name in dataset.ids:
        with suppress(UnreadableImage):  # a row that failed
            dataset.read(name)


def _verify(store: Store, quick: bool) -> None:
    found = verify(store, quick=quick)
    if found.faults:
        raise HdcacheError(f"verify: {found.faults[0]}")


def probe(path: str) -> dict[str, Any]:
    """Do everything with a store: errors by step, seconds of the longest step, and how much more memory was taken than before."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak of resident memory begins anew
    before, seconds = _status("VmRSS"), 0.0
    errors = []
    for name, work in steps(path):
        began = time.process_time()
        try:
            work()
        except HdcacheError as error:
            verifying = name.startswith("verify") and type(error) is HdcacheError
            errors.append([name, type(error).__name__, 5 if verifying else error.exit_code, str(error)])
        except BaseException as error:
            errors.append([name, type(error).__name__, None, str(error)[:2000]])
        seconds = max(seconds, time.process_time() - began)
    return {"errors": errors, "seconds": seconds, "megabytes": (_status("VmHWM") - before) / 1e6}


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def main() -> None:
    torch.set_num_threads(1)
    limited = False
    for line in sys.stdin:
        print(json.dumps(probe(line.rstrip("\n"))), flush=True)
        if not limited and os.environ.get("PROBE_UNLIMITED") is None:
            most = _status("VmSize") + SPARE
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            limited = True


if __name__ == "__main__":
    main()

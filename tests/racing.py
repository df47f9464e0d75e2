"""Processes that begin to do something at the same moment, forked from one that has loaded what they need: for test_races.py.

python racing.py WHAT ARGUMENTS-AS-JSON    # prints what became of each, as JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hdcache import arrays
from hdcache.durable import durable_write
from hdcache.errors import StoreLocked
from hdcache.extract.writer import Row, ViewWriter
from hdcache.schema import Receipt
from hdcache.store import Store
from hdcache.views import row_order

PROCESSES = 4
HELD_SECONDS = 0.5


def race(work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` returns in each of :data:`PROCESSES` children, given its number, or class and text of its error."""
    ready, go = os.pipe()
    children = []
    for number in range(PROCESSES):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.close(go)
            arrays._forked = False  # right, since the parent has not used the Rust reader
            try:
                os.read(ready, 1)  # until the parent lets go
                found = work(number)
            except Exception as error:
                found = [type(error).__name__, str(error.args[-1] if error.args else "")]
            os.write(writer, json.dumps(found).encode())
            os._exit(0)
        os.close(writer)
        children.append((child, reader))
    os.close(go)
    answers = []
    for child, reader in children:
        with open(reader, "rb") as file:
            answers.append(json.loads(file.read() or b'["died", ""]'))
        os.waitpid(child, 0)
    return answers


def view_writer(root: str, view: int) -> ViewWriter:
    """What writes a view of teacher ``t``, without its network."""
    store = Store.open(root)
    record = store.teacher("t")
    cards: Any = {tap: SimpleNamespace(card=card) for tap, card in record.taps.items()}
    return ViewWriter(store, record, cards, view)


def write_shard(writer: ViewWriter, shard: int, value: int) -> int:
    """A shard all of whose values are ``value``."""
    card = writer.store.card
    order = row_order(writer.rows, card.views.seed, writer.view)[
        shard * card.rows_per_shard : (shard + 1) * card.rows_per_shard
    ]
    pixels = np.zeros((3, 4, 4), np.uint8)
    rows = [Row(int(sample), pixels, (0, 1, 2, 3), True, (9, 8), bytes([int(sample)] * 32)) for sample in order]
    parts: dict[str, dict[str, Any]] = {
        tap: {name: np.full((len(rows), *array.shape), value, array.dtype) for name, array in found.arrays.items()}
        for tap, found in writer.record.taps.items()
    }
    return writer.write(shard, rows, parts, {}, 0)


def create(path: str) -> Callable[[int], Any]:
    """Each creates one file of its own bytes."""
    return lambda number: durable_write(Path(path), bytes([number]) * 100_000, create_only=True).size


def hold(root: str) -> Callable[[int], Any]:
    """Each takes the lease of teacher ``t``."""

    def work(number: int) -> int:
        with Store.open(root).lock("t"):
            time.sleep(HELD_SECONDS)
        return os.getpid()

    return work


def write(root: str, view: int, same: bool) -> Callable[[int], Any]:
    """Each writes all shards of a view, without a lease, beginning with another one, and seals it."""

    def work(number: int) -> int:
        writer = view_writer(root, view)
        # Workers write shards; the command that they work for has written the metadata.
        writer._open(writer.geometry, writer._geometry_writers, writer._geometry_static)
        writer._open(writer.ledger, writer._writers, writer._static)
        written = 0
        for step in range(writer.shards):
            shard = (step + number) % writer.shards
            written += write_shard(writer, shard, 1 if same else number + 1) > 0
        writer.seal()
        return written

    return work


def seal(root: str, view: int, same: bool) -> Callable[[int], Any]:
    """Each seals a whole view of teacher ``t``; or says otherwise how many of its values were clipped."""

    def work(number: int) -> str:
        writer = view_writer(root, view)
        receipts: list[Receipt] = []
        for shard in range(writer.shards):
            receipt = writer.ledger.receipt(shard)
            assert receipt is not None
            receipts.append(receipt if same else receipt.model_copy(update={"saturated": number}))
        told = {"teacher": "t", "identity": writer.record.identity_digest(), "view": view, "rows": writer.rows}
        return writer.ledger.seal(receipts, {}, **told).digest()

    return work


def copy(source: str, target: str) -> Callable[[int], Any]:
    """Each copies a store to one place."""
    from hdcache.sharing.places import open_place
    from hdcache.sharing.transfer import copy_store

    return lambda number: copy_store(open_place(source), open_place(target), quiet=True).whole.objects


def extract(store: str, **settings: Any) -> Callable[[int], Any]:
    """Each runs one command; what the one that is refused says names a process that runs too."""
    from hdcache.extract.run import extract as run

    def work(number: int) -> Any:
        try:
            return run(store=store, **settings).teachers["t"]["rows_written"]
        except StoreLocked as error:
            return ["StoreLocked", str(error), os.getpid()]

    return work


def task(recipe: dict[str, Any], shards: int) -> Callable[[int], Any]:
    """Each is given every shard of a run: what a scheduler does with tasks of workers that it takes for dead."""
    from hdcache.extract.worker import write_shard as write_task

    return lambda number: [sorted(write_task(recipe, 0, shard)) for shard in range(shards)]


if __name__ == "__main__":
    what = {
        "create": create,
        "hold": hold,
        "write": write,
        "seal": seal,
        "copy": copy,
        "extract": extract,
        "task": task,
    }
    print(json.dumps(race(what[sys.argv[1]](**json.loads(sys.argv[2])))))

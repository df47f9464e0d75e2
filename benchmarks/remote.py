"""Samples a second of a store at a URL, beside the same store in a folder, and beside nothing but its download.

    python benchmarks/remote.py --out DIR            # 4,096 rows of [257, 384]: about five minutes
    python benchmarks/remote.py --out DIR --quick

The store is served by ``hdcache serve`` on this machine, over HTTP: no network is measured, but all that reading through the
cache costs, and a server on the same cores. Contenders take turns, three rounds, the best of each counts; the first epoch
begins with an empty cache, the second finds all of it. *Pulled first* is ``hdcache pull`` and then an epoch. *Small cache*
holds a quarter of what an epoch reads. Prints one table and writes DIR/remote.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from loader_store import build_store, feature_rows

from hdcache.datasets import open_dataset
from hdcache.index import write_index
from hdcache.ledgers import teacher_ledger
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.resources import available_cores
from hdcache.schema import Preprocessing
from hdcache.sharing.places import open_place
from hdcache.sharing.streaming import PARALLEL, open_store
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from hdcache.target_sources import open_targets

BATCH, ROUNDS = 64, 3
FULL, QUICK = 4096, 512


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The URL of a folder's stores while this lasts."""
    command = [sys.executable, "-m", "hdcache", "serve", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        raise SystemExit("hdcache serve printed no URL")
    finally:
        server.terminate()
        server.wait(20)


def epoch(store: Store, data: Path, number: int) -> float:
    """Seconds of an epoch of targets alone, decoded."""
    stored, _ = open_targets(store, {"t": ["final"]}, dtype=torch.bfloat16)
    options = Options(
        batch_size=BATCH, preprocessing=Preprocessing(size=224), images=False, threads=available_cores()
    )  # fmt: skip
    loader = Loader(open_dataset(f"npz:{data}"), options, views=store.card.views, store=store, stored=stored)
    began = time.perf_counter()
    rows = sum(len(batch.ids) for batch in loader.epoch(number))
    seconds = time.perf_counter() - began
    if rows != len(store.ids):
        raise SystemExit(f"{rows} rows came, not {len(store.ids)}")
    return seconds


def download(url: str, store: Store) -> float:
    """Seconds to get all objects of the tap and to prove them, with nothing else done to them."""
    place, objects = open_place(url), teacher_ledger(store, "t", 0).manifest().objects
    mine = {key: entry for key, entry in objects.items() if "/final/" in key and "/c." in key}
    began = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(lambda item: sum(map(len, place.parts(*item))), mine.items()):
            pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int)
    asked = parser.parse_args()
    count = asked.rows or (QUICK if asked.quick else FULL)
    asked.out.mkdir(parents=True, exist_ok=True)
    root = build_store(asked.out, feature_rows(asked.out, count, None), 0.1)
    store, data, scratch = Store.open(root / "store.hdc"), root / "data.npz", asked.out / "scratch"
    write_index(store)
    objects = teacher_ledger(store, "t", 0).manifest().objects
    needed = sum(entry.size for key, entry in objects.items() if "/views/0/final/" in key and "/c." in key)
    best: dict[str, float] = {}
    fetched: dict[str, float] = {}

    def streamed(url: str, cache: str, size: int) -> Store:
        return open_store(url, cache=scratch / cache, cache_size=size)

    def small(url: str) -> float:
        far = streamed(url, "small", max(1, needed // 4))
        seconds = epoch(far, data, 0)
        fetched["small"] = far.files.cache.fetched / needed  # type: ignore[attr-defined]
        return seconds

    def pulled(url: str) -> float:
        began = time.perf_counter()
        copy_store(open_place(url), open_place(scratch / "copy.hdc"), quiet=True)
        spent = time.perf_counter() - began
        return spent + epoch(Store.open(scratch / "copy.hdc"), data, 0)

    with served(root) as address:
        url = f"{address}/store.hdc"
        ways: dict[str, Callable[[], float]] = {
            "folder": lambda: epoch(Store.open(root / "store.hdc"), data, 0),
            "download alone": lambda: download(url, store),
            "streamed, first epoch": lambda: epoch(streamed(url, "large", 2 * needed + (64 << 20)), data, 0),
            "streamed, later epochs": lambda: epoch(streamed(url, "large", 2 * needed + (64 << 20)), data, 1),
            "streamed, small cache": lambda: small(url),
            "pulled first, first epoch": lambda: pulled(url),
        }
        epoch(store, data, 0)  # threads, pages and libraries are warm for all
        for _ in range(1 if asked.quick else ROUNDS):
            shutil.rmtree(scratch, ignore_errors=True)
            for name, way in ways.items():
                best[name] = min(best.get(name, float("inf")), way())
    shutil.rmtree(scratch, ignore_errors=True)
    lines = ["| way | samples/s | against the folder |", "|---|---|---|"]
    lines += [f"| {name} | {count / value:,.0f} | {best['folder'] / value:.2f} |" for name, value in best.items()]
    print("\n".join(lines))
    print(
        f"\nan epoch reads {needed / 1e6:.1f} MB; a cache of a quarter of it fetched {fetched['small']:.2f} times as much"
    )
    facts = {"rows": count, "bytes": needed, "seconds": best, "fetched_small": fetched["small"]}
    (asked.out / "remote.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

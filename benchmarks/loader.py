"""Samples a second of a shuffled epoch: our loader beside other layouts of the same rows, beside its codec alone and a copy in RAM.

    python benchmarks/loader.py --out DIR [--features final.pt] [--rows 4096] [--quick]

Rows are [257, 384]: a class token and 256 patch tokens. Without --features ([R, N, D], .pt or .npy; the mean stands in for the
class token) they are Gaussian with a spectrum as that of DINOv2's last layer. Ours holds them as klt codes, all others in half
precision. All contenders yield collated batches, each with the best of 0, 1 and 2 worker processes, and take turns; the best of
--rounds counts. Then the same with the page cache dropped before each epoch. No images are read. Peers that are not installed
(``pip install hdcache[peers]``) are left out and named. Prints one table and writes DIR/loader.json. Set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loader_peers
import torch
import zarr
from loader_store import batch_mates, build_store, feature_rows

from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.progress import size
from hdcache.resources import available_cores, keep_freed_memory
from hdcache.runs import RUN_ROWS
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.target_sources import open_targets

BATCH, BUFFER = 64, 1024
MAPPED = 0.2
"""Share of looked-at pages that stay in the page cache from which on a contender must be closed for them to go."""
LIMIT_S = 10.0
"""An epoch that takes longer is cut: its rate is of the rows so far."""


@dataclass
class Contender:
    """One way to read the rows."""

    name: str
    epoch: Callable[[int], Iterable[Any]]
    """Yields batches; their lengths are counted."""
    files: Callable[[], list[Path]]
    bytes: int
    close: Callable[[], None] = lambda: None
    kind: str = "peer"
    cold: bool = True
    warm: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    still: float = 0.0
    """Share of its pages that stayed in the page cache when it was to be dropped."""


class Ours:
    """Epochs of our loader, decoded or not; ``keep`` its reader between them, else every epoch opens the store and compares
    each shard's sha256 when it first reads it."""

    def __init__(self, store: Path, threads: int, *, decode: bool, keep: bool = True) -> None:
        self.path, self.threads, self.decode, self.keep = store, threads, decode, keep
        self.loader: Loader | None = None

    def epoch(self, number: int) -> Iterator[Any]:
        if self.loader is None or not self.keep:
            self.loader = self.open()
        batches = self.loader.epoch(number) if self.decode else self.loader.host_batches(number)
        return (batch.ids for batch in batches)

    def close(self) -> None:
        self.loader = None

    def open(self) -> Loader:
        from hdcache.datasets import open_dataset

        store = Store.open(self.path / "store.hdc")
        data = open_dataset(str(self.path / "data.npz"), classes=store.card.dataset.classes)
        stored, _ = open_targets(store, {"t": ["final"]}, dtype=torch.bfloat16)
        options = Options(
            batch_size=BATCH, preprocessing=Preprocessing(size=224), buffer_rows=BUFFER, images=False, threads=self.threads
        )  # fmt: skip
        return Loader(data, options, views=store.card.views, store=store, stored=stored)


def raw(store: Path, pipeline: str, run: int, threads: int) -> Callable[[int], Iterator[Any]]:
    """Zarr's own decode of the same chunks, in order, in pieces of ``run`` rows."""
    folder = store / "store.hdc/teachers/t/views/0/final"

    def epoch(_: int) -> Iterator[Any]:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            arrays = [zarr.open_array(path, mode="r") for path in sorted(folder.iterdir()) if path.is_dir()]
        starts = range(0, arrays[0].shape[0], run)

        def decoded(start: int) -> Any:
            return [array[start : start + run] for array in arrays][-1]

        with ThreadPoolExecutor(threads) as pool:
            # So many pieces at a time are held, not the epoch.
            for first in range(0, len(starts), threads):
                yield from pool.map(decoded, starts[first : first + threads])

    return epoch


def timed(contender: Contender, number: int, rows: int) -> float:
    """Samples a second of one epoch, or of its first seconds."""
    began, seen = time.perf_counter(), 0
    batches = iter(contender.epoch(number))
    for batch in batches:
        seen += len(batch)
        if time.perf_counter() - began > LIMIT_S:
            break
    else:
        if seen != rows:
            raise SystemExit(f"{contender.name}: an epoch of {seen} rows, expected {rows}")
    return seen / (time.perf_counter() - began)


def drop_cache(paths: list[Path]) -> float:
    """Have the system forget these files' pages; the share of sampled pages that it still holds."""
    held = looked = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for path in paths[:: max(1, len(paths) // 64)]:
        with open(path, "rb", buffering=0) as file:
            # Far apart: what one look brings in, by reading ahead, must not be counted by the next.
            for offset in range(0, path.stat().st_size, 64 << 20):
                looked += 1
                with suppress(BlockingIOError):
                    held += os.preadv(file.fileno(), [bytearray(4096)], offset, os.RWF_NOWAIT) > 0
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return held / max(1, looked)


def peers(rows: Any, folder: Path, *, quick: bool) -> tuple[list[Contender], list[str]]:
    """Every layout with its best number of workers, and the names of those that cannot be read here."""
    found, absent = [], []
    for layout in loader_peers.LAYOUTS:
        name, needs = layout.name, layout.needs
        if package := loader_peers.missing(*needs):
            absent.append(f"{name} ({package})")
            continue
        place = folder / layout.__name__
        made = folder / f"{place.name}.bytes"
        arguments = (place, len(rows), rows.shape[1:], BATCH)
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            layout(*arguments, 0, BUFFER).write(rows)
            made.write_text(str(sum(path.stat().st_size for path in place.rglob("*") if path.is_file())))
        best: tuple[float, Contender] | None = None
        for workers in layout.workers[: 1 if quick else None]:
            one = layout(*arguments, workers, BUFFER)
            label = f"{name}, {workers} workers" if len(layout.workers) > 1 else name
            kind = "limit" if layout is loader_peers.MemoryMap else "peer"
            contender = Contender(label, one.batches, one.files, int(made.read_text()), one.close, kind)
            # The first epoch starts workers and fills the page cache.
            rate = max(timed(contender, number, len(rows)) for number in range(2))
            if best is None or rate > best[0]:
                if best is not None:
                    best[1].close()
                best = rate, contender
            else:
                one.close()
        assert best is not None
        found.append(best[1])
    return found, absent


def ours(store: Path, threads: int) -> list[Contender]:
    """Our loader's lines, and the raw decodes that it cannot pass."""
    rows = store / "store.hdc/teachers/t/views/0/final"
    files: Callable[[], list[Path]] = lambda: [path for path in rows.rglob("*") if path.is_file()]  # noqa: E731
    stored = sum(path.stat().st_size for path in files())
    zarrs, stock = "zarrs.ZarrsCodecPipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"
    codes, decoded = Ours(store, threads, decode=False), Ours(store, threads, decode=True)
    opening = Ours(store, threads, decode=False, keep=False)
    raws = [
        ("zarrs alone, whole shards", raw(store, zarrs, 256, 1)),
        (f"zarrs alone, {RUN_ROWS} rows at a time, {threads} threads", raw(store, zarrs, RUN_ROWS, threads)),
        ("zarr-python alone, whole shards", raw(store, stock, 256, 1)),
    ]
    return [
        Contender("ours, codes on the host", codes.epoch, files, stored, codes.close, "codes"),
        Contender("ours, decoded to bf16 on the CPU", decoded.epoch, files, stored, decoded.close, "bf16"),
        Contender("ours, codes, first epoch (opens, sha256)", opening.epoch, files, stored, opening.close, "first"),
        *[Contender(name, epoch, files, stored, kind="limit", cold=False) for name, epoch in raws],
    ]


def report(contenders: list[Contender], rows: int) -> list[dict[str, Any]]:
    """The lines of the table, as numbers."""
    best = {one.kind: max(one.warm) for one in contenders if one.kind in ("codes", "bf16")}
    cold = {one.kind: max(one.dropped) for one in contenders if one.dropped and one.kind in ("codes", "first")}
    lines = []
    for one in contenders:
        warm, dropped = max(one.warm), max(one.dropped, default=None)
        lines.append(
            {
                "name": one.name, "kind": one.kind, "bytes_a_sample": one.bytes / rows, "samples_per_second": warm,
                "codes_to_it": best["codes"] / warm, "bf16_to_it": best["bf16"] / warm, "cold": dropped,
                "cold_codes_to_it": cold["codes"] / dropped if dropped else None,
                "cold_first_to_it": cold["first"] / dropped if dropped else None,
                "rounds": one.warm, "cold_rounds": one.dropped, "pages_still_cached": one.still,
            }
        )  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for all layouts: 2 MB a row; made once, then used again"
    )
    parser.add_argument("--features", type=Path)
    parser.add_argument("--rows", type=int, help="4096; quick: 512")
    parser.add_argument("--fidelity", type=float, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="512 rows, 2 rounds, 1 cold one, no worker processes")
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds, settings.cold_rounds = 2, 1
    settings.rows = settings.rows or (512 if settings.quick else 4096)
    torch.set_num_threads(settings.threads)
    keep_freed_memory()  # as `hdcache distill` does; all contenders have it
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = feature_rows(settings.out, settings.rows, settings.features)
    store = build_store(settings.out, rows, settings.fidelity)
    mine = ours(store, settings.threads)
    for one in mine:
        timed(one, 0, len(rows))
    others, absent = peers(rows, settings.out, quick=settings.quick)
    contenders = mine + others
    for number in range(1, settings.rounds + 1):
        for one in contenders:
            one.warm.append(timed(one, number, len(rows)))
    for number in range(settings.cold_rounds):
        for one in (one for one in contenders if one.cold):
            # Data sets stay open and workers stay up, but for those that map their files: their pages would stay too. A look at
            # a page may itself bring it back, so that a few prove nothing.
            if drop_cache(one.files()) > MAPPED:
                one.close()
                gc.collect()
            one.still = max(one.still, drop_cache(one.files()))
            one.dropped.append(timed(one, 100 + number, len(rows)))
    for one in contenders:
        one.close()
    mates = batch_mates(len(rows), BATCH, BUFFER)
    lines = report(contenders, len(rows))
    result = {
        "settings": {k: str(v) for k, v in vars(settings).items()}, "rows": len(rows), "shape": list(rows.shape[1:]),
        "absent": absent, "batch_mates": mates, "lines": lines,
    }  # fmt: skip
    (settings.out / "loader.json").write_text(json.dumps(result, indent=1))
    print(
        "| | KB a sample | samples/s | codes to it | bf16 to it | cold samples/s | codes to it, cold | first epoch to it, cold |\n|---|---|---|---|---|---|---|---|"
    )
    for line in lines:
        cold = "| |"
        if line["cold"]:
            cold = f"{line['cold']:,.0f} | {line['cold_codes_to_it']:.2f} | {line['cold_first_to_it']:.2f}"
        print(
            f"| {line['name']} | {line['bytes_a_sample'] / 1e3:.1f} | {line['samples_per_second']:,.0f} "
            f"| {line['codes_to_it']:.2f} | {line['bf16_to_it']:.2f} | {cold} |"
        )
    print(
        f"\nBest of {settings.rounds} rounds (cold: {settings.cold_rounds}) of {len(rows)} rows, {size(rows[0].nbytes)} each in fp16, "
        f"batches of {BATCH}; {mates['ours']:.1%} of the rows beside a row are of its run of {RUN_ROWS} (a full shuffle: {mates['full']:.1%})."
        + (f" Not installed: {', '.join(absent)}." if absent else "")
        + "".join(f" {one.name}: {one.still:.0%} of its pages stayed cached." for one in contenders if one.still)
    )


if __name__ == "__main__":
    main()

"""What a row costs when there are many: stores of ten thousand to a million rows, built, opened, read, checked and run again.

    python benchmarks/scale.py --out DIR            # 10^4, 10^5 and 10^6 rows: about 20 minutes
    python benchmarks/scale.py --out DIR --quick    # 10^3 and 10^4

Samples are arrays of 8 px and the teacher is a random ViT of one block, so that what is measured is everything but pixels
and networks. Each step of each size is a process of its own: its times are from inside, imports apart, and its peak of
resident memory is the system's own figure. Short steps are repeated, sizes in turn, and the best counts. Prints one
table, with ratios to the smallest store, and writes DIR/scale.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from resident import resident

TEACHER = "t=random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=16&depth=1&num_heads=1"
SIDE, BATCH, STUDENT_BATCH = 8, 256, 256
NETWORKS = ("timm", "zarr", "zarrs", "hdcache.api", "hdcache.extract.run")
LOADED = {"build": NETWORKS, "rerun": NETWORKS, "open": NETWORKS, "epoch": NETWORKS, "verify": ("hdcache.integrity",)}
"""What is imported before a step is timed, however late hdcache itself would."""
Facts = dict[str, float]


def timed(work: Callable[[], Any], times: int = 1) -> Facts:
    """Seconds on the clock and of the processor, of all threads together: the best of so many runs."""
    best = {"seconds": float("inf"), "cpu": float("inf")}
    for _ in range(times):
        clock, processor = time.perf_counter(), time.process_time()
        work()
        now = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - processor}
        best = {name: min(best[name], value) for name, value in now.items()}
    return best


def named(name: str, facts: Facts) -> Facts:
    """Facts under a longer name: ``order seconds``."""
    return {f"{name} {key}": value for key, value in facts.items()}


def data(folder: Path, rows: int, _: int) -> Facts:
    """Random pictures, and ten classes of them."""
    import numpy as np

    words = np.random.Philox(key=rows).random_raw(rows * SIDE * SIDE // 8)
    np.savez(folder / "data.npz", images=words.view(np.uint8).reshape(rows, SIDE, SIDE), labels=np.arange(rows) % 10)
    return {}


def build(folder: Path, rows: int, rows_per_shard: int) -> Facts:
    """The whole ``hdcache extract``, and the part of it that writes rows."""
    from hdcache.extract.run import extract

    begun, found = resident(), []
    facts = timed(
        lambda: found.append(
            extract(
                str(folder / "data.npz"), store=folder / "store.hdc", teachers=[TEACHER], taps=["final"], batch=BATCH,
                rows_per_shard=rows_per_shard, views="resize", precision="fp32", device="cpu",
            )
        )
    )  # fmt: skip
    account = found[0].teachers["t"]
    if account["rows"] != rows:
        raise SystemExit(f"{account['rows']} rows were stored, not {rows}")
    return facts | {"writing": account["seconds"], "bytes": account["bytes"], "begun": begun}


def opened(folder: Path, rows: int, _: int) -> Facts:
    """A store and its seal: all that is read before the first row can be."""
    from hdcache.reader import TeacherReader
    from hdcache.store import Store

    begun = resident()
    return timed(lambda: TeacherReader(Store.open(folder / "store.hdc"), "t").manifest(0)) | {"begun": begun}


def epoch(folder: Path, rows: int, most: int) -> Facts:
    """The order of an epoch, and its first batches as a student gets them."""
    from hdcache.api import open_store

    begun = resident()
    store, made = open_store(folder / "store.hdc"), list[Any]()
    size = {"batch_size": STUDENT_BATCH, "size": SIDE, "seed": 1, "threads": 2}
    listing = timed(lambda: made.append(store.loader({"t": ["final"]}, **size)))
    order = timed(lambda: made[0].order(1), 5)
    batches = made[0].epoch(0)
    first = timed(lambda: next(batches))
    read = 0

    def go_on() -> None:
        nonlocal read
        for batch in itertools.chain(batches, *(made[0].epoch(number) for number in range(1, 1 + most // rows))):
            read += len(batch.ids)
            if read >= most:
                break

    reading = {name: value / read for name, value in timed(go_on).items()}
    parts = {"listing": listing, "order": order, "first": first, "reading": reading}
    return {key: value for name, facts in parts.items() for key, value in named(name, facts).items()} | {"begun": begun}


def check(folder: Path, rows: int, _: int) -> Facts:
    """``hdcache verify --quick``."""
    from hdcache.integrity import verify
    from hdcache.store import Store

    begun, found = resident(), []
    facts = timed(lambda: found.append(verify(Store.open(folder / "store.hdc"), quick=True)))
    if not found[0].good:
        raise SystemExit(found[0].faults[0])
    return facts | {"objects": found[0].objects, "begun": begun}


def described(folder: Path, rows: int, _: int) -> Facts:
    """``hdcache info``."""
    from hdcache.info import describe_store, format_store
    from hdcache.store import Store

    begun = resident()
    return timed(lambda: format_store(describe_store(Store.open(folder / "store.hdc")))) | {"begun": begun}


STEPS: dict[str, Callable[[Path, int, int], Facts]] = {
    "data": data, "build": build, "open": opened, "epoch": epoch, "verify": check, "info": described, "rerun": build,
}  # fmt: skip
REPEATED = ("open", "epoch", "verify", "info", "rerun")


def measure(step: str, folder: Path, rows: int, extra: int) -> Facts:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--rows", str(rows), "--extra", str(extra)]
    done = subprocess.run([*command, "--out", str(folder)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} of {rows:,} rows failed with status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(settings: argparse.Namespace) -> dict[int, dict[str, list[Facts]]]:
    """Every step of every size."""
    found: dict[int, dict[str, list[Facts]]] = {rows: {} for rows in settings.rows}
    extra = {"build": settings.rows_per_shard, "rerun": settings.rows_per_shard, "epoch": settings.read_rows}
    for step in STEPS:
        for _ in range(settings.repeats if step in REPEATED else 1):
            for rows in settings.rows:
                folder = settings.out / f"{rows}"
                folder.mkdir(exist_ok=True)
                found[rows].setdefault(step, []).append(measure(step, folder, rows, extra.get(step, 0)))
                print(f"{step} {rows:,}: {found[rows][step][-1]}", file=sys.stderr, flush=True)
    return found


def line(rows: int, files: int, found: dict[str, list[Facts]]) -> dict[str, float]:
    """One size as numbers: seconds, and microseconds a row where the work is proportional to the rows."""
    best = {step: {key: min(run[key] for run in runs) for key in runs[0]} for step, runs in found.items()}
    peak = {step: max(run["peak"] for run in runs) for step, runs in found.items()}
    a_row = 1e6 / rows
    lines = {
        "build: us a row": a_row * best["build"]["writing"],
        "build: CPU us a row": a_row * best["build"]["cpu"],
        "build, once more: us a row": a_row * best["rerun"]["seconds"],
        "build, once more: CPU us a row": a_row * best["rerun"]["cpu"],
        "list the data: us a row": a_row * best["epoch"]["listing seconds"],
        "order of an epoch: us a row": a_row * best["epoch"]["order seconds"],
        "read: us a row": 1e6 * best["epoch"]["reading seconds"],
        "read: CPU us a row": 1e6 * best["epoch"]["reading cpu"],
        "verify --quick: us a row": a_row * best["verify"]["seconds"],
        "verify --quick: CPU us a row": a_row * best["verify"]["cpu"],
        "open: s": best["open"]["seconds"],
        "first batch: s": best["epoch"]["first seconds"],
        "info: s": best["info"]["seconds"],
        "files": files,
    }
    for step, name in (("build", "build"), ("epoch", "read"), ("verify", "verify --quick")):
        lines |= {f"{name}: peak, MB": peak[step] / 1e6}
    return lines


def table(lines: dict[int, dict[str, float]]) -> str:
    """Sizes as columns; after the first, time a row as a ratio to it, and memory as what each further row has added."""
    first, *later = lines
    rows = [f"| | {' | '.join(f'{size:,} rows' for size in lines)} |", "|---" * (len(lines) + 1) + "|"]
    for name, base in lines[first].items():
        cells = [f"{base:.4g}"]
        for size in later:
            value = lines[size][name]
            more = f" ({value / base:.2f})" if "us a row" in name else ""
            more = f" (+{1e6 * (value - base) / (size - first):.0f} bytes a row)" if "peak" in name else more
            cells.append(f"{value:.4g}{more}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--rows-per-shard", type=int, default=256)
    parser.add_argument("--read-rows", type=int, help="rows that are read to time reading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="10^3 and 10^4 rows")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--extra", type=int, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.step:
        for module in LOADED.get(settings.step, ()):
            import_module(module)
        facts = STEPS[settings.step](settings.out, settings.rows[0], settings.extra)
        print(json.dumps(facts | {"peak": resident("VmHWM")}))
        return
    settings.rows = settings.rows or ([1_000, 10_000] if settings.quick else [10_000, 100_000, 1_000_000])
    settings.read_rows = settings.read_rows or (4_000 if settings.quick else 40_000)
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    found = run(settings)
    lines = {
        rows: line(rows, sum(path.is_file() for path in (settings.out / f"{rows}" / "store.hdc").rglob("*")), steps)
        for rows, steps in found.items()
    }
    result = {"settings": {key: str(value) for key, value in vars(settings).items()}, "steps": found, "lines": lines}
    (settings.out / "scale.json").write_text(json.dumps(result, indent=1))
    print(table(lines))


if __name__ == "__main__":
    main()

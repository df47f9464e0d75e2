"""How much faster more worker processes extract: one and two of them on a core each, beside the inline engine on one core.

    python benchmarks/workers.py --data images/train --out DIR \\
        --teacher 'dino=timm:vit_small_patch14_dinov2?checkpoint=FILE&img_size=112'
    python benchmarks/workers.py --out DIR --quick    # images of noise, an untrained teacher, about a minute

Every process computes and decodes with one thread and is pinned to a core of its own. The contenders run in turn, --repeats
times, and all extract the same shards. Rows per second are counted from the receipts: after each process has written two
shards, so that starting, loading and calibrating are left out; the time to the first receipt tells what those cost. Medians;
ratios are taken within a round. Prints one table and writes DIR/workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import dask
import distributed  # its configuration, before it is changed
import numpy as np
import torch

from hdcache.extract.run import extract

TEACHER = "t=random:vit_small_patch16_224?img_size=112"
WARM = 2
"""Shards of each process that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data set; images of noise if left out")
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--tap", action="append", help="default: those of hdcache extract")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024, help="of noise")
    parser.add_argument("--rows-per-shard", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="384 images, one round")
    asked = parser.parse_args()
    if asked.quick:
        asked.images, asked.repeats, asked.rows_per_shard = 384, 1, 16
    cores = sorted(os.sched_getaffinity(0))
    if max(asked.workers) > len(cores):
        raise SystemExit(f"{max(asked.workers)} workers need a core each, there are {len(cores)}")
    # What the workers inherit; this process has loaded torch already.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    data = asked.data or noise(asked.out / "noise.npz", asked.images)
    rounds = []
    for _ in range(asked.repeats):
        one: dict[str, dict[str, float]] = {}
        for count in (0, *asked.workers):
            one[name_of(count)] = timed(asked, data, count, cores)
        rounds.append(one)
    shutil.rmtree(asked.out / "store", ignore_errors=True)
    (asked.out / "noise.npz").unlink(missing_ok=True)
    lines = summarise(rounds, name_of(asked.workers[0]))
    print("| | rows/s | beside inline | beside " + name_of(asked.workers[0]) + " | seconds to the first shard |")
    print("|---|---|---|---|---|")
    for name, line in lines.items():
        print(f"| {name} | {line['rate']:.1f} | {line['inline']:.2f} | {line['one']:.2f} | {line['first']:.1f} |")
    facts = {
        "rounds": rounds,
        "lines": lines,
        "cores": len(cores),
        "teacher": asked.teacher,
        "distributed": distributed.__version__,
    }
    (asked.out / "workers.json").write_text(json.dumps(facts, indent=1))


def name_of(count: int) -> str:
    """Of a contender: 0 workers are the inline engine."""
    return f"{count} worker{'s' if count > 1 else ''}" if count else "inline"


def noise(path: Path, count: int) -> str:
    """Smooth random pictures of 128 pixels."""
    small = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=small.repeat(16, axis=1).repeat(16, axis=2))
    return f"npz:{path}"


def timed(asked: argparse.Namespace, data: str, count: int, cores: list[int]) -> dict[str, float]:
    """Extract everything into a fresh store; rows/s of the shards after the first ones, and seconds to the first."""
    store = asked.out / "store"
    shutil.rmtree(store, ignore_errors=True)
    # Dask numbers the workers it starts; the threads of a pinned process are pinned with it.
    pin = f"import os\ndef dask_setup(worker):\n os.sched_setaffinity(0, {{{cores}[int(worker.name)]}})\n"
    if not count:
        os.sched_setaffinity(0, cores[:1])
    began = time.time()
    with dask.config.set({"distributed.worker.preload": [pin]}):
        summary = extract(
            data, store=store, teachers=[asked.teacher], taps=asked.tap or (), threads=1, device="cpu", precision="fp32",
            rows_per_shard=asked.rows_per_shard, workers=count or None,
        )  # fmt: skip
    taken = time.time() - began
    os.sched_setaffinity(0, cores)
    times = sorted(path.stat().st_mtime for path in store.glob("teachers/*/views/0/receipts/*.json"))
    first = WARM * max(1, count)
    if len(times) < 4 * first:
        raise SystemExit(
            f"{len(times)} shards are too few for {count} workers; give more images or fewer --rows-per-shard"
        )
    (facts,) = summary.teachers.values()
    rows = facts["rows"] / len(times) * (len(times) - first)
    return {"rate": rows / (times[-1] - times[first - 1]), "first": times[0] - began, "seconds": taken}


def summarise(rounds: list[dict[str, dict[str, float]]], one: str) -> dict[str, dict[str, Any]]:
    """Medians over the rounds; ``inline`` and ``one``: the rate beside those of the same round."""
    return {
        name: {
            "rate": statistics.median(found[name]["rate"] for found in rounds),
            "inline": statistics.median(found[name]["rate"] / found["inline"]["rate"] for found in rounds),
            "one": statistics.median(found[name]["rate"] / found[one]["rate"] for found in rounds),
            "first": statistics.median(found[name]["first"] for found in rounds),
        }
        for name in rounds[0]
    }


if __name__ == "__main__":
    main()

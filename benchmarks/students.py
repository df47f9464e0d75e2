"""Several students from one read, beside the same students trained one after the other, and beside batches that cost nothing.

    python benchmarks/students.py --train images/train --out DIR \\
        --teacher 'dino=timm:vit_small_patch14_dinov2?checkpoint=FILE&img_size=112'
    python benchmarks/students.py --quick --out DIR

Students of two sizes learn the relations of one block, from a store and with the teacher in the loop, each at a learning
rate of its own, for one epoch. In each repeat, together and one after the other run in turn in one process; of each the
fastest counts. Times are those of training, opening left out. "in memory": one such student on batches that were read
before, times the number of students: the limit. Prints one table and writes DIR/students.json. Without --train: noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from hdcache.batch import Batch
from hdcache.distill.run import distill, distill_several
from hdcache.extract.run import extract
from hdcache.loader import Loader

# The grid of patch tokens must be the teacher's: 8 x 8.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "ViT-Ti": {"img_size": 128, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
}
TEACHER = "dino=random:vit_small_patch14_dinov2?img_size=112"
QUICK = "dino=random:vit_small_patch14_dinov2?img_size=112&depth=6"
RATES = (1e-3, 5e-4, 2e-4, 1e-4)
MODES = ("store", "online")


class Bench:
    """Runs of one store, each in a new folder."""

    def __init__(self, settings: argparse.Namespace, data: str, store: Path) -> None:
        self.settings, self.runs = settings, settings.out / "runs"
        self.where: dict[str, Any] = {
            "store": store,
            "data": data,
            "device": settings.device,
            "threads": settings.threads,
        }

    def recipe(self, size: str) -> dict[str, Any]:
        heads = {"objective.heads": SIZES[size]["num_heads"]}
        return heads | {
            "student.arguments": SIZES[size], "epochs": 1, "warmup_epochs": 0, "batch_size": self.settings.batch_size,
            "amp": self.settings.amp, "save_every_minutes": 1e6,
        }  # fmt: skip

    def together(self, size: str, count: int, mode: str) -> dict[str, float]:
        """Seconds of training and of waiting for data, of ``count`` students at once."""
        shutil.rmtree(self.runs, ignore_errors=True)
        found = distill_several(
            ["tinymim-tiny"], out=self.runs, overrides=self.recipe(size), sweep={"lr": RATES[:count]},
            online=mode == "online", **self.where,
        )  # fmt: skip
        seconds = max(run["seconds"] for run in found)
        samples = found[0]["steps"] * self.settings.batch_size
        return {"seconds": seconds, "waited": seconds * found[0]["wait_share"], "samples": samples}

    def apart(self, size: str, count: int, mode: str) -> dict[str, float]:
        """The same of ``count`` students one after the other."""
        shutil.rmtree(self.runs, ignore_errors=True)
        done = [
            distill(
                "tinymim-tiny", out=self.runs / str(rate), overrides=self.recipe(size) | {"lr": rate},
                online=mode == "online", **self.where,
            )
            for rate in RATES[:count]
        ]  # fmt: skip
        return {
            "seconds": sum(run["seconds"] for run in done),
            "waited": sum(run["seconds"] * run["wait_share"] for run in done),
        }

    def in_memory(self, size: str) -> float:
        """Seconds of one student on batches that were read before."""
        kept: list[Batch] = []
        read = Loader.epoch

        def record(self: Loader, number: int, start: int = 0) -> Iterator[Batch]:
            for batch in read(self, number, start):
                kept.append(batch)
                yield batch

        def replay(self: Loader, number: int, start: int = 0) -> Iterator[Batch]:
            yield from kept[start:]

        seconds = 0.0
        for epoch in (record, replay):
            shutil.rmtree(self.runs, ignore_errors=True)
            with mock.patch.object(Loader, "epoch", epoch):
                run = distill("tinymim-tiny", out=self.runs, overrides=self.recipe(size), **self.where)
            seconds = float(run["seconds"])
        return seconds


def noise(folder: Path, count: int) -> str:
    """Pictures of noise as an array data set; its spec."""
    cells = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=cells.repeat(8, 1).repeat(8, 2), labels=np.arange(count) % 10)
    return f"npz:{folder / 'noise.npz'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="Data set.  [default: noise]")
    parser.add_argument("--teacher", help="NAME=SPEC with 8 x 8 patches.  [default: an untrained ViT-S]")
    parser.add_argument("--tap", help="[default: block9.attn_in, block6.attn_in in the quick form]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--amp", default="off")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--images", type=int, help="Pictures of noise.  [default: 2048, 256 in the quick form]")
    parser.add_argument("--repeats", type=int, help="[default: 3, 1 in the quick form]")
    parser.add_argument(
        "--quick", action="store_true", help="Under a minute: fewer pictures, a smaller teacher, the tiny size."
    )
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    if settings.quick:
        settings.sizes = settings.sizes[:1]
    repeats = settings.repeats or (1 if settings.quick else 3)
    data = settings.train or noise(settings.out, settings.images or (256 if settings.quick else 2048))
    teacher, tap = settings.teacher or (QUICK if settings.quick else TEACHER), settings.tap
    store, block = settings.out / "store.hdc", tap or ("block6.attn_in" if settings.quick else "block9.attn_in")
    extract(
        data,
        store=store,
        teachers=[teacher],
        taps=[block],
        views="gentle",
        device=settings.device,
        threads=settings.threads,
    )
    bench = Bench(settings, data, store)
    lines: list[dict[str, Any]] = []
    for size in settings.sizes:
        for mode in MODES:
            for count in settings.students:
                found: dict[str, list[dict[str, float]]] = {"together": [], "apart": []}
                for number in range(repeats):
                    # Turn about, so that what warms up or slows down meets both.
                    for kind in (*found,) if number % 2 == 0 else (*found,)[::-1]:
                        found[kind].append(getattr(bench, kind)(size, count, mode))
                samples = found["together"][0]["samples"]
                lines.append({"size": size, "source": mode, "students": count, "samples": samples, "runs": found})
        limit = min(bench.in_memory(size) for _ in range(repeats))
        for line in lines:
            line.setdefault("in_memory", limit * line["students"])
    result = {"torch": version("torch"), "settings": {k: str(v) for k, v in vars(settings).items()}, "lines": lines}
    print(
        "| student | targets | students | together, samples/s of all | one after the other | ratio | in memory | of the limit | "
        "waiting | waiting apart |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for line in lines:
        one, other = (min(runs, key=lambda run: run["seconds"]) for runs in line["runs"].values())
        rates = [
            line["students"] * line["samples"] / seconds
            for seconds in (one["seconds"], other["seconds"], line["in_memory"])
        ]
        line |= {"together": rates[0], "apart": rates[1], "limit": rates[2]}
        print(
            f"| {line['size']} | {line['source']} | {line['students']} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} | "
            f"{rates[2]:,.0f} | {rates[0] / rates[2]:.2f} | {100 * one['waited'] / one['seconds']:.0f} % | "
            f"{100 * other['waited'] / other['seconds']:.0f} % |"
        )
    (settings.out / "students.json").write_text(json.dumps(result, indent=1))
    shutil.rmtree(bench.runs, ignore_errors=True)


if __name__ == "__main__":
    main()

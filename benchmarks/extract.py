"""Extraction beside its limit, the bare teacher forward on decoded images, and what each stage costs alone.

    python benchmarks/extract.py --train images/train --teacher 'dino=timm:NAME?checkpoint=FILE&img_size=112' --out DIR
    python benchmarks/extract.py --quick --out DIR

Images are decoded once into an array data set at the teacher's input size, so that the data set costs little more than the
bare forward's own input. Each variant runs in turn with the bare forward of the same taps, batches and arithmetic (one
batch after the other and in extraction's lanes, whichever is faster) right before and after it, in one process; the ratio of a repeat is to the mean of the two, and the median of the repeats counts.
Rates are of the rows between the first shard and the last: what a long run has. "whole" includes filling and emptying the
pipeline. On a busy machine the CPU seconds of all threads tell more than the clock (with OMP_WAIT_POLICY=PASSIVE, so that
waiting costs none); they leave out that the bare forward's threads wait for each other. Calibration comes once per teacher and is told apart. The same encoding from --train itself (its own decoding, random
crops) comes last. Prints two tables and writes DIR/extract.json. Without --train: noise. --quick: a small random teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hdcache import draws
from hdcache.datasets import open_dataset
from hdcache.durable import durable_write
from hdcache.encodings import request
from hdcache.extract.calibrate import calibrate, write_record
from hdcache.extract.lanes import Lanes, lanes_for
from hdcache.extract.opening import open_or_create
from hdcache.extract.pipeline import Pipeline
from hdcache.extract.rows import decode_row, shard_rows
from hdcache.extract.writer import ViewWriter, tap_writer
from hdcache.resources import available_cores, keep_freed_memory
from hdcache.samples import open_sample
from hdcache.shards import chunk_rows
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, choose_device, load_teacher
from hdcache.views import parse_views

RANDOM = "dino=random:vit_small_patch14_dinov2?img_size=112"
QUICK = "dino=random:vit_small_patch14_dinov2?img_size=70&depth=4"
Variant = tuple[str, str, tuple[str, ...], str, float | None]
"""Name, data, taps, encoding, fidelity."""


def variants(block: int) -> list[Variant]:
    """What is extracted; ``block`` is the one whose attention is read."""
    inside, both = f"block{block}.attn_in", (f"block{block}.attn_in", f"block{block}.qkv")
    return [
        ("final, fp16", "decoded", ("final",), "fp16", None),
        ("final, klt 10 %", "decoded", ("final",), "klt", 0.1),
        ("attn_in, klt 10 %", "decoded", (inside,), "klt", 0.1),
        ("attn_in + final, fp16", "decoded", (inside, "final"), "fp16", None),
        ("attn_in + final, klt 10 %", "decoded", (inside, "final"), "klt", 0.1),
        ("attn_in + final, klt 20 %", "decoded", (inside, "final"), "klt", 0.2),
        ("attn_in + qkv, klt 10 %", "decoded", both, "klt", 0.1),
        ("attn_in + final, klt 10 %, from files", "files", (inside, "final"), "klt", 0.1),
    ]


def make_images(folder: Path, rows: int) -> str:
    """A data set of smooth noise, as PNG files."""
    (folder / "a").mkdir(parents=True)
    for number in range(rows):
        pixels = 256 * draws.uniform(12 * 12 * 3, number, "benchmark image").reshape(12, 12, 3)
        coarse = Image.fromarray(pixels.astype(np.uint8))
        coarse.resize((128, 128), Image.Resampling.BICUBIC).save(folder / "a" / f"{number:05d}.png")
    return f"folder:{folder}"


def decoded(spec: str, teacher: Teacher, rows: int, path: Path) -> str:
    """The first ``rows`` samples at the teacher's input size, as an array data set."""
    data, views = open_dataset(spec), parse_views("resize")
    with ThreadPoolExecutor(available_cores()) as pool:
        images = list(
            pool.map(lambda i: open_sample(data, i, views, 0).pixels(teacher.card.preprocessing), data.ids[:rows])
        )
    np.savez(path, images=np.stack(images).transpose(0, 2, 3, 1))
    return f"npz:{path}?images=images"


class Bench:
    """One teacher, its data, and the variants' stores."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings, self.out = settings, settings.out
        self.teacher = load_teacher(
            settings.teacher, precision=settings.precision, batch=settings.batch, device=settings.device
        )
        files = settings.train or make_images(self.out / "images", settings.rows)
        self.data = {"files": files, "decoded": decoded(files, self.teacher, settings.rows, self.out / "decoded.npz")}
        self.views = {"files": "gentle", "decoded": "resize"}
        with np.load(self.out / "decoded.npz") as found:
            pixels = torch.from_numpy(np.ascontiguousarray(found["images"].transpose(0, 3, 1, 2)))
        self.batches = list(pixels[: settings.bare_rows].split(settings.batch))
        self.threads = settings.threads or available_cores()

    def bare(self, taps: tuple[str, ...]) -> tuple[float, float]:
        """Rows/s of the teacher alone, one batch after the other or in lanes, whichever is faster; the CPU seconds of a row."""
        return max(self._bare(taps, count) for count in {1, self.settings.lanes or lanes_for(self.teacher, ["klt"])})

    def _bare(self, taps: tuple[str, ...], count: int) -> tuple[float, float]:
        cpu = time.process_time()
        lanes = Lanes(self.teacher, count)
        with self.clock() as seconds, lanes, ThreadPoolExecutor(count, initializer=lanes.begin) as pool:
            # Nothing of it is kept, as a loop over batches would keep nothing.
            for _ in pool.map(lambda pixels: self.teacher.forward(pixels, taps) and None, self.batches):
                pass
        rows = sum(map(len, self.batches))
        return rows / seconds(), (time.process_time() - cpu) / rows

    def prepared(self, variant: Variant) -> tuple[Pipeline, ViewWriter, float]:
        """A new store for a variant, calibrated; and how long calibration took."""
        _, data, taps, encoding, fidelity = variant
        folder = self.out / "store.hdc"
        shutil.rmtree(folder, ignore_errors=True)
        dataset, store = open_or_create(self.data[data], folder, self.views[data], 0, self.settings.rows_per_shard)
        began = time.perf_counter()
        requests = [request(tap, encoding, fidelity) for tap in sorted(taps)]
        record, encoders = calibrate(store, dataset, self.teacher, requests, threads=self.threads, source="")
        seconds = time.perf_counter() - began
        write_record(store, self.teacher, record, encoders)
        writer = ViewWriter(store, record, encoders, 0)
        writer.open()
        lanes = self.settings.lanes or lanes_for(self.teacher, [encoding])
        pipeline = Pipeline(store, dataset, self.teacher, threads=self.threads, max_failures=None, lanes=lanes)
        return pipeline, writer, seconds

    def extraction(self, variant: Variant) -> dict[str, float]:
        """Rows/s of a whole extraction, and the seconds of its stages a row."""
        pipeline, writer, calibration = self.prepared(variant)
        shards = writer.todo()[: self.settings.shards]
        marks: list[tuple[float, int]] = []
        cpu, began = time.process_time(), time.perf_counter()
        pipeline.run(writer, shards, lambda rows, _: marks.append((time.perf_counter(), rows)))
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        rows = sum(number for _, number in marks)
        return {
            "steady": sum(number for _, number in marks[1:]) / (marks[-1][0] - marks[0][0]),
            "whole": rows / (ended - began),
            "calibration": calibration,
            "cpu": cpu / rows,
            "bytes": pipeline.timing.bytes / rows,
        } | {f"stage {name}": value / rows for name, value in pipeline.timing.stages().items()}

    def stages(self, variant: Variant) -> dict[str, float]:
        """Milliseconds a row of each stage alone, on an idle machine: best of three."""
        pipeline, writer, _ = self.prepared(variant)
        store, encoders = pipeline.store, writer.encoders
        entries = shard_rows(store, 0, 0)[: self.settings.rows_per_shard]
        preprocessing = self.teacher.card.preprocessing

        def decode() -> None:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(lambda entry: decode_row(store, pipeline.dataset, preprocessing, 0, *entry), entries))

        rows = sum(map(len, self.batches[:4]))
        features = [self.teacher.forward(pixels, variant[2]) for pixels in self.batches[:4]]
        parts: dict[str, dict[str, Any]] = {tap: {} for tap in encoders}

        def encode() -> None:
            for tap, encoder in encoders.items():
                blocks = [encoder.encode(found[tap])[0] for found in features]
                parts[tap] = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

        def copy() -> None:
            for found in features:
                for value in found.values():
                    for tensor in [value.prefix, value.patches] if isinstance(value, Tokens) else [value]:
                        tensor.cpu()

        found = {
            "decode": self.best(decode, len(entries)),
            "forward": 1e3 / max(self.bare(variant[2])[0] for _ in range(3)),
        }
        found |= {"copy to the host": self.best(copy, rows), "encode": self.best(encode, rows)}
        shards = {
            f"{tap}/{name}": tap_writer(card, name, rows, chunk_rows(rows), rows)
            for tap, card in ((tap, encoder.card) for tap, encoder in encoders.items())
            for name in card.arrays
        }  # fmt: skip
        made: dict[str, bytes] = {}

        def compress() -> None:
            for key, shard in shards.items():
                tap, _, name = key.rpartition("/")
                made[key] = shard.encode(0, parts[tap][name])

        def write() -> None:
            for number, data in enumerate(made.values()):
                durable_write(self.out / "scratch" / str(number), data)

        return found | {"compress": self.best(compress, rows), "write, fsync": self.best(write, rows)}

    def best(self, call: Callable[[], None], rows: int) -> float:
        """Milliseconds a row, best of three."""
        found = []
        for _ in range(3):
            with self.clock() as seconds:
                call()
            found.append(seconds())
        return 1e3 * min(found) / rows

    @contextmanager
    def clock(self) -> Iterator[Callable[[], float]]:
        """Seconds until the device is done."""
        marks = [time.perf_counter()]
        yield lambda: marks[1] - marks[0]
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        marks.append(time.perf_counter())


def measure(bench: Bench, wanted: list[Variant], repeats: int) -> list[dict[str, Any]]:
    """Every variant, in turn, as often as asked."""
    runs: dict[str, list[dict[str, float]]] = {variant[0]: [] for variant in wanted}
    for variant in wanted:
        bench.bare(variant[2])
    for _ in range(repeats):
        for variant in wanted:
            before = bench.bare(variant[2])
            found = bench.extraction(variant)
            bare, cpu = ((one + two) / 2 for one, two in zip(before, bench.bare(variant[2]), strict=True))
            ratios = {
                "ratio": found["steady"] / bare,
                "ratio whole": found["whole"] / bare,
                "ratio cpu": cpu / found["cpu"],
            }
            runs[variant[0]].append(found | {"bare": bare, "bare cpu": cpu} | ratios)
    lines = []
    for variant in wanted:
        found = runs[variant[0]]
        middle = {key: statistics.median(run[key] for run in found) for key in found[0]}
        lines.append({"variant": variant[0], "runs": found, "alone": bench.stages(variant), **middle})
    return lines


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| extraction | rows/s | bare forward | of it (limit 1) | lowest to highest | whole run | KB a row | calibration |",
        "|---" * 8 + "|",
    ]
    for line in lines:
        ratios = sorted(run["ratio"] for run in line["runs"])
        rows.append(
            f"| {line['variant']} | {line['steady']:.0f} | {line['bare']:.0f} | {line['ratio']:.3f} | {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"| {line['ratio whole']:.3f} | {line['bytes'] / 1e3:.1f} | {line['calibration']:.1f} s |"
        )
    names = list(lines[0]["alone"])
    rows += ["", f"| alone, ms a row | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for line in lines:
        cells = " | ".join(f"{line['alone'][name]:.3f}" for name in names)
        rows.append(f"| {line['variant']} | {cells} |")
    stages = [key for key in lines[0] if key.startswith("stage ")]
    rows += [
        "",
        f"| in the run, ms a row | {' | '.join(key[6:] for key in stages)} | CPU, all threads | CPU of the bare forward | of it |",
    ]
    rows.append("|---" * (len(stages) + 4) + "|")
    for line in lines:
        cells = " | ".join(f"{1e3 * line[key]:.3f}" for key in stages)
        rows.append(
            f"| {line['variant']} | {cells} | {1e3 * line['cpu']:.2f} | {1e3 * line['bare cpu']:.2f} | {line['ratio cpu']:.3f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="data set; noise without it")
    parser.add_argument("--teacher", help="NAME=SPEC; a random ViT-S without it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1280, help="images that are decoded")
    parser.add_argument("--bare-rows", type=int, default=384)
    parser.add_argument("--rows-per-shard", type=int, default=256)
    parser.add_argument("--shards", type=int, default=5, help="shards of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, help="decoding threads; as many as cores without it")
    parser.add_argument("--lanes", type=int, help="batches under way at once; as extraction chooses without it")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    keep_freed_memory()  # as the command does; the bare forward has it too
    settings.teacher = settings.teacher or (QUICK if settings.quick else RANDOM)
    if settings.quick:
        settings.rows, settings.rows_per_shard, settings.bare_rows, settings.repeats = 320, 64, 128, 1
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    settings.device = choose_device(settings.device)
    bench = Bench(settings)
    depth = bench.teacher.card.depth
    wanted = [entry for entry in variants(max(1, 3 * depth // 4)) if not settings.only or settings.only in entry[0]]
    lines = measure(bench, wanted, settings.repeats)
    shutil.rmtree(settings.out / "store.hdc")
    result = {
        "machine": {"cores": os.cpu_count(), "device": str(bench.teacher.device), "torch": version("torch")},
        "settings": {key: str(value) for key, value in vars(settings).items() if key != "out"},
        "precision": bench.teacher.card.precision,
        "lines": lines,
    }
    (settings.out / "extract.json").write_text(json.dumps(result, indent=1))
    print(tables(lines))


if __name__ == "__main__":
    main()

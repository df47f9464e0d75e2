"""Samples a second of training: targets from the store, the same targets held in RAM, teachers in the loop; one and two teachers.

    python benchmarks/epoch.py --train images/train --relation-teacher mae=SPEC --feature-teacher dino=SPEC --out DIR

All lines train the same student on the same batches with the code of ``hdcache distill``. "In RAM" holds the finished targets
(features, relation matrices) of all rows as decoded tensors and takes a batch's rows from them: what no store can beat. The
ideal is (teachers + student) / student: the teachers' bare forward on ready pixels, and the step with targets in RAM. Runs
take turns, the best of --repeats counts. Prints one table and writes DIR/epoch.json. ``--quick`` makes images and teachers with
random weights. Set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdcache.distill.run import distill
from hdcache.extract.run import extract
from hdcache.resources import keep_freed_memory
from hdcache.schema import ArrayCard
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import HostArrays, StoredTargets, open_targets
from hdcache.teachers import load_teacher

KINDS = ("store", "in RAM", "online")
RECIPES = {"one": "hybrid-feature-tiny", "two": "hybrid-tiny"}
QUICK = "random:vit_tiny_patch16_224?img_size=64&patch_size=8&depth=6&embed_dim=192&num_heads=6"
STUDENT = '{"img_size":64,"patch_size":8,"embed_dim":96,"depth":6,"num_heads":6}'


class InRam(StoredTargets):
    """The finished targets of all rows of all views, held as tensors: a batch reads numbers of rows and nothing else."""

    def __init__(self, stored: StoredTargets) -> None:
        self.__dict__.update({key: value for key, value in stored.__dict__.items() if key != "arrays"})
        store = self.reader.store
        self._rows, views = store.card.dataset.count, store.views(self.name)
        if views != list(range(len(views))):
            raise SystemExit(f"{store.path}: views {views} are not the first ones")
        pieces = [
            self._decoded(stored, view, start)
            for view in views
            for start in range(0, self._rows, store.card.rows_per_shard)
        ]
        self._held = {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}

    def _decoded(self, stored: StoredTargets, view: int, start: int) -> dict[str, Tokens | Tensor]:
        stop = min(self._rows, start + self.reader.store.card.rows_per_shard)
        buffer = {key: np.empty((stop - start, *card.shape), card.dtype) for key, card in stored.arrays.items()}
        stored.read(view, start, stop, [(buffer, place) for place in range(stop - start)])
        return stored.finish({key: torch.from_numpy(value) for key, value in buffer.items()})

    @cached_property
    def arrays(self) -> dict[str, ArrayCard]:
        return {"row": ArrayCard(shape=(), dtype="int64")}

    def read(self, view: int, start: int, stop: int, into: Sequence[tuple[HostArrays, int] | None]) -> None:
        for row, wanted in zip(range(start, stop), into, strict=True):
            if wanted is not None:
                wanted[0]["row"][wanted[1]] = view * self._rows + row

    def finish(self, arrays: Mapping[str, Tensor]) -> dict[str, Tokens | Tensor]:
        rows = arrays["row"]
        return {
            name: held[rows] if isinstance(held, Tensor) else Tokens(held.prefix[rows], held.patches[rows])
            for name, held in self._held.items()
        }


def _joined(values: Sequence[Any]) -> Tokens | Tensor:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return Tokens(torch.cat([value.prefix for value in values]), torch.cat([value.patches for value in values]))


@contextlib.contextmanager
def in_ram() -> Iterator[None]:
    """Runs inside read their stored targets before they begin, and hold them."""

    def opened(*arguments: Any, **options: Any) -> tuple[list[StoredTargets], list[Any]]:
        stored, live = open_targets(*arguments, **options)
        return [InRam(one) for one in stored], live

    # No user needs this, so distill() has no setting for it.
    with patch("hdcache.distill.run_batches.open_targets", opened):
        yield


def train(teachers: str, kind: str, settings: argparse.Namespace, number: int) -> dict[str, Any]:
    """One run; what it says of itself."""
    out = settings.out / f"{teachers}-{kind.replace(' ', '-')}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    names = {
        "relation": settings.relation_teacher.partition("=")[0],
        "feature": settings.feature_teacher.partition("=")[0],
    }
    changes: dict[str, Any] = {
        "student.arguments": json.loads(settings.student), "batch_size": settings.batch_size, "epochs": settings.epochs,
        "warmup_epochs": 0, "amp": settings.amp, "objective.feature_teacher": names["feature"],
        # Fewer tokens would make the student itself cheaper than with targets alone.
        "objective.keep_ratio": None,
    }  # fmt: skip
    if teachers == "two":
        changes["objective.relation_teacher"] = names["relation"]
    with in_ram() if kind == "in RAM" else contextlib.nullcontext():
        found = distill(
            RECIPES[teachers], store=settings.out / "store.hdc", out=out, overrides=changes, online=kind == "online"
        )
    shutil.rmtree(out)
    return found


def forward_seconds(spec: str, taps: Sequence[str], repeats: int) -> float:
    """Seconds a sample of a teacher's bare forward, best of so many."""
    teacher = load_teacher(spec)
    side = teacher.card.preprocessing.size
    pixels = torch.randint(0, 256, (teacher.batch, 3, side, side), dtype=torch.uint8)
    best = float("inf")
    for _ in range(max(3, repeats)):
        began = time.perf_counter()
        teacher.forward(pixels, taps)
        best = min(best, time.perf_counter() - began)
    return best / teacher.batch


def paint(folder: Path, count: int) -> str:
    """A folder of smooth random images in two classes."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = folder / "ab"[number % 2] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((64, 64)).save(path)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train")
    parser.add_argument("--relation-teacher", help="NAME=SPEC")
    parser.add_argument("--feature-teacher", help="NAME=SPEC")
    parser.add_argument("--relation-tap", default="block5.attn_in")
    parser.add_argument("--student", default=STUDENT, help="timm arguments as JSON")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--views", default="gentle")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="made images, teachers with random weights, one epoch, one run each"
    )
    parser.add_argument("--quick-images", type=int, default=192)
    settings = parser.parse_args()
    keep_freed_memory()  # as the command does
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    if settings.quick:
        settings.train = settings.train or paint(settings.out / "images", settings.quick_images)
        settings.relation_teacher = settings.relation_teacher or f"mae={QUICK}&seed=1"
        settings.feature_teacher = settings.feature_teacher or f"dino={QUICK}&seed=2"
        settings.epochs = settings.repeats = 1
    if not (settings.train and settings.relation_teacher and settings.feature_teacher):
        parser.error("give --train, --relation-teacher and --feature-teacher, or --quick")
    taps = {settings.relation_teacher: [settings.relation_tap], settings.feature_teacher: ["final"]}
    store = settings.out / "store.hdc"
    for spec, wanted in taps.items():
        extract(settings.train, store=store, views=settings.views, teachers=[spec], taps=wanted)
    bytes_a_row = sum(path.stat().st_size for path in (store / "teachers").rglob("c.*")) / len(Store.open(store).ids)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {teachers: {kind: [] for kind in KINDS} for teachers in RECIPES}
    for number in range(settings.repeats):
        for teachers, kinds in runs.items():
            for kind, found in kinds.items():
                found.append(train(teachers, kind, settings, number))
    forward = {spec: forward_seconds(spec, wanted, settings.repeats) for spec, wanted in taps.items()}
    lines = []
    print(
        "| teachers | targets | samples/s | of in RAM | times online | ideal | waiting for data |\n|---|---|---|---|---|---|---|"
    )
    for teachers, kinds in runs.items():
        best = {kind: max(found, key=lambda run: run["samples_per_second"]) for kind, found in kinds.items()}
        rate = {kind: float(run["samples_per_second"]) for kind, run in best.items()}
        student = 1 / rate["in RAM"]
        seconds = sum(forward[spec] for spec in taps) if teachers == "two" else forward[settings.feature_teacher]
        ideal = (seconds + student) / student
        for kind in KINDS:
            line = {
                "teachers": teachers, "kind": kind, "samples_per_second": rate[kind], "of_ram": rate[kind] / rate["in RAM"],
                "times_online": rate[kind] / rate["online"], "ideal": ideal, "wait_share": best[kind]["wait_share"],
            }  # fmt: skip
            lines.append(line)
            print(
                f"| {teachers} | {kind} | {line['samples_per_second']:,.0f} | {line['of_ram']:.2f} | {line['times_online']:.2f} "
                f"| {ideal:.2f} | {line['wait_share']:.1%} |"
            )
    print(
        f"\nBest of {settings.repeats} runs of {settings.epochs} epochs; {bytes_a_row / 1e3:.1f} KB a row on disk, of both teachers."
    )
    result = {
        "settings": {k: str(v) for k, v in vars(settings).items()}, "forward_seconds": forward, "bytes_a_row": bytes_a_row,
        "lines": lines, "runs": runs,
    }  # fmt: skip
    (settings.out / "epoch.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

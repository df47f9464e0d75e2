"""The whole pipeline on real images with a real teacher, against its limits and against teachers in the loop.

    python benchmarks/pipeline.py --train images/train --test images/test --teacher dino=timm:NAME?checkpoint=FILE --out DIR

Prints one table and writes DIR/pipeline.json: store bytes against raw fp16, rows/s against the bare teacher forward,
seconds an epoch from the store against --online and against the student alone, and k-NN of the teacher, the untrained
student and the distilled ones. All ratios are from this one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from hdcache.datasets import open_dataset
from hdcache.distill.run import distill
from hdcache.evaluate.run import knn_eval
from hdcache.extract.opening import default_taps
from hdcache.extract.run import extract
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.progress import size
from hdcache.store import Store
from hdcache.teachers import choose_device, load_teacher, split_name
from hdcache.views import parse_views

VIT_TINY = '{"img_size": 112, "patch_size": 14, "embed_dim": 192, "depth": 12, "num_heads": 3}'


def bare_forward(spec: str, train: str, taps: list[str], precision: str, rows: int) -> float:
    """Rows/s of the teacher alone on decoded pixels, in the batches and arithmetic of extraction; best of three."""
    teacher = load_teacher(spec, precision=precision, device=choose_device("auto"))
    options = Options(batch_size=teacher.batch, preprocessing=teacher.card.preprocessing, drop_last=True)
    loader = Loader(open_dataset(train), options, views=parse_views("center"))
    batches = []
    for batch in loader.epoch(0):
        batches.append((batch.images * 0).to(torch.uint8))
        if len(batches) * teacher.batch >= rows:
            break
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for pixels in batches:
            teacher.forward(pixels, taps)
        best = max(best, len(batches) * teacher.batch / (time.perf_counter() - started))
    return best


def seconds_an_epoch(train_seconds: dict[str, Any], count: int) -> float:
    """Seconds an epoch from the samples/s of a run."""
    return count / float(train_seconds["samples_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--teacher", required=True, help="NAME=SPEC")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", default="gentle")
    parser.add_argument("--num-views", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--recipe", default="tinymim-tiny")
    parser.add_argument("--amp", default="auto", help="mixed precision of the students: auto, bf16, off")
    parser.add_argument("--student", default=VIT_TINY, help="timm arguments as JSON")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5])
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; everything is measured from the start, so give --out a new folder")
    store = settings.out / "store.hdc"
    name = split_name(settings.teacher)[0]

    probe = load_teacher(settings.teacher)
    taps = default_taps(probe)
    before = bare_forward(settings.teacher, settings.train, taps, "auto", 768)
    summary = extract(
        settings.train, store=store, teachers=[settings.teacher], taps=taps, views=settings.views,
        num_views=settings.num_views, quiet=False,
    )  # fmt: skip
    # A machine's speed drifts: the bare forward is timed on both sides of what it is compared with.
    bare = (before + bare_forward(settings.teacher, settings.train, taps, "auto", 768)) / 2
    done = summary.teachers[name]
    facts = dict.fromkeys(taps, 0)
    card = Store.open(store).teacher(name).card
    tokens = card.grid[0] * card.grid[1] + card.prefix_tokens
    half = done["rows"] * len(facts) * tokens * card.width * 2

    base = {
        "student.architecture": "vit_tiny_patch16_224", "student.arguments": json.loads(settings.student),
        "objective.teacher": name, "amp": settings.amp, "epochs": settings.epochs, "warmup_epochs": min(2, settings.epochs - 1),
    }  # fmt: skip
    runs: dict[str, dict[str, Any]] = {}
    variants: list[tuple[str, dict[str, Any], bool]] = [
        ("untrained", {"epochs": 0, "warmup_epochs": 0}, False),
        ("relation", {}, False),
        ("feature", {"objective.strategy": "feature", "objective.feature": "final"}, False),
        ("relation-online", {"epochs": 1, "warmup_epochs": 0}, True),
        (
            "feature-online",
            {"epochs": 1, "warmup_epochs": 0, "objective.strategy": "feature", "objective.feature": "final"},
            True,
        ),
        ("relation-1", {"epochs": 1, "warmup_epochs": 0}, False),
        (
            "feature-1",
            {"epochs": 1, "warmup_epochs": 0, "objective.strategy": "feature", "objective.feature": "final"},
            False,
        ),
    ]
    for variant, changes, online in variants:
        runs[variant] = distill(
            settings.recipe,
            out=settings.out / variant,
            store=store,
            overrides=base | changes,
            online=online,
            quiet=False,
        )
    models = {"teacher": split_name(settings.teacher)[1]} | {
        v: str(settings.out / v) for v in ("untrained", "relation", "feature")
    }
    scores = {
        which: knn_eval(model, settings.train, settings.test, ks=settings.k, img_size=None)
        for which, model in models.items()
    }
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
        "settings": {key: str(value) for key, value in vars(settings).items() if key != "out"},
        "bytes": {"store": done["bytes"], "fp16": half, "smaller": half / done["bytes"], "rows": done["rows"], "taps": done["taps"]},
        "extract": {"rows_per_second": done["rows_per_second"], "bare_forward": bare, "ratio": done["rows_per_second"] / bare, "bottleneck": done["bottleneck"]},
        "epoch": {
            kind: {
                "cached": seconds_an_epoch(runs[f"{kind}-1"], done["rows"] // settings.num_views),
                "online": seconds_an_epoch(runs[f"{kind}-online"], done["rows"] // settings.num_views),
                "speedup": runs[f"{kind}-1"]["samples_per_second"] / runs[f"{kind}-online"]["samples_per_second"],
                "wait_share": runs[kind]["wait_share"],
            }
            for kind in ("relation", "feature")
        },
        "knn": {which: {"layer": score["model"]["layer"], "pool": score["model"]["pool"], **{f"k{e['k']}": e["top1"] for e in score["knn"]}} for which, score in scores.items()},
        "chance": scores["teacher"]["chance"],
    }  # fmt: skip
    (settings.out / "pipeline.json").write_text(json.dumps(result, indent=1))
    print(table(result))


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    stored, speed = result["bytes"], result["extract"]
    lines = [
        f"store      {size(stored['store'])} for {stored['rows']:,} rows; fp16 {size(stored['fp16'])}: {stored['smaller']:.1f} times smaller",
        f"extract    {speed['rows_per_second']:.0f} rows/s; bare forward {speed['bare_forward']:.0f}: {speed['ratio']:.2f} ({speed['bottleneck']})",
    ]
    lines += [
        f"epoch      {kind}: {entry['cached']:.1f} s from the store, {entry['online']:.1f} s online: {entry['speedup']:.2f} times faster, "
        f"waiting for data {100 * entry['wait_share']:.1f} %"
        for kind, entry in result["epoch"].items()
    ]
    for which, entry in result["knn"].items():
        scores = ", ".join(f"{key} {value:.2f} %" for key, value in entry.items() if key.startswith("k"))
        lines.append(f"k-NN       {which:<12}{entry['layer']:<12}{entry['pool']:<6}{scores}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

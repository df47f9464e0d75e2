"""Peak memory and epoch time of a two-teacher distillation: from the store, with teachers in the loop, student alone.

    python benchmarks/memory.py --train images/train --relation-teacher mae=SPEC --feature-teacher dino=SPEC --out DIR

Each run is a process of its own (its peak resident memory is the system's own figure), and all three train the same
student on the same images, all tokens kept; "alone" is ``supervised`` training, which has no teacher and no targets. Runs
are repeated in turn and the best time of each counts. Prints one table and writes DIR/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hdcache.progress import size

KINDS = ("store", "online", "alone")


def run(kind: str, settings: argparse.Namespace, number: int) -> dict[str, Any]:
    """One epoch in a process of its own."""
    names = {
        "relation": settings.relation_teacher.partition("=")[0],
        "feature": settings.feature_teacher.partition("=")[0],
    }
    folder = settings.out / f"{kind}-{number}"
    student = ["--set", f"student.arguments={settings.student}", "--set", f"batch_size={settings.batch_size}"]
    student += ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", f"amp={settings.amp}", "--out", str(folder)]
    teachers = [f"--set=objective.{role}_teacher={name}" for role, name in names.items()]
    if kind == "alone":
        command = ["supervised-tiny", "--data", settings.train, "--views", settings.views]
    else:
        # Fewer tokens would make the student itself cheaper than alone.
        command = [
            settings.recipe,
            "--store",
            str(settings.out / "store.hdc"),
            *teachers,
            "--set=objective.keep_ratio=null",
        ]
        command += ["--online"] if kind == "online" else []
    process = subprocess.Popen([sys.executable, "-m", "hdcache", "distill", *command, *student, "--quiet", "--json"], stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    output = process.stdout.read()
    # The peak of exactly this child; but Linux has it start at this process's own, which must therefore load no network.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{kind}: the run failed with status {status}")
    found = json.loads(output)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "rss": usage.ru_maxrss * unit,
        "seconds": found["seconds"],
        "samples_per_second": found["samples_per_second"],
        "device": found["device_memory"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--relation-teacher", required=True, help="NAME=SPEC")
    parser.add_argument("--feature-teacher", required=True, help="NAME=SPEC")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="hybrid-tiny")
    parser.add_argument("--student", required=True, help="timm arguments as JSON")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--views", default="gentle")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--relation-tap", default="block12.attn_in")
    parser.add_argument("--repeats", type=int, default=2)
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    store = ["--store", str(settings.out / "store.hdc"), "--views", settings.views]
    for teacher, tap in ((settings.relation_teacher, settings.relation_tap), (settings.feature_teacher, "final")):
        command = ["extract", settings.train, *store, "--teacher", teacher, "--tap", tap]
        subprocess.run([sys.executable, "-m", "hdcache", *command], check=True)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(settings.repeats):
        for kind in KINDS:
            runs[kind].append(run(kind, settings, number))
    best = {
        kind: {measure: max(run[measure] or 0 for run in found) for measure in ("rss", "device", "samples_per_second")}
        for kind, found in runs.items()
    }
    result = {
        "torch": version("torch"),
        "settings": {k: str(v) for k, v in vars(settings).items()},
        "runs": runs,
        "best": best,
    }
    (settings.out / "memory.json").write_text(json.dumps(result, indent=1))
    alone = best["alone"]
    print("| | peak memory | peak on the GPU | samples/s | time of the student alone |\n|---|---|---|---|---|")
    for kind, found in best.items():
        ratio = alone["samples_per_second"] / found["samples_per_second"]
        device = size(found["device"]) if found["device"] else "no GPU"
        print(f"| {kind} | {size(found['rss'])} | {device} | {found['samples_per_second']:.0f} | {ratio:.2f} times |")


if __name__ == "__main__":
    main()

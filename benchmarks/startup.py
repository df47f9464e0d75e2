"""From the start of a command to its end: what hdcache's short commands cost beside Python itself and the libraries below.

    python benchmarks/startup.py --out DIR            # median of 10
    python benchmarks/startup.py --out DIR --quick    # median of 3

``info`` and ``verify`` look into a store of a few rows that is made first. All commands run in turn, so that a busy moment
meets each of them. Prints one table and writes DIR/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEACHER = "t=random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=16&depth=1&num_heads=1"


def commands(store: Path) -> dict[str, list[str]]:
    """What is timed, by the name it has in the table; the first line is the limit."""
    ours = {
        "hdcache --help": ["--help"],
        "hdcache --version": ["--version"],
        "hdcache extract --help": ["extract", "--help"],
        "hdcache info STORE": ["info", str(store)],
        "hdcache verify STORE": ["verify", str(store), "--quiet"],
        "hdcache recipes": ["recipes"],
    }
    code = {
        "python -c pass": "pass",
        "import hdcache": "import hdcache",
        "import zarr": "import zarr",
        "import torch": "import torch",
        "import timm": "import timm",
    }
    found = {name: [sys.executable, "-c", text] for name, text in code.items()}
    return found | {name: [sys.executable, "-m", "hdcache", *rest] for name, rest in ours.items()}


def run(command: list[str]) -> dict[str, float]:
    """Seconds from start to exit, and the peak of resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return {"seconds": taken, "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def make_store(folder: Path) -> Path:
    """A store of 32 rows."""
    # In a process of its own: what this one has loaded would be in the peaks of its children.
    code = f"import numpy; numpy.savez({str(folder / 'data.npz')!r}, images=numpy.zeros((32, 8, 8), numpy.uint8))"
    subprocess.run([sys.executable, "-c", code], check=True)
    store = folder / "store.hdc"
    command = ["extract", str(folder / "data.npz"), "--store", str(store), "--teacher", TEACHER, "--tap", "final"]
    subprocess.run([sys.executable, "-m", "hdcache", *command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return store


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, the quickest first."""
    limit = found["python -c pass"]["seconds"]
    rows = ["| | s | times Python itself | peak, MB |", "|---|---|---|---|"]
    for name, facts in sorted(found.items(), key=lambda item: item[1]["seconds"]):
        rows.append(f"| {name} | {facts['seconds']:.3f} | {facts['seconds'] / limit:.1f} | {facts['peak'] / 1e6:.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="three times each")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    timed = commands(make_store(settings.out))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
    for _ in range(settings.repeats or (3 if settings.quick else 10)):
        for name, command in timed.items():
            runs[name].append(run(command))
    found = {
        name: {
            "seconds": statistics.median(each["seconds"] for each in taken),
            "peak": max(each["peak"] for each in taken),
        }
        for name, taken in runs.items()
    }
    (settings.out / "startup.json").write_text(json.dumps({"runs": runs, "medians": found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()

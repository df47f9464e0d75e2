"""Is this installation fit for work? Versions, devices, codecs, and a real round trip through a tiny array."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hdcache.arrays import ArrayReader, ShardWriter, read_pipeline
from hdcache.durable import durable_write
from hdcache.errors import HdcacheError
from hdcache.progress import size
from hdcache.schema import ArrayCard
from hdcache.shards import Codec

NEEDED = (
    "torch",
    "timm",
    "zarr",
    "numcodecs",
    "zarrs",
    "dask",
    "faiss-cpu",
    "numpy",
    "pillow",
    "pydantic",
    "click",
    "safetensors",
)
OPTIONAL = {"datasets": "hf", "scikit-learn": "quickstart", "tensorboard": "tensorboard", "av": "video"}


def examine() -> dict[str, Any]:
    """A JSON-able list of facts and problems; ``good`` is False when something would fail."""
    problems: list[str] = []
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            if name in NEEDED:
                problems.append(f"{name} is not installed: pip install --upgrade hdcache")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_disk_here": shutil.disk_usage(".").free,
        "reader": read_pipeline(),
    }
    try:
        from hdcache.teachers import choose_device, choose_precision

        device = choose_device("auto")
        facts |= {"device": str(device), "precision": choose_precision("auto", device)}
    except (ImportError, OSError, HdcacheError) as error:
        problems.append(f"torch cannot be used ({error}); reinstall it for this machine")
    try:
        facts["round_trip"] = _round_trip()
    except (HdcacheError, ImportError, OSError, ValueError, RuntimeError) as error:
        problems.append(
            f"a tiny array does not survive writing and reading ({error}); pip install --upgrade zarr zarrs numcodecs"
        )
    return facts | {"problems": problems, "good": not problems}


def _round_trip() -> str:
    values = np.arange(20 * 4 * 3, dtype=np.int16).astype(np.int8).reshape(20, 4, 3)
    writer = ShardWriter(20, ArrayCard(shape=(4, 3), dtype="int8"), 4, 8, codec=Codec(), attributes={})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        durable_write(root / "a" / "zarr.json", writer.metadata)
        listed = {}
        for shard in range(3):
            key = f"a/{writer.key(shard)}"
            listed[key] = durable_write(root / key, writer.encode(shard, values[shard * 8 : shard * 8 + 8]))
        read = ArrayReader(root, "a", (20, 4, 3), "int8", listed, 8).rows(0, 20)
    if not np.array_equal(read, values):
        raise ValueError("other values came back")
    return "ok"


def format_findings(findings: dict[str, Any]) -> str:
    """The findings as aligned text, problems last."""
    lines = [
        f"{'python':<16}{findings['python']} on {findings['platform']}",
        f"{'device':<16}{findings.get('device', 'unknown')}, teachers in {findings.get('precision', 'unknown')}",
        f"{'cores':<16}{findings['cores']}",
        f"{'free disk here':<16}{size(findings['free_disk_here'])}",
        f"{'store reader':<16}{findings['reader']}, round trip {findings.get('round_trip', 'failed')}",
    ]
    for name, found in findings["versions"].items():
        missing = f"not installed (pip install 'hdcache[{OPTIONAL[name]}]')" if name in OPTIONAL else "MISSING"
        lines.append(f"{name:<16}{found or missing}")
    return "\n".join(
        [
            *lines,
            *(f"problem: {problem}" for problem in findings["problems"]),
            "" if findings["problems"] else "all good",
        ]
    )

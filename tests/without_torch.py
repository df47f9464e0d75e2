"""What needs no torch: modules that a machine with a store but no network loads, and the tests that run there.

`make lanes` runs these tests where torch is not installed. Run as a script, this prints their files.
"""

from __future__ import annotations

from pathlib import Path

MODULES = (
    "array_metadata",
    "arrays",
    "chunks",
    "croissant",
    "dataset_rows",
    "dataset_specs",
    "datasets",
    "draws",
    "durable",
    "errors",
    "geometry",
    "held",
    "hub_datasets",
    "index",
    "info",
    "integrity",
    "leases",
    "ledgers",
    "leftovers",
    "listings",
    "masks",
    "object_files",
    "order",
    "packed",
    "pixels",
    "progress",
    "records",
    "resources",
    "row_arrays",
    "samples",
    "schema",
    "shards",
    "shrinking",
    "stopping",
    "store",
    "stored_objects",
    "stored_rows",
    "tap_names",
    "video",
    "views",
    "extract.packing",
    "extract.pixel_digests",
    "extract.writer",
)
"""Below ``hdcache``, with all that they load. Each one's test file runs without torch too, where it has one."""

TESTED_ELSEWHERE = {
    "croissant": "its tests extract",
    "hub_datasets": "its tests need Hugging Face's library",
    "samples": "its tests decode videos",
    "video": "its tests extract and train",
    "extract.packing": "its tests extract; the samples that it writes are read in test_packed.py, and by lane_store.py",
    "extract.pixel_digests": "its tests extract",
    "extract.writer": "its tests decode what was written; lane_store.py writes with it",
}
"""Modules whose test files need more."""


def tests() -> list[Path]:
    """Test files of :data:`MODULES`."""
    names = [module.rpartition(".")[2] for module in MODULES if module not in TESTED_ELSEWHERE]
    paths = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    return [path for path in paths if path.exists()]


if __name__ == "__main__":
    print(*(path.name for path in tests()), sep="\n")

"""The store's side needs no torch: not its modules, not what they load, not their tests; nor do versions change its bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lane_store
import small_store
import without_torch
from test_house import MODULES, imports_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", without_torch.MODULES)
def test_what_a_listed_module_loads_is_listed(name: str) -> None:
    """So that whatever the store's side comes to rest on is tested without torch too."""
    items = [item for item in imports_of(MODULES[f"hdcache.{name}"]) if not (item.in_function or item.type_checking)]
    loaded = {item.module.removeprefix("hdcache.") for item in items if item.module in MODULES}
    assert loaded <= {*without_torch.MODULES, "hdcache"}, "add to MODULES of tests/without_torch.py"


def test_modules_without_tests_here_are_listed_once() -> None:
    assert set(without_torch.TESTED_ELSEWHERE) <= set(without_torch.MODULES)
    assert sorted(without_torch.MODULES) == sorted(set(without_torch.MODULES))
    assert {f"test_{name}.py" for name in ("arrays", "store", "integrity", "ledgers", "stored_rows", "packed")} <= {
        path.name for path in without_torch.tests()
    }


def test_their_tests_are_collected_where_torch_is_not_installed() -> None:
    code = """
        import sys
        import pytest
        for name in ("torch", "torchvision", "timm"):
            sys.modules[name] = None
        sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:randomly", *sys.argv[1:]]))
    """
    files = map(str, without_torch.tests())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lanes") / "store"
    lane_store.write(root)
    return root


def test_shards_that_no_version_of_anything_may_change(written: Path) -> None:
    """Of every encoding, mask, geometry and sample: those of Python 3.11 and 3.13, zarr 3.1.6 and 3.4.2, NumPy 2.4 and 2.5.

    Only a change of what lane_store.py or small_store.py write may change it; `make lanes` then has to find equal stores.
    """
    paths = sorted(path for path in written.rglob("c.*") if path.is_file())
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()
    assert (len(paths), digest) == (
        184, "8d6285dc587ed09ea797d97638d10cbad87f6ed9d1d2a1d481b5a5bd3a001a1a"
    )  # fmt: skip


def test_every_way_of_reading_finds_what_was_written(written: Path) -> None:
    found = lane_store.check(written)
    assert found["arrays"] == 44 * len(lane_store.ways())


def test_other_values_are_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check compares with is what it was told to write, so it fails where that is something else."""
    monkeypatch.setattr(lane_store, "LABELS", lane_store.LABELS[::-1].copy())
    with pytest.raises(SystemExit, match=r"^labels: other values than were written"):
        lane_store.check(written)
    monkeypatch.undo()
    made = small_store.numbers
    monkeypatch.setattr(small_store, "numbers", lambda dtype, *shape, key: made(dtype, *shape, key=f"{key} "))
    with pytest.raises(SystemExit, match=r"^plain/0/block1\.attn_in/wide by chunks: other values than were written"):
        lane_store.check(written)

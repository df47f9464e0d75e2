"""What a row costs does not grow with their number: files read, memory held, passes made; counted, not timed."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdcache import integrity
from hdcache.api import open_store
from hdcache.dataset_rows import Listed, Row, assemble
from hdcache.dataset_specs import parse
from hdcache.datasets import open_dataset
from hdcache.extract.run import extract
from hdcache.integrity import verify
from hdcache.order import epoch_order
from hdcache.reader import TeacherReader
from hdcache.store import Store

TEACHER = "t=random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=16&depth=1&num_heads=1"
FEW, MANY = 24, 240
_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_audit)


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Every file that Python opens meanwhile."""
    global _opened
    found = _opened = list[str]()
    try:
        yield found
    finally:
        _opened = None


@contextmanager
def memory() -> Iterator[list[int]]:
    """The most bytes that Python and numpy hold at a time meanwhile."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two stores in shards of 8 rows: 3 shards and 30."""
    root, made = tmp_path_factory.mktemp("scale"), {}
    for rows in (FEW, MANY):
        pixels = np.random.default_rng(0).integers(0, 256, (rows, 8, 8), dtype=np.uint8)
        np.savez(root / f"{rows}.npz", images=pixels)
        made[rows] = root / f"{rows}.hdc"
        extract(
            str(root / f"{rows}.npz"), store=made[rows], teachers=[TEACHER], taps=["final"], views="resize",
            rows_per_shard=8, precision="fp32", device="cpu", threads=2,
        )  # fmt: skip
    return made


def test_opening_reads_as_many_files_whatever_the_number_of_shards(stores: dict[int, Path]) -> None:
    counts = {}
    for rows, path in stores.items():
        with files_opened() as found:
            TeacherReader(Store.open(path), "t").manifest(0)
        counts[rows] = sorted(Path(name).relative_to(path).as_posix() for name in found)
    assert counts[FEW] == counts[MANY]
    assert len(counts[MANY]) <= 9, "the records that the seal rests on, each once more to be compared with it"


def test_describing_reads_no_receipt(stores: dict[int, Path]) -> None:
    with files_opened() as found:
        open_store(stores[MANY]).info()
    assert found
    assert not [name for name in found if "receipts" in name]


def test_a_data_set_lends_its_ids_to_its_store(stores: dict[int, Path]) -> None:
    with files_opened() as found:
        loader = open_store(stores[FEW]).loader({"t": ["final"]}, batch_size=8, size=8)
    assert loader.ids is loader.dataset.ids
    assert not [name for name in found if "id_bytes" in name]
    other = Store.open(stores[MANY])
    other.adopt_ids(loader.dataset.card.fingerprint, loader.dataset.ids)
    assert len(other.ids) == MANY


def test_ids_read_in_blocks_are_the_ids(stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_dataset(str(stores[MANY].with_suffix(".npz"))).ids
    for block in (1, 7, MANY - 1, MANY, MANY + 1):
        monkeypatch.setattr("hdcache.store.ID_BLOCK", block)
        assert Store.open(stores[MANY]).ids == expected


def test_a_quick_check_looks_at_each_file_once_and_reads_each_record_once(
    stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, looked = stores[MANY], Counter[str]()
    size = integrity.file_size

    def counting(path: str) -> int | None:
        looked[path] += 1
        return size(path)

    monkeypatch.setattr(integrity, "file_size", counting)
    with files_opened() as found:
        assert verify(Store.open(root), quick=True).good
    assert looked == Counter(str(path) for path in root.rglob("*") if path.is_file())
    receipts = Counter(name for name in found if "receipts" in name)
    assert len(receipts) == 2 * MANY // 8
    assert set(receipts.values()) == {1}


def test_a_finished_store_is_found_finished_by_its_receipts_alone(stores: dict[int, Path]) -> None:
    data = str(stores[MANY].with_suffix(".npz"))
    settings: dict[str, Any] = {"precision": "fp32", "device": "cpu", "rows_per_shard": 8, "threads": 2}
    with files_opened() as found:
        extract(data, store=stores[MANY], teachers=[TEACHER], taps=["final"], **settings)
    inside = Counter(Path(name).name for name in found if str(stores[MANY]) in name and "/views/" in name)
    assert max(inside[f"{shard}.json"] for shard in range(MANY // 8)) <= 4  # geometry and teacher, twice each
    assert not [name for name in inside if name.startswith("c.")]


ROWS = 50_000


@pytest.mark.parametrize(
    ("what", "most"), [("order", 60), ("listing", 400)]
)  # numbers of 8 bytes; ids, places and labels as objects
def test_memory_a_row(what: str, most: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((ROWS, 2, 2), np.uint8), labels=np.arange(ROWS) % 7)
    work: dict[str, Callable[[], object]] = {
        "order": lambda: epoch_order(np.arange(ROWS), 256, run_rows=32, buffer_rows=1024, seed=0, epoch=0),
        "listing": lambda: open_dataset(str(tmp_path / "data.npz")),
    }
    work[what]()
    with memory() as peak:
        work[what]()
    assert peak[0] < most * ROWS


def test_a_listing_in_any_order_is_the_same() -> None:
    """It is sorted only where it has to be, and no list of row objects is asked for."""

    def listed(order: range) -> Listed:
        rows = (Row(f"{number:02d}", number % 3, number) for number in order)
        return assemble(parse("npz:/none"), rows, lambda place: np.zeros((1, 1), np.uint8), None, content=str)

    up, down = listed(range(100)), listed(range(99, -1, -1))
    assert up.ids == down.ids == tuple(f"{number:02d}" for number in range(100))
    assert up.places == down.places == tuple(range(100))
    assert up.labels.tolist() == down.labels.tolist() == [number % 3 for number in range(100)]
    assert up.card == down.card

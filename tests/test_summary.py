"""What an extraction says of itself, as data and as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hdcache.extract.pipeline import Timing
from hdcache.extract.run import extract
from hdcache.extract.summary import ExtractSummary, account, format_summary
from hdcache.store import Store


@pytest.fixture
def store(tiny_store: Path) -> Store:
    return Store.open(tiny_store)


def test_the_account_is_that_of_the_sealed_views(store: Store) -> None:
    record = store.teacher("t")
    timing = Timing(forward=2.0, encode=1.0, rows=128, decoding=0.5, writing=0.25)
    facts = account(store, record, timing, 4.0, 2)
    assert (facts["rows"], facts["rows_written"], facts["failed_rows"], facts["saturated"]) == (128, 128, 0, 0)
    assert (facts["seconds"], facts["rows_per_second"], facts["bottleneck"]) == (4.0, 32.0, "teacher forward")
    assert facts["stages"] == {"reading and decoding": 0, "teacher forward": 2, "encoding": 1, "writing": 0}
    assert facts["beside"] == {"decoding": 0.5, "writing": 0.25}
    assert facts["mask"] is None
    files = [path for view in "01" for path in (store.path / f"teachers/t/views/{view}").rglob("*")]
    listed = [path for path in files if path.is_file() and "receipts" not in path.parts and path.stem != "manifest"]
    assert facts["bytes"] == sum(path.stat().st_size for path in listed)
    assert list(facts["manifests"]) == ["0", "1"]
    assert facts["identity"] == record.identity_digest()
    assert {tap: seal["encoding"] for tap, seal in facts["taps"].items()} == dict.fromkeys(record.taps, "fp32")
    assert account(store, record, Timing(), 1.0, 1)["bottleneck"] == "nothing left to do"
    assert account(store, record, Timing(), 1.0, 1)["rows"] == 64


def test_a_summary_names_what_was_written_and_what_failed(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 30)
    for path in sorted(root.rglob("*.png"))[:22]:
        path.write_bytes(b"")
    common: dict[str, Any] = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "taps": ["final"]}
    summary = extract(str(root), store=tmp_path / "s", teachers=[f"t={tiny}"], teacher_mask="0.5", **common)
    text = format_summary(summary)
    assert f"{tmp_path}/s: teacher t, 30 rows, " in text
    assert "(30 rows written at " in text
    assert "random mask of ratio 0.5, seed 0: sees 8 of 16 patch tokens" in text
    assert "  final: fp32, " in text
    assert "22 samples failed (recorded as failed rows); the same command tries again:" in text
    assert text.count("the file is empty (0 bytes)") == 20
    assert text.endswith("  and 2 more (--json lists all)")
    dumped = json.loads(json.dumps(summary.json(), allow_nan=False))
    assert len(dumped["failed"]) == 22
    assert ExtractSummary(**dumped).json() == summary.json()
    assert "clipped" not in text


def test_clipped_values_are_said() -> None:
    facts = {
        "rows": 1,
        "bytes": 1,
        "rows_written": 1,
        "rows_per_second": 1,
        "bottleneck": "x",
        "stages": {"teacher forward": 3.0, "encoding": 1.0, "writing": 0.001},
        "mask": None,
        "taps": {},
    }
    text = format_summary(ExtractSummary("s", {"t": facts | {"saturated": 1234}}))
    assert "1,234 values clipped to the integer range; see docs/store-format.md" in text
    text = format_summary(ExtractSummary("s", {"t": facts | {"saturated": 1}}, {"a": "a: broken"}))
    assert "teacher t, 1 row, 1 B (1 row written at " in text
    assert "  1 value clipped to " in text
    assert "\n  teacher forward 75 %, encoding 25 %\n" in text
    assert "\n1 sample failed (recorded" in text

"""What ``hdcache info`` says about a small store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hdcache.errors import StoreCorrupt
from hdcache.index import write_index
from hdcache.info import describe_store, format_store
from hdcache.ledgers import teacher_ledger
from hdcache.schema import DatasetCard, StoreCard
from hdcache.store import Store
from hdcache.views import PRESETS


def test_a_described_store(sealed_store: Path) -> None:
    """JSON-able, and the bytes of each tap are those of its files."""
    store = Store.open(sealed_store)
    facts = describe_store(store)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["dataset"] == {
        "spec": "folder:/data",
        "kind": "folder",
        "fingerprint": "f" * 64,
        "count": 20,
        "classes": 2,
    }
    teacher = facts["teachers"]["t"]
    assert teacher["identity"] == store.teacher("t").identity_digest()
    assert teacher["sealed_views"] == {
        "0": {"manifest": teacher_ledger(store, "t", 0).manifest().digest(), "rows": 20, "failed": 0}
    }
    for tap, entry in teacher["taps"].items():
        files = (sealed_store / "teachers/t/views/0" / tap).rglob("*")
        assert entry["bytes"] == sum(path.stat().st_size for path in files if path.is_file())
    assert teacher["bytes"] == sum(entry["bytes"] for entry in teacher["taps"].values())
    assert teacher["taps"]["final"]["bytes_fp16"] == 20 * 10 * 6 * 2
    assert teacher["taps"]["pooled"]["bytes_fp16"] == 20 * 6 * 2
    attention = teacher["taps"]["block1.attn_in"]
    matrices = 20 * 2 * 2 * 10 * 10 * 2
    assert attention["smaller_than_relation_matrices_fp16"] == round(matrices / attention["bytes"], 1)


def test_a_teacher_of_clips_says_its_frames(sealed_store: Path) -> None:
    facts = describe_store(Store.open(sealed_store))
    card = facts["teachers"]["t"]["card"]
    card["preprocessing"]["frames"], card["slots"] = 16, 8
    assert "t: vit_tiny_patch16_224 at 48 px, 16 frames in 8 slots, 3x3 patch + 1" in format_store(facts)


def test_a_page_of_text(sealed_store: Path) -> None:
    """Every tap has its line; relation errors are shown only where they were measured."""
    facts = describe_store(Store.open(sealed_store))
    text = format_store(facts)
    assert "20 images, 2 classes, from folder:/data" in text
    assert "random resized crops of area 0.2 to 1, flip 0.5, seed 3" in text
    assert "t: vit_tiny_patch16_224 at 48 px, 3x3 patch + 1 prefix tokens, width 6, 2 heads, fp32" in text
    assert "sealed views: 0 (20 rows)" in text
    assert [line.split()[:2] for line in text.splitlines()[-3:]] == [
        ["block1.attn_in", "klt"],
        ["final", "fp32"],
        ["pooled", "fp16"],
    ]
    assert "relations from it" not in text
    facts["teachers"]["t"]["taps"]["block1.attn_in"]["certificate"] |= {"kl_qk": 0.00123, "kl_vv": 0.0004}
    assert "relations from it: KL 0.00123 (QK), 0.00040 (VV)" in format_store(facts)
    facts["teachers"]["t"]["sealed_views"]["0"]["failed"] = 3
    assert "0 (20 rows, 3 failed)" in format_store(facts)


def test_views_that_are_not_complete(sealed_store: Path) -> None:
    views = sealed_store / "teachers/t/views"
    for name in ("10", "2", "1.bak", "zarr"):
        (views / name).mkdir()
    facts = describe_store(Store.open(sealed_store))
    assert facts["teachers"]["t"]["unsealed_views"] == [2, 10]
    assert "sealed views: 0 (20 rows); not complete: [2, 10]" in format_store(facts)
    (views / "0" / "manifest.json").unlink()
    facts = describe_store(Store.open(sealed_store))
    assert facts["teachers"]["t"]["taps"]["final"]["smaller_than_fp16"] is None
    assert "sealed views: none; not complete: [0, 2, 10]" in format_store(facts)


@pytest.mark.parametrize(
    ("name", "text"), [("center", "centre crops of 0.875 of the shorter side"), ("resize", "whole images")]
)
def test_a_store_without_teachers(name: str, text: str, tmp_path: Path) -> None:
    dataset = DatasetCard(spec="x", kind="npz", fingerprint="0" * 64, count=1)
    Store.create(tmp_path / "s", StoreCard(dataset=dataset, views=PRESETS[name]), ["a"], np.zeros(1, np.int64))
    page = format_store(describe_store(Store.open(tmp_path / "s")))
    assert text in page
    assert page.endswith(f"no teacher yet; 'hdcache extract --store {tmp_path}/s --teacher NAME=SPEC' adds one")


def test_a_damaged_manifest_is_named(sealed_store: Path) -> None:
    (sealed_store / "teachers/t/views/0/manifest.json").write_text("[]")
    with pytest.raises(StoreCorrupt, match=r"manifest\.json: record: "):
        describe_store(Store.open(sealed_store))


def test_seals_are_those_that_they_should_be(sealed_store: Path) -> None:
    """A seal of an earlier version of the view, or of none of the teacher, would have its sizes and digest shown."""
    write_index(Store.open(sealed_store))
    path = sealed_store / "teachers/t/views/0/manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole) | {"check": ""}
    path.write_bytes(json.dumps(manifest | {"saturated": 7}).encode())
    with pytest.raises(StoreCorrupt, match=r"manifest\.json: not the seal that index\.json lists"):
        describe_store(Store.open(sealed_store))
    (sealed_store / "index.json").unlink()
    path.write_bytes(json.dumps(manifest | {"identity": "0" * 64}).encode())
    with pytest.raises(StoreCorrupt, match=r"manifest\.json: seals 't' view 0 \(identity 0{12}\), not 't' view 0"):
        describe_store(Store.open(sealed_store))


def test_a_part_of_a_copy_is_described_as_what_it_has(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    whole = describe_store(store)["teachers"]["t"]
    assert (whole["held"], whole["elsewhere"]) == (None, [])
    (sealed_store / "teachers/t/held.json").write_text('{"taps":["final"]}')
    part = describe_store(store)["teachers"]["t"]
    assert (part["held"], part["elsewhere"]) == (["final"], ["block1.attn_in", "pooled"])
    assert part["taps"] == {"final": whole["taps"]["final"]}
    assert part["identity"] == whole["identity"]
    assert whole["bytes"] - part["bytes"] == sum(whole["taps"][tap]["bytes"] for tap in part["elsewhere"])
    text = format_store(describe_store(store))
    assert "held final of 3 taps" in text
    assert "attn_in" not in text

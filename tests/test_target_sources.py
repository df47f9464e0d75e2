from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdcache.datasets import open_dataset
from hdcache.errors import InputNotFound, UsageError
from hdcache.extract.run import extract
from hdcache.geometry import read_geometry
from hdcache.samples import open_sample
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import LiveTargets, StoredTargets, open_targets
from hdcache.teachers import reload_teacher

TARGETS = ["final", "block3.rel.qk", "block3.rel.vv@6", "block3.qkv", "block3.out"]


def tensors(values: dict[str, Tokens | Tensor]) -> list[Tensor]:
    return [value if isinstance(value, Tensor) else value.sequence() for value in values.values()]


def pixels_of(store: Store, view: int, rows: list[int], size: int) -> Tensor:
    """The stored view of some rows, rendered by hand at a network's input size."""
    dataset = open_dataset(store.card.dataset.spec)
    preprocessing = store.teacher("t").card.preprocessing.model_copy(update={"size": size})
    geometry, digests = read_geometry(store, view)
    opened = [
        open_sample(dataset, store.ids[geometry[r, 0]], store.card.views, view, (geometry[r], digests[r].tobytes()))
        for r in rows
    ]
    return torch.from_numpy(np.stack([sample.pixels(preprocessing) for sample in opened]))


def arrays_of(source: StoredTargets, view: int, rows: list[int]) -> dict[str, Tensor]:
    """Stored arrays of some rows, read one by one."""
    found: dict[str, Any] = {key: np.empty((len(rows), *card.shape), card.dtype) for key, card in source.arrays.items()}
    for place, row in enumerate(rows):
        source.read(view, row, row + 1, [(found, place)])
    return {key: torch.from_numpy(value) for key, value in found.items()}


def stored_targets(path: Path, targets: list[str]) -> StoredTargets:
    (found,), live = open_targets(Store.open(path), {"t": targets})
    assert live == []
    return found


# Cached equals live


@pytest.mark.parametrize("size", [1, 4, 7, 32])
@pytest.mark.parametrize("view", [0, 1])
def test_stored_targets_equal_live_ones_to_the_bit(tiny_store: Path, size: int, view: int) -> None:
    """For the same rows, an fp32 store gives what the teacher itself gives, however the rows are batched."""
    store = Store.open(tiny_store)
    source, live = stored_targets(tiny_store, TARGETS), LiveTargets(reload_teacher(store.teacher("t")), TARGETS)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(size)).tolist()
    for start in range(0, 64, size):
        rows = order[start : start + size]
        cached = source.finish(arrays_of(source, view, rows))
        online = live.finish(pixels_of(store, view, rows, 32))
        assert list(cached) == list(online) == TARGETS
        for name, one, other in zip(TARGETS, tensors(cached), tensors(online), strict=True):
            assert torch.equal(one, other), name


def test_live_taps_are_the_cheapest(tiny_store: Path) -> None:
    live = LiveTargets(reload_teacher(Store.open(tiny_store).teacher("t")), ["block2.rel.qk", "block2.qkv", "final"])
    assert live.derivation.plan == {"block2.rel.qk": "block2.attn_in", "block2.qkv": "block2.attn_in", "final": "final"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "taps", [["block2.attn_in"], ["block2.qkv"], ["block2.rel.qk", "block2.qkv"], ["block2.attn_in", "block2.qkv"]]
)
def test_live_targets_follow_from_what_the_store_holds(
    tmp_path: Path, tiny: str, make_npz: Any, taps: list[str], precision: str
) -> None:
    """Whatever taps a store has, in whatever arithmetic, cached and live targets have the same bits."""
    common = {"encoding": "fp32", "precision": precision, "device": "cpu", "batch": 8}
    extract(make_npz(tmp_path / "d.npz", 12), store=tmp_path / "s", teachers=[f"t={tiny}"], taps=taps, **common)
    store, targets = Store.open(tmp_path / "s"), ["block2.rel.qk", "block2.rel.vv", "block2.qkv"]
    (source,), _ = open_targets(store, {"t": targets})
    _, (live,) = open_targets(store, {"t": targets}, live={"t": reload_teacher(store.teacher("t"))})
    assert live.derivation.plan == source.derivation.plan
    rows = list(range(12))
    cached, online = source.finish(arrays_of(source, 0, rows)), live.finish(pixels_of(store, 0, rows, 32))
    for name, one, other in zip(targets, tensors(cached), tensors(online), strict=True):
        assert torch.equal(one, other), name


def test_rows_come_to_where_they_are_wanted(tiny_store: Path) -> None:
    """Rows of a run may go to several batches, to any place, or nowhere; they are those that the reader gives."""
    source = stored_targets(tiny_store, TARGETS)
    one, other = ({key: np.zeros((3, *card.shape), card.dtype) for key, card in source.arrays.items()} for _ in "ab")
    source.read(1, 14, 19, [(one, 2), None, (other, 0), (one, 0), None])
    for key in source.arrays:
        tap, name = key.split("/")
        rows = source.reader.rows(1, tap, 14, 19)[name]
        assert np.array_equal(one[key], np.stack([rows[3], np.zeros_like(rows[0]), rows[0]]))
        assert np.array_equal(other[key], np.stack([rows[2], *np.zeros_like(rows[:2])]))


def test_no_rows_give_targets_of_no_rows(tiny_store: Path) -> None:
    source = stored_targets(tiny_store, TARGETS)
    found = source.finish(arrays_of(source, 0, []))
    assert [value.shape[0] for value in tensors(found)] == [0] * len(TARGETS)


# Where they come from


def test_live_teachers_are_not_read_from_the_store(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    teacher = reload_teacher(store.teacher("t"))
    stored, live = open_targets(store, {"t": ["final"]}, live={"t": teacher, "unwanted": teacher})
    assert stored == []
    assert [source.name for source in live] == ["t"]
    assert open_targets(None, {"t": ["final"]}, live={"t": teacher})[0] == []


def test_a_teacher_that_is_nowhere_is_refused(tiny_store: Path) -> None:
    with pytest.raises(UsageError, match="no store to read targets of teacher 't' from"):
        open_targets(None, {"t": ["final"]})
    with pytest.raises(InputNotFound, match=r"no teacher 'u' \(teachers: t\)"):
        open_targets(Store.open(tiny_store), {"u": ["final"]})
    with pytest.raises(InputNotFound, match=r"which cannot give block1\.out; ask for teacher 't-2', and store it"):
        open_targets(Store.open(tiny_store), {"t": ["block1.out"]})
    with pytest.raises(InputNotFound, match=r"; set objective\.teacher=t-2, and store it under that name too: hdcache"):
        open_targets(Store.open(tiny_store), {"t": ["block1.out"]}, fields={"t": ["objective.teacher"]})


def test_heads_that_do_not_divide_are_refused_when_opened(tiny_store: Path) -> None:
    with pytest.raises(UsageError, match="cannot be split into 5 heads"):
        open_targets(Store.open(tiny_store), {"t": ["block3.rel.qk@5"]})

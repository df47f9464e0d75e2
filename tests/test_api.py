from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hdcache
from hdcache.api import OpenedStore, open_store
from hdcache.backbones import create_vit
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.photometric import Photometric
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.taps import Tokens, forward_taps

SIZE = 16


def test_an_own_training_loop_learns(tiny_store: Path) -> None:
    """The fifteen lines of the docs: a student's features move towards the teacher's."""
    store = hdcache.open_store(tiny_store)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    student = create_vit("vit_tiny_patch16_224", small).train()
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(24, 48)
    torch.nn.init.normal_(head.weight, std=0.1, generator=generator)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=1e-3)
    losses: list[float] = []
    loader = store.loader({"t": ["final"]}, batch_size=16, size=32)
    for _ in range(6):
        for batch in loader:
            final = forward_taps(student, batch.images, ["final"])["final"]
            target = batch.targets["t"]["final"]
            assert isinstance(final, Tokens)
            assert isinstance(target, Tokens)
            loss = torch.nn.functional.mse_loss(head(final.patches), target.patches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 6 * len(loader)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_an_opened_store_says_what_it_holds(tiny_store: Path) -> None:
    store, inner = open_store(str(tiny_store)), Store.open(tiny_store)
    assert isinstance(store, OpenedStore)
    assert (store.path, store.ids, len(store)) == (tiny_store, inner.ids, 64)
    assert store.classes == inner.card.dataset.classes == ("0", "1", "2")
    assert store.teachers() == ["t"]
    reader = store.teacher("t")
    assert (reader.name, sorted(reader.record.taps)) == ("t", ["block3.attn_in", "block3.out", "final"])
    assert reader.tap(0, "final", 0, 2).patches.shape == (2, 16, 48)  # type: ignore[union-attr]
    assert store.info() == hdcache.open_store(tiny_store).info()
    assert "t" in str(store.info())


def test_a_store_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="no store there; make one with 'hdcache extract DATA --store"):
        open_store(tmp_path / "none")


def test_a_teacher_that_is_not_there_is_named(tiny_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"no teacher 'u' \(teachers: t\)"):
        open_store(tiny_store).teacher("u")
    with pytest.raises(InputNotFound, match=r"no teacher 'u' \(teachers: t\)"):
        open_store(tiny_store).loader({"u": ["final"]}, batch_size=8, size=SIZE)


def test_a_target_that_does_not_follow_names_the_command(tiny_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"cannot give block1\.rel\.qk; .*--tap block1\.attn_in"):
        open_store(tiny_store).loader({"t": ["block1.rel.qk"]}, batch_size=8, size=SIZE)


# Options


def test_options_reach_the_loader(tiny_store: Path) -> None:
    options: dict[str, Any] = {
        "seed": 5,
        "jitter": (0.1, 0.2, 0.3),
        "drop_last": True,
        "buffer_rows": 32,
        "rank": 1,
        "world": 2,
        "threads": 3,
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    shown = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    loader = open_store(tiny_store).loader({"t": ["final"]}, batch_size=24, size=SIZE, num_views=1, **options, **shown)
    given = {name: value for name, value in options.items() if name != "jitter"}
    for name, value in (given | {"batch_size": 24, "device": torch.device("cpu")}).items():
        assert getattr(loader.options, name) == value
    assert loader.options.augment == (Photometric(brightness=0.1, contrast=0.2, saturation=0.3),)
    assert loader.options.preprocessing == Preprocessing(size=SIZE, **shown)
    assert loader.views == [0]
    batch = next(iter(loader))
    assert (len(batch.ids), len(loader), batch.images.dtype) == (12, 2, torch.float32)
    assert batch.targets["t"]["final"].patches.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_bad_options_are_refused_before_the_first_batch(tiny_store: Path) -> None:
    store = open_store(tiny_store)
    for options, message in (
        ({"world": 9, "batch_size": 8}, "batch size 8 is smaller than the 9 processes"),
        ({"batch_size": 8, "threads": 0}, "threads 0 must be at least 1"),
        ({"batch_size": 8, "num_views": 0}, "num_views 0 must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            store.loader({"t": ["final"]}, size=SIZE, **options)


def test_a_store_verifies_itself(tiny_store: Path) -> None:
    assert open_store(tiny_store).verify().good
    assert open_store(tiny_store).verify(quick=True).objects > 0


def test_several_teachers_give_their_targets_side_by_side(tmp_path: Path, tiny: str, make_npz: Any) -> None:
    """A second teacher, added later with other taps and another input size, comes in the same batches."""
    data = make_npz(tmp_path / "d.npz", 20)
    common = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8}
    extract(data, store=tmp_path / "s", teachers=[f"one={tiny}"], taps=["final"], **common)
    extract(None, store=tmp_path / "s", teachers=[f"two={tiny}&seed=1"], taps=["pooled"], img_size=16, **common)
    store = open_store(tmp_path / "s")
    batch = next(iter(store.loader({"one": ["final"], "two": ["pooled"]}, batch_size=8, size=SIZE)))
    assert batch.targets["one"]["final"].patches.shape == (8, 16, 48)  # type: ignore[union-attr]
    assert batch.targets["two"]["pooled"].shape == (8, 48)  # type: ignore[union-attr]
    assert store.teachers() == ["one", "two"]


# Where the data is


def test_a_data_set_that_moved_is_found_where_it_is_said_to_be(tmp_path: Path, tiny: str, make_npz: Any) -> None:
    """The store remembers a place, not an identity: elsewhere, the same data gives the same batches."""
    data = make_npz(tmp_path / "d.npz", 20)
    common = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "taps": ["final"]}
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], **common)
    wanted: dict[str, Any] = {"targets": {"t": ["final"]}, "batch_size": 8, "size": SIZE}
    before = next(iter(open_store(tmp_path / "s").loader(**wanted)))
    shutil.move(tmp_path / "d.npz", tmp_path / "moved.npz")
    with pytest.raises(InputNotFound, match=r"d\.npz.*; if the data set has moved, give data=SPEC"):
        open_store(tmp_path / "s").loader(**wanted)
    after = next(iter(open_store(tmp_path / "s").loader(**wanted, data=f"npz:{tmp_path / 'moved.npz'}")))
    assert before.ids == after.ids
    assert torch.equal(before.images, after.images)
    with pytest.raises(InputNotFound) as caught:
        open_store(tmp_path / "s").loader(**wanted, data=f"npz:{tmp_path / 'nowhere.npz'}")
    assert "has moved" not in str(caught.value)


def test_another_data_set_is_refused(tiny_store: Path, tmp_path: Path, make_npz: Any) -> None:
    other = make_npz(tmp_path / "other.npz", 64, seed=1)
    with pytest.raises(
        StoreMismatch, match=r"other.npz is not the data set that .* was made from: .* give data=SPEC of"
    ):
        open_store(tiny_store).loader({"t": ["final"]}, batch_size=8, size=SIZE, data=other)

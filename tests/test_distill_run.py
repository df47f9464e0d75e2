"""``distill``: from a store to a student that timm loads, and a clear word for every way it cannot be done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from hdcache.backbones import load_backbone
from hdcache.datasets import open_dataset
from hdcache.distill.changes import validated
from hdcache.distill.recipes import get_recipe
from hdcache.distill.run import distill
from hdcache.distill.run_report import format_run
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, StoreCorrupt, StoreLocked, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.leases import lease
from hdcache.ledgers import teacher_ledger
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.store import Store

Make = Callable[..., Recipe]
EXTRACT: dict[str, Any] = {"precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 8, "threads": 2}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def run(recipe: Recipe | str | Path, out: Path, **settings: Any) -> dict[str, Any]:
    return distill(recipe, out=out, device="cpu", **{"threads": 2} | settings)


@pytest.fixture
def data(tmp_path: Path, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path / "data.npz", 32)


@pytest.fixture
def quick(small_recipe: Make) -> Recipe:
    """One epoch without warm-up."""
    return small_recipe(epochs=1, warmup_epochs=0)


def test_a_run_that_reads_no_target_goes_on_after_a_teacher_was_added(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views are the store's: the resumed run ends with the weights of one that was never stopped."""
    extract(data, store=tmp_path / "s", teachers=[f"a={tiny}"], taps=["final"], **EXTRACT)
    sizes = {"student.arguments": STUDENT, "batch_size": 8, "warmup_epochs": 0, "epochs": 2, "save_every_epochs": 1}
    recipe = get_recipe("supervised-tiny", sizes)
    run(recipe, tmp_path / "whole", store=tmp_path / "s")
    epoch = Loader.epoch

    def stopped(self: Loader, number: int, start: int = 0) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, start)

    monkeypatch.setattr(Loader, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", store=tmp_path / "s")
    monkeypatch.undo()
    extract(data, store=tmp_path / "s", teachers=[f"b={tiny}&seed=1"], taps=["final"], **EXTRACT)
    assert run(recipe, tmp_path / "run", store=tmp_path / "s")["resumed_at"] == 4
    one, other = (load_backbone(str(tmp_path / name)).weights for name in ("whole", "run"))
    assert one == other


def test_a_monitor_runs_after_whole_epochs(tmp_path: Path, quick: Recipe) -> None:
    with pytest.raises(UsageError, match="monitor_every 0 must be at least 1 epoch"):
        run(quick, tmp_path / "a", store=tmp_path / "no-store", monitor=lambda *_: {}, monitor_every=0)


# The result


def test_what_a_run_leaves_behind(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe()
    result = run(recipe, tmp_path / "a", store=tiny_store)
    assert json.loads((tmp_path / "a/run.json").read_text()) == json.loads(json.dumps(result, allow_nan=False))
    assert result["recipe"] == "tinymim-tiny"
    assert (result["epochs"], result["steps"], result["resumed_at"]) == (2, 8, 0)
    assert result["seconds"] > 0
    assert result["samples_per_second"] > 0
    assert 0 <= result["wait_share"] <= 1
    assert 0 < result["loss"] < 10
    assert (result["device"], result["online"], result["store"]) == ("cpu", False, str(tiny_store))
    assert result["targets"] == {"t": ["block3.rel.qk", "block3.rel.vv"]}
    assert result["data"]["count"] == 64
    assert result["dropped"] == {}
    assert set(result["versions"]) == {"hdcache", "torch", "timm", "zarr", "numpy"}
    assert json.loads((tmp_path / "a/recipe.json").read_text()) == recipe.model_dump(mode="json")
    assert validated(json.loads((tmp_path / "a/recipe.json").read_text()), "recipe.json") == recipe
    text = format_run(result)
    assert "tinymim-tiny: 8 steps" in text
    assert "targets from the store" in text
    assert "block2.out" in text


def test_timm_loads_the_student(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    run(quick, tmp_path / "a", store=tiny_store)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == quick.student.arguments
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    about = config["hdcache"]
    assert about["last_trained"] == "block2.out"
    assert about["recipe"] == quick.model_dump(mode="json")
    assert about["trained_from"]["manifests"]["t"] == {
        str(view): teacher_ledger(Store.open(tiny_store), "t", view).manifest().digest() for view in (0, 1)
    }
    checkpoint = str(tmp_path / "a/student.safetensors")
    model = timm.create_model(config["architecture"], num_classes=0, checkpoint_path=checkpoint, **config["model_args"])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = load_backbone(str(tmp_path / "a"))
    with torch.inference_mode():
        assert torch.equal(model.eval().forward_features(images), own.model.forward_features(images))  # type: ignore[operator]
    assert own.last_trained == "block2.out"


def test_the_same_call_gives_the_same_student(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    for name, threads in (("a", 1), ("b", 3)):
        run(quick, tmp_path / name, store=tiny_store, threads=threads)
    assert (tmp_path / "a/student.safetensors").read_bytes() == (tmp_path / "b/student.safetensors").read_bytes()


def test_a_recipe_may_be_a_name_a_file_or_a_record(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    changes = {key: value for key, value in quick.model_dump(mode="json").items() if key != "name"}
    (tmp_path / "r.yaml").write_text(json.dumps({"base": "tinymim-tiny", "epochs": 5}))
    for number, recipe in enumerate(("tinymim-tiny", tmp_path / "r.yaml", str(tmp_path / "r.yaml"), quick)):
        run(recipe, tmp_path / str(number), store=tiny_store, overrides={} if recipe is quick else changes)
    assert len({(tmp_path / str(n) / "student.safetensors").read_bytes() for n in range(4)}) == 1


def test_objectives_without_a_teacher_need_no_store(data: str, tmp_path: Path, small_recipe: Make) -> None:
    for name, layer in (("supervised-tiny", "final"), ("mae-tiny", "final")):
        recipe = small_recipe(name, student__drop_path=0.1)
        result = run(recipe, tmp_path / name, data=data, num_views=2)
        assert (result["steps"], result["store"], result["targets"]) == (4, None, {})
        assert result["last_trained"] == layer
        assert "no teacher" in format_run(result)
        again = run(recipe, tmp_path / f"{name}-2", data=data, num_views=2)
        assert again["loss"] == result["loss"]


def test_a_teacher_is_not_needed_where_a_store_is_given(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    result = run(small_recipe("supervised-tiny"), tmp_path / "a", store=tiny_store)
    assert (result["steps"], result["targets"]) == (8, {})


def test_an_unreadable_image_is_left_out_without_a_store(
    tmp_path: Path, small_recipe: Make, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 24)
    (root / "a/02.png").write_bytes(b"")
    result = run(small_recipe("supervised-tiny"), tmp_path / "a", data=str(root))
    assert result["dropped"] == {"a/02.png": "a/02.png: the file is empty (0 bytes)"}


def test_failed_rows_of_a_store_take_no_part(
    tmp_path: Path, tiny: str, small_recipe: Make, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 34)
    (root / "a/02.png").write_bytes(b"")
    (root / "a/04.png").write_bytes(b"")
    extract(str(root), store=tmp_path / "s", teachers=[f"t={tiny}"], **EXTRACT)
    result = run(small_recipe(), tmp_path / "a", store=tmp_path / "s")
    assert result["steps"] == 4, "32 usable rows are 2 batches of 16"


def test_a_teacher_that_was_given_another_size_runs_online(
    data: str, tmp_path: Path, tiny: str, small_recipe: Make
) -> None:
    settings = EXTRACT | {"encoding": "fp32", "img_size": 48}
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], **settings)
    recipe = small_recipe(student__arguments=STUDENT | {"img_size": 48}, epochs=1, warmup_epochs=0)
    cached = run(recipe, tmp_path / "a", store=tmp_path / "s")
    live = run(recipe, tmp_path / "b", store=tmp_path / "s", online=True)
    assert cached["loss"] == live["loss"]


def test_only_the_teachers_that_a_recipe_reads_run_online(
    data: str, tmp_path: Path, tiny: str, small_recipe: Make
) -> None:
    checkpoint = tmp_path / "gone.safetensors"
    from safetensors.torch import save_file

    model = load_backbone(tiny).model
    save_file(model.state_dict(), checkpoint)
    spec = tiny.replace("random:", "timm:") + f"&checkpoint={checkpoint}"
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}", f"other={spec}"], **EXTRACT)
    recipe = small_recipe(objective__teacher="t", epochs=1, warmup_epochs=0)
    checkpoint.rename(tmp_path / "moved.safetensors")
    assert run(recipe, tmp_path / "a", store=tmp_path / "s", online=True)["online"]
    other = small_recipe(objective__teacher="other", epochs=1, warmup_epochs=0)
    with pytest.raises(InputNotFound, match=r"gone\.safetensors"):
        run(other, tmp_path / "b", store=tmp_path / "s", online=True)
    moved = spec.replace("gone", "moved")
    assert run(other, tmp_path / "b", store=tmp_path / "s", online=True, teachers=[f"other={moved}"])["online"]
    with pytest.raises(StoreMismatch, match=r"teacher other: .*the store was made with"):
        run(other, tmp_path / "c", store=tmp_path / "s", online=True, teachers=[f"other={tiny}&seed=5"])
    with pytest.raises(UsageError, match=r"--teacher t=\.\.\.: this run reads other of .*/s"):
        run(other, tmp_path / "c", store=tmp_path / "s", online=True, teachers=[f"t={tiny}"])


# Refusals


def test_messages_for_what_is_not_given(data: str, tmp_path: Path, quick: Recipe, tiny: str, tiny_store: Path) -> None:
    with pytest.raises(UsageError, match="nothing to train on; give --store STORE, or --data DATA"):
        run(quick, tmp_path / "a")
    named = quick.model_copy(update={"objective": quick.objective.model_copy(update={"teacher": "t"})})
    others = [get_recipe(name) for name in ("hybrid-tiny", "sdssl-cached-final-tiny", "logits-tiny", "amd-image-tiny")]
    for recipe in (quick, named, *others):
        with pytest.raises(
            UsageError, match=rf"^recipe '{recipe.name}' reads teacher targets; give --store STORE, or --online w"
        ):
            run(recipe, tmp_path / "a", data=data)
    with pytest.raises(UsageError, match="--online without a store needs the teachers: --teacher NAME=SPEC"):
        run(quick, tmp_path / "a", data=data, online=True)
    with pytest.raises(UsageError, match="--teacher names teachers to run in the loop; add --online, or drop it"):
        run(quick, tmp_path / "a", store=tiny_store, teachers=[f"t={tiny}"])
    with pytest.raises(InputNotFound, match="missing: no store there; make one with 'hdcache extract DATA --store"):
        run(quick, tmp_path / "a", store=tmp_path / "missing")
    for setting in ({"num_views": 0}, {"threads": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(setting))} 0 must be at least 1"):
            run(quick, tmp_path / "a", store=tiny_store, **setting)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file; give --out a folder"):
        run(quick, tmp_path / "file", store=tiny_store)
    with pytest.raises(UsageError, match="unknown recipe 'tinymim-tyni'; did you mean 'tinymim-t"):
        run("tinymim-tyni", tmp_path / "a", store=tiny_store)
    with pytest.raises(UsageError, match="unknown views 'mea'; did you mean 'mae'"):
        run(get_recipe("supervised-tiny"), tmp_path / "a", data=data, views="mea")
    assert not (tmp_path / "a").exists(), "a refused call left something behind"


def test_a_missing_tap_names_the_command_that_adds_it(data: str, tmp_path: Path, tiny: str, quick: Recipe) -> None:
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], num_views=2, **EXTRACT)
    message = (
        r"teacher 't' holds final, which cannot give block3\.rel\.qk, block3\.rel\.vv; set objective\.teacher=t-2, "
        r"and store it under that name too: hdcache extract --store .*/s --num-views 2 --teacher '?t-2=\S+ .*--tap block3\.attn_in$"
    )
    with pytest.raises(InputNotFound, match=message):
        run(quick, tmp_path / "a", store=tmp_path / "s")


def test_views_of_a_store_are_not_drawn_again(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    with pytest.raises(UsageError, match="with --store its own are used: leave --views out"):
        run(quick, tmp_path / "a", store=tiny_store, views="gentle")


def test_a_run_without_a_store_sees_another_view_in_each_epoch(tiny_store: Path) -> None:
    """Views that nothing recorded cost nothing, so two epochs show other crops of the same samples."""
    data = open_dataset(f"npz:{tiny_store.parent}/data.npz")
    options = Options(batch_size=len(data.ids), preprocessing=Preprocessing(size=32))
    loader = Loader(data, options, views=ViewSpec(flip=0))
    first, second = (next(iter(loader.epoch(epoch))) for epoch in (0, 1))
    assert (first.view, second.view) == (0, 1)
    at = [second.ids.index(name) for name in first.ids]
    same = (first.images == second.images[at]).flatten(1).all(dim=1)
    assert same.float().mean() < 0.1


def test_views_that_are_not_complete_are_named(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    with pytest.raises(
        InputNotFound, match=r"3 views asked for, complete in every teacher are \[0, 1\].*--num-views 3"
    ):
        run(quick, tmp_path / "a", store=tiny_store, num_views=3)


def test_a_moved_data_set_is_found_with_data(
    data: str, tmp_path: Path, tiny: str, quick: Recipe, make_npz: Callable[..., str]
) -> None:
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], **EXTRACT)
    shutil.move(tmp_path / "data.npz", tmp_path / "elsewhere.npz")
    with pytest.raises(InputNotFound, match=r"no such file.*if the data set has moved, say where with --data"):
        run(quick, tmp_path / "a", store=tmp_path / "s")
    assert run(quick, tmp_path / "a", store=tmp_path / "s", data=f"npz:{tmp_path}/elsewhere.npz")["steps"] == 2
    other = make_npz(tmp_path / "other.npz", 30, seed=9)
    with pytest.raises(
        StoreMismatch, match=r"other\.npz is not the data set that .*/s was made from \(30 samples.*expected 32"
    ):
        run(quick, tmp_path / "a", store=tmp_path / "s", data=other)


@pytest.fixture
def torn(tiny_store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the store, and one of its shards."""
    root = shutil.copytree(tiny_store, tmp_path / "torn")
    return root, next(path for path in (root / "teachers/t/views/0/block3.attn_in/values").glob("c.1*"))


def test_a_torn_store_is_refused(torn: tuple[Path, Path], tmp_path: Path, quick: Recipe) -> None:
    root, shard = torn
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(StoreCorrupt, match=rf"c\.1.*: {len(whole) - 10} bytes, expected {len(whole)}; copy the store"):
        run(quick, tmp_path / "a", store=root)
    flipped = np.frombuffer(whole, np.uint8).copy()
    flipped[100:200] ^= 255
    shard.write_bytes(flipped.tobytes())
    with pytest.raises(StoreCorrupt, match=r"sha256 .*run 'hdcache verify'"):
        run(quick, tmp_path / "a", store=root)
    shard.unlink()
    with pytest.raises(StoreCorrupt, match=r"c\.1.*: missing, expected \d+ bytes"):
        run(quick, tmp_path / "a", store=root)
    (root / "teachers/t/views/0/manifest.json").unlink()
    with pytest.raises(
        StoreCorrupt,
        match=r"views/0/manifest\.json: missing, though it was there when index\.json was written; 'hdcache repair",
    ):
        run(quick, tmp_path / "a", store=root)
    (root / "teachers/t/views/1/manifest.json").unlink()
    (root / "index.json").unlink()
    with pytest.raises(InputNotFound, match=r"complete in every teacher are none \(sealed: t: none\)"):
        run(quick, tmp_path / "a", store=root)


def test_a_folder_of_another_run_is_refused_and_left_alone(
    tiny_store: Path, tmp_path: Path, quick: Recipe, small_recipe: Make
) -> None:
    run(quick, tmp_path / "a", store=tiny_store)
    before = {path: path.read_bytes() for path in (tmp_path / "a").glob("*") if path.is_file()}
    other = small_recipe(epochs=1, warmup_epochs=0, lr=0.5)
    with pytest.raises(
        StoreMismatch, match=r"recipe\.lr: it has 0\.001, asked was 0\.5\); repeat them, or give --out another"
    ):
        run(other, tmp_path / "a", store=tiny_store)
    with pytest.raises(StoreMismatch, match=r"online: it has False, asked was True"):
        run(quick, tmp_path / "a", store=tiny_store, online=True)
    with pytest.raises(StoreMismatch, match=r"num_views: it has 2, asked was 1"):
        run(quick, tmp_path / "a", store=tiny_store, num_views=1)
    assert {path: path.read_bytes() for path in (tmp_path / "a").glob("*") if path.is_file()} == before
    run(small_recipe(epochs=1, warmup_epochs=0, log_every=7), tmp_path / "a", store=tiny_store)


def test_a_folder_that_is_being_written_is_refused(tiny_store: Path, tmp_path: Path, quick: Recipe) -> None:
    with (
        lease(tmp_path / "a" / ".lock-0"),
        pytest.raises(StoreLocked, match=r"/a is being written by \S+, process \d+ on .*; wait for it, or stop it"),
    ):
        run(quick, tmp_path / "a", store=tiny_store)
    assert run(quick, tmp_path / "a", store=tiny_store)["steps"] == 4


def test_processes_share_a_batch_evenly(
    tiny_store: Path, tmp_path: Path, quick: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache.distill import run as module
    from hdcache.distill.ranks import Ranks

    monkeypatch.setattr(module, "join_ranks", lambda: Ranks(0, 3))
    with pytest.raises(UsageError, match="batch_size 16 is not a multiple of the 3 processes that share it"):
        run(quick, tmp_path / "a", store=tiny_store)


def test_labels_are_needed_where_they_are_learnt(tmp_path: Path, make_npz: Callable[..., str]) -> None:
    data = make_npz(tmp_path / "d.npz", 16, classes=1)
    with pytest.raises(UsageError, match="needs labels of at least 2 classes, but the data set has 1"):
        run(get_recipe("supervised-tiny"), tmp_path / "a", data=data)


def test_a_store_recipe_without_targets_anywhere(
    tmp_path: Path, data: str, quick: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache.distill.tinymim import TinyMIM

    monkeypatch.setattr(TinyMIM, "wants", lambda self, cards: {"t": ("final",)})
    with pytest.raises(
        UsageError, match=r"recipe 'tinymim-tiny' reads teacher targets; give --store STORE, or --online"
    ):
        run(quick, tmp_path / "a", data=data)

"""k-NN while a student trains: the numbers of ``knn-eval``, a student left as it was, faults before the first step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hdcache.backbones import load_backbone
from hdcache.datasets import open_dataset
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, UnreadableImage, UsageError
from hdcache.evaluate.monitor import knn_monitor
from hdcache.evaluate.run import knn_eval
from hdcache.options import Trained
from hdcache.schema import ViewSpec

Make = Callable[..., Recipe]


@pytest.fixture
def sets(tmp_path: Path, make_npz: Callable[..., str]) -> tuple[str, str]:
    return make_npz(tmp_path / "train.npz", 40), make_npz(tmp_path / "test.npz", 24, seed=1)


def logged(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "knn" in entry]


@pytest.mark.parametrize("alone", [False, True])
def test_the_last_measurement_is_that_of_knn_eval(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, sets: tuple[str, str], alone: bool
) -> None:
    """Every layer, of the student as it is written; training is the same to the bit with and without."""
    train, test = sets[0], None if alone else sets[1]
    recipe = small_recipe(epochs=3)
    monitor = knn_monitor(train, test, layers="all", k=5)
    for name, given in (("a", {"monitor": monitor}), ("plain", {})):
        distill(recipe, out=tmp_path / name, store=tiny_store, device="cpu", threads=2, **given)  # type: ignore[arg-type]
    found = logged(tmp_path / "a")
    assert [entry["epoch"] for entry in found] == [0, 1, 2, 3]
    result = knn_eval(tmp_path / "a", train, test, layer="all", ks=[5], device="cpu")
    assert found[-1]["knn"] == {layer: entries[0]["top1"] for layer, entries in result["layers"].items()}
    assert list(found[-1]["knn"]) == ["block1.out", "block2.out", "block3.out", "final"]
    for name in ("student.safetensors", "state.safetensors"):
        whole = [(tmp_path / run / name).read_bytes() for run in ("a", "plain")]
        tensors = [content[8 + int.from_bytes(content[:8], "little") :] for content in whole]
        # A state's header holds the seconds that it took.
        assert tensors[0] == tensors[1]


def test_the_averaged_student_is_measured(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, sets: tuple[str, str]
) -> None:
    monitor = knn_monitor(*sets, k=5)
    distill(small_recipe(ema=0.9), out=tmp_path / "a", store=tiny_store, device="cpu", threads=2, monitor=monitor)
    result = knn_eval(tmp_path / "a" / "ema", *sets, ks=[5], device="cpu")
    assert logged(tmp_path / "a")[-1]["knn"] == {"block2.out": result["knn"][0]["top1"]}


def test_a_student_keeps_its_mode_and_its_gradients(sets: tuple[str, str]) -> None:
    backbone = load_backbone("random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=12&depth=2&num_heads=2")
    student = backbone.model.train().requires_grad_(True)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    monitor = knn_monitor(*sets, layers=["final", "block1.out", "final"])
    first = monitor(student, backbone.preprocessing, Trained("final"))
    assert list(first) == ["final", "block1.out"]
    assert monitor(student, backbone.preprocessing, Trained("final")) == first
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in student.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.zeros(1, 3, 32, 32)
    student(images).sum().backward()
    assert next(student.parameters()).grad is not None


def test_a_small_bank_lowers_k(tmp_path: Path, make_npz: Callable[..., str]) -> None:
    backbone = load_backbone("random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=12&depth=2&num_heads=2")
    data = make_npz(tmp_path / "few.npz", 6)
    (accuracy,) = knn_monitor(data)(backbone.model, backbone.preprocessing, Trained("block1.out")).values()
    assert accuracy == knn_eval(backbone, data, ks=[5], layer="block1.out", device="cpu")["knn"][0]["top1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k: expected one or more positive integers, found"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"crop": 2.0}, "crop 2.0 must lie above 0 and be at most 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        knn_monitor("no/such/folder", **settings)


def test_data_is_opened_at_once() -> None:
    with pytest.raises(InputNotFound, match="no/such/folder"):
        knn_monitor("no/such/folder")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["block9.out"]}, r"tap 'block9\.out': the network has 3 blocks"),
        ({"layers": ["block1.qkv"]}, r"layer 'block1\.qkv': expected 'final' or 'blockN\.out'"),
        ({"pool": "max"}, "pool 'max': expected one of"),
        ({"stride": 2}, "stride 2: the student takes still images"),
    ],
)
def test_a_layer_that_the_student_lacks_is_refused_before_the_first_step(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, sets: tuple[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        distill(
            small_recipe(), out=tmp_path / "a", store=tiny_store, device="cpu", monitor=knn_monitor(*sets, **settings)
        )
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == ""


def test_clips_are_shown_at_the_stride_of_the_run(
    tmp_path: Path,
    make_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was asked for, else what the run says; samples that cannot be read are counted once."""
    backbone = load_backbone(
        "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=12&depth=1&num_heads=2&frames=4"
    )
    dataset = open_dataset(str(make_folder(tmp_path / "d", 6)))
    card = dataset.card.model_copy(update={"kind": "video", "spec": "video:d"})
    clips = dataclasses.replace(dataset, card=card)
    monkeypatch.setattr("hdcache.evaluate.monitor.open_labelled", lambda *_: (clips, clips))
    strides: list[int] = []

    def opened(_: Any, name: str, spec: ViewSpec, view: int) -> Any:
        strides.append(spec.stride)
        if name == clips.ids[1]:
            raise UnreadableImage(f"{name}: 6 frames, but a clip of 4 frames")
        return SimpleNamespace(pixels=lambda _: np.full((3, 4, 16, 16), len(name), np.uint8))

    monkeypatch.setattr("hdcache.evaluate.embed.open_sample", opened)
    given = (backbone.model, backbone.preprocessing, Trained("final", "mean", 7))
    knn_monitor("video:d", k=1, threads=1)(*given)
    assert set(strides) == {7}
    text = capsys.readouterr().err
    assert text == (
        f"k-NN while training: 1 of 6 samples of video:d cannot be read and are left out; the first: {clips.ids[1]}: "
        "6 frames, but a clip of 4 frames\n"
    )
    strides.clear()
    measure = knn_monitor("video:d", k=1, threads=1, stride=3)
    measure(*given), measure(*given)
    assert set(strides) == {3}
    assert capsys.readouterr().err == text

"""Frozen features: which layer, which tokens, and what happens to images that cannot be read."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hdcache.backbones import Backbone, load_backbone, normalize
from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import InputNotFound, UsageError
from hdcache.evaluate.embed import all_layers, check_layer, check_pool, embed, embed_layers
from hdcache.views import center_box, render

TINY = "random:vit_tiny_patch16_224?img_size=24&patch_size=8&embed_dim=12&depth=3&num_heads=2&seed=1"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(TINY)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Three classes of four images; two of the files are no images."""
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    draws = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = draws.integers(0, 256, (30 + number, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "bee" / "1.png").write_bytes(b"not an image")
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"")
    return open_dataset(str(tmp_path / "images"))


def pixels_of(dataset: Dataset, sample_id: str, size: int, fraction: float = 0.875) -> NDArray[np.uint8]:
    image = Image.open(Path(dataset.card.spec.removeprefix("folder:")) / sample_id).convert("RGB")
    return np.asarray(render(image, center_box(*image.size, fraction), False, size, "bicubic"))


def input_of(dataset: Dataset, sample_id: str, backbone: Backbone) -> torch.Tensor:
    pixels = pixels_of(dataset, sample_id, backbone.preprocessing.size)
    return normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], backbone.preprocessing)


def test_rows_are_the_models_own_features_in_order(backbone: Backbone, dataset: Dataset) -> None:
    found = embed(backbone, dataset, batch_size=5, threads=3)
    assert found.ids == tuple(i for i in dataset.ids if i not in found.failed)
    assert found.features.dtype == np.float32
    assert found.features.shape == (10, 12)
    assert found.classes == ("ant", "bee", "cat")
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (found.layer, found.layer_is_default, found.pool) == ("final", True, "cls")
    for sample_id, row in zip(found.ids, found.features, strict=True):
        with torch.inference_mode():
            own = backbone.model(input_of(dataset, sample_id, backbone))[0]
        np.testing.assert_allclose(row, own.numpy(), rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_recorded_and_left_out(backbone: Backbone, dataset: Dataset) -> None:
    found = embed(backbone, dataset, batch_size=1)
    assert sorted(Path(i).name for i in found.failed) == ["1.png", "3.png"]
    assert not set(found.failed) & set(found.ids)
    assert all(found.failed.values()), "every failure has a reason"


def test_no_readable_image_at_all_is_an_error(backbone: Backbone, dataset: Dataset) -> None:
    folder = Path(dataset.card.spec.removeprefix("folder:"))
    for sample_id in dataset.ids:
        (folder / sample_id).write_bytes(b"x")
    with pytest.raises(InputNotFound, match=r"expected readable images, found none among 12 samples"):
        embed(backbone, dataset)


def test_batch_size_and_threads_change_nothing_but_rounding(backbone: Backbone, dataset: Dataset) -> None:
    first = embed(backbone, dataset, batch_size=64, threads=1)
    second = embed(backbone, dataset, batch_size=3, threads=4)
    assert (first.ids, first.failed) == (second.ids, second.failed)
    np.testing.assert_allclose(first.features, second.features, rtol=1e-4, atol=1e-5)


def test_the_crop_is_central_and_of_the_given_fraction(backbone: Backbone, dataset: Dataset) -> None:
    whole = embed(backbone, dataset, fraction=1.0)
    pixels = pixels_of(dataset, whole.ids[0], 24, fraction=1.0)
    with torch.inference_mode():
        images = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], backbone.preprocessing)
        own = backbone.model(images)[0]
    np.testing.assert_allclose(whole.features[0], own.numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(whole.features, embed(backbone, dataset).features)


def test_mean_pools_patch_tokens_only(backbone: Backbone, dataset: Dataset) -> None:
    found = embed(backbone, dataset, pool="mean")
    with torch.inference_mode():
        tokens = backbone.model.forward_features(input_of(dataset, found.ids[2], backbone))  # type: ignore[operator]
    np.testing.assert_allclose(found.features[2], tokens[0, 1:].mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_cls_and_mean_are_normalised_before_they_are_joined(backbone: Backbone, dataset: Dataset) -> None:
    joined = embed(backbone, dataset, pool="cls+mean").features
    parts = [embed(backbone, dataset, pool=pool).features for pool in ("cls", "mean")]
    for half, part in zip(np.split(joined, 2, axis=1), parts, strict=True):
        np.testing.assert_allclose(half, part / np.linalg.norm(part, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_a_blocks_output_passes_the_final_norm(backbone: Backbone, dataset: Dataset) -> None:
    model = backbone.model
    found = embed(backbone, dataset, layer="block2.out")
    assert (found.layer, found.layer_is_default) == ("block2.out", False)
    with torch.inference_mode():
        own = model.forward_intermediates(  # type: ignore[operator]
            input_of(dataset, found.ids[0], backbone),
            indices=[1], norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
    np.testing.assert_allclose(found.features[0], own[0][1][0, 0].numpy(), rtol=1e-4, atol=1e-5)
    last = embed(backbone, dataset, layer="block3.out").features
    np.testing.assert_allclose(last, embed(backbone, dataset, layer="final").features, rtol=1e-4, atol=1e-5)


def test_many_layers_take_one_pass_over_the_images(backbone: Backbone, dataset: Dataset) -> None:
    """Each layer's features are those that it has alone; every image is read once, every block runs once."""
    layers = all_layers(backbone.model)
    assert layers == ("block1.out", "block2.out", "block3.out", "final")
    watched, calls = Watched(dataset, []), []
    hook = backbone.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index, operator, union-attr]
    try:
        found = embed_layers(backbone, watched, (*reversed(layers), "block1.out"), batch_size=12)  # type: ignore[arg-type]
    finally:
        hook.remove()
    assert sorted(watched.reads) == sorted(dataset.ids)
    assert len(calls) == 1
    assert [one.layer for one in found] == ["final", "block3.out", "block2.out", "block1.out", "block1.out"]
    for one in found:
        alone = embed(backbone, dataset, layer=one.layer, batch_size=12)
        np.testing.assert_array_equal(one.features, alone.features)
        assert (one.ids, one.failed, one.pool, one.layer_is_default) == (alone.ids, alone.failed, "cls", False)
    (default,) = embed_layers(backbone, dataset, batch_size=12)
    assert (default.layer, default.layer_is_default) == ("final", True)
    with pytest.raises(UsageError, match="block4"):
        embed_layers(backbone, dataset, ["final", "block4.out"])


def test_the_default_layer_is_the_last_that_was_trained(backbone: Backbone, dataset: Dataset) -> None:
    relation_student = dataclasses.replace(backbone, last_trained="block2.out")
    found = embed(relation_student, dataset)
    assert (found.layer, found.layer_is_default) == ("block2.out", True)
    np.testing.assert_array_equal(found.features, embed(backbone, dataset, layer="block2.out").features)


def test_a_model_without_class_token_is_pooled_by_mean(dataset: Dataset) -> None:
    averaging = load_backbone(f"{TINY}&class_token=false&global_pool=avg")
    found = embed(averaging, dataset)
    assert found.pool == "mean"
    with torch.inference_mode():
        own = averaging.model(input_of(dataset, found.ids[0], averaging))[0]
    np.testing.assert_allclose(found.features[0], own.numpy(), rtol=1e-4, atol=1e-5)
    for pool in ("cls", "cls+mean"):
        with pytest.raises(UsageError, match=r"the model has no class token; use --pool mean"):
            embed(averaging, dataset, pool=pool)


@pytest.mark.parametrize("layer", ["block4.out", "blok2", "block2.qkv", "pooled", "logits"])
def test_a_layer_that_is_not_there_is_refused(backbone: Backbone, layer: str) -> None:
    with pytest.raises(UsageError, match=layer):
        check_layer(backbone.model, layer)


def test_a_class_token_that_was_never_trained_is_not_the_default(backbone: Backbone, dataset: Dataset) -> None:
    student = dataclasses.replace(backbone, pool_trained="mean")
    found = embed(student, dataset)
    assert found.pool == "mean"
    assert np.array_equal(found.features, embed(backbone, dataset, pool="mean").features)
    assert embed(student, dataset, pool="cls").pool == "cls", "as asked"


def test_an_unknown_pool_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match=r"pool 'max': expected one of cls, mean, cls\+mean"):
        check_pool(backbone.model, "max")


@pytest.mark.parametrize("name", ["batch_size", "threads"])
def test_sizes_below_one_are_refused(backbone: Backbone, dataset: Dataset, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: expected at least 1, found 0"):
        embed(backbone, dataset, **{name: 0})  # type: ignore[arg-type]


def test_progress_counts_every_sample(backbone: Backbone, dataset: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    embed(backbone, dataset, batch_size=5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 12), (5, 12), (10, 12), (12, 12)]


@dataclasses.dataclass(frozen=True)
class Watched:
    """A data set that notes how many reads are ahead of ``taken``."""

    inner: Dataset
    reads: list[str]

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def read(self, sample_id: str) -> object:
        self.reads.append(sample_id)
        return self.inner.read(sample_id)


def test_reading_ahead_is_bounded_and_an_interrupt_ends_it(backbone: Backbone, dataset: Dataset) -> None:
    watched = Watched(dataset, [])

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(backbone, watched, batch_size=2, threads=1, progress=interrupt)  # type: ignore[arg-type]
    assert len(watched.reads) <= 2 + 4
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_a_model_in_training_is_evaluated_and_given_back_in_training(backbone: Backbone, dataset: Dataset) -> None:
    dropping = load_backbone(f"{TINY}&proj_drop_rate=0.5")
    dropping.model.train()
    found = embed(dropping, dataset)
    assert dropping.model.training
    np.testing.assert_array_equal(found.features, embed(dropping, dataset).features)

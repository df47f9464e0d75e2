"""Attention distance and NMI: cases that have an answer in closed form, and a network's own attention maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from hdcache.backbones import Backbone, load_backbone, normalize
from hdcache.datasets import Dataset, decode, open_dataset
from hdcache.errors import UnreadableImage, UsageError
from hdcache.evaluate.attention import (
    attention_distance,
    attention_nmi,
    attention_profile,
    patch_attention,
    spread,
)
from hdcache.views import center_box, render


def uniform(tokens: int) -> torch.Tensor:
    return torch.full((1, 1, tokens, tokens), 1 / tokens)


def sink(tokens: int, to: int) -> torch.Tensor:
    """Every query attends to token ``to`` alone."""
    attention = torch.zeros(1, 1, tokens, tokens)
    attention[..., to] = 1
    return attention


def softmaxed(seed: int, heads: int, tokens: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, heads, tokens, tokens, generator=noise)).softmax(-1)


# Cases with an answer in closed form


def test_attention_to_oneself_has_no_distance_and_all_information() -> None:
    identity = torch.eye(196).expand(2, 3, 196, 196)
    assert float(attention_distance(identity, (14, 14), 16, 0).max()) < 1e-20
    assert attention_nmi(identity, 0).flatten().tolist() == pytest.approx([1] * 6, abs=1e-4)


@pytest.mark.parametrize(
    ("grid", "patch", "pixels"), [((14, 14), 16, 116.49), ((16, 16), 14, 116.57), ((8, 8), 4, 16.55)]
)
def test_uniform_attention_sees_everything_and_tells_nothing(grid: tuple[int, int], patch: int, pixels: float) -> None:
    attention = uniform(grid[0] * grid[1])
    assert float(attention_distance(attention, grid, patch, 0)) == pytest.approx(pixels, abs=0.01)
    assert float(attention_nmi(attention, 0)) == pytest.approx(0, abs=1e-9)


def test_one_sink_is_as_far_as_it_lies_and_tells_nothing() -> None:
    """On 1 x 4 patches of 10 pixels, token 0 lies 0, 10, 20 and 30 pixels from the queries."""
    assert float(attention_distance(sink(4, 0), (1, 4), 10, 0)) == pytest.approx(15)
    assert float(attention_distance(sink(4, 1), (1, 4), 10, 0)) == pytest.approx(10)
    assert float(attention_nmi(sink(196, 7), 0)) == pytest.approx(0, abs=1e-6)


def test_a_shift_is_one_patch_far() -> None:
    """Each query of a column of patches attends to the next one, the last to the first."""
    attention = torch.eye(4).roll(1, dims=1).expand(1, 1, 4, 4)
    assert float(attention_distance(attention, (4, 1), 8, 0)) == pytest.approx((8 + 8 + 8 + 24) / 4)
    assert float(attention_nmi(attention, 0)) == pytest.approx(1, abs=1e-5)


def test_two_groups_share_half_of_the_information() -> None:
    """Queries of each half attend to their half alone, evenly: I = log 2, and both entropies are log N."""
    attention = torch.zeros(1, 1, 16, 16)
    attention[..., :8, :8] = attention[..., 8:, 8:] = 1 / 8
    assert float(attention_nmi(attention, 0)) == pytest.approx(math.log(2) / math.log(16), abs=1e-5)


def test_prefix_tokens_take_no_part() -> None:
    inner = softmaxed(0, 2, 9)
    whole = torch.zeros(2, 2, 11, 11)
    whole[:, :, 2:, 2:] = inner * 0.25
    whole[:, :, 2:, 0] = 0.75
    whole[:, :, :2, 1] = 1
    torch.testing.assert_close(
        attention_distance(whole, (3, 3), 8, 2), attention_distance(inner, (3, 3), 8, 0), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(attention_nmi(whole, 2), attention_nmi(inner, 0), rtol=1e-5, atol=0)
    assert torch.allclose(patch_attention(whole, 2, 1e-8).sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))


def test_a_row_that_attends_to_prefix_tokens_alone_counts_as_uniform() -> None:
    attention = sink(5, 0)
    assert torch.equal(patch_attention(attention, 1, 1e-32), uniform(4).double())


def test_one_patch_token_carries_no_information() -> None:
    assert float(attention_nmi(torch.ones(1, 1, 1, 1), 0)) == 0


@given(seed=st.integers(0, 999), rows=st.integers(1, 4), columns=st.integers(1, 4), prefix=st.integers(0, 2))
def test_bounds_and_symmetries(seed: int, rows: int, columns: int, prefix: int) -> None:
    """NMI is in 0..1 and blind to the order of queries; no distance exceeds the diagonal, and it grows with patches."""
    attention = softmaxed(seed, 2, rows * columns + prefix)
    nmi, distance = attention_nmi(attention, prefix), attention_distance(attention, (rows, columns), 4, prefix)
    assert bool(((nmi >= 0) & (nmi <= 1)).all())
    assert bool(((distance >= 0) & (distance <= 4 * math.hypot(rows - 1, columns - 1) + 1e-9)).all())
    assert torch.allclose(attention_distance(attention, (rows, columns), 8, prefix), 2 * distance)
    mixed = torch.cat([attention[:, :, :prefix], attention[:, :, prefix:].flip(2)], dim=2)
    assert torch.allclose(attention_nmi(mixed, prefix), nmi, atol=1e-12)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected \[images, heads, tokens, tokens\] with more than 1 tokens, found"):
        attention_nmi(torch.ones(3, 4, 4), 1)
    with pytest.raises(UsageError, match=r"with more than 4 tokens, found \[1, 1, 4, 4\]"):
        attention_nmi(uniform(4), 4)
    with pytest.raises(UsageError, match=r"attention of 9 patch tokens: expected the 2 x 4 of the grid; give the grid"):
        attention_distance(uniform(9), (2, 4), 16, 0)


# A network over images


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("random:vit_tiny_patch16_224?img_size=24&patch_size=8&embed_dim=12&depth=3&num_heads=2&seed=1")


@pytest.fixture
def dataset(tmp_path: Path, make_npz: Callable[..., str]) -> Dataset:
    return open_dataset(make_npz(tmp_path / "d.npz", 10))


def own_attention(backbone: Backbone, dataset: Dataset, sample_id: str, block: int) -> torch.Tensor:
    """The softmax that timm's own forward computes, read where it enters the (idle) attention dropout."""
    model: Any = backbone.model
    assert isinstance(model, VisionTransformer)
    picture: Any = dataset.read(sample_id)
    image = decode(picture)
    pixels = np.asarray(render(image, center_box(*image.size, 0.875), False, 24, "bicubic"))
    attention: Any = model.blocks[block - 1].attn
    seen: list[torch.Tensor] = []
    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.inference_mode():
            model(normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], backbone.preprocessing))
    finally:
        hook.remove()
        attention.fused_attn = fused
    return seen[0]


def test_a_profile_is_the_mean_over_images_of_the_networks_own_attention(backbone: Backbone, dataset: Dataset) -> None:
    found = attention_profile(backbone, dataset, images=3, batch_size=2)
    assert found.ids == tuple(dataset.ids[index] for index in (0, 3, 6))
    assert found.blocks == (1, 2, 3)
    assert found.distance.shape == found.nmi.shape == (3, 2)
    for row, block in enumerate(found.blocks):
        maps = torch.cat([own_attention(backbone, dataset, sample_id, block) for sample_id in found.ids])
        np.testing.assert_allclose(
            found.distance[row], attention_distance(maps, (3, 3), 8, 1).mean(0).numpy(), rtol=1e-4
        )
        np.testing.assert_allclose(found.nmi[row], attention_nmi(maps, 1).mean(0).numpy(), rtol=1e-2, atol=1e-8)
    uniform_distance = float(attention_distance(uniform(9), (3, 3), 8, 0))
    assert found.uniform_distance == pytest.approx(uniform_distance)


def test_blocks_and_ids_are_settings(backbone: Backbone, dataset: Dataset) -> None:
    whole = attention_profile(backbone, dataset, ids=dataset.ids[4:6])
    some = attention_profile(backbone, dataset, ids=dataset.ids[4:6], blocks=[3, 1], batch_size=1, threads=1)
    assert some.blocks == (3, 1)
    np.testing.assert_allclose(some.distance, whole.distance[[2, 0]], rtol=1e-5)
    (first, _) = some.rows()
    assert first["block"] == 3
    assert first["distance"] == pytest.approx(float(np.mean(first["distance_by_head"])))
    assert first["nmi_by_head"] == pytest.approx(some.nmi[0].tolist())


def test_the_list_is_fixed_and_evenly_spaced() -> None:
    assert spread("abcdefgh", 4) == list("aceg")
    assert spread("abc", 9) == list("abc")
    assert spread("abc", 0) == []


def test_a_model_in_training_comes_back_in_training(backbone: Backbone, dataset: Dataset) -> None:
    backbone.model.train()
    try:
        attention_profile(backbone, dataset, images=1)
        assert backbone.model.training
    finally:
        backbone.model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images: expected at least 1, found 0"),
        ({"blocks": []}, "blocks: expected at least 1, found 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"blocks": [4]}, r"tap 'block4\.rel\.qk': the network has 3 blocks"),
    ],
)
def test_bad_settings_are_refused(backbone: Backbone, dataset: Dataset, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attention_profile(backbone, dataset, **settings)


def test_a_network_of_clips_is_refused(backbone: Backbone, dataset: Dataset) -> None:
    clips = dataclasses.replace(backbone, preprocessing=backbone.preprocessing.model_copy(update={"frames": 16}))
    with pytest.raises(UsageError, match="takes clips; attention distance is defined for still images only"):
        attention_profile(clips, dataset)


def test_videos_are_refused(backbone: Backbone, dataset: Dataset) -> None:
    card = dataset.card.model_copy(update={"kind": "video", "spec": "video:d"})
    with pytest.raises(
        UsageError, match=r"^video:d holds videos; attention is measured on still images: name a data set"
    ):
        attention_profile(backbone, dataclasses.replace(dataset, card=card))


def test_an_unreadable_image_is_not_replaced(
    backbone: Backbone, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "d", 6)
    dataset = open_dataset(str(root))
    (root / dataset.ids[1]).write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=dataset.ids[1]):
        attention_profile(backbone, dataset, images=6)

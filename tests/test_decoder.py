"""The pixel decoder of masked autoencoders: what it predicts, for which patches, and from what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hdcache.backbones import create_vit, normalize
from hdcache.distill.decoder import (
    PixelDecoder,
    PixelTargets,
    hidden_patches,
    is_clip_network,
    patch_pixels,
    pixel_decoder,
    pixel_targets,
    sincos_positions,
    unit_pixels,
)
from hdcache.errors import UsageError
from hdcache.schema import Preprocessing
from hdcache.taps import Tokens
from hdcache.video_vit import sinusoid_positions

CLIPS = {"frames": 4, "tubelet": 2}


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def build(student: nn.Module, width: int = 16, heads: int = 2, **settings: Any) -> PixelDecoder:
    targets = pixel_targets(student, normalise=True, kind=None, objective="mae")
    wanted = {"prefix": True, "embed_bias": True} | settings
    return pixel_decoder(student, targets, width, 1, heads, torch.Generator().manual_seed(0), **wanted)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Patches


def test_patches_of_images_are_row_major_with_channels_last() -> None:
    image = normal(1, 3, 8, 12)
    found = patch_pixels(image, 4)
    assert found.shape == (1, 6, 48)
    cut = image[0, :, 4:8, 8:12]  # row 1, column 2
    assert torch.equal(found[0, 5], cut.permute(1, 2, 0).flatten())


@given(
    slots=st.integers(1, 3), tubelet=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3),
    patch=st.integers(1, 3),
)  # fmt: skip
def test_tubelets_are_slot_major_then_rows_then_columns(
    slots: int, tubelet: int, rows: int, columns: int, patch: int
) -> None:
    clip = normal(1, 3, slots * tubelet, rows * patch, columns * patch)
    found = patch_pixels(clip, patch, tubelet)
    assert found.shape == (1, slots * rows * columns, 3 * tubelet * patch * patch)
    for slot in range(slots):
        for row in range(rows):
            for column in range(columns):
                cut = clip[0, :, slot * tubelet :, row * patch :, column * patch :][:, :tubelet, :patch, :patch]
                token = (slot * rows + row) * columns + column
                assert torch.equal(found[0, token], cut.permute(1, 2, 3, 0).flatten())


def test_tubelets_are_the_tokens_of_the_network() -> None:
    """Token by token, the network's convolution is one linear map of the values that the decoder predicts."""
    student: Any = vit(**CLIPS)
    clip = normal(2, 3, 4, 16, 16)
    weight = student.patch_embed.proj.weight  # [D, 3, t, p, p]
    linear = weight.permute(0, 2, 3, 4, 1).flatten(1)
    expected = patch_pixels(clip, 4, 2) @ linear.T + student.patch_embed.proj.bias
    torch.testing.assert_close(student.patch_embed(clip), expected)


# Targets


def test_normalisation_undone() -> None:
    pixels = torch.rand(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit_pixels(normalize(pixels, Preprocessing(size=5))), pixels)


@pytest.mark.parametrize("tubelet", [None, 2])
@pytest.mark.parametrize("kind", ["patch", "channel"])
def test_targets_have_mean_0_and_variance_1(kind: Any, tubelet: int | None) -> None:
    images = normal(2, 3, 16, 16) if tubelet is None else normal(2, 3, 4, 16, 16)
    targets = PixelTargets(4, tubelet, True, kind)
    found = targets(images)
    assert found.shape[-1] == targets.values
    groups = found if kind == "patch" else found.unflatten(-1, (-1, 3)).movedim(-1, 0)
    torch.testing.assert_close(groups.mean(-1), torch.zeros_like(groups[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var(-1), torch.ones_like(groups[..., 0]), atol=1e-3, rtol=0)


def test_channel_targets_agree_with_a_slow_loop() -> None:
    """VideoMAE's rule: (x - mean) / (sqrt(unbiased variance) + 1e-6), on pixels in [0, 1]."""
    clip = normal(1, 3, 2, 4, 4)
    found = PixelTargets(4, 2, True, "channel")(clip)[0, 0].reshape(-1, 3)
    fed = Preprocessing(size=4)
    for channel in range(3):
        values = (clip[0, channel] * fed.std[channel] + fed.mean[channel]).flatten().double().numpy()
        expected = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(found[:, channel].numpy(), expected, atol=1e-5)


def test_a_constant_patch_has_finite_targets() -> None:
    for kind in ("patch", "channel"):
        target = PixelTargets(4, None, True, kind)(torch.full((1, 3, 4, 4), 0.3))  # type: ignore[arg-type]
        assert torch.isfinite(target).all()


def test_plain_targets_are_the_input_or_the_pixels() -> None:
    image = normal(1, 3, 4, 4)
    assert torch.equal(PixelTargets(4, None, False, "patch")(image), patch_pixels(image, 4))
    assert torch.equal(PixelTargets(4, None, False, "channel")(image), patch_pixels(unit_pixels(image), 4))


def test_default_kind_is_that_of_the_released_code() -> None:
    kinds = [pixel_targets(vit(**more), True, None, "mae").kind for more in ({}, CLIPS)]
    assert kinds == ["patch", "channel"]
    assert pixel_targets(vit(), True, "channel", "mae").kind == "channel"
    assert [is_clip_network(vit(**more)) for more in ({}, CLIPS)] == [False, True]


# The decoder


def test_positions_are_2d_for_images_and_1d_for_clips() -> None:
    assert torch.equal(build(vit()).get_buffer("positions")[0], sincos_positions(16, (4, 4)))
    assert torch.equal(build(vit(**CLIPS)).get_buffer("positions")[0], sinusoid_positions(32, 16))
    # One slot is still a clip.
    assert torch.equal(build(vit(frames=2)).get_buffer("positions")[0], sinusoid_positions(16, 16))


@pytest.mark.parametrize("prefix", [True, False])
def test_prefix_tokens_take_part_only_where_asked(prefix: bool) -> None:
    decoder = build(vit(), prefix=prefix, embed_bias=prefix)
    assert (decoder.embed.bias is not None) == prefix
    visible = torch.tensor([[0, 3, 7]])
    first, second = (
        decoder(Tokens(normal(1, 1 if prefix else 0, 24, seed=seed), normal(1, 3, 24)), visible) for seed in (1, 2)
    )
    assert first.shape == (1, 16, 48)
    assert torch.equal(first, second) != prefix


def test_the_order_of_the_tokens_follows_their_indices() -> None:
    """Attention has no order: two visible tokens that trade places and indices change nothing."""
    decoder, tokens = build(vit(**CLIPS), prefix=False), normal(1, 3, 24)
    there = decoder(Tokens(tokens[:, :0], tokens), torch.tensor([[1, 5, 30]]))
    back = decoder(Tokens(tokens[:, :0], tokens[:, [2, 1, 0]]), torch.tensor([[30, 5, 1]]))
    torch.testing.assert_close(there, back)
    assert there.shape == (1, 32, 96)


def test_error_reads_hidden_patches_only() -> None:
    decoder, images = build(vit(**CLIPS)), normal(2, 3, 4, 16, 16)
    hidden = hidden_patches(torch.tensor([[0, 1, 2], [4, 9, 31]]), 32)
    assert hidden.sum(1).tolist() == [29, 29]
    target = decoder.targets(images)
    prediction = target + hidden.unsqueeze(-1) * 2.0 + ~hidden.unsqueeze(-1) * 1e6
    assert decoder.error(images, prediction, hidden).item() == pytest.approx(4.0, rel=1e-5)


# Mask tokens


def test_mask_tokens_start_as_the_released_codes_draw_them() -> None:
    """Normal of deviation 0.02: whole for images (MAE), cut at one deviation for clips (VideoMAE, AMD)."""
    image, clip = (build(vit(**more), width=512).mask_token.detach().flatten() for more in ({}, CLIPS))
    assert image.abs().max() > 0.04
    assert abs(image.std() - 0.02) < 0.002
    assert 0.018 < clip.abs().max() <= 0.02
    assert abs(clip.std() - 0.0108) < 0.001, "what the cut leaves of the deviation: 0.54"


# Positions


def test_sincos_positions_agree_with_mae_s_formula() -> None:
    found = sincos_positions(16, (3, 5)).numpy()
    rates = 1 / 10000 ** (np.arange(4) / 4)
    for row in range(3):
        for column in range(5):
            halves = [np.concatenate([np.sin(at * rates), np.cos(at * rates)]) for at in (column, row)]
            np.testing.assert_allclose(found[5 * row + column], np.concatenate(halves), atol=1e-6)


def test_sincos_positions_need_a_multiple_of_four() -> None:
    with pytest.raises(UsageError, match="need a width that is a multiple of 4, found 18"):
        sincos_positions(18, (2, 2))


# What cannot be meant


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"decoder_heads 3 does not divide objective\.decoder_width 16; choose"):
        build(vit(), heads=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": (4, 8)}, "objective 'mae' needs square patches, but the student's are 4x8 pixels"),
        (
            {"img_size": 18},
            "patches of 4 pixels do not cover the student's input of 18x18; .*img_size to a multiple of 4",
        ),
    ],
)
def test_patches_that_cannot_be_predicted_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(vit(**arguments))

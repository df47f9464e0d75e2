"""Photometric augmentation: torchvision's and Pillow's operations, with choices keyed by (seed, id, epoch, view)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError

from hdcache.photometric import NUMBERS, Photometric, apply_photometric, draw_photometric

IDS = [f"{i}.png" for i in range(400)]
GREY = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
NOTHING = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
EVERYTHING = Photometric(
    hue=0.1, saturation=0.2, probability=0.8, grayscale=0.2, blur=0.5, blur_sigma=(0.1, 1.0), solarize=0.2
)


def noise(count: int, seed: int = 0, shape: tuple[int, ...] = (6, 5)) -> torch.Tensor:
    return torch.rand(count, 3, *shape, generator=torch.Generator().manual_seed(seed))


def drawn(count: int, epoch: int = 0, seed: int = 0) -> torch.Tensor:
    return draw_photometric(Photometric(), seed, IDS[:count], epoch)


def numbers_for(order: int, orders: int, factors: list[float]) -> torch.Tensor:
    """Numbers that give factors in units of their half range, from -1 to 1, and one of the orders."""
    row = torch.zeros(1, NUMBERS, dtype=torch.float64)
    row[0, 3] = (order + 0.5) / orders
    for column, factor in zip((0, 1, 2, 4), factors, strict=False):
        row[0, column] = (factor + 1) / 2
    return row


# What is drawn


def test_choices_are_functions_of_seed_id_epoch_and_slot() -> None:
    """Equal for an equal key whatever stands beside it, and different when any part of the key is."""
    spec = Photometric()
    rows = draw_photometric(spec, 1, IDS[:8], 2)
    assert rows.shape == (8, NUMBERS)
    assert rows.dtype == torch.float64
    assert torch.equal(draw_photometric(spec, 1, IDS[5:6], 2)[0], rows[5])
    for seed, epoch, slot in ((1, 3, 0), (2, 2, 0), (1, 2, 1)):
        assert not torch.isclose(draw_photometric(spec, seed, IDS[:8], epoch, slot), rows).any()
    assert float(rows.unique().numel()) == rows.numel()


def test_the_first_numbers_are_those_of_earlier_releases() -> None:
    """A run that is resumed sees the images that it would have seen."""
    expected = [0.85060210, 0.25644581, 0.91374537, 0.51046996]
    assert drawn(1, epoch=3)[0, :4].tolist() == pytest.approx(expected, abs=1e-8)


def test_default_settings_are_the_plain_jitter() -> None:
    """Brightness, contrast, saturation and their order alone, whatever the other numbers are."""
    images, numbers = noise(40), drawn(40)
    other = torch.cat([numbers[:, :4], drawn(40, epoch=1)[:, 4:]], dim=1)
    assert torch.equal(
        apply_photometric(images, numbers, Photometric()), apply_photometric(images, other, Photometric())
    )


# The colour jitter


@pytest.mark.parametrize("order", range(24))
def test_jitter_is_torchvision_s_in_the_drawn_order(order: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    steps = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    for operations in (3, 4):
        orders = list(itertools.permutations(range(operations)))
        hue = 0.5 if operations == 4 else 0.0
        for factors in ([-0.9, 0.7, 0.4, 0.3], [0.6, -0.5, -1.0, -0.8]):
            spec = Photometric(brightness=0.8, contrast=0.8, saturation=0.8, hue=hue)
            (image,) = noise(1, order)
            numbers = numbers_for(order % len(orders), len(orders), factors)
            expected = image
            for operation in orders[order % len(orders)]:
                strength = hue * factors[3] if operation == 3 else 1 + 0.8 * factors[operation]
                expected = steps[operation](expected, strength)
            (found,) = apply_photometric(image.unsqueeze(0), numbers, spec)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_factors_fill_their_ranges() -> None:
    """A grey image under one of the operations shows its factor; a factor is never below 0."""
    images = torch.full((400, 3, 2, 2), 0.5)
    for half in (0.4, 1.0):
        found = apply_photometric(images, drawn(400), Photometric(brightness=half, contrast=0, saturation=0))[
            :, 0, 0, 0
        ]
        assert 0.5 * (1 - half) - 1e-6 <= float(found.min()) <= 0.5 * (1 - 0.95 * half)
        assert 0.5 * (1 + 0.95 * half) <= float(found.max()) <= 0.5 * (1 + half) + 1e-6
    counts = torch.bincount((drawn(400)[:, 3] * 6).long(), minlength=6)
    assert counts.min() > 40


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), factor=st.floats(-1, 1))
def test_saturation_blends_with_grey(seed: int, factor: float) -> None:
    """factor x + (1 - factor) grey(x), clipped to [0, 1]."""
    image = noise(1, seed)
    spec = Photometric(brightness=0, contrast=0, saturation=1)
    found = apply_photometric(image, numbers_for(0, 6, [0, 0, factor]), spec)
    grey = (image * GREY).sum(1, keepdim=True)
    torch.testing.assert_close(found, ((1 + factor) * image - factor * grey).clamp(0, 1), rtol=0, atol=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), turn=st.floats(-1, 1))
def test_hue_keeps_value_and_chroma(seed: int, turn: float) -> None:
    image = noise(1, seed)
    found = apply_photometric(image, numbers_for(0, 24, [0, 0, 0, turn]), Photometric(**NOTHING, hue=0.5))
    for before, after in ((image.amax(1), found.amax(1)), (image.amin(1), found.amin(1))):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_hue_turns_red_into_green_and_leaves_grey() -> None:
    images = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.3, 0.3]]).view(2, 3, 1, 1)
    numbers = numbers_for(0, 24, [0, 0, 0, 2 / 3]).repeat(2, 1)
    found = apply_photometric(images, numbers, Photometric(**NOTHING, hue=0.5)).view(2, 3)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.0], [0.3, 0.3, 0.3]]), rtol=0, atol=1e-6)


def test_each_operation_touches_the_share_that_was_asked_for() -> None:
    images = noise(400)
    for spec in (
        Photometric(probability=0.3),
        Photometric(**NOTHING, grayscale=0.3),
        Photometric(**NOTHING, blur=0.3, blur_sigma=(1.0, 2.0)),
        Photometric(**NOTHING, solarize=0.3),
    ):
        changed = (apply_photometric(images, drawn(400), spec) - images).abs().amax((1, 2, 3)) > 1e-3
        assert 0.22 < float(changed.float().mean()) < 0.38
    for spec in (Photometric(probability=0), Photometric(**NOTHING)):
        torch.testing.assert_close(apply_photometric(images, drawn(400), spec), images, rtol=0, atol=1e-6)


# Grayscale, blur, solarization


def test_grayscale_is_torchvision_s() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = noise(4)
    found = apply_photometric(images, drawn(4), Photometric(**NOTHING, grayscale=1))
    torch.testing.assert_close(found, functional.rgb_to_grayscale(images, 3), rtol=0, atol=1e-6)


def test_solarization_is_pillow_s() -> None:
    codes = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = apply_photometric(codes.float() / 255, drawn(1), Photometric(**NOTHING, solarize=1))
    expected = ImageOps.solarize(Image.fromarray(codes[0].permute(1, 2, 0).numpy().astype(np.uint8)))
    assert np.array_equal((found[0] * 255).round().permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_blur_is_torchvision_s_with_the_edge_continued(sigma: float) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images, reach = noise(3, shape=(20, 17)), math.ceil(4 * sigma)
    found = apply_photometric(images, drawn(3), Photometric(**NOTHING, blur=1, blur_sigma=(sigma, sigma)))
    padded = torch.nn.functional.pad(images, [reach] * 4, mode="replicate")
    expected = functional.gaussian_blur(padded, 2 * reach + 1, sigma)[..., reach:-reach, reach:-reach]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_blur_is_near_pillow_s() -> None:
    """Pillow's radius is the same standard deviation; it approximates the Gaussian by boxes and rounds."""
    images = noise(1, shape=(40, 40))
    for sigma in (0.7, 2.0):
        found = apply_photometric(images, drawn(1), Photometric(**NOTHING, blur=1, blur_sigma=(sigma, sigma)))
        picture = Image.fromarray((images[0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
        pillow = torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(sigma)))).permute(2, 0, 1) / 255
        assert float((found[0] - pillow).abs().mean()) < 0.15 * float((found[0] - images[0]).abs().mean())


def test_each_image_has_its_own_sigma_within_the_range() -> None:
    """The spread of a bright dot is the variance of the blur."""
    images = torch.zeros(60, 3, 41, 41)
    images[..., 20, 20] = 1
    found = apply_photometric(images, drawn(60), Photometric(**NOTHING, blur=1, blur_sigma=(0.5, 2.0)))
    places = torch.arange(41.0) - 20
    sigmas = (found[:, 0].sum(1) * places**2).sum(1).sqrt()
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(60, 3), rtol=0, atol=1e-4)
    assert 0.48 < float(sigmas.min()) < 0.7
    assert 1.8 < float(sigmas.max()) < 2.01


def test_operations_come_in_the_published_order() -> None:
    """Jitter, grayscale, blur, solarization: what one step gives is what the next one gets."""
    images, numbers = noise(3, shape=(12, 12)), drawn(3)
    whole = Photometric(grayscale=1, blur=1, blur_sigma=(1.0, 1.0), solarize=1)
    expected = images
    for step in (
        Photometric(),
        Photometric(**NOTHING, grayscale=1),
        Photometric(**NOTHING, blur=1, blur_sigma=(1.0, 1.0)),
        Photometric(**NOTHING, solarize=1),
    ):
        expected = apply_photometric(expected, numbers, step)
    torch.testing.assert_close(apply_photometric(images, numbers, whole), expected, rtol=0, atol=1e-6)


# Batches and clips


@pytest.mark.parametrize("spec", [Photometric(), EVERYTHING])
def test_a_batch_gives_what_its_images_give_alone(spec: Photometric) -> None:
    images, numbers = noise(40), drawn(40)
    before = images.clone()
    found = apply_photometric(images, numbers, spec)
    for row in range(40):
        part = slice(row, row + 1)
        torch.testing.assert_close(found[part], apply_photometric(images[part], numbers[part], spec), rtol=0, atol=1e-5)
    assert torch.equal(images, before)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found, apply_photometric(images, numbers, spec))
    assert apply_photometric(images[:0], numbers[:0], spec).shape == (0, 3, 6, 5)


def test_the_frames_of_a_clip_are_changed_alike() -> None:
    """A still clip stays still; frames do not run into each other."""
    frame, numbers = noise(12), drawn(12)
    still = frame.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    found = apply_photometric(still, numbers, EVERYTHING)
    assert found.shape == still.shape
    one = apply_photometric(frame, numbers, EVERYTHING)
    torch.testing.assert_close(found, one.unsqueeze(2).expand_as(found), rtol=0, atol=1e-5)
    clip = torch.zeros(1, 3, 3, 6, 5)
    clip[:, :, 1] = 1
    blurred = apply_photometric(clip, drawn(1), Photometric(**NOTHING, blur=1, blur_sigma=(2.0, 2.0)))
    torch.testing.assert_close(blurred, clip, rtol=0, atol=1e-5)


def test_constants_and_places_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to a device waits for it: one of the places, one of the factors, none of the grey weights."""
    images, numbers = noise(40), drawn(40)
    apply_photometric(images, numbers, Photometric())
    copies: list[int] = []
    to = torch.Tensor.to

    def spy(self: torch.Tensor, *more: Any) -> torch.Tensor:
        if torch.device("cpu") in more:
            copies.append(self.numel())
        return to(self, *more)  # type: ignore[no-any-return, call-overload]

    monkeypatch.setattr(torch.Tensor, "to", spy)
    apply_photometric(images, numbers, Photometric())
    assert sorted(copies) == [40, 120]


# What cannot be meant


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blur_sigma": (2.0, 0.1)}, r"blur_sigma \[2.0, 0.1\] must be two numbers above 0, the smaller first"),
        ({"blur_sigma": (0.0, 1.0)}, "must be two numbers above 0"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"probability": 1.1}, "less than or equal to 1"),
        ({"solarise": 0.2}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Photometric(**fields)

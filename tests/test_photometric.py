"""Colour jitter: torchvision's operations, with factors that are functions of (seed, id, epoch)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache.photometric import apply_jitter, draw_jitter

IDS = [f"{i}.png" for i in range(400)]
GREY = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_factors_fill_their_ranges() -> None:
    factors, orders = draw_jitter((0.4, 0.2, 0.0), 0, IDS, 3)
    assert factors.shape == (400, 3)
    assert factors.dtype == torch.float32
    for column, strength in enumerate((0.4, 0.2, 0.0)):
        low, high = factors[:, column].min(), factors[:, column].max()
        assert 1 - strength - 1e-6 <= low <= 1 - 0.97 * strength
        assert 1 + 0.97 * strength <= high <= 1 + strength + 1e-6
    assert torch.bincount(orders, minlength=6).min() > 40
    assert draw_jitter((3.0, 0, 0), 0, IDS, 0)[0].min() == 0


def test_factors_are_functions_of_seed_id_and_epoch() -> None:
    """Equal for an equal key whatever stands beside it, and different when any part of the key is."""
    strength = (0.4, 0.4, 0.4)
    factors, orders = draw_jitter(strength, 1, IDS[:8], 2)
    alone, order = draw_jitter(strength, 1, IDS[5:6], 2)
    assert torch.equal(alone[0], factors[5])
    assert order[0] == orders[5]
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.isclose(draw_jitter(strength, seed, IDS[:8], epoch)[0], factors).any()


@pytest.mark.parametrize("order", range(6))
def test_operations_are_those_of_torchvision_in_the_drawn_order(order: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    images, factors = noise(4), draw_jitter((0.8, 0.8, 0.8), 0, IDS[:4], 0)[0]
    found = apply_jitter(images, factors, torch.full((4,), order))
    for image, row, jittered in zip(images, factors.tolist(), found, strict=True):
        expected = image
        for operation in list(itertools.permutations(range(3)))[order]:
            expected = steps[operation](expected, row[operation])
        torch.testing.assert_close(jittered, expected, rtol=0, atol=2e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), factor=st.floats(0, 2))
def test_saturation_blends_with_grey(seed: int, factor: float) -> None:
    """factor x + (1 - factor) grey(x), clipped to [0, 1]."""
    image = noise(1, seed)
    found = apply_jitter(image, torch.tensor([[1.0, 1.0, factor]]), torch.zeros(1, dtype=torch.long))
    grey = (image * GREY).sum(1, keepdim=True)
    torch.testing.assert_close(found, (factor * image + (1 - factor) * grey).clamp(0, 1), rtol=0, atol=1e-6)


def test_each_image_gets_its_own_factors_and_order() -> None:
    """A batch gives what its images give alone; the input stays as it was."""
    images = noise(12)
    before = images.clone()
    factors, orders = draw_jitter((0.5, 0.5, 0.5), 0, IDS[:12], 0)
    assert len(set(orders.tolist())) > 2
    found = apply_jitter(images, factors, orders)
    for row in range(12):
        part = slice(row, row + 1)
        torch.testing.assert_close(
            found[part], apply_jitter(images[part], factors[part], orders[part]), rtol=0, atol=1e-6
        )
    assert torch.equal(images, before)
    assert found.min() >= 0
    assert found.max() <= 1


def test_no_strength_changes_nothing() -> None:
    images = noise(5)
    factors, orders = draw_jitter((0, 0, 0), 0, IDS[:5], 0)
    torch.testing.assert_close(apply_jitter(images, factors, orders), images, rtol=0, atol=1e-6)


def test_every_image_is_jittered_alone_whatever_the_mix_of_orders() -> None:
    """The images of one order are gathered in one list, and go back to their places."""
    images = noise(40)
    factors, orders = draw_jitter((0.4, 0.4, 0.4), 0, IDS[:40], 0)
    assert len(set(orders.tolist())) > 3
    found = apply_jitter(images, factors, orders)
    for row in range(40):
        alone = apply_jitter(images[row : row + 1], factors[row : row + 1], orders[row : row + 1])
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-6)
    assert apply_jitter(images[:0], factors[:0], orders[:0]).shape == (0, 3, 6, 5)


def test_constants_and_places_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to a device waits for it: one of the places, one of the factors, none of the grey weights."""
    images = noise(40)
    factors, orders = draw_jitter((0.4, 0.4, 0.4), 0, IDS[:40], 0)
    apply_jitter(images, factors, orders)
    copies: list[int] = []
    to = torch.Tensor.to

    def spy(self: torch.Tensor, *more: object) -> torch.Tensor:
        copies.append(self.numel())
        return to(self, *more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", spy)
    monkeypatch.setattr(torch, "tensor", None)
    apply_jitter(images, factors, orders)
    assert sorted(copies) == [40, 120]

"""The klt encoding's parts: an orthonormal transform, whole numbers that come back, a rate near its bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdcache.encodings import Encoder, fit, request
from hdcache.klt import (
    DEAD_ZONE,
    IDLE,
    LIMITS,
    bound,
    chunks,
    components,
    compressed,
    dct_matrix,
    fit_klt,
    integers,
    over_grid,
    rounded,
)
from hdcache.klt_decoding import unfold
from hdcache.taps import Tokens


def field(rows: int, grid: tuple[int, ...], channels: int, smooth: float, seed: int = 0) -> Tensor:
    """Correlated Gaussian tokens [R, N, D]; ``smooth`` of their energy is shared by all tokens of a row."""
    noise = torch.Generator().manual_seed(seed)
    tokens = math.prod(grid)
    own, shared = torch.randn(rows, tokens, channels, generator=noise), torch.randn(rows, 1, channels, generator=noise)
    mixed = math.sqrt(1 - smooth) * own + math.sqrt(smooth) * shared
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)))[0]
    return mixed * torch.arange(1, channels + 1).float() ** -1 @ rotation.T + 3 * rotation[0]


def tokens_of(patches: Tensor) -> Tokens:
    return Tokens(torch.zeros(patches.shape[0], 0, patches.shape[2]), patches)


def error(encoder: Encoder, patches: Tensor) -> float:
    """Relative RMSE of what comes back."""
    parts = {name: torch.from_numpy(np.array(part)) for name, part in encoder.encode(tokens_of(patches))[0].items()}
    found = encoder.decode(parts)
    assert isinstance(found, Tokens)
    return float((found.patches - patches).norm() / (patches - patches.mean((0, 1))).norm())


@given(grid=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_transform_keeps_energy_and_comes_back(grid: list[int], seed: int) -> None:
    z = torch.randn(2, 3, math.prod(grid), generator=torch.Generator().manual_seed(seed))
    matrices = [dct_matrix(side) for side in grid]
    there = over_grid(z, matrices)
    torch.testing.assert_close(there.square().sum(), z.square().sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(over_grid(there, [matrix.T for matrix in matrices]), z, rtol=1e-4, atol=1e-5)
    # The first frequency is the mean, whatever the order of the axes.
    torch.testing.assert_close(there[..., 0], z.mean(-1) * math.sqrt(z.shape[-1]), rtol=1e-4, atol=1e-5)


def test_the_transform_is_along_each_axis() -> None:
    z = torch.arange(6.0).reshape(1, 1, 2, 3)
    expected = dct_matrix(2) @ z @ dct_matrix(3).T
    torch.testing.assert_close(over_grid(z.flatten(2), [dct_matrix(2), dct_matrix(3)]), expected.flatten(2))


@pytest.mark.parametrize("dtype", LIMITS)
def test_every_whole_number_comes_back(dtype: str) -> None:
    limit = LIMITS[dtype]
    z = torch.arange(-limit, limit + 1).float()
    stored = integers(z, dtype)
    assert str(stored.dtype) == dtype
    assert torch.equal(unfold(torch.from_numpy(stored)).float(), z)
    beyond = torch.tensor([limit + 1.0, -limit - 1.0, math.inf, -math.inf, math.nan])
    expected = torch.tensor([limit, -limit, limit, -limit, 0.0])
    assert torch.equal(unfold(torch.from_numpy(integers(beyond, dtype))).float(), expected)


def test_small_numbers_of_either_sign_have_zeros_in_their_high_bits() -> None:
    z = torch.tensor([0.0, -1.0, 1.0, -2.0, 2.0])
    for dtype in ("uint8", "uint16"):
        assert integers(z, dtype).tolist() == [0, 1, 2, 3, 4]
    noise = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)).round()
    assert len(compressed(integers(noise, "uint8"))) < 0.95 * len(compressed(integers(noise, "int8")))


@given(st.floats(-1e4, 1e4), st.sampled_from([0.0, 0.1, 0.3]))
def test_rounding_has_a_dead_zone(value: float, dead_zone: float) -> None:
    found = float(rounded(torch.tensor([value]), dead_zone))
    assert found == round(found)
    assert abs(found) <= abs(value) + 0.5
    assert abs(value - found) <= 0.5 + dead_zone + 1e-3 + 1e-6 * abs(value)
    assert found == 0 if abs(value) < 0.499 + dead_zone else True
    assert found == -float(rounded(torch.tensor([-value]), dead_zone))


def test_the_bound_is_reverse_water_filling() -> None:
    """Closed forms: white tokens need log2(1 / rmse) bits; a component below the water needs none."""
    white = np.ones(16)
    assert bound(white, 0.5) == pytest.approx(1)
    assert bound(white, 0.05) == pytest.approx(math.log2(20))
    two = np.array([4.0, 1.0])
    # Water at 1 is where the second component drowns: error (1 + 1) / 5 of the energy.
    assert bound(two, math.sqrt(2 / 5)) == pytest.approx(0.5 * math.log2(4) / 2, rel=1e-6)
    assert bound(two, math.sqrt(3 / 5)) == pytest.approx(0.5 * math.log2(4 / 2) / 2, rel=1e-6)
    assert bound(white, 1.0) == bound(white, 2.0) == bound(np.zeros(3), 0.1) == 0
    assert math.isinf(bound(white, 0.0))


@settings(max_examples=20)
@given(
    fidelity=st.floats(0.02, 0.4),
    smooth=st.sampled_from([0.0, 0.5, 0.9]),
    grid=st.sampled_from([(4, 8), (2, 4, 4)]),
    seed=st.integers(0, 9),
)
def test_unseen_rows_have_the_error_that_was_asked_for(
    fidelity: float, smooth: float, grid: tuple[int, ...], seed: int
) -> None:
    encoder = fit(
        request("final", "klt", fidelity),
        tokens_of(field(500, grid, 12, smooth, seed)),
        tokens_of(field(20, grid, 12, smooth, seed + 100)),
        grid,
    )
    assert error(encoder, field(300, grid, 12, smooth, seed + 200)) == pytest.approx(fidelity, rel=0.1)


def test_a_dct_is_used_where_tokens_are_alike_and_nowhere_else() -> None:
    """And then it lies below the bound of tokens that know nothing of each other."""
    grid = (12, 12)
    asked = request("final", "klt", 0.2)
    rough, smooth = (tokens_of(field(120, grid, 16, share)) for share in (0.0, 0.95))
    assert fit(asked, rough, rough, grid).card.grid is None
    assert fit(asked, smooth, smooth).card.grid is None
    with_dct, without = fit(asked, smooth, smooth, grid).card, fit(asked, smooth, smooth).card
    assert with_dct.grid == grid
    assert with_dct.certificate.bits_per_value < 0.8 * without.certificate.bits_per_value
    bound_bits = with_dct.certificate.bound_bits
    assert bound_bits is not None
    assert with_dct.certificate.bits_per_value < bound_bits


@pytest.mark.parametrize("fidelity", [0.05, 0.2, 0.4])
def test_the_rate_is_near_the_bound(fidelity: float) -> None:
    data = tokens_of(field(200, (16, 16), 64, 0.0))
    seal = fit(request("final", "klt", fidelity), data, tokens_of(field(40, (16, 16), 64, 0.0, 1))).card.certificate
    assert seal.bound_bits is not None
    assert seal.bound_bits < seal.bits_per_value < seal.bound_bits + 0.6


def test_the_gain_makes_the_error_least() -> None:
    """Any other gain of a component is worse on the rows that it was found on."""
    patches = field(40, (4, 4), 8, 0.0)
    found = fit_klt("final", patches, 0.3, None)
    constants = {name: torch.from_numpy(value) for name, value in found.constants.items()}
    z = components(patches, constants, None)
    q = rounded(z, DEAD_ZONE)
    gain = constants["gain"][None, :, None]
    least = ((z - gain * q) ** 2).sum((0, 2))
    assert (found.constants["gain"] != 1).any()
    for other in (0.98, 1.02):
        assert (((z - other * gain * q) ** 2).sum((0, 2)) >= least).all()


def test_components_that_say_nothing_are_dropped() -> None:
    """Their share of the error is at most one hundredth."""
    patches = field(200, (4, 8), 48, 0.0)
    found = fit_klt("final", patches, 0.3, None)
    kept = found.constants["basis"].shape[1]
    assert 1 < kept < 48
    whole = fit(request("final", "klt", 0.3), tokens_of(patches), tokens_of(patches))
    assert whole.constants["basis"].shape[1] == kept
    assert error(whole, field(100, (4, 8), 48, 0.0, 1)) < 0.3 * (1 + IDLE) * 1.05


def test_the_codec_takes_codes_as_they_are_shortest() -> None:
    """One byte at a time, or two where neighbours are alike; the card says which, and reading needs no hint."""
    noise = torch.randn(64, 24, 256, generator=torch.Generator().manual_seed(0))
    frequency = (torch.arange(16)[:, None] + torch.arange(16)).flatten()
    smooth = over_grid(noise / (1 + frequency) ** 2, [dct_matrix(16).T] * 2)
    for patches, expected in ((noise, 0), (smooth / (1 + torch.arange(24))[:, None].sqrt(), 2)):
        found = fit_klt("final", patches.transpose(1, 2), 0.1, (16, 16))
        constants = {name: torch.from_numpy(value) for name, value in found.constants.items()}
        z = rounded(components(patches.transpose(1, 2), constants, found.grid), DEAD_ZONE)
        narrow = integers(z[-12:, found.wide :], "uint8")  # of the rows that the choice was made on
        sizes = {width: sum(len(compressed(run, typesize=width)) for run in chunks(narrow)) for width in (0, 2)}
        assert found.typesize == expected == min(sizes, key=lambda width: sizes[width])

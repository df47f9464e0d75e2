"""How far stored rows are from live ones, and how far they may be: by hand, and by what must always hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdcache.encodings import fit
from hdcache.extract.agreement import Sample, judged
from hdcache.extract.checked_rows import RowPlace
from hdcache.schema import TapCard
from hdcache.tap_requests import request
from hdcache.taps import Tokens


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_of(exact: torch.Tensor, copy: torch.Tensor) -> Sample:
    sample = Sample()
    for row in range(len(exact)):
        sample.add(RowPlace(0, row), exact[row].double(), copy[row].double())
    return sample


@pytest.fixture(scope="module")
def card() -> TapCard:
    """Of klt at 10 %, with certificate."""
    value = noise(0, 96, 16, 24)
    prefix = torch.zeros(96, 0, 24)
    return fit(request("final", "klt", 0.1), Tokens(prefix[:64], value[:64]), Tokens(prefix[64:], value[64:])).card


def verdict(
    sample: Sample, card: TapCard, precision: str = "fp32", min_cosine: float | None = None
) -> tuple[float, str, bool]:
    facts, fault, few = judged(
        sample, card, precision, prefix=False, min_cosine=min_cosine, named=lambda place: f"row {place.row}"
    )
    assert facts["good"] == (not fault)
    return facts["relative_error"]["all"], fault, few


@given(seed=st.integers(0, 1000), scale=st.floats(0.0, 0.5), rows=st.integers(4, 40))
def test_the_relative_error_is_that_of_the_certificate(seed: int, scale: float, rows: int) -> None:
    """Root of the squared error over the squared distances from the sample's mean vector, with its own bias taken out."""
    exact = noise(seed, rows, 16, 24)
    copy = exact + scale * noise(seed + 1, rows, 16, 24)
    sample = sample_of(exact, copy)
    flat = exact.double().flatten(0, 1)
    spread = float(((flat - flat.mean(0)) ** 2).sum()) * rows / (rows - 1)
    assert math.isclose(float(sample.spreads().sum()), spread, rel_tol=1e-9)
    error = float(((exact.double() - copy.double()) ** 2).sum())
    assert math.isclose(sum(sample.errors), error, rel_tol=1e-9, abs_tol=1e-12)


def test_what_is_as_it_should_be(card: TapCard) -> None:
    exact = noise(2, 32, 16, 24)
    copy = exact + 0.1 * noise(3, 32, 16, 24)
    error, fault, few = verdict(sample_of(exact, copy), card)
    assert 0.09 < error < 0.11
    assert (fault, few) == ("", False)


def test_one_row_that_is_another_ones(card: TapCard) -> None:
    """Among 64 it hardly moves the mean."""
    exact = noise(2, 64, 16, 24)
    copy = exact + 0.1 * noise(3, 64, 16, 24)
    copy[17] = exact[18]
    _, fault, few = verdict(sample_of(exact, copy), card)
    assert fault.startswith("row 17 has a relative error of 1.")
    assert "(1 of 64 rows have more)" in fault
    assert few


def test_a_little_too_much_everywhere(card: TapCard) -> None:
    exact = noise(2, 64, 16, 24)
    _, fault, few = verdict(sample_of(exact, exact + 0.25 * noise(3, 64, 16, 24)), card)
    assert fault.startswith("a relative error of 0.2")
    assert "over 64 rows, expected at most 0.1" in fault
    assert not few


def test_one_token_that_points_elsewhere(card: TapCard) -> None:
    exact = noise(2, 64, 16, 24)
    exact[5, 3] *= 0.2
    copy = exact + 0.05 * noise(3, 64, 16, 24)
    copy[5, 3] = -exact[5, 3]
    _, fault, _ = verdict(sample_of(exact, copy), card)
    assert "a smallest cosine of -1 (row 5), expected at least 0.7" in fault


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_wrong(value: float, card: TapCard) -> None:
    exact = noise(2, 16, 16, 24)
    copy = exact.clone()
    copy[3, 2, 1] = value
    _, fault, few = verdict(sample_of(exact, copy), card)
    assert "row 3" in fault
    assert few


def test_rounding_of_another_machine_is_allowed_and_no_more(card: TapCard) -> None:
    lossless = card.model_copy(
        update={"certificate": card.certificate.model_copy(update={"relative_rmse": 0.0, "cosine_min": 1.0})}
    )
    exact = noise(2, 32, 16, 24)
    for precision, fine, coarse in (("fp32", 5e-4, 5e-3), ("bf16", 0.015, 0.15)):
        assert verdict(sample_of(exact, exact * (1 + fine)), lossless, precision)[1] == ""
        assert verdict(sample_of(exact, exact + coarse * noise(3, 32, 16, 24)), lossless, precision)[1] != ""


def test_what_the_user_allows_is_all_that_counts(card: TapCard) -> None:
    exact = noise(2, 32, 16, 24)
    assert verdict(sample_of(exact, exact * 3), card, min_cosine=0.99)[1] == ""
    _, fault, _ = verdict(sample_of(exact, exact + 0.1 * noise(3, 32, 16, 24)), card, min_cosine=0.9999)
    assert fault.endswith("expected at least 0.9999")


def test_a_single_row_and_rows_that_are_all_zero(card: TapCard) -> None:
    exact = noise(2, 1, 16, 24)
    assert verdict(sample_of(exact, exact), card)[0] == 0.0
    zero = torch.zeros(8, 16, 24)
    assert verdict(sample_of(zero, zero), card)[:2] == (0.0, "")
    assert verdict(sample_of(zero, zero + 1), card)[1] != ""

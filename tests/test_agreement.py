"""How far stored rows are from live ones, and how far they may be: by hand, and by what must always hold."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdcache.encodings import Encoder, fit
from hdcache.extract.agreement import ERRORS, Sample, chance_to_find, codes_apart, judged, percent
from hdcache.extract.checked_rows import RowPlace
from hdcache.schema import TapCard
from hdcache.tap_requests import request
from hdcache.taps import Tokens


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_of(exact: torch.Tensor, copy: torch.Tensor, again: torch.Tensor | None = None) -> Sample:
    """Rows of live and stored values; ``again``: of live ones by way of the encoding, by default as stored."""
    sample = Sample()
    again = copy if again is None else again
    for row in range(len(exact)):
        apart = (copy[row] != again[row]).long().numpy()
        sample.add(RowPlace(0, row), exact[row].double(), copy[row].double(), again[row].double(), apart, None)
    return sample


def coded(value: torch.Tensor, encoder: Encoder, other: torch.Tensor) -> tuple[Sample, float]:
    """A store of ``value``, and ``other`` is what the teacher gives now; the sample, and the share of equal codes."""
    prefix = torch.zeros(len(value), 0, value.shape[-1])
    stored, live = (encoder.encode(Tokens(prefix, each))[0] for each in (value, other))
    copy, again = (encoder.decode({k: torch.from_numpy(v) for k, v in part.items()}) for part in (stored, live))
    assert isinstance(copy, Tokens)
    assert isinstance(again, Tokens)
    apart = [codes_apart(stored[name], live[name], encoder.card, name).reshape(len(value), -1) for name in stored]
    step = float(encoder.constants["step"][0]) if encoder.card.encoding == "klt" else None
    sample = Sample()
    for row, codes in enumerate(np.concatenate(apart, 1)):
        sample.add(
            RowPlace(0, row), other[row].double(), copy.patches[row].double(), again.patches[row].double(), codes, step
        )
    return sample, float(sample.codes[0] / sample.codes.sum())


def fitted(encoding: str) -> Encoder:
    value = noise(0, 96, 16, 24)
    prefix = torch.zeros(96, 0, 24)
    asked = request("final", encoding, 0.1 if encoding == "klt" else None)
    return fit(asked, Tokens(prefix[:64], value[:64]), Tokens(prefix[64:], value[64:]))


@pytest.fixture(scope="module")
def card() -> TapCard:
    """Of klt at 10 %, with certificate."""
    return fitted("klt").card


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


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8", "klt"])
@pytest.mark.parametrize(("precision", "fine", "coarse"), [("fp32", 5e-4, 5e-3), ("bf16", 0.015, 0.06)])
def test_rounding_of_another_machine_is_allowed_and_no_more(
    encoding: str, precision: str, fine: float, coarse: float
) -> None:
    """Of a value's own size, whatever the encoding's own error is: without it a klt tap would hide ten times as much."""
    encoder, exact = fitted(encoding), noise(2, 32, 16, 24)
    for seed in range(8):
        fault = verdict(coded(exact, encoder, exact + fine * noise(3 + seed, 32, 16, 24))[0], encoder.card, precision)[
            1
        ]
        assert fault == ""
    fault = verdict(coded(exact, encoder, exact + coarse * noise(3, 32, 16, 24))[0], encoder.card, precision)[1]
    assert fault
    if encoding == "klt":
        assert re.match(
            r"values \S+ % from those that were stored, where other hardware makes \S+ % at most \(\S+ % of", fault
        )


def test_one_row_that_was_computed_otherwise(card: TapCard) -> None:
    """Far within what klt at 10 % may do to a row; among 64 it does not move the mean."""
    encoder, exact = fitted("klt"), noise(2, 64, 16, 24)
    other = exact.clone()
    other[9] += 0.1 * noise(3, 16, 24)
    sample, equal = coded(exact, encoder, other)
    assert 0.99 < equal < 1
    _, fault, few = verdict(sample, card, "bf16")
    assert "; row 9: 9" in fault
    assert few


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8", "klt"])
@pytest.mark.parametrize("factor", [0.97, 0.995, 1.002, 1.03])
def test_a_scale_that_is_off_is_found_under_every_encoding(encoding: str, factor: float) -> None:
    encoder, exact = fitted(encoding), noise(2, 64, 16, 24)
    fault = verdict(coded(exact, encoder, exact * factor)[0], encoder.card)[1]
    found = re.match(r"all values that the teacher gives now are (\S+) % (larger|smaller) than those stored", fault)
    assert found, fault
    assert math.isclose(float(found[1]), 100 * abs(factor - 1), rel_tol=0.3)
    assert found[2] == ("larger" if factor > 1 else "smaller")


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-7, 0.03), common=st.booleans(), rows=st.integers(8, 40))
def test_rounding_has_no_bias(seed: int, scale: float, common: bool, rows: int) -> None:
    """Neither errors of their own in each row nor the same ones in all (class tokens that hardly differ) pass for a scale."""
    exact = 3 * noise(seed, 1, 1, 48) + (0.01 if common else 1.0) * noise(seed + 1, rows, 4, 48)
    stored = exact + scale * exact.abs() * noise(seed + 2, *([1, 1] if common else [rows, 4]), 48)
    live = exact + scale * exact.abs() * noise(seed + 3, *([1, 1] if common else [rows, 4]), 48)
    found = sample_of(live, stored, live).scale()
    assert found is not None
    low, high, *errors = found
    assert low <= high * (1 + 1e-12)
    assert low - 1 <= 1e-6 + ERRORS * errors[0]
    assert 1 - high <= 1e-6 + ERRORS * errors[1]


def test_the_standard_error_is_that_of_chance() -> None:
    """Slopes of many samples scatter by what each says of itself."""
    slopes, stated = [], []
    for seed in range(200):
        stored = noise(2 * seed, 24, 4, 32) + 2
        found = sample_of(stored, stored, stored + 0.05 * noise(2 * seed + 1, 24, 4, 32)).scale()
        assert found is not None
        slopes.append(found[0])
        stated.append(found[2])
    # Rows and channels both tell of the same noise here: a root of two more than it is.
    assert 1.0 < np.mean(stated) / np.std(slopes) < 2.0


def test_a_channel_that_shifted(card: TapCard) -> None:
    exact = noise(2, 64, 16, 24)
    other = exact.clone()
    other[..., 5] += 0.1
    sample = sample_of(exact, exact, other)
    assert [channel for channel, _ in sample.shifted("bf16")] == [5]
    fault = verdict(sample, card, "bf16")[1]
    assert fault.startswith("the mean of 1 channels of 24 shifted, that of channel 5 by +") or fault.startswith(
        "the mean of 1 channel of 24 shifted, that of channel 5 by +"
    )
    assert sample_of(exact, exact, exact + 0.02 * noise(3, 64, 16, 24)).shifted("bf16") == []


@given(
    one=st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=20),
    other=st.lists(st.floats(width=16, allow_nan=False), min_size=20, max_size=20),
)
def test_floats_are_as_far_apart_as_there_are_others_between(one: list[float], other: list[float]) -> None:
    """Against numbering all half-precision values in order."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    number = {float(value): place for place, value in enumerate(np.unique(every[~np.isnan(every)]))}
    a, b = np.array(one, np.float16), np.array(other[: len(one)], np.float16)
    found = codes_apart(a, b, fitted_fp16().card, "values")
    assert found.tolist() == [abs(number[float(x)] - number[float(y)]) for x, y in zip(a, b, strict=True)]


@functools.cache
def fitted_fp16() -> Encoder:
    return fitted("fp16")


def test_codes_of_every_type(card: TapCard) -> None:
    """bf16 bits count through zero, klt codes are unfolded (0, -1, 1, -2 ... are stored as 0, 1, 2, 3 ...)."""
    half = fitted("bf16").card
    bits = torch.tensor([1.0, -0.0, 1e-40, 2.0]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    others = torch.tensor([1.0078125, 0.0, -1e-40, 2.0]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    tiny = 2 * int(bits[2])
    assert codes_apart(bits, others, half, "values").tolist() == [1, 0, tiny, 0]
    stored, live = np.array([0, 1, 2, 3], np.uint8), np.array([1, 2, 2, 254], np.uint8)
    assert codes_apart(stored, live, card, "codes").tolist() == [1, 2, 0, 129]
    classes = np.array([3, 5], np.uint16), np.array([3, 900], np.uint16)
    assert codes_apart(*classes, half, "classes").tolist() == [0, 2]


@given(rows=st.integers(1, 60), data=st.data())
def test_the_chance_to_find_a_fault(rows: int, data: st.DataObject) -> None:
    looked, faulty = data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))
    expected = 1 - math.comb(rows - faulty, looked) / math.comb(rows, looked)
    assert math.isclose(chance_to_find(looked, rows, faulty), expected, abs_tol=1e-12)


def test_shares_are_cut_off() -> None:
    """One code in a million that differs does not read as none."""
    assert [percent(share) for share in (1, 1 - 1e-6, 0.5, 0)] == ["100 %", "99.99 %", "50.00 %", "0.00 %"]


def test_what_the_user_allows_leaves_all_other_bounds(card: TapCard) -> None:
    exact = noise(2, 32, 16, 24)
    assert verdict(sample_of(exact, exact * 3), card, min_cosine=0.99)[1].startswith("row ")
    _, fault, _ = verdict(sample_of(exact, exact + 0.1 * noise(3, 32, 16, 24)), card, min_cosine=0.9999)
    assert fault.endswith("expected at least 0.9999")
    away = exact.clone()
    away[5, 3] = -0.05 * away[5, 3]
    assert "a smallest cosine" in verdict(sample_of(exact, away), card)[1]
    assert verdict(sample_of(exact, away), card, min_cosine=-1)[1] == ""


def test_a_single_row_and_rows_that_are_all_zero(card: TapCard) -> None:
    exact = noise(2, 1, 16, 24)
    assert verdict(sample_of(exact, exact), card)[0] == 0.0
    zero = torch.zeros(8, 16, 24)
    assert verdict(sample_of(zero, zero), card)[:2] == (0.0, "")
    assert verdict(sample_of(zero, zero + 1), card)[1] != ""

"""Encodings: exact where they promise it, within the stated error elsewhere, never silently clipped."""

from __future__ import annotations

import math
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hdcache.encodings import Encoder, fit, request, rounded
from hdcache.errors import UsageError
from hdcache.klt_decoding import unfold
from hdcache.row_arrays import compresses
from hdcache.schema import TapRequest
from hdcache.shards import LEVEL
from hdcache.taps import Tokens

SPECTRA = {
    "flat": lambda d: torch.ones(d),
    "power": lambda d: torch.arange(1, d + 1).float() ** -1,
    "steep": lambda d: torch.exp(-torch.arange(d) / 4.0),
    "outlier": lambda d: torch.cat([torch.tensor([200.0]), torch.ones(d - 1)]),
}


def gaussian(rows: int, tokens: int, channels: int, spectrum: str = "power", prefix: int = 1, seed: int = 0) -> Tokens:
    """Correlated Gaussian tokens with a mean: the same rotation for every seed."""
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)))[0]
    scale = SPECTRA[spectrum](channels)
    noise = torch.Generator().manual_seed(seed)
    patches = torch.randn(rows, tokens, channels, generator=noise) * scale @ rotation.T + 3 * rotation[0]
    return Tokens(torch.randn(rows, prefix, channels, generator=noise), patches)


def tokens_of(patches: Tensor, prefix: int = 0) -> Tokens:
    return Tokens(torch.zeros(patches.shape[0], prefix, patches.shape[2]), patches)


def stored(encoder: Encoder, value: Tokens | Tensor) -> tuple[dict[str, Tensor], int]:
    """Encoded parts as a store returns them, checked against the card."""
    parts, clipped = encoder.encode(value)
    assert parts.keys() == encoder.card.arrays.keys()
    for name, part in parts.items():
        assert part.shape[1:] == encoder.card.arrays[name].shape
        assert str(part.dtype) == encoder.card.arrays[name].dtype
    return {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}, clipped


def again(encoder: Encoder, value: Tokens | Tensor) -> Any:
    return encoder.decode(stored(encoder, value)[0])


def bits(value: Tensor) -> NDArray[np.int32]:
    return value.contiguous().numpy().view(np.int32)


floats = st.lists(st.floats(width=32), min_size=12, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float32))
awkward = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-40, 3.4e38, 1.0, -1.5, 65504.0, 1e-8])


# What is asked for


@pytest.mark.parametrize(
    ("tap", "encoding", "fidelity", "kind", "asked"),
    [
        ("final", None, None, "klt", 0.1),
        ("final", None, 0.02, "klt", 0.02),
        ("block1.out", "int8", None, "int8", None),
        ("block1.rel.qk", None, 0.1, "sqrt8", None),
        ("block1.rel.qk", "fp16", None, "fp16", None),
        ("block1.rel.qk@2", "bf16", None, "sqrt8", None),
        ("pooled", "klt", None, "fp16", None),
        ("logits", "bf16", None, "bf16", None),
        ("pooled", "sqrt8", None, "fp16", None),
    ],
)
def test_a_request_fits_the_tap(
    tap: str, encoding: str | None, fidelity: float | None, kind: str, asked: float | None
) -> None:
    assert request(tap, encoding, fidelity) == TapRequest(tap=tap, encoding=kind, fidelity=asked)


@pytest.mark.parametrize(
    ("tap", "encoding", "fidelity", "message"),
    [
        ("final", "klr", None, "unknown encoding 'klr'; did you mean 'klt'"),
        ("final", None, 0.0, "fidelity 0.0 must lie between 0 and 1"),
        ("final", None, 1.0, "must lie between 0 and 1"),
        ("final", None, math.nan, "fidelity nan must lie between 0 and 1"),
        ("final", "int8", 0.1, "fidelity belongs to the klt encoding; int8 has a fixed error"),
        ("final", "sqrt8", None, "sqrt8 is for relation matrices, final is a token tap"),
        ("blocks.3", None, None, "unknown tap 'blocks.3'"),
    ],
)
def test_requests_that_cannot_be_meant(tap: str, encoding: str | None, fidelity: float | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(tap, encoding, fidelity)


# Floats


@settings(max_examples=60)
@given(values=floats)
def test_fp32_keeps_every_bit(values: Tensor) -> None:
    """NaN, infinities, -0 and subnormals included, for tokens, their prefix, vectors and relations."""
    for x in (values, awkward):
        tokens = Tokens(x[:4].view(1, 2, 2), x[4:].view(1, 4, 2))
        encoder = fit(request("final", "fp32", None), gaussian(1, 4, 2, prefix=2), gaussian(1, 4, 2, prefix=2))
        found = again(encoder, tokens)
        np.testing.assert_array_equal(bits(found.prefix), bits(tokens.prefix))
        np.testing.assert_array_equal(bits(found.patches), bits(tokens.patches))
        vector = fit(request("pooled", "fp32", None), torch.ones(1, 12), torch.ones(1, 12))
        np.testing.assert_array_equal(bits(again(vector, x[None])), bits(x[None]))


@settings(max_examples=100)
@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=8, max_size=8).map(torch.tensor))
@pytest.mark.parametrize(("kind", "digits", "smallest"), [("fp16", 11, -24), ("bf16", 8, -133)])
def test_short_floats_are_within_half_a_unit(kind: str, digits: int, smallest: int, values: Tensor) -> None:
    encoder = fit(request("pooled", kind, None), torch.ones(1, 8), torch.ones(1, 8))
    found = again(encoder, values.float()[None])[0].double()
    exact = values.double()
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-300))) - digits + 1).clamp_min(2.0**smallest)
    assert ((found - exact).abs() <= unit / 2).all()


@pytest.mark.parametrize("kind", ["fp16", "int8", "klt"])
def test_values_beyond_half_precision_are_clipped_and_counted(kind: str) -> None:
    """A prefix, and fp16 patches, that do not fit are held at 65504 and counted."""
    data = gaussian(40, 4, 3)
    encoder = fit(request("final", kind, None), data, data)
    value = Tokens(data.prefix[:1].clone(), data.patches[:1])
    value.prefix[0, 0, :2] = torch.tensor([1e6, -math.inf])
    parts, clipped = stored(encoder, value)
    assert clipped == 2
    assert encoder.decode(parts).prefix[0, 0, :2].tolist() == [65504, -65504]
    if kind == "fp16":
        assert stored(encoder, Tokens(data.prefix[:1], value.patches * 1e9))[1] == 12


def test_bf16_prefix_and_patches_are_its_bits() -> None:
    data = gaussian(2, 4, 3)
    encoder = fit(request("final", "bf16", None), data, data)
    found = again(encoder, data)
    assert torch.equal(found.patches, data.patches.bfloat16().float())
    assert torch.equal(found.prefix, data.prefix.bfloat16().float())


# int8


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), offset=st.floats(-100, 100), spread=st.floats(1e-3, 1e3))
def test_int8_is_within_half_a_scale_inside_the_calibrated_range(seed: int, offset: float, spread: float) -> None:
    x = torch.rand(20, 5, 3, generator=torch.Generator().manual_seed(seed)) * spread + offset
    encoder = fit(request("final", "int8", None), tokens_of(x), tokens_of(x))
    inside = x.amin((0, 1)) + (x.amax((0, 1)) - x.amin((0, 1))) * torch.rand(7, 5, 3)
    parts, clipped = stored(encoder, tokens_of(inside))
    rounding = 2e-6 * (abs(offset) + spread)
    limit = torch.from_numpy(np.array(encoder.constants["scale"])) / 2 + rounding
    assert clipped == 0
    assert ((encoder.decode(parts).patches - inside).abs() <= limit).all()


def test_int8_clips_to_its_range_and_counts() -> None:
    x = gaussian(20, 5, 3).patches
    encoder = fit(request("final", "int8", None), tokens_of(x), tokens_of(x))
    far = x[:1].clone()
    far[0, 0] = 1e6
    far[0, 1] = -1e6
    far[0, 2] = math.nan
    parts, clipped = stored(encoder, tokens_of(far))
    assert clipped == 9
    codes = unfold(parts["codes"])
    assert (codes[0, :, 0] == 127).all()
    assert (codes[0, :, 1] == -127).all()


# klt


@pytest.mark.parametrize("fidelity", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_klt_keeps_its_fidelity_on_rows_it_has_not_seen(spectrum: str, fidelity: float) -> None:
    """The relative RMSE on fresh rows is within a tenth of what was asked, and the certificate says the same."""
    encoder = fit(
        request("final", "klt", fidelity), gaussian(60, 40, 24, spectrum), gaussian(20, 40, 24, spectrum, seed=1)
    )
    fresh = gaussian(40, 40, 24, spectrum, seed=2)
    found = again(encoder, fresh)
    centred = fresh.patches - fresh.patches.mean((0, 1))
    error = float((found.patches - fresh.patches).norm() / centred.norm())
    assert 0.9 * fidelity < error < 1.1 * fidelity
    assert encoder.card.certificate.relative_rmse == pytest.approx(error, rel=0.1)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), fidelity=st.floats(0.01, 0.3), spectrum=st.sampled_from(sorted(SPECTRA)))
def test_klt_error_of_each_token_is_bounded(seed: int, fidelity: float, spectrum: str) -> None:
    """step sqrt(D) / 2 where no component was dropped and nothing saturated."""
    data = gaussian(12, 10, 16, spectrum, seed=seed)
    encoder = fit(request("final", "klt", fidelity), data, data)
    assert encoder.constants["basis"].shape == (16, 16)
    fresh = gaussian(6, 10, 16, spectrum, seed=seed + 1)
    parts, clipped = stored(encoder, fresh)
    error = (encoder.decode(parts).patches - fresh.patches).norm(dim=-1)
    limit = float(encoder.constants["step"][0]) * math.sqrt(16) / 2
    assert clipped or float(error.max()) <= limit * 1.001 + 1e-5 * float(fresh.patches.abs().max())


def test_klt_beats_equal_bits_per_channel() -> None:
    """The point of the transform: at the error of int8, fewer bits on correlated features."""
    data, held = gaussian(60, 40, 24, "steep"), gaussian(20, 40, 24, "steep", seed=1)
    int8 = fit(request("final", "int8", None), data, held).card.certificate
    klt = fit(request("final", "klt", int8.relative_rmse), data, held).card.certificate
    assert klt.bits_per_value < 0.8 * int8.bits_per_value


def test_klt_drops_components_that_are_always_zero_and_widens_the_large() -> None:
    """A narrow flat rest is dropped after enough tokens; an outlier component gets 16 bits; shapes add up."""
    few = gaussian(4, 20, 16, "steep")
    many = gaussian(40, 20, 16, "steep")
    assert fit(request("final", "klt", 0.2), few, few).constants["basis"].shape[1] == 16
    dropped = fit(request("final", "klt", 0.2), many, many)
    kept = dropped.constants["basis"].shape[1]
    assert kept < 16
    assert sum(dropped.card.arrays[name].shape[0] for name in ("codes", "wide") if name in dropped.card.arrays) == kept
    assert dropped.card.certificate.relative_rmse < 0.22
    outlier = gaussian(40, 20, 16, "outlier")
    wide = fit(request("final", "klt", 0.01), outlier, outlier)
    assert wide.card.arrays["wide"].shape == (1, 20)
    assert wide.card.arrays["codes"].shape == (15, 20)
    assert wide.card.certificate.saturated == 0


def test_klt_with_wide_components_only() -> None:
    data = gaussian(10, 20, 4, "flat")
    encoder = fit(request("final", "klt", 0.002), data, data)
    assert encoder.card.arrays.keys() == {"wide", "prefix"}
    assert float((again(encoder, data).patches - data.patches).norm() / data.patches.norm()) < 0.002


def test_klt_counts_what_it_clips() -> None:
    """Values far outside what calibration saw, and NaN, are clipped to the range and counted."""
    data = gaussian(40, 20, 16, "outlier")
    encoder = fit(request("final", "klt", 0.01), data, data)
    assert {"wide", "codes"} <= encoder.card.arrays.keys()
    far = Tokens(data.prefix[:1], data.patches[:1] * 1e6)
    parts, clipped = stored(encoder, far)
    wide, codes = unfold(parts["wide"]), unfold(parts["codes"])
    assert clipped == int((wide.abs() == 32767).sum() + (codes.abs() == 127).sum()) > 0
    assert codes.min() >= -127
    assert stored(encoder, Tokens(data.prefix[:1], torch.full_like(far.patches, math.nan)))[1] == far.patches.numel()
    assert fit(request("final", "klt", 0.01), data, far).card.certificate.saturated == clipped


def test_klt_refuses_a_fidelity_that_16_bits_cannot_hold() -> None:
    data = gaussian(40, 20, 16, "outlier")
    with pytest.raises(UsageError, match=r"tap final: fidelity 1e-05 needs more than 16 bits .* encoding fp16 or fp32"):
        fit(request("final", "klt", 1e-5), data, data)


@pytest.mark.parametrize("kind", ["klt", "int8"])
@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, -1e30, 1e-30])
def test_constant_features_come_back(kind: str, level: float) -> None:
    x = tokens_of(torch.full((3, 4, 5), level))
    encoder = fit(request("final", kind, None), x, x)
    torch.testing.assert_close(again(encoder, x).patches, x.patches, rtol=1e-6, atol=1e-12)
    assert encoder.card.certificate.saturated == 0


def test_one_token_that_differs_among_many_does_not_stop_the_fit() -> None:
    """The bisection looks at a part of the tokens; the part may not vary at all."""
    x = torch.zeros(40, 1000, 2)
    x[0, 1] = 5
    encoder = fit(request("final", "klt", None), tokens_of(x), tokens_of(x))
    torch.testing.assert_close(again(encoder, tokens_of(x)).patches, x, rtol=0, atol=0.5)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "klt"])
@pytest.mark.parametrize(
    ("rows", "tokens", "channels", "prefix"), [(1, 4, 8, 1), (1, 1, 6, 0), (2, 3, 32, 5), (9, 4, 1, 0)]
)
def test_small_calibrations(kind: str, rows: int, tokens: int, channels: int, prefix: int) -> None:
    """One row, fewer tokens than channels, one channel, no prefix: shapes hold and calibration comes back."""
    data = gaussian(rows, tokens, channels, "flat", prefix)
    encoder = fit(request("final", kind, 0.05 if kind == "klt" else None), data, data)
    found = again(encoder, data)
    assert found.prefix.shape == data.prefix.shape
    spread = float((data.patches - data.patches.mean((0, 1))).norm())
    assert float((found.patches - data.patches).norm()) <= max(0.06 * spread, 0.02)
    torch.testing.assert_close(found.prefix, data.prefix, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "klt"])
def test_rows_are_coded_one_by_one(kind: str) -> None:
    """Any number of rows gives what each row gives alone, none included."""
    data = gaussian(20, 6, 8)
    encoder = fit(request("final", kind, None), data, data)
    whole, _ = stored(encoder, data)
    for part in (slice(0, 0), slice(3, 4), slice(0, 20)):
        one, _ = stored(encoder, Tokens(data.prefix[part], data.patches[part]))
        for name in whole:
            assert torch.equal(one[name], whole[name][part])
        found: Any = encoder.decode({name: value[part] for name, value in whole.items()})
        expected: Any = encoder.decode(whole)
        torch.testing.assert_close(found.patches, expected.patches[part], rtol=0, atol=1e-5)
        assert torch.equal(found.prefix, expected.prefix[part])


@pytest.mark.parametrize("kind", ["int8", "klt"])
def test_decoding_in_bf16_is_near(kind: str) -> None:
    data = gaussian(20, 6, 8)
    encoder = fit(request("final", kind, None), data, data)
    parts, _ = stored(encoder, data)
    low: Any = encoder.decode(parts, torch.bfloat16)
    assert low.patches.dtype == low.prefix.dtype == torch.bfloat16
    assert float((low.patches.float() - data.patches).norm() / data.patches.norm()) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "klt"])
def test_constants_are_copied_once_and_decode_as_the_formula_does(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per device and dtype, in inference mode or not; what comes out is the plain formula's."""
    data = gaussian(20, 6, 8)
    encoder = fit(request("final", kind, None), data, data)
    parts, _ = stored(encoder, data)
    constants = {name: torch.from_numpy(np.array(value)) for name, value in encoder.constants.items()}
    z = torch.cat([unfold(parts[name]).to(dtype) for name in ("wide", "codes") if name in parts], dim=1).transpose(1, 2)
    if kind == "klt":
        expected = z @ (constants["basis"] * (constants["step"] * constants["gain"])).T.to(dtype) + constants[
            "mean"
        ].to(dtype)
    else:
        expected = z * constants["scale"].to(dtype) + constants["offset"].to(dtype)
    with torch.inference_mode():
        encoder.encode(data)
        first: Any = encoder.decode(parts, dtype)
    monkeypatch.setattr(torch, "from_numpy", None)
    encoder.encode(data)
    second: Any = encoder.decode(parts, dtype)
    assert torch.equal(first.patches, second.patches)
    # The sum is rounded once, where the formula rounds product and sum.
    torch.testing.assert_close(first.patches, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert not any(value.is_inference() for held in encoder._held.values() for value in held.values())


def test_nothing_becomes_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no float64, so tensors go to the CPU before they are widened."""
    copied: list[int] = []
    to_cpu = Tensor.cpu

    def cpu(self: Tensor, *more: Any) -> Tensor:
        assert self.dtype != torch.float64, "widened before it went to the CPU"
        copied.append(self.numel())
        return to_cpu(self, *more)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    data = gaussian(20, 6, 8)
    for kind in ("klt", "int8"):
        fit(request("final", kind, None), data, data)
    assert copied


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "klt"])
def test_fitting_twice_gives_the_same_bits(kind: str) -> None:
    data, held = gaussian(30, 16, 12), gaussian(5, 16, 12, seed=1)
    first, second = (fit(request("final", kind, None), data, held) for _ in range(2))
    assert first.card == second.card
    for name in first.constants:
        assert first.constants[name].tobytes() == second.constants[name].tobytes()


# Relations


def test_sqrt8_rows_are_distributions_again() -> None:
    """Rows sum to 1, and each probability is within what one step of its root allows."""
    exact = torch.softmax(3 * torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)), -1)
    encoder = fit(request("block1.rel.vv", None, None), exact, exact)
    found = again(encoder, exact)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 9), rtol=0, atol=1e-6)
    # One rounding moves a root by 1/510; nine of them move the sum of a row by less than 9 / 510 * 2.
    assert ((found - exact).abs() <= 2 * exact.sqrt() / 510 + 510**-2 + 0.03 * exact).all()
    one = torch.zeros(1, 2, 9, 9)
    one[..., 4] = 1
    assert torch.equal(again(encoder, one), one)


# Certificates


@pytest.mark.parametrize("kind", ["fp16", "int8", "klt", "sqrt8"])
def test_certificate_equals_an_independent_computation(kind: str) -> None:
    """Relative RMSE, cosines and bits per value, recomputed with NumPy from what is stored."""
    if kind == "sqrt8":
        data: Any = torch.softmax(torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(0)), -1)
        tap, held = "block1.rel.qk", data[6:]
    else:
        data, held, tap = gaussian(20, 16, 12), gaussian(10, 16, 12, seed=1), "final"
    encoder = fit(request(tap, kind, None), data, held)
    seal = encoder.card.certificate
    exact = (held if isinstance(held, Tensor) else held.patches).double().numpy()
    found = again(encoder, held)
    copy = (found if isinstance(found, Tensor) else found.patches).double().numpy()
    exact, copy = exact.reshape(-1, exact.shape[-1]), copy.reshape(-1, exact.shape[-1])
    rmse = np.sqrt(((exact - copy) ** 2).mean() / ((exact - exact.mean(0)) ** 2).mean())
    cosine = (exact * copy).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(copy, axis=1)
    assert seal.relative_rmse == pytest.approx(rmse, rel=1e-5)
    assert seal.cosine_mean == pytest.approx(cosine.mean(), rel=1e-5)
    assert seal.cosine_min == pytest.approx(cosine.min(), rel=1e-5)
    assert (seal.calibration_rows, seal.heldout_rows) == (
        12 if kind == "sqrt8" else 20,
        len(held if isinstance(held, Tensor) else held.patches),
    )
    count = 0
    for name, part in encoder.encode(held)[0].items():
        if name == "prefix":
            continue
        codec = numcodecs.Blosc("zstd", LEVEL, numcodecs.Blosc.BITSHUFFLE)
        chunks = [np.ascontiguousarray(part[i : i + 32]) for i in range(0, len(part), 32)]
        count += sum(
            len(codec.encode(chunk)) if compresses(str(part.dtype), name) else chunk.nbytes for chunk in chunks
        )
    assert seal.bits_per_value == pytest.approx(8 * count / exact.size, rel=1e-5)
    if kind == "fp16":
        assert seal.bits_per_value == 16


@pytest.mark.parametrize("kind", ["int8", "klt"])
def test_a_certificate_has_no_digits_that_threads_decide(kind: str) -> None:
    """Its record is hashed, and the last bits of a sum depend on how many threads made it."""
    seal = fit(request("final", kind, None), gaussian(20, 16, 12), gaussian(10, 16, 12, seed=1)).card.certificate
    measured = {name: value for name, value in seal.model_dump().items() if isinstance(value, float)}
    assert len(measured) == (5 if kind == "klt" else 4)
    assert measured == {name: float(f"{value:.6g}") for name, value in measured.items()}
    assert rounded({"a": 0.1234567, "b": 1234567, "c": 1.2345674e-9, "d": 0.0}) == {
        "a": 0.123457, "b": 1234567, "c": 1.23457e-9, "d": 0.0,
    }  # fmt: skip


def test_a_certificate_is_measured_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relation matrices of all rows in float64 would fill the memory."""
    exact = torch.softmax(torch.randn(37, 2, 5, 5, generator=torch.Generator().manual_seed(0)), -1)
    sizes: list[int] = []
    encode = Encoder.encode

    def spy(self: Encoder, value: Any) -> Any:
        sizes.append(len(value))
        return encode(self, value)

    monkeypatch.setattr(Encoder, "encode", spy)
    certificate = fit(request("block1.rel.vv", None, None), exact, exact).card.certificate
    assert sizes == [8, 8, 8, 8, 5]
    assert certificate.heldout_rows == 37


@pytest.mark.parametrize("grid", [None, (4, 4), (2, 3, 4), (24, 24)], ids=str)
def test_codes_of_a_teacher_in_bf16_are_made_in_bf16(grid: tuple[int, ...] | None) -> None:
    """Their error is that of codes made in fp32, to two thousandths; finer codes are not made so."""
    tokens = math.prod(grid) if grid else 16
    smooth = torch.randn(1, tokens, 1, generator=torch.Generator().manual_seed(5))
    rows, held = (gaussian(40, tokens, 24, seed=seed) for seed in (0, 1))
    rows, held = (Tokens(value.prefix, value.patches + 4 * smooth.cumsum(1) / tokens**0.5) for value in (rows, held))
    for fidelity, expected in ((0.04, "fp32"), (0.05, "bf16"), (0.1, "bf16"), (None, "bf16")):
        asked = request("final", "klt", fidelity)
        single, half = (fit(asked, rows, held, grid, precision=precision) for precision in ("fp32", "bf16"))
        assert (single.card.code_precision, half.card.code_precision) == ("fp32", expected)
        errors = [each.card.certificate.relative_rmse for each in (single, half)]
        assert errors[1] == pytest.approx(errors[0], rel=2e-3)
        for name, codes in single.encode(held)[0].items():
            other = half.encode(held)[0][name]
            assert (codes != other).mean() < 0.05
    assert fit(request("final", "int8", None), rows, held, grid, precision="bf16").card.code_precision == "fp32"
    none = Tokens(held.prefix[:0], held.patches[:0])
    assert {name: part.shape for name, part in half.encode(none)[0].items()} == {
        name: (0, *card.shape) for name, card in half.card.arrays.items()
    }


@pytest.mark.parametrize("grid", [None, (4, 4), (24, 24)], ids=str)
def test_a_cpu_without_bf16_makes_the_same_codes(grid: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same factors, so that shards of two machines do not differ more than those of one in fp32."""
    tokens = math.prod(grid) if grid else 16
    rows = gaussian(20, tokens, 24)
    encoder = fit(request("final", "klt", 0.1), rows, rows, grid, precision="bf16")
    with_it = encoder.encode(rows)[0]
    monkeypatch.setattr("hdcache.klt.multiplies_bf16", lambda: False)
    without = encoder.encode(rows)[0]
    for name, codes in with_it.items():
        assert (codes != without[name]).mean() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", [None, (4, 4)], ids=str)
def test_a_gpu_makes_the_same_codes_in_bf16(grid: tuple[int, ...] | None) -> None:
    rows = gaussian(20, 16, 24)
    encoder = fit(request("final", "klt", 0.1), rows, rows, grid, precision="bf16")
    there = Tokens(rows.prefix.cuda(), rows.patches.cuda())
    for name, codes in encoder.encode(rows)[0].items():
        assert (codes != encoder.encode(there)[0][name]).mean() < 0.01

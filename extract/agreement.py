"""How far stored rows are from what their teacher gives, and how far they may be.

For every tap the sample is held to its birth certificate, which was measured on H rows that the encoding was not fitted on.

==============  =======================================================================================================
whole sample    relative RMSE at most (1.2 + 1 / sqrt(rows) + 1 / sqrt(H)) times the certificate's: a fifth for other data,
                the rest for what a few rows say of all
each row        its error over its own spread (the sample's mean spread, if larger) at most 4 times the certificate's relative
                RMSE, and never above 0.7 where that holds for a whole sample: another image's row has about 1.4
each token      1 - cosine at most 16 times the certificate's largest: four times the error at the same length
class tokens    kept apart and not certified: relative error at most the rounding of their type
==============  =======================================================================================================

What other hardware may round otherwise (:data:`ROUNDING`, of a value's own size) comes on top; lossless taps have no more than
that. ``min_cosine`` replaces the bound on cosines, and no other.

The encoding's own error would hide a teacher that changed by less. So live rows are encoded as the stored ones were, and what
comes out is compared with what is stored: on the machine that wrote a store, all codes are equal.

==============  =======================================================================================================
how far         mean distance between codes, in steps times the step, of all and of each row: values near a threshold cross it
                as often as they moved far, so this is how far values moved before they were rounded, or less where most
                codes are zero. At most :data:`ROUNDING`, as for lossless taps, and :data:`ERRORS` times what chance makes
scale           slope of live values on stored ones, through the origin. Rounding of either makes it uncertain (it lies between
                the regressions of one on the other), but not biased: 1 must not lie outside by more than :data:`BIAS` and
                :data:`ERRORS` standard errors
each channel    its mean must not have shifted by more than :data:`ROUNDING` and :data:`ERRORS` standard errors
==============  =======================================================================================================

Standard errors are of rows and of channels, both: rounding that all rows share is as wrong in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.extract.checked_rows import RowPlace
from hdcache.klt_decoding import unfold
from hdcache.progress import counted
from hdcache.schema import TapCard

ROUNDING = {"fp32": 1e-3, "bf16": 0.03}
"""Arithmetic of a teacher -> what another machine may give otherwise, relative to the value."""
BIAS = {"fp32": 1e-4, "bf16": 5e-4}
"""Arithmetic of a teacher -> what its scale may be off by, beyond what chance explains."""
ERRORS = 6.0
"""Standard errors that chance explains."""
PREFIX_ROUNDING = {"float32": 0.0, "float16": 2.0**-10, "uint16": 2.0**-7}
"""Type of stored class tokens (uint16: bfloat16) -> their relative error."""
_NONE = 1e300
"""The error of what is not a number."""


@dataclass
class Sample:
    """What is measured of one tap."""

    places: list[RowPlace] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Squared, of each row."""
    powers: list[float] = field(default_factory=list)
    """Squared lengths, of each row."""
    sums: list[NDArray[np.float64]] = field(default_factory=list)
    """Over the vectors of each row: [channels]."""
    vectors: int = 0
    """Of a row."""
    cosines: list[NDArray[np.float64]] = field(default_factory=list)
    """Of each row's vectors."""
    codes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    """How many are equal, one apart, further apart."""
    moved: list[tuple[float, float]] = field(default_factory=list)
    """Sums of distances between codes of each row and of their squares, in units of values."""
    by_row: list[NDArray[np.float64]] = field(default_factory=list)
    """Of each row, live times stored, stored squared, live squared, both decoded: [3]."""
    by_channel: NDArray[np.float64] | float = 0.0
    """The same over all rows: [3, channels]."""
    shifts: list[NDArray[np.float64]] = field(default_factory=list)
    """Mean of live minus stored over each row's vectors: [channels]."""

    def add(
        self, place: RowPlace, exact: Tensor, copy: Tensor, again: Tensor, apart: NDArray[np.int64], step: float | None
    ) -> None:
        """One row: live, stored, and live by way of the encoding, float64 [vectors, channels] each.

        ``apart`` are distances between stored and live codes, of any shape; ``step`` is what one stands for, None where that is
        the distance of decoded values.
        """
        lengths = exact.norm(dim=-1)
        cosine = (exact * copy).sum(-1) / (lengths * copy.norm(dim=-1)).clamp_min(1e-300)
        # A vector without a length has no direction; one that is not a number is as wrong as can be.
        cosine = torch.where(lengths > 0, cosine, 1.0).nan_to_num(nan=-1.0)
        self.places.append(place)
        self.errors.append(float(((exact - copy) ** 2).sum().nan_to_num(nan=_NONE, posinf=_NONE)))
        self.powers.append(float((exact**2).sum()))
        self.sums.append(exact.sum(0).numpy())
        self.vectors = len(exact)
        self.cosines.append(cosine.numpy())
        # What is no number is an error of its row, and must not hide the others.
        x, y = (value.nan_to_num(0.0, 0.0, 0.0) for value in (copy, again))
        self.codes = self.codes + np.bincount(np.minimum(apart, 2).ravel(), minlength=3)
        far = (y - x).abs() if step is None else step * torch.from_numpy(apart).double()
        self.moved.append((float(far.sum()), float((far**2).sum())))
        products = torch.stack([(a * b).sum(0) for a, b in ((x, y), (x, x), (y, y))]).numpy()
        self.by_row.append(products.sum(1))
        self.by_channel = self.by_channel + products
        self.shifts.append((y - x).mean(0).numpy())

    def spreads(self) -> NDArray[np.float64]:
        """Squared distances of each row's vectors from the sample's mean vector; of one row alone, from zero."""
        powers = np.array(self.powers)
        if len(powers) == 1:
            return powers
        sums = np.stack(self.sums)
        mean = sums.sum(0) / (len(sums) * self.vectors)
        around = powers - 2 * sums @ mean + self.vectors * (mean @ mean)
        # The sample's own mean lies too close.
        unbiased: NDArray[np.float64] = np.maximum(around, 0.0) * len(sums) / (len(sums) - 1)
        return unbiased

    def scale(self) -> tuple[float, float, float, float] | None:
        """Least and largest slope of live on stored values, and the standard error of each; None where nothing is alike.

        Errors of the stored values alone would bias the one regression, errors of the live ones the other.
        """
        rows, channels = np.stack(self.by_row, 1), np.asarray(self.by_channel)
        xy, xx, yy = rows.sum(1)
        if min(xy, xx) <= 0:
            return None
        low, high = float(xy / xx), float(yy / xy)
        least, most = (
            math.hypot(*(_standard_error(parts[above], parts[below], slope) for parts in (rows, channels)))
            for slope, above, below in ((low, 0, 1), (high, 2, 0))
        )
        return low, high, least, most

    def shifted(self, precision: str) -> list[tuple[int, float]]:
        """Channels whose mean has shifted, and by how much of their size, the largest first."""
        shifts, count = np.stack(self.shifts), len(self.shifts)
        if count == 1:
            return []
        means, errors = shifts.mean(0), shifts.std(0, ddof=1) / math.sqrt(count)
        squares = np.asarray(self.by_channel)[1] / (count * self.vectors)
        # What a product rounds is of the size of all that it sums.
        sizes = np.sqrt(squares + squares.mean())
        wrong = np.flatnonzero(np.abs(means) > ROUNDING[precision] * sizes + ERRORS * errors)
        return sorted(((int(c), float(means[c] / sizes[c])) for c in wrong), key=lambda found: -abs(found[1]))


def codes_apart(one: NDArray[Any], other: NDArray[Any], card: TapCard, name: str) -> NDArray[np.int64]:
    """Distance of two arrays ``name`` of a tap in codes (of floats: units in the last place), each."""
    if name == "classes":
        return np.where(one == other, 0, 2).astype(np.int64)
    if card.encoding in ("klt", "int8") and name != "prefix":
        places = [unfold(torch.from_numpy(np.ascontiguousarray(value))).numpy() for value in (one, other)]
    elif one.dtype.kind == "f" or card.encoding == "bf16":
        bits = [np.ascontiguousarray(value).view(f"int{8 * one.itemsize}").astype(np.int64) for value in (one, other)]
        sign = np.int64(1) << (8 * one.itemsize - 1)
        # Sign and magnitude to numbers in order; both zeros are one.
        places = [np.where(value < 0, -(value + sign), value) for value in bits]
    else:
        places = [one, other]
    return np.abs(places[0].astype(np.int64) - places[1].astype(np.int64))


def chance_to_find(looked: int, rows: int, faulty: int) -> float:
    """Probability that ``looked`` of ``rows`` rows, drawn evenly, hold at least one of ``faulty`` ones."""
    missed = 1.0
    for taken in range(looked):
        missed *= max(0, rows - faulty - taken) / (rows - taken)
    return 1 - missed


def judged(
    sample: Sample,
    card: TapCard,
    precision: str,
    *,
    prefix: bool,
    min_cosine: float | None,
    named: Callable[[RowPlace], str],
) -> tuple[dict[str, Any], str, bool]:
    """The facts about what was measured of a tap (of its class tokens: ``prefix``), by the rules at the top of this module.

    Returns
    -------
    tuple
        facts as JSON; what is wrong, if anything; and whether that is a matter of single rows. ``named`` tells which row one is.
    """
    errors, powers, spreads = np.array(sample.errors), np.array(sample.powers), sample.spreads()
    # Class tokens are all alike: what they are compared with is their own size.
    own = powers if prefix else spreads
    base = np.maximum(own, own.mean())
    total = _ratio(float(errors.sum()), float(own.sum()))
    each = np.array([_ratio(error, size) for error, size in zip(errors, base, strict=True)])
    cosines = np.concatenate(sample.cosines)
    lowest = int(np.argmin([cosine.min() for cosine in sample.cosines]))
    whole, per_row, cosine = _limits(card, precision, len(errors), prefix=prefix)
    rounding = ROUNDING[precision]
    count, fault = len(errors), ""
    distances = np.array(sample.moved)
    # A Gaussian's deviation is a quarter more than its mean distance from zero.
    unit = 1.25 / math.sqrt(sample.sums[0].size * sample.vectors)
    moved = np.array([_ratio((unit * far) ** 2, size) for far, size in zip(distances[:, 0], base, strict=True)])
    limits = {
        "moved": rounding * _ratio(float(powers.sum()), float(own.sum())),
        "moved_row": rounding * max(map(_ratio, powers.tolist(), base.tolist())),
        "cosine": cosine if min_cosine is None else min_cosine,
    }
    limits["relative_error"] = math.hypot(whole, limits["moved"])
    limits["row"] = math.hypot(per_row, limits["moved_row"])
    bad = each > limits["row"]
    # Few codes change at all, and those by chance, each by itself: a row of few values may have several.
    other = _sure(distances) * unit > limits["moved_row"] * np.sqrt(base)
    changed = float(_sure(distances.sum(0))) * unit > limits["moved"] * math.sqrt(count * float(own.sum()))
    few = bool(0 < (bad | other).mean() <= 0.5)
    equal, one, more = (float(share) for share in sample.codes / max(1, sample.codes.sum()))
    scale, said = _scale(sample, precision)
    shifted = sample.shifted(precision)
    # Single rows that are wrong make the scale uncertain, not wrong.
    if said:
        fault, few = said, False
    elif bad.any():
        worst = int(each.argmax())
        fault = (
            f"{named(sample.places[worst])} has a relative error of {each[worst]:.3g}, expected at most "
            f"{limits['row']:.3g} ({int(bad.sum())} of {counted(count, 'rows')} have more)"
        )
    elif total > limits["relative_error"]:
        fault = f"a relative error of {total:.3g} over {counted(count, 'rows')}, expected at most {limits['relative_error']:.3g}"
    elif cosines.min() < limits["cosine"]:
        fault = (
            f"a smallest cosine of {cosines.min():.6g} ({named(sample.places[lowest])}), expected at least "
            f"{limits['cosine']:.6g}"
        )
    elif other.any() or changed:
        worst = int(moved.argmax())
        fault = (
            f"values {100 * moved.mean():.3g} % from those that were stored, where other hardware makes {100 * limits['moved']:.3g} % at "
            f"most ({percent(equal)} of codes are equal; {named(sample.places[worst])}: {100 * moved[worst]:.3g} %)"
        )
    elif shifted:
        fault = (
            f"the mean of {counted(len(shifted), 'channels')} of {sample.sums[0].size} shifted, that of channel {shifted[0][0]} by "
            f"{100 * shifted[0][1]:+.3g} % of its size, which rounding does not do"
        )
    facts = {
        "encoding": card.encoding,
        "cosine": {
            "min": float(cosines.min()), "p1": float(np.quantile(cosines, 0.01)),
            "median": float(np.median(cosines)), "mean": float(cosines.mean()),
        },
        "relative_error": {
            "all": total, "median": float(np.median(each)), "p99": float(np.quantile(each, 0.99)), "max": float(each.max()),
        },
        "certificate": None
        if prefix
        else {
            "relative_error": card.certificate.relative_rmse, "cosine_min": card.certificate.cosine_min,
            "cosine_mean": card.certificate.cosine_mean,
        },
        "codes": {"equal": equal, "one_apart": one, "further_apart": more},
        "moved": {"mean": float(moved.mean()), "max": float(moved.max())},
        "scale": scale,
        "shifted_channels": [channel for channel, _ in shifted],
        "limits": limits,
        "good": not fault,
    }  # fmt: skip
    return facts, fault, few


def _scale(sample: Sample, precision: str) -> tuple[dict[str, Any] | None, str]:
    found = sample.scale()
    if found is None:
        return None, ""
    low, high, low_error, high_error = found
    off, error = (low - 1, low_error) if low > 1 else (1 - high, high_error)
    factor = math.sqrt(low * high)
    facts = {
        "factor": factor, "least": low, "largest": high,
        "standard_error": error if math.isfinite(error) else None,
    }  # fmt: skip
    if not off > BIAS[precision] + ERRORS * error:
        return facts, ""
    percents = 100 * (factor - 1)
    return facts, (
        f"all values that the teacher gives now are {abs(percents):.3g} % {'larger' if percents > 0 else 'smaller'} than those stored ({low:.6g} to {high:.6g} "
        f"times, with a standard error of {error:.1g}), which rounding does not do"
    )


def _standard_error(above: NDArray[np.float64], below: NDArray[np.float64], slope: float) -> float:
    """Of the ratio of two sums over groups that err together; each group's part is as it looks to all others (HC3)."""
    others = 1 - below / below.sum()
    residual = above - slope * below
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(others > 1e-12, residual / others, np.inf)
    return float(np.sqrt((parts**2).sum()) / below.sum())


def _sure(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is left of sums [..., 2] of distances and of their squares without what chance may add."""
    sure: NDArray[np.float64] = distances[..., 0] - ERRORS * np.sqrt(distances[..., 1])
    return sure


def percent(share: float) -> str:
    """Two digits behind the point, cut off: what is not all never reads as all."""
    return "100 %" if share == 1 else f"{math.floor(1e4 * share) / 100:.2f} %"


def _limits(card: TapCard, precision: str, rows: int, *, prefix: bool) -> tuple[float, float, float]:
    """The largest relative error of a sample and of a row, and the smallest cosine, but for arithmetic."""
    slack = (4 * ROUNDING[precision]) ** 2 / 2
    if prefix:
        rounding = PREFIX_ROUNDING[card.arrays["prefix"].dtype]
        return rounding, 2 * rounding, 1 - slack - 8 * rounding**2
    known = card.certificate
    stated = known.relative_rmse
    whole = stated * (1.2 + rows**-0.5 + max(1, known.heldout_rows) ** -0.5)
    each = min(4 * stated, max(0.7, 1.5 * whole))
    return whole, max(whole, each), 1 - 16 * max(0.0, 1 - known.cosine_min) - slack


def _ratio(error: float, size: float) -> float:
    """The root of a squared error over a squared size; what has no size has no error, or is wrong altogether."""
    return math.sqrt(error / size) if size > 0 else (_NONE if error > 0 else 0.0)

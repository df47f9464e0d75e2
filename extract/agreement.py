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
that. ``min_cosine`` replaces all of these: no token's cosine may be smaller.
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
from hdcache.progress import counted
from hdcache.schema import TapCard

ROUNDING = {"fp32": 1e-3, "bf16": 0.03}
"""Arithmetic of a teacher -> what another machine may give otherwise, relative to the value."""
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

    def add(self, place: RowPlace, exact: Tensor, copy: Tensor) -> None:
        """One row: float64 [vectors, channels] twice."""
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
    limits = {
        "relative_error": math.hypot(whole, rounding * _ratio(float(powers.sum()), float(own.sum()))),
        "row": math.hypot(per_row, rounding * max(map(_ratio, powers.tolist(), base.tolist()))),
        "cosine": cosine,
    }
    bad = each > limits["row"]
    count, fault = len(errors), ""
    if min_cosine is not None:
        limits = {"cosine": min_cosine}
        bad = np.array([found.min() < min_cosine for found in sample.cosines])
    if bad.any() and min_cosine is None:
        worst = int(each.argmax())
        fault = (
            f"{named(sample.places[worst])} has a relative error of {each[worst]:.3g}, expected at most "
            f"{limits['row']:.3g} ({int(bad.sum())} of {counted(count, 'rows')} have more)"
        )
    elif min_cosine is None and total > limits["relative_error"]:
        fault = f"a relative error of {total:.3g} over {counted(count, 'rows')}, expected at most {limits['relative_error']:.3g}"
    elif cosines.min() < limits["cosine"]:
        fault = (
            f"a smallest cosine of {cosines.min():.6g} ({named(sample.places[lowest])}), expected at least "
            f"{limits['cosine']:.6g}"
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
        "limits": limits,
        "good": not fault,
    }  # fmt: skip
    return facts, fault, bool(0 < bad.mean() <= 0.5)


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

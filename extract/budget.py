"""``--budget``: spread a number of bytes over the taps of a teacher so that their errors together are least.

Each klt tap has a curve of bytes over error, measured on calibration rows. The errors are squared relative ones, so that
taps of any scale count alike. From the coarsest code of every tap on, the step that takes away most error for its bytes is
taken again and again, as long as it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hdcache.encodings import Encoder, fit
from hdcache.errors import UsageError
from hdcache.klt import prepare
from hdcache.progress import size
from hdcache.resources import parse_bytes
from hdcache.schema import TapRequest
from hdcache.taps import Tokens

FIDELITIES = (0.5, 0.4, 0.3, 0.22, 0.16, 0.12, 0.09, 0.065, 0.05, 0.035, 0.025, 0.018)
"""Relative RMSE of the codes that are tried, coarsest first: each about a factor 1.35 finer."""
COARSEST = 0.9
"""Where rows that were not in the curves need more, codes are made coarser up to this."""
CURVE_ROWS = 48
"""Rows that curves are measured on."""
SAFETY = 0.97
"""Share of the budget that is spread: rows that were not measured may need more."""


@dataclass(frozen=True)
class Point:
    """One code of one tap."""

    fidelity: float
    bytes: float
    error: float
    """Squared relative error."""


def budget_share(budget: str | int | None, fidelity: float | None, teachers: int) -> int | None:
    """Bytes of one of so many teachers; None where there is no budget.

    Raises
    ------
    UsageError
        where a fidelity is asked for too.
    """
    if budget is None:
        return None
    if fidelity is not None:
        raise UsageError("budget chooses the fidelity of each tap; leave one of the two out")
    return parse_bytes(budget, "budget") // max(1, teachers)


def with_budget(requests: Sequence[TapRequest], budget: int, rows: int) -> list[TapRequest]:
    """The same requests, klt taps with their teacher's bytes a row in place of a fidelity.

    Raises
    ------
    UsageError
        where no tap is klt: the bytes of all others are fixed.
    """
    if not any(entry.encoding == "klt" for entry in requests):
        raise UsageError(
            "--budget chooses the fidelity of klt taps, but none is asked for; leave --budget or --encoding out"
        )
    return [
        entry.model_copy(update={"fidelity": None, "row_budget": budget // max(1, rows)})
        if entry.encoding == "klt"
        else entry
        for entry in requests
    ]


def fit_within_budget(
    requests: Sequence[TapRequest],
    known: Mapping[str, tuple[Tokens | Tensor, Tokens | Tensor]],
    grid: tuple[int, ...] | None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Encoder]:
    """Encoders of all taps whose rows fit into the requests' ``row_budget``; ``known`` has calibration and held-out rows.

    Raises
    ------
    UsageError
        where even the coarsest codes do not fit, with the bytes that would.
    """
    budget = next(entry.row_budget for entry in requests if entry.row_budget is not None)
    fixed = {entry.tap: fit(entry, *known[entry.tap], grid) for entry in requests if entry.row_budget is None}
    taken = sum(encoder.card.bytes_per_row for encoder in fixed.values())
    asked = {entry.tap: entry for entry in requests if entry.row_budget is not None}
    curves = {tap: _curve(entry, *known[tap], grid, precision) for tap, entry in asked.items()}
    chosen = _spread(curves, SAFETY * budget - taken)
    if chosen is None:
        least = (taken + sum(points[0].bytes for points in curves.values())) / SAFETY
        raise _too_small(budget, asked, least)
    while True:
        fitted = {
            tap: fit(asked[tap].model_copy(update={"fidelity": chosen[tap]}), *known[tap], grid, precision=precision)
            for tap in asked
        }
        if taken + sum(encoder.card.bytes_per_row for encoder in fitted.values()) <= budget:
            return fixed | fitted
        if min(chosen.values()) >= COARSEST:
            raise _too_small(budget, asked, taken + sum(encoder.card.bytes_per_row for encoder in fitted.values()))
        # The curves are of fewer rows.
        chosen = {tap: min(COARSEST, 1.05 * fidelity) for tap, fidelity in chosen.items()}


def _too_small(budget: int, taps: Iterable[str], least: float) -> UsageError:
    return UsageError(
        f"--budget leaves {size(budget)} a row, but the coarsest codes of {', '.join(taps)} need {size(least)}; "
        f"give {least / max(1, budget):.2f} times as much, or store fewer taps or views"
    )


def _curve(
    asked: TapRequest, first: Tokens | Tensor, held: Tokens | Tensor, grid: tuple[int, ...] | None,
    precision: Literal["fp32", "bf16"],
) -> list[Point]:  # fmt: skip
    """Codes of falling error, each with fewer error for more bytes than the one before."""
    found: list[Point] = []
    first, held = _few(first), _few(held)
    prepared = prepare(first.patches, grid) if isinstance(first, Tokens) else None
    for fidelity in FIDELITIES:
        card = fit(asked.model_copy(update={"fidelity": fidelity}), first, held, grid, prepared, precision).card
        point = Point(fidelity, card.bytes_per_row, card.certificate.relative_rmse**2)
        if not found or (point.error < found[-1].error and point.bytes > found[-1].bytes):
            found.append(point)
    return found


def _few(value: Tokens | Tensor) -> Tokens | Tensor:
    return (
        value[:CURVE_ROWS]
        if isinstance(value, Tensor)
        else Tokens(value.prefix[:CURVE_ROWS], value.patches[:CURVE_ROWS])
    )


def _spread(curves: Mapping[str, Sequence[Point]], budget: float) -> dict[str, float] | None:
    """Fidelity of each tap; None where the coarsest codes do not fit."""
    place = dict.fromkeys(curves, 0)
    left = budget - sum(points[0].bytes for points in curves.values())
    if left < 0:
        return None
    while True:
        steps = [
            ((points[i].error - points[j].error) / (points[j].bytes - points[i].bytes), tap, j)
            for tap, points in curves.items()
            for i in [place[tap]]
            for j in range(i + 1, len(points))
            if points[j].bytes - points[i].bytes <= left
        ]
        if not steps:
            return {tap: points[place[tap]].fidelity for tap, points in curves.items()}
        _, tap, step = max(steps)
        left -= curves[tap][step].bytes - curves[tap][place[tap]].bytes
        place[tap] = step

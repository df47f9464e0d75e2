"""Which patch tokens a network sees, drawn as a function of what the mask is for, and kept as packed bits.

Legend: B samples, N patch tokens (S temporal slots x cells of the patch grid), M visible ones.

A mask is an ascending list of *visible* token indices: what a masked encoder gathers. Published code speaks of
hidden shares (mask ratios), which are rounded down to whole cells as AMD's and VideoMAE's generators do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdcache.draws import uniform_rows
from hdcache.errors import UsageError, nearest
from hdcache.schema import MaskSpec, TeacherCard

KINDS = ("random", "tube")


def parse_mask(text: str, *, seed: int = 0, clips: bool = False) -> MaskSpec:
    """``0.75``, ``random:0.75`` or ``tube:0.75`` as a :class:`MaskSpec`; a bare ratio is tube for clips, else random.

    Raises
    ------
    UsageError
        for an unknown kind (naming the nearest), a ratio that is not between 0 and 1, or a negative seed.
    """
    kind, sign, ratio = text.partition(":")
    if not sign:
        kind, ratio = "tube" if clips else "random", text
    if kind not in KINDS:
        raise UsageError(f"mask {text!r}: unknown kind {kind!r}; {nearest(kind, KINDS)}")
    try:
        share = float(ratio)
    except ValueError:
        raise UsageError(f"mask {text!r}: {ratio!r} is no number; write a ratio such as {kind}:0.75") from None
    if not 0 < share < 1:
        raise UsageError(f"mask {text!r}: the ratio must lie between 0 and 1, for example {kind}:0.75")
    if seed < 0:
        raise UsageError(f"mask seed {seed} must be at least 0")
    return MaskSpec(kind="tube" if kind == "tube" else "random", ratio=share, seed=seed)


def hidden_count(cells: int, ratio: float, what: str = "mask ratio") -> int:
    """``ratio`` of ``cells``, rounded down; :class:`UsageError` if that hides nothing or leaves nothing to see."""
    # The product of a decimal ratio can fall a hair short of a whole number.
    hidden = int(ratio * cells + 1e-9)
    if not 0 < hidden < cells:
        raise UsageError(
            f"{what} {ratio:g} of {cells} {'cells' if cells > 1 else 'cell'} hides {hidden} and leaves {cells - hidden} visible; "
            "at least one must be hidden and one visible: choose another ratio"
        )
    return hidden


def visible_count(spec: MaskSpec, cells: int, slots: int = 1) -> int:
    """Visible patch tokens of one sample."""
    if spec.kind == "tube":
        return (cells - hidden_count(cells, spec.ratio)) * slots
    return cells * slots - hidden_count(cells * slots, spec.ratio)


def mask_facts(card: TeacherCard) -> dict[str, Any] | None:
    """A teacher's mask as JSON, with how many of its ``tokens`` are ``visible``; None: it sees all of them."""
    if card.mask is None:
        return None
    visible = visible_count(card.mask, card.grid[0] * card.grid[1], card.slots)
    return card.mask.model_dump(mode="json") | {"visible": visible, "tokens": card.tokens}


def mask_text(facts: Mapping[str, Any]) -> str:
    """What :func:`mask_facts` found, in words."""
    return (
        f"{facts['kind']} mask of ratio {facts['ratio']:g}, seed {facts['seed']}: "
        f"sees {facts['visible']:,} of {facts['tokens']:,} patch tokens"
    )


def draw_visible(
    spec: MaskSpec, ids: Sequence[str], view: int, cells: int, slots: int = 1, purpose: str = "mask"
) -> NDArray[np.int64]:
    """Ascending indices int64 [B, M] of the visible tokens: a function of (spec.seed, id, view, purpose).

    Parameters
    ----------
    view
        number of the view, or of the epoch for masks that are drawn afresh in each.
    cells, slots
        cells of the patch grid, and temporal slots; token ``slot * cells + cell``.
    """
    tube = spec.kind == "tube"
    count = cells if tube else cells * slots
    noise = uniform_rows(count, [(spec.seed, sample, view, purpose) for sample in ids])
    chosen = first_sorted(noise, count - hidden_count(count, spec.ratio))
    return over_slots(chosen, cells, slots) if tube else chosen


def draw_among(visible: NDArray[np.int64], count: int, keys: Sequence[tuple[object, ...]]) -> NDArray[np.int64]:
    """``count`` of the columns of ``visible`` [B, M], one draw per row's key: positions int64 [B, count], ascending."""
    return first_sorted(uniform_rows(visible.shape[1], keys), count)


def first_sorted(noise: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Positions of the ``count`` smallest numbers of each row, ascending."""
    return np.sort(np.argsort(noise, axis=1, kind="stable")[:, :count], axis=1).astype(np.int64)


def over_slots(cells_BM: NDArray[np.int64], cells: int, slots: int) -> NDArray[np.int64]:
    """The same cells in every temporal slot: [B, M] -> [B, slots * M], ascending."""
    return np.concatenate([cells_BM + slot * cells for slot in range(slots)], axis=1)


def pack_visible(visible: NDArray[np.int64], tokens: int) -> NDArray[np.uint8]:
    """Visible indices [B, M] as packed bits uint8 [B, ceil(tokens / 8)], token 0 in the highest bit."""
    bits = np.zeros((len(visible), tokens), np.uint8)
    np.put_along_axis(bits, visible, 1, axis=1)
    return np.packbits(bits, axis=1)


def unpack_visible(packed: NDArray[np.uint8], tokens: int, count: int) -> NDArray[np.int64]:
    """The inverse of :func:`pack_visible`.

    Raises
    ------
    ValueError
        when a row does not hold exactly ``count`` visible tokens.
    """
    bits = np.unpackbits(packed, axis=1, count=tokens)
    found = bits.sum(axis=1, dtype=np.int64)
    if (found != count).any():
        row = int(np.flatnonzero(found != count)[0])
        raise ValueError(f"a mask of {int(found[row])} visible tokens where {count} are expected (row {row})")
    return np.nonzero(bits)[1].reshape(len(packed), count).astype(np.int64)


def check_tubes(visible: NDArray[np.int64], cells: int, slots: int) -> None:
    """:class:`ValueError` unless each row of visible indices [B, M] has the same cells in every temporal slot."""
    if visible.shape[1] % slots:
        raise ValueError(f"a tube mask of {visible.shape[1]} visible tokens in {slots} temporal slots")
    first = visible[:, : visible.shape[1] // slots]
    wrong = np.flatnonzero((over_slots(first, cells, slots) != visible).any(axis=1))
    if len(wrong):
        raise ValueError(f"a tube mask whose visible cells differ between temporal slots (row {int(wrong[0])})")

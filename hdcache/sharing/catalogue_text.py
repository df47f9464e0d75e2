"""A catalogue as a table for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from hdcache.info import held_text
from hdcache.progress import counted, size
from hdcache.sharing.catalogue_entries import StoreEntry, TapEntry, TeacherEntry

WIDTHS = (24, 16, 24, 31, 7, 8)
"""Columns of the table, with two blanks between them."""
_HEADS = ("STORE", "DATA", "TEACHER", "TAP", "VIEWS", "BYTES")
FLOATS = ("fp32", "fp16", "bf16")
_RIGHT = 5
"""The column that is set flush right."""


def format_catalogue(where: str, entries: Sequence[StoreEntry], *, filtered: bool = False) -> str:
    """The stores of ``where``, a block of lines each. Names come from stores: what a terminal would obey is not printed."""
    good = [entry for entry in entries if not entry.fault]
    what = f"{counted(len(good), 'stores')}{' found' if filtered else ''}"
    lines = [f"{what} in {plain(where)}, {size(sum(entry.bytes for entry in good))} sealed"]
    if good:
        lines += ["", _line(_HEADS)]
        for entry in good:
            lines += ["", *_block(entry)]
    for entry in entries:
        if entry.fault:
            text = f"{plain(entry.path)}: {plain(entry.fault)}"
            lines += ["", *textwrap.wrap(text, 118, subsequent_indent="  ", break_on_hyphens=False)]
    return "\n".join(lines)


def plain(text: str) -> str:
    """``text`` in one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _line(cells: Sequence[str]) -> str:
    fitted = [_fitted(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
    fitted[_RIGHT] = fitted[_RIGHT].strip().rjust(WIDTHS[_RIGHT])
    return "  ".join(fitted).rstrip()


def _fitted(text: str, width: int) -> str:
    """``text`` in exactly ``width`` columns, its middle left out where it is longer."""
    text = plain(text)
    if len(text) > width:
        head = (width - 3 + 1) // 2
        text = f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
    return text.ljust(width)


def _block(entry: StoreEntry) -> list[str]:
    store = [entry.path, f"id {entry.id}", f"{size(entry.bytes)}, {state(entry)}"]
    store += [f"by {entry.made_by}"] * bool(entry.made_by)
    data = [f"{entry.samples:,} {entry.noun}", class_count(entry.classes)]
    data += [f"kept, {size(entry.pixels)}"] if entry.pixels is not None else []
    apart = ("", "", "", "")
    teachers = [row for teacher in entry.teachers for row in (apart, *_teacher(teacher))][1:]
    rows = zip_longest(store, data, teachers)
    return [_line((first or "", second or "", *(third or ("", "", "", "")))) for first, second, third in rows]


def _teacher(teacher: TeacherEntry) -> list[tuple[str, str, str, str]]:
    """Cells of the last four columns."""
    if teacher.fault:
        return [(teacher.name, f"unreadable: {teacher.fault}", "", "")]
    facts = [teacher.name, teacher.architecture, f"{teacher.size} px, {teacher.precision}"]
    facts += [f"licence {teacher.licence}", f"id {teacher.id}"]
    taps = [(f"{one.tap} {error_text(one)}", size(one.bytes)) for one in teacher.taps]
    taps += (
        [(part, "") for part in textwrap.wrap(plain(held_text(teacher.held or (), teacher.elsewhere)), WIDTHS[3])]
        if teacher.elsewhere
        else []
    )
    views = [span(teacher.views) or "none"] + ["cut off"] * bool(teacher.unsealed)
    rows = zip_longest(facts, taps, views)
    return [(fact or "", tap[0] if tap else "", view or "", tap[1] if tap else "") for fact, tap, view in rows]


def state(entry: StoreEntry) -> str:
    """Whether a store is complete, in words."""
    return "sealed" if entry.sealed else "not complete" if entry.teachers else "no teacher yet"


def class_count(count: int) -> str:
    """``1`` -> ``1 class``; none: ``no classes``."""
    return f"{count:,} class{'' if count == 1 else 'es'}" if count else "no classes"


def error_text(tap: TapEntry) -> str:
    """A tap's encoding, and the error that was measured of it."""
    kl, rmse = tap.certificate.get("kl"), tap.certificate.get("relative_rmse")
    if kl is not None:
        return f"{tap.encoding} KL {kl:.2g}"
    # Floats are what the teacher gave, short of their last digits.
    return tap.encoding if rmse is None or tap.encoding in FLOATS else f"{tap.encoding} {100 * rmse:.2g} %"


def span(numbers: Sequence[int]) -> str:
    """``0, 1, 2, 5`` -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

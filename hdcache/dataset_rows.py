"""From the rows of a listing to a data set: sorted unique ids, numbered classes, a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdcache.dataset_specs import Spec
from hdcache.errors import InputNotFound, UnreadableImage, UsageError
from hdcache.pixels import Source
from hdcache.records import canonical_json
from hdcache.schema import DatasetCard


class Row(NamedTuple):
    """One sample while a data set is being listed."""

    id: str
    label: str | int | None
    content: str
    """What the fingerprint knows of the image beside its id: a digest of arrays, nothing of files."""
    place: Any
    """What ``fetch`` needs to read it."""


@dataclass(frozen=True, eq=False)
class Listed:
    """The only :class:`hdcache.datasets.Dataset`: sorted ids beside the place of each sample."""

    card: DatasetCard
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    places: Sequence[Any] = field(repr=False)
    fetch: Callable[[Any], Source] = field(repr=False)

    def read(self, sample_id: str) -> Source:
        row = bisect_left(self.ids, sample_id)
        if row == len(self.ids) or self.ids[row] != sample_id:
            raise InputNotFound(f"{self.card.spec}: no sample {sample_id!r}; is this the data set the id came from?")
        try:
            return self.fetch(self.places[row])
        except OSError as error:
            raise UnreadableImage(f"{sample_id}: cannot be read: {error.strerror or error}") from None


def assemble(
    spec: Spec,
    rows: list[Row],
    fetch: Callable[[Any], Source],
    classes: Sequence[str] | None,
    names: Sequence[str] = (),
) -> Listed:
    """Sort, check and number ``rows``; ``names`` is the data set's own class list where it has one."""
    # Python compares strings by code point, which is the bytewise order of UTF-8.
    rows = sorted((row._replace(id=nfc(row.id)) for row in rows), key=lambda row: row.id)
    if rows and not rows[0].id:
        raise UsageError(f"{spec.text}: {_name(rows[0].place)} has an empty id; give every sample an id of its own")
    for first, second in itertools.pairwise(rows):
        if first.id == second.id:
            raise UsageError(
                f"{spec.text}: two samples have the id {first.id!r}: {_name(first.place)} and {_name(second.place)};"
                " rename or remove one"
            )
    found = {row.label for row in rows if row.label is not None}
    # Numeric order only where every label is a number: 2 before 10, yet folder names stay bytewise.
    numeric = all(isinstance(label, int) for label in found)
    own = list(names) or sorted({str(label) for label in found}, key=int if numeric else None)
    if classes is not None:
        present = {str(label) for label in found}
        own = [*classes, *(name for name in own if name in present and name not in set(classes))]
    index = {name: number for number, name in enumerate(own)}
    labels = np.array([-1 if row.label is None else index[str(row.label)] for row in rows], dtype=np.int64)
    labels.setflags(write=False)
    hasher = hashlib.sha256()
    for row in rows:
        try:
            hasher.update(canonical_json([row.id, None if row.label is None else str(row.label), row.content]) + b"\n")
        except UnicodeEncodeError:
            raise UsageError(f"{spec.text}: the name {row.id!r} is not valid UTF-8; rename it") from None
    card = DatasetCard(
        spec=spec.canonical(), kind=spec.kind, fingerprint=hasher.hexdigest(), count=len(rows), classes=tuple(own)
    )
    return Listed(card, tuple(row.id for row in rows), labels, tuple(row.place for row in rows), fetch)


def _name(place: Any) -> str:
    return f"row {place}" if isinstance(place, int) else str(place)


def nfc(text: str) -> str:
    """``text`` in Unicode form NFC, so that a name is the same on every file system."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)

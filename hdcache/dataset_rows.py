"""From the rows of a listing to a data set: sorted unique ids, numbered classes, a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hdcache.dataset_specs import Spec
from hdcache.errors import InputNotFound, UnreadableImage, UsageError
from hdcache.pixels import Source
from hdcache.records import canonical_json
from hdcache.schema import DatasetCard


class Dataset(Protocol):
    """An ordered, immutable list of samples. Reads may run in any number of threads."""

    @property
    def card(self) -> DatasetCard:
        """Spec (with an absolute path), kind, fingerprint, count and class names."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Unique ids, NFC, in bytewise (UTF-8) order."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [count]: index into ``card.classes``, -1 where a sample has no label."""

    def read(self, sample_id: str) -> Source:
        """Encoded image bytes, or uint8 pixels [H, W] or [H, W, C]; see :func:`hdcache.pixels.decode`.

        :class:`InputNotFound` for an id that is not in ``ids`` (ids from a store are untrusted: they are looked
        up, never turned into a path); :class:`UnreadableImage` if a listed sample cannot be read any more.
        """


class Row(NamedTuple):
    """One sample while a data set is being listed."""

    id: str
    label: str | int | None
    place: Any
    """What ``fetch`` needs to read it."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Sorted ids beside the place of each sample: the :class:`Dataset` of every listing."""

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
    rows: Iterable[Row],
    fetch: Callable[[Any], Source],
    classes: Sequence[str] | None,
    names: Sequence[str] = (),
    content: Callable[[Any], str] = lambda place: "",
) -> Listed:
    """Sort, check and number ``rows``; ``names`` is the data set's own class list where it has one.

    ``content`` is what the fingerprint knows of the image at a place beside its id: a digest of arrays, nothing of files.
    """
    # Kept as columns: a million rows as objects would take several times the memory of what they hold.
    ids: list[str] = []
    values: list[str | int | None] = []
    places: list[Any] = []
    shared: dict[str | int | None, str | int | None] = {}
    for row in rows:
        ids.append(nfc(row.id))
        values.append(shared.setdefault(row.label, row.label))
        places.append(row.place)
    if any(first > second for first, second in itertools.pairwise(ids)):
        # Python compares strings by code point, which is the bytewise order of UTF-8.
        order = sorted(range(len(ids)), key=ids.__getitem__)
        ids, values, places = [ids[n] for n in order], [values[n] for n in order], [places[n] for n in order]
    if ids and not ids[0]:
        raise UsageError(f"{spec.text}: {_name(places[0])} has an empty id; give every sample an id of its own")
    for number, (first, second) in enumerate(itertools.pairwise(ids)):
        if first == second:
            raise UsageError(
                f"{spec.text}: two samples have the id {first!r}: {_name(places[number])} and {_name(places[number + 1])};"
                " rename or remove one"
            )
    found = shared.keys() - {None}
    # Numeric order only where every label is a number: 2 before 10, yet folder names stay bytewise.
    numeric = all(isinstance(label, int) for label in found)
    own = list(names) or sorted({str(label) for label in found}, key=int if numeric else None)
    if classes is not None:
        own = _extended(classes, own, {str(label) for label in found})
    index = {name: number for number, name in enumerate(own)}
    numbers = {label: -1 if label is None else index[str(label)] for label in shared}
    labels = np.fromiter((numbers[label] for label in values), np.int64, len(values))
    labels.setflags(write=False)
    names_of = {label: None if label is None else str(label) for label in shared}
    hasher = hashlib.sha256()
    for sample_id, label, place in zip(ids, values, places, strict=True):
        try:
            hasher.update(canonical_json([sample_id, names_of[label], content(place)]) + b"\n")
        except UnicodeEncodeError:
            raise UsageError(f"{spec.text}: the name {sample_id!r} is not valid UTF-8; rename it") from None
    card = DatasetCard(
        spec=spec.canonical(),
        kind=spec.kind,  # type: ignore[arg-type]  # the samples of a store are not listed
        fingerprint=hasher.hexdigest(),
        count=len(ids),
        classes=tuple(own),
    )
    return Listed(card, tuple(ids), labels, tuple(places), fetch)


def with_classes(found: Listed, classes: Sequence[str]) -> Listed:
    """``found`` numbered by another list of classes, as :func:`assemble` does; classes that occur beside them are appended."""
    known = found.card.classes
    own = _extended(classes, known, {known[label] for label in np.unique(found.labels) if label >= 0})
    index = {name: number for number, name in enumerate(own)}
    labels = np.array([*(index.get(name, -1) for name in known), -1], np.int64)[found.labels]
    labels.setflags(write=False)
    return replace(found, card=found.card.model_copy(update={"classes": tuple(own)}), labels=labels)


def _extended(classes: Sequence[str], own: Sequence[str], present: Collection[str]) -> list[str]:
    return [*classes, *(name for name in own if name in present and name not in set(classes))]


def _name(place: Any) -> str:
    return f"row {place}" if isinstance(place, int) else str(place)


def nfc(text: str) -> str:
    """``text`` in Unicode form NFC, so that a name is the same on every file system."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)

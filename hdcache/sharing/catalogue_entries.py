"""What a catalogue says of each store, and how it is searched. As JSON, the same in a folder and over HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hdcache.schema import FORMAT

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Counts, sizes and numbers of views: those of a server may be anything."""


class Entry(BaseModel):
    """A frozen part of a catalogue. That of a later version may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _unicode(cls, value: Any) -> Any:
        """What a file system or a hostile record has for text, and no page nor JSON can hold, is spelled out."""
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        if isinstance(value, Mapping):
            return {cls._unicode(name): cls._unicode(inner) for name, inner in value.items()}
        return [cls._unicode(inner) for inner in value] if isinstance(value, list | tuple) else value


class TapEntry(Entry):
    """One tap of a teacher."""

    tap: str
    encoding: str
    fidelity: float | None = None
    """Relative RMSE that was asked for (klt)."""
    tokens: Count = 0
    prefix_tokens: Count = 0
    channels: Count = 0
    certificate: dict[str, float | None] = Field(default_factory=dict)
    """What storing it cost, measured on rows that were held out (:class:`~hdcache.schema.Certificate`)."""
    bytes: Count = 0
    smaller_than_fp16: float | None = None
    smaller_than_relation_matrices_fp16: float | None = None


class TeacherEntry(Entry):
    """One teacher of a store."""

    name: str
    fault: str = ""
    """Why its record cannot be read; nothing else is known then."""
    id: str = ""
    """First 16 digits of its identity's sha256."""
    architecture: str = ""
    size: Count = 0
    """Side of its input, pixels."""
    frames: Count | None = None
    slots: Count = 1
    grid: tuple[Count, Count] = (0, 0)
    patch_size: Count = 0
    width: Count = 0
    depth: Count = 0
    heads: Count = 0
    precision: str = ""
    mask: str = ""
    licence: str = ""
    source: str = ""
    views: tuple[Count, ...] = ()
    """Sealed ones."""
    unsealed: tuple[Count, ...] = ()
    failed: Count = 0
    """Rows of the sealed views that failed."""
    bytes: Count = 0
    taps: tuple[TapEntry, ...] = ()
    held: tuple[str, ...] | None = None
    """The taps that this copy holds the rows of, where it does not hold all."""
    elsewhere: tuple[str, ...] = ()
    """Taps that the store has and this copy of it does not."""


class StoreEntry(Entry):
    """One store."""

    path: str
    """Where it lies, relative to the catalogue's root; ``.`` for the root itself."""
    fault: str = ""
    """Why it cannot be read; nothing else is known then."""
    id: str = ""
    """First 16 digits of the sha256 of what never changes about it."""
    format: Count = 0
    kind: str = ""
    noun: str = ""
    samples: Count = 0
    classes: Count = 0
    data: str = ""
    """Where the data was when the store was made."""
    views: str = ""
    """How views are drawn, in words."""
    shorter_side: Count | None = None
    pixels: Count | None = None
    """Bytes of the samples that the store keeps itself; None where it keeps none."""
    written_with: dict[str, str] = Field(default_factory=dict)
    """Versions of what wrote it."""
    made_by: str = ""
    """What ``HDCACHE_MADE_BY`` said when it was made; empty where nothing did."""
    sealed: bool = False
    """Whether it holds a teacher, and every view that one of them has begun is complete."""
    bytes: Count = 0
    """Bytes of everything that is sealed."""
    teachers: tuple[TeacherEntry, ...] = ()


class CatalogueRecord(Entry):
    """What ``catalog.json`` holds."""

    format: Count = FORMAT
    stores: tuple[StoreEntry, ...]


def select(entries: Iterable[StoreEntry], *, teacher: str = "", tap: str = "", search: str = "") -> list[StoreEntry]:
    """The stores with one teacher whose name, architecture or source holds ``teacher`` and which has a tap that holds
    ``tap``, and in which every word of ``search`` is found anywhere. Upper and lower case are the same.
    """
    words = search.casefold().split()
    found = []
    for entry in entries:
        if teacher or tap:
            fits = (
                teacher.casefold() in f"{one.name}\n{one.architecture}\n{one.source}".casefold()
                and any(tap.casefold() in each.tap.casefold() for each in one.taps)
                for one in entry.teachers
            )
            if not any(fits):
                continue
        text = "\n".join(_texts(entry.model_dump())).casefold() if words else ""
        if all(word in text for word in words):
            found.append(entry)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)

"""What every record that is stored or typed by a user has in common: frozen, closed, with one canonical spelling.

Nothing here needs torch or zarr. A record that comes from a store is untrusted: unknown fields, wrong types and
unsafe names are refused while parsing.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from hdcache.errors import StoreCorrupt, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KEY = re.compile(r"[A-Za-z0-9._@/-]{1,512}")
# A row beyond this is no feature; it bounds what a hostile record can make a reader allocate.
MAX_VALUES = 1 << 32
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_BRIEF = reprlib.Repr()
"""What a hostile record says where a number should be may be as long as the record."""
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 200
WHOLE = {"whole": True}
"""The context in which records are dumped with every field."""


class Record(BaseModel):
    """A frozen record; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical(self) -> bytes:
        """The one JSON spelling of this record: sorted keys, no spaces, UTF-8."""
        return canonical_json(self.model_dump(mode="json"))

    def whole(self) -> dict[str, Any]:
        """Every field as JSON, those that :class:`GrownRecord` leaves out of its spelling too: for messages, to be compared."""
        return self.model_dump(mode="json", context=WHOLE)

    def digest(self) -> str:
        """sha256 of :meth:`canonical`, hexadecimal."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, data: object, where: str | Path) -> Self:
        """Validate ``data`` read from ``where``; :class:`StoreCorrupt` names the first wrong field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise StoreCorrupt(f"{where}: {first_fault(error)}") from None


class GrownRecord(Record):
    """A record that gained fields after the first stores of its format were made.

    The default of such a field means what those stores did, and the field is spelled only where it differs from that.
    Old records are therefore read as they are, and their digests and identities stay what they were.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset()
    """Names of those fields."""

    @model_serializer(mode="wrap")
    def _spelled(self, spell: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        if info.context == WHOLE:
            return dict(spell(self))
        fields = type(self).model_fields
        silent = {name for name in self.ADDED if getattr(self, name) == fields[name].default}
        return {name: value for name, value in spell(self).items() if name not in silent}


class CheckedRecord(GrownRecord):
    """A record that nothing else vouches for: its file also holds the sha256 of all that it says.

    ``check`` exists on disk only: :meth:`parse` compares and drops it, :meth:`checked` spells it. Records of earlier versions
    have none.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"check"})

    check: str = ""

    def checked(self) -> bytes:
        """What is written: :meth:`canonical`, with its sha256 in the field ``check``."""
        return canonical_json(self.model_dump(mode="json") | {"check": self.digest()})

    @classmethod
    def parse(cls, data: object, where: str | Path) -> Self:
        if isinstance(data, dict) and data.get("check"):
            # What was read is compared, not what is understood of it: a manifest of many objects is not spelled out again.
            if record_check({key: value for key, value in data.items() if key != "check"}) != data["check"]:
                raise StoreCorrupt(f"{where}: altered since it was written (its check differs); copy the store again")
            data = data | {"check": ""}
        return super().parse(data, where)


def record_check(record: Any) -> str:
    """sha256 of a record in its canonical spelling; empty for what has none."""
    try:
        return hashlib.sha256(canonical_json(record)).hexdigest()
    except ValueError:  # NaN, a lone surrogate
        return ""


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values have equal bytes."""
    return _ENCODER.encode(value).encode()


def first_fault(error: ValidationError) -> str:
    """One line for the first fault that pydantic found: field, reason, value."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "record"
    where = (where if where.isprintable() else ascii(where))[:160]  # keys of a hostile record may hold anything
    return f"{where}: {fault['msg']} (found {_BRIEF.repr(fault.get('input'))[:80]})"


def check_name(name: str, what: str) -> str:
    """``name`` if it may be a folder of a store; :class:`UsageError` otherwise."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} may hold only letters, digits, '.', '_', '-', and start with a letter or digit"
        )
    return name


def check_key(key: str) -> str:
    """``key`` if it is a safe relative object key (no absolute path, ``..`` or empty segment)."""
    if not KEY.fullmatch(key) or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"unsafe object key {key!r}")
    return key


def _spellable(value: dict[str, Any]) -> dict[str, Any]:
    canonical_json(value)  # raises ValueError for NaN, infinities and lone surrogates
    return value


Facts = Annotated[dict[str, Any], AfterValidator(_spellable)]
"""Free JSON: whatever a library calls its settings."""


def differences(asked: Any, found: Any, path: str = "") -> list[str]:
    """Lines ``path: found -> asked`` for every leaf in which two JSON values differ."""
    if isinstance(asked, dict) and isinstance(found, dict):
        lines = []
        for key in sorted({*asked, *found}):
            lines += differences(asked.get(key), found.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if isinstance(asked, list) and isinstance(found, list) and len(asked) == len(found):
        return [
            line
            for i, (a, f) in enumerate(zip(asked, found, strict=True))
            for line in differences(a, f, f"{path}[{i}]")
        ]
    return [] if asked == found else [f"{path}: the store has {found!r}, asked was {asked!r}"]

"""Damaged objects taken from another copy of the same store, once their bytes are proven to be what they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hdcache.array_metadata import read_json
from hdcache.durable import durable_parts, durable_write
from hdcache.errors import HdcacheError, StoreCorrupt
from hdcache.extract.damage import Damaged, Survey, survey, teacher_of
from hdcache.extract.record_mending import make_room
from hdcache.ledgers import SAMPLES_RECEIPT
from hdcache.schema import Manifest, Receipt, StoredObject
from hdcache.store import ABOUT, About, Store

BLOCK = 1 << 22
_RECORDS = ("manifest", "receipt", "record")
"""Kinds of objects that say what others should be."""


def take_from_copy(store: Store, other: Path, found: Survey, again: Callable[[Store], Survey] | None) -> Survey:
    """Take what is damaged from a copy: records first, since they say what else is.

    ``again`` surveys once more, where records were taken and sizes are not enough; what is returned holds all that was found.
    """
    taken: list[Damaged] = []
    while True:
        records = [one for one in found.open() if one.kind in _RECORDS or one.key == SAMPLES_RECEIPT]
        for one in sorted(records, key=lambda one: (one.kind not in _RECORDS, one.kind)):
            _take_record(store, other, one, found)
        if not any(one.outcome for one in records):
            break
        taken += [one for one in records if one.outcome]
        store = Store.open(store.path)
        found = survey(store, quick=True)
    if taken and again is not None:
        found = again(store)
    found.damaged = taken + found.damaged
    for one in found.open():
        if one.kind == "index":
            continue
        if one.expected is None:
            one.why_not = one.why_not or "nothing that can be read says what it should be"
        elif why := copied(other / one.key, store.path / one.key, one.expected):
            one.why_not = why
        else:
            one.outcome = f"taken from {other}"
    _take_notes(store, other)
    return found


def _take_notes(store: Store, other: Path) -> None:
    """Where data and weights were, of what was lost as a whole: no record lists these notes."""
    for key in (ABOUT, *(f"teachers/{name}/{ABOUT}" for name in store.teachers())):
        if not (store.path / key).exists() and (other / key).is_file():
            with suppress(StoreCorrupt):
                durable_write(store.path / key, About.parse(read_json(other / key), other / key).canonical())


def _take_record(store: Store, other: Path, one: Damaged, found: Survey) -> None:
    """A manifest, a receipt or a record of the copy, where it agrees with what is good here."""
    path = other / one.key
    try:
        if one.kind == "manifest" and one.expected is None:
            manifest = Manifest.parse(read_json(path), path)
            receipts = found.receipts[one.ledger].values()
            told = {f"{one.ledger}/{name}": entry for receipt in receipts for name, entry in receipt.objects.items()}
            good = (manifest.teacher, manifest.rows) == (teacher_of(one.ledger), store.card.dataset.count)
            if not good or any(manifest.objects.get(key) != entry for key, entry in told.items()) or not told:
                one.why_not = f"{path} does not agree with the receipts here; is {other} a copy of this store?"
                return
        elif one.kind == "receipt" and one.shard is not None:
            receipt = Receipt.parse(read_json(path), path)
            expected = found.receipt(one.ledger, one.shard)
            if expected is None or receipt.model_copy(update={"saturated": 0}) != expected:
                one.why_not = f"{path} does not agree with the manifest; is {other} a copy of this store?"
                return
        elif one.expected is None and one.kind != "manifest":
            one.why_not = "no seal says what it should be"
            return
        why = copied(path, store.path / one.key, one.expected)
    except StoreCorrupt as error:
        why = str(error)
    one.why_not, one.outcome = why, "" if why else f"taken from {other}"


def copied(source: Path, path: Path, expected: StoredObject | None) -> str:
    """Copy a file if it is what is ``expected``; else say why not."""
    try:
        if expected is not None:
            if source.stat().st_size != expected.size:
                return f"{source} has another size, or is damaged too"
            with open(source, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    return f"{source} is another object, or is damaged too"
        make_room(path)
        durable_parts(path, _blocks(source, expected))
    except FileNotFoundError:
        return f"{source} is not there"
    except (OSError, StoreCorrupt) as error:
        if isinstance(error, HdcacheError):
            raise
        return f"{source} cannot be read ({error.strerror})"
    return ""


def _blocks(source: Path, expected: StoredObject | None) -> Iterator[bytes]:
    hasher = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
            yield block
    # Once more, of the bytes that were written: a disk may give others the second time.
    if expected is not None and hasher.hexdigest() != expected.sha256:
        raise StoreCorrupt(f"{source}: it changed while it was copied; run the same command again")

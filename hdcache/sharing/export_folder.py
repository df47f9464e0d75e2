"""What lies in the folder of an export: its settings, and which of its shards are complete."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hdcache.array_metadata import read_json
from hdcache.durable import durable_write
from hdcache.errors import OutOfSpace, StoreCorrupt, StoreMismatch
from hdcache.progress import size
from hdcache.records import Record
from hdcache.schema import Receipt, StoredObject
from hdcache.sharing.exported_shards import Rows

SETTINGS, INDEX, RECEIPTS = "export.json", "index.json", "receipts"
Dtype = Literal["fp16", "bf16", "fp32"]


class ExportSettings(Record):
    """What decides every byte of an export, versions of libraries aside."""

    version: int = 1
    format: Literal["safetensors", "webdataset"]
    dataset: str
    """Fingerprint of the data set."""
    view: int
    seals: dict[str, str]
    """Digest of the view's seal, by teacher."""
    features: dict[str, tuple[str, ...]]
    """Taps and targets, by teacher."""
    taps: dict[str, tuple[str, ...]]
    """Those of them that are exported as they are stored."""
    dtype: Dtype
    images: bool
    rows_per_shard: int


@dataclass(frozen=True)
class ShardFile:
    """One file: its rows are number ``first`` and following of those that are exported."""

    number: int
    name: str
    first: int
    rows: Rows


def check_folder(folder: Path, settings: ExportSettings) -> None:
    """:class:`StoreMismatch` where ``folder`` holds anything but an export, or one of other settings."""
    if folder.exists() and not folder.is_dir():
        raise StoreMismatch(f"{folder}: a file, not a folder; choose another folder")
    path = folder / SETTINGS
    if not path.is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise StoreMismatch(f"{folder}: not empty, and not an export; choose another folder")
        return
    asked, found = settings.whole(), read_json(path)
    found = found if isinstance(found, dict) else {}
    wrong = [
        f"{field} is {found.get(field)!r}, asked was {asked.get(field)!r}"
        for field in sorted({*asked, *found})
        if asked.get(field) != found.get(field)
    ]
    if wrong:
        raise StoreMismatch(
            f"{folder}: an export of other settings ({'; '.join(wrong)}); choose another folder, or remove this one"
        )


def finished(folder: Path, shard: ShardFile) -> Receipt | None:
    """The receipt of a shard that is there, whole; None where it has to be written."""
    path = folder / RECEIPTS / f"{shard.number}.json"
    if not path.is_file():
        return None
    try:
        receipt = Receipt.parse(read_json(path), path)
    except StoreCorrupt:
        return None
    listed = receipt.objects.get(shard.name)
    span = (shard.first, shard.first + len(shard.rows))
    if listed is None or receipt.rows != span or not _equal(folder / shard.name, listed):
        return None
    return receipt


def _equal(path: Path, listed: StoredObject) -> bool:
    try:
        if path.stat().st_size != listed.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256
    except FileNotFoundError:
        return False


def record(folder: Path, shard: ShardFile, written: StoredObject) -> Receipt:
    """Write the receipt of a shard that is durable."""
    span = (shard.first, shard.first + len(shard.rows))
    receipt = Receipt(shard=shard.number, rows=span, objects={shard.name: written})
    durable_write(folder / RECEIPTS / f"{shard.number}.json", receipt.checked())
    return receipt


def check_space(folder: Path, need: int) -> None:
    """:class:`OutOfSpace` where ``need`` bytes are more than are free where ``folder`` is, or will be."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if need > free:
        raise OutOfSpace(
            f"{folder}: {size(need)} ({need:,} bytes) are needed, {size(free)} are free; free space, choose fewer taps with --tap, "
            "or --dtype fp16"
        )

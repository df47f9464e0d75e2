"""What ``repair`` is asked for: what cannot be meant is refused before anything of the store is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hdcache.datasets import Dataset
from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, UsageError
from hdcache.extract.checked_rows import images_of
from hdcache.records import NAME
from hdcache.store import Store


def named_folders(path: str | Path, copy: str | Path | None) -> tuple[Path, Path | None]:
    """The folders of a store and of its copy, if one is named; UsageError and InputNotFound for what are none."""
    if "://" in str(path):
        raise UsageError(f"{path}: this needs the store in a folder; get it first: hdcache pull {path} FOLDER")
    if copy is not None and "://" in str(copy):
        raise UsageError(f"--from {copy}: this needs the copy in a folder; get it first: hdcache pull {copy} COPY")
    for name, given in (("STORE", path), ("--from", copy)):
        if str(given) == "":
            raise UsageError(f"{name} is empty; name the folder of a store")
    root, other = Path(path).expanduser(), None if copy is None else Path(copy).expanduser()
    if other is not None and not (other / "zarr.json").is_file():
        raise InputNotFound(f"{other}: no store there; --from takes the folder of another copy of {root}")
    if other is not None and other.resolve() == root.resolve():
        raise InputNotFound(f"{other}: that is the store itself; --from takes the folder of another copy of it")
    return root, other


def check_asked(store: Store, other: Path | None, data: str | None, teachers: Sequence[str]) -> Dataset | None:
    """Refuse what cannot be meant before any object is looked at; the data set, if one is named and the store is good enough to compare."""
    for text in teachers:
        name, sign, spec = text.partition("=")
        if not sign or not spec:
            raise UsageError(f"--teacher {text}: say where its weights are: --teacher {name}=MODEL")
        if not (NAME.fullmatch(name) and (store.path / "teachers" / name).is_dir()):
            known = ", ".join(store.teachers()) or "none"
            raise InputNotFound(
                f"{store.path}: no teacher {name!r} (teachers: {known}); --teacher takes NAME=MODEL of one of them"
            )
    if other is not None:
        try:
            copy = Store.open(other)
        except HdcacheError:
            copy = store  # its record is damaged: what is taken is proven anyway
        if copy.id != store.id:
            raise UsageError(
                f"{other}: another store (id {copy.id}); --from takes a copy of {store.path} (id {store.id})"
            )
    if data is None:
        return None
    try:
        return images_of(store, data)
    except StoreCorrupt:
        return None  # the survey says what of the store it is

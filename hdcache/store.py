"""Store format 1: where everything lies.

::

    STORE/zarr.json                         attributes.hdcache: StoreCard; about.json: where the data was
    STORE/samples/{id_bytes,id_offsets,label}
    STORE/samples/pixels/...                the samples themselves, where they are kept: hdcache.packed
    STORE/views/K/{geometry,source_digest}  one row per (sample, view K), in the view's own order
    STORE/teachers/NAME/zarr.json           attributes.hdcache: TeacherRecord
    STORE/teachers/NAME/encodings/TAP/...   constants of an encoding (basis, mean, step)
    STORE/teachers/NAME/weights/blockN/...  the frozen pieces that derive targets
    STORE/teachers/NAME/views/K/TAP/...     the stored rows
    STORE/teachers/NAME/views/K/mask/visible  masked teachers: which patch tokens each row is of
    .../views/K/receipts/N.json, manifest.json

Every array is plain Zarr v3 with core codecs only, so zarr-python, zarrs and tensorstore all open it. No torch here.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hdcache.array_metadata import contained, group_metadata, names_in, read_attributes, read_json
from hdcache.arrays import ArrayReader, write_constant
from hdcache.durable import durable_write, sync_folder
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.leases import lease, refuse_elsewhere
from hdcache.object_files import ObjectFiles
from hdcache.records import NAME, Record, check_name
from hdcache.schema import FORMAT, Receipt, StoreCard, StoredObject, TeacherRecord, ViewSpec

ABOUT, ROOT_LOCK, GC_LOCK, LEASE = "about.json", ".lock", ".+gc.lock", ".lease"
PIXELS = "samples/pixels"
"""Where a store keeps the bytes of its samples, if it does (:mod:`hdcache.packed`)."""
ID_BLOCK = 1 << 16
"""Sample ids that are decoded at a time."""
GEOMETRY_COLUMNS = ("sample", "left", "top", "width", "height", "flip", "source_width", "source_height")
"""Columns of a view's geometry, of still images and of clips alike; :func:`geometry_columns` names all."""


def geometry_columns(views: ViewSpec) -> tuple[str, ...]:
    """Columns of the geometry of ``views``; a clip's row ends with the indices of its frames in the video."""
    return GEOMETRY_COLUMNS + tuple(f"frame_{number}" for number in range(views.frames or 0))


class About(Record):
    """What may change without changing a store: where things came from. ``about.json``, which no seal covers."""

    data: str = ""
    """Spec of the data set when the store was made."""
    source: str = ""
    """Where a teacher's weights came from."""
    written_with: dict[str, str] = Field(default_factory=dict)
    """Versions of what wrote it (hdcache, zarr, pillow ...)."""


def read_about(folder: Path) -> About:
    """Where a store or a teacher came from; empty where that was lost, since nothing rests on it."""
    try:
        return About.parse(read_json(folder / ABOUT), folder / ABOUT)
    except StoreCorrupt:
        return About()


def _newer(root: Path) -> str:
    """How to install a version that reads the store at ``root``: at least the one that made it, where that is known."""
    try:
        made_with = read_json(root / ABOUT)["written_with"]["hdcache"]
    except (StoreCorrupt, LookupError, TypeError):
        made_with = None
    known = isinstance(made_with, str) and re.fullmatch(r"\d+(\.\w+){0,4}", made_with)
    return f"pip install 'hdcache>={made_with}'" if known else "pip install -U hdcache"


class Store:
    """A store folder, opened. Cheap: reads only the root record until something is asked for."""

    def __init__(self, path: Path, card: StoreCard, about: About, files: ObjectFiles | None = None) -> None:
        """``files`` has the objects that are no records, where they do not lie in the folder."""
        data = card.dataset.model_copy(update={"spec": about.data})
        self.path, self.card, self.about = path, card.model_copy(update={"dataset": data}), about
        self.files = files or ObjectFiles(path)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open an existing store.

        Raises
        ------
        InputNotFound
            when there is no store at ``path``.
        StoreMismatch
            when it was written in a newer format.
        StoreCorrupt
            when its root record is malformed.
        """
        if "://" in str(path):
            raise UsageError(f"{path}: this needs the store in a folder; get it first: hdcache pull {path} FOLDER")
        root = Path(path).expanduser()
        if not (root / "zarr.json").is_file():
            if next(root.glob("views/*/manifest.json"), None) is not None:
                raise StoreCorrupt(f"{root}/zarr.json: missing; take it from a copy: hdcache repair {root} --from COPY")
            if (root / "samples").is_dir():
                raise InputNotFound(
                    f"{root}: a store whose creation was cut short; run the same 'hdcache extract' command again"
                )
            raise InputNotFound(
                f"{root}: no store there; make one with 'hdcache extract DATA --store {root} --teacher MODEL'"
            )
        record = read_attributes(root / "zarr.json")
        if not isinstance(record, dict):
            raise InputNotFound(f"{root}: a Zarr group, but not an hdcache store (no 'hdcache' attribute)")
        version = record.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise StoreMismatch(f"{root}: store format {version}, this hdcache reads up to {FORMAT}; {_newer(root)}")
        return cls(root, StoreCard.parse(record, root / "zarr.json"), read_about(root))

    @classmethod
    def create(
        cls,
        path: str | Path,
        card: StoreCard,
        ids: Sequence[str],
        labels: NDArray[np.int64],
        written_with: Mapping[str, str] | None = None,
    ) -> Store:
        """Create a store with its samples; the root record is written last, so a half-made store is never opened."""
        root = Path(path).expanduser()
        if not len(ids) == len(labels) == card.dataset.count:
            raise ValueError(f"{len(ids)} ids and {len(labels)} labels for {card.dataset.count} samples")
        if (root.exists() and not root.is_dir()) or (root / "zarr.json").exists():
            raise StoreMismatch(f"{root}: exists already; give --store another folder")
        if root.is_dir() and any(
            entry.name not in ("samples", "views", "teachers", ABOUT) and not entry.name.startswith(".")
            for entry in root.iterdir()
        ):
            raise StoreMismatch(f"{root}: not empty and not a store; give --store another folder")
        lengths = np.fromiter((len(sample.encode()) for sample in ids), np.int64, len(ids))
        objects: dict[str, StoredObject] = {}
        arrays: dict[str, NDArray[Any]] = {
            "id_bytes": np.frombuffer("".join(ids).encode(), np.uint8),
            "id_offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            "label": np.asarray(labels, np.int64),
        }
        for name, value in arrays.items():
            objects |= write_constant(root / "samples", name, value)
        receipt = Receipt(shard=0, rows=(0, len(ids)), objects=objects)
        durable_write(root / "samples" / "receipt.json", receipt.checked())
        for group in ("samples", "views", "teachers"):
            durable_write(root / group / "zarr.json", group_metadata({}))
        about = About(data=card.dataset.spec, written_with=dict(written_with or {}))
        durable_write(root / ABOUT, about.canonical())
        durable_write(root / "zarr.json", group_metadata(_lasting(card).model_dump(mode="json")))
        store = cls(root, card, about)
        store.ids = tuple(ids)
        return store

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that copies have in common: of the digest of what never changes, wherever it lies."""
        return _lasting(self.card).digest()[:16]

    def _sample_array(self, name: str, count: int | None, dtype: str) -> NDArray[np.generic]:
        path = self.path / "samples" / "receipt.json"
        listed = Receipt.parse(read_json(path), path).objects
        if count is None:
            chunk = listed.get(f"{name}/c.0")
            if chunk is None:
                raise StoreCorrupt(f"{path}: {name} is not listed")
            count = chunk.size - 4  # one byte a value, and the crc32c
        try:
            return ArrayReader(self.files.below("samples"), name, (count,), dtype, listed, None).rows(0, count)
        except StoreCorrupt as error:
            raise StoreCorrupt(f"{error}; or {path}, which lists it, is another's") from None

    def check_count(self) -> None:
        """:class:`StoreCorrupt` unless the ids take as many bytes as the record says that there are samples.

        For who makes something for each of them before anything of them is read: a record alone may say any number.
        """
        path, count = self.path / "samples" / "receipt.json", self.card.dataset.count
        listed = Receipt.parse(read_json(path), path).objects.get("id_offsets/c.0")
        if listed is None or listed.size != 8 * (count + 1) + 4:
            raise StoreCorrupt(f"{path}: does not list the ids of {count:,} samples; copy the store again")
        self.files.below("samples").unproved("id_offsets/c.0", listed).close()

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Sample ids, sorted bytewise."""
        offsets = self._sample_array("id_offsets", self.card.dataset.count + 1, "int64").astype(np.int64, copy=False)
        data = self._sample_array("id_bytes", None, "uint8").tobytes()
        if offsets[0] != 0 or offsets[-1] != len(data) or not (offsets[:-1] < offsets[1:]).all():
            raise StoreCorrupt(f"{self.path}/samples: id offsets do not fit the id bytes")
        found: list[str] = []
        try:
            for start in range(0, len(offsets) - 1, ID_BLOCK):
                ends = offsets[start : start + ID_BLOCK + 1].tolist()
                found += [data[a:b].decode() for a, b in itertools.pairwise(ends)]
        except UnicodeDecodeError:
            raise StoreCorrupt(f"{self.path}/samples/id_bytes: not UTF-8") from None
        return tuple(found)

    def adopt_ids(self, fingerprint: str, ids: tuple[str, ...]) -> None:
        """Take the ids of a data set that is this store's by its fingerprint, so that no second copy of them is held."""
        if fingerprint == self.card.dataset.fingerprint:
            self.ids = ids

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 [samples], an index into ``card.dataset.classes``, -1 where there is none."""
        found = self._sample_array("label", self.card.dataset.count, "int64").astype(np.int64)
        if not ((found >= -1) & (found < len(self.card.dataset.classes))).all():
            raise StoreCorrupt(f"{self.path}/samples/label: does not fit the store's classes; copy the store again")
        return found

    def teachers(self) -> list[str]:
        """Names of the teachers in the store, sealed or not."""
        folder = self.path / "teachers"
        return [name for name in names_in(folder) if NAME.fullmatch(name) and (folder / name / "zarr.json").is_file()]

    def teacher_path(self, name: str) -> Path:
        return self.path / "teachers" / check_name(name, "teacher")

    def teacher(self, name: str) -> TeacherRecord:
        """The record of one teacher; :class:`InputNotFound` lists those that exist."""
        path = contained(self.path, f"teachers/{check_name(name, 'teacher')}") / "zarr.json"
        if not path.is_file():
            if next(path.parent.glob("views/*/manifest.json"), None) is not None:
                raise StoreCorrupt(
                    f"{path}: missing, and rows of the teacher are there; 'hdcache verify' lists what is damaged"
                )
            known = ", ".join(self.teachers()) or "none"
            raise InputNotFound(
                f"{self.path}: no teacher {name!r} (teachers: {known}); "
                f"add it: {self.extract_command()} --teacher {name}=MODEL"
            )
        record = TeacherRecord.parse(read_attributes(path), path)
        if record.name != name:
            raise StoreCorrupt(f"{path}: the record of teacher {record.name!r}; rename the folder back to that")
        return record.model_copy(update={"source": read_about(path.parent).source})

    def free_name(self, name: str) -> str:
        """``NAME-2``, or with the first number after that which no teacher here has."""
        taken = self.teachers()
        return next(free for number in itertools.count(2) if (free := f"{name}-{number}") not in taken)

    def extract_command(self) -> str:
        """How a teacher is added with as many views as the others have; a run reads the views that all of its teachers have."""
        views = max((len(self.views(other)) for other in self.teachers()), default=0)
        more = f" --num-views {views}" if views > 1 else ""
        return f"hdcache extract --store {shlex.quote(str(self.path))}{more}"

    def views(self, teacher: str) -> list[int]:
        """Sealed views of a teacher, ascending."""
        folder = self.teacher_path(teacher) / "views"
        found = (name for name in names_in(folder) if is_view(name) and (folder / name / "manifest.json").is_file())
        return sorted(int(name) for name in found)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclusive right to write ``name`` (a teacher, or :data:`PIXELS`); the system frees it when the process dies,
        however it dies. A lease that such a process left is removed, so that its workers begin nothing more.

        Raises
        ------
        StoreLocked
            when another process has it.
        StoreCorrupt
            when a link in it leads out of the store, where nothing may be written.
        StoreMismatch
            when another process has withdrawn this store (:meth:`withdraw`) and made it anew with other settings.
        """
        # No teacher's name holds a plus.
        own = PIXELS.replace("/", "+") if name == PIXELS else check_name(name, "teacher")
        with lease(self.path / f".{own}.lock"):
            # Who withdraws, or removes leftovers, holds this lock, and leaves a store alone whose teachers' locks are taken.
            with filelock.FileLock(self.path / ROOT_LOCK):
                refuse_elsewhere(self.path / GC_LOCK)
                same = (self.path / "zarr.json").is_file() and _lasting(Store.open(self.path).card) == _lasting(
                    self.card
                )
            if not same:
                raise StoreMismatch(
                    f"{self.path}: another process made it anew with other settings; run the same command again"
                )
            for key in (PIXELS, "views", "teachers" if name == PIXELS else f"teachers/{name}"):
                for link in _folder_links(contained(self.path, key)):
                    contained(self.path, link.relative_to(self.path).as_posix())
            (self.path / f".{own}{LEASE}").unlink(missing_ok=True)
            yield

    @property
    def begun(self) -> bool:
        """Whether it holds a teacher, rows of a view or bytes of samples: its settings are fixed then."""
        views = any(is_view(name) for name in names_in(self.path / "views"))
        return views or bool(self.teachers()) or (self.path / PIXELS).is_dir()

    def withdraw(self) -> bool:
        """Remove the root record of a store that nothing was written to, so that it can be created with other settings.

        The caller holds the lock :data:`ROOT_LOCK`. False, and nothing is done, where it has begun or a teacher is
        about to be written.
        """
        with ExitStack() as held:
            for path in self.path.glob(".*.lock"):
                try:
                    held.enter_context(filelock.FileLock(path, timeout=0))
                except filelock.Timeout:
                    return False
            if self.begun:
                return False
            for name in ("index.json", "croissant.json", "zarr.json"):  # they speak of what there was before
                (self.path / name).unlink(missing_ok=True)
            sync_folder(self.path)
            return True


def _folder_links(folder: Path) -> Iterator[Path]:
    """Links in place of folders, in and below a folder."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and entry.is_dir():
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                yield from _folder_links(Path(entry.path))


def _lasting(card: StoreCard) -> StoreCard:
    """A card without where the data lies, which may change."""
    return card.model_copy(update={"dataset": card.dataset.model_copy(update={"spec": ""})})


def is_view(name: str) -> bool:
    """Whether a folder's name is the number of a view as hdcache spells it."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name

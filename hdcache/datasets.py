"""One spec for every data set: an ordered list of stable sample ids, their labels and raw sources.

====================================================  ==================================================
``/path`` or ``folder:/path``                         image folder, class = first-level directory
``/path/s-{000..007}.tar``, ``tar:...``, ``wds:...``  WebDataset shards (braces and globs)
``/path/x.npz`` or ``npz:/path/x.npz?images=&...``    uint8 arrays
``hf:owner/name?split=train&image=&label=&...``       Hugging Face data set, by name or local path
``torchvision:CIFAR10?root=/data&train=true``         torchvision data set
====================================================  ==================================================

After a kind and its colon, ``?`` starts options and ``%XX`` is decoded; a plain path is taken literally.
Integer labels below zero mean "none", as in unlabelled test splits.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import itertools
import os
import re
import threading
import unicodedata
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.errors import InputNotFound, UnreadableImage, UsageError, nearest
from hdcache.listings import EXTENSIONS, checked_label, expand_braces, index_tar, stamp_of, walk
from hdcache.pixels import Source, decode, digest, rgb
from hdcache.schema import DatasetCard, canonical_json

__all__ = ["Dataset", "Source", "decode", "digest", "open_dataset"]

Kind = Literal["folder", "tar", "hf", "torchvision", "npz"]
KINDS: dict[str, Kind] = {
    "folder": "folder", "tar": "tar", "wds": "tar", "npz": "npz", "hf": "hf", "torchvision": "torchvision"
}  # fmt: skip
OPTIONS: dict[Kind, tuple[str, ...]] = {
    "folder": (),
    "tar": (),
    "npz": ("images", "labels", "ids"),
    "hf": ("split", "image", "label", "id", "revision", "config"),
}


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
    content: str
    """Size in bytes or content digest: what the fingerprint knows of the image."""
    place: Any
    """What ``fetch`` needs to read it."""


@dataclass(frozen=True, eq=False)
class Listed:
    """The only :class:`Dataset`: sorted ids beside the place of each sample."""

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


@dataclass(frozen=True)
class Spec:
    """A parsed spec; ``text`` is what was asked, for messages."""

    text: str
    kind: Kind
    path: str
    options: Mapping[str, str]

    def canonical(self) -> str:
        """The spec with its kind and absolute path; parses to the same data set."""
        options = "&".join(f"{name}={_quote(value, '%&')}" for name, value in sorted(self.options.items()))
        return f"{self.kind}:{_quote(self.path, '%?')}" + (f"?{options}" if options else "")


def open_dataset(spec: str, *, classes: Sequence[str] | None = None, cache: Path | None = None) -> Dataset:
    """List the data set at ``spec`` (see the table at the top of this module).

    ``classes`` forces the class list, usually that of the training split, so that labels agree between splits;
    classes that occur but are not in it are appended (legal: a k-NN evaluation counts them as wrong). ``cache``
    holds listings of folders and tars (default ``$HDCACHE_CACHE`` or ``~/.cache/hdcache``). A directory is read
    again when its mtime changed, so a file that was rewritten in place is noticed only after ``touch``-ing it.

    The fingerprint covers id, label and size in bytes of each sample (npz: sha256 of the pixels; torchvision: the
    class and its options), never where the data lies or in which order it was listed.

    :class:`UsageError` for a spec that cannot be meant, duplicate ids or bad labels; :class:`InputNotFound` for
    data that is missing, empty or damaged.
    """
    parsed = _parse(spec)
    if classes is not None and len(set(classes)) != len(classes):
        raise UsageError(f"{spec}: classes= names a class twice; give each class once")
    listings = (cache or Path(os.environ.get("HDCACHE_CACHE") or Path.home() / ".cache" / "hdcache")) / "listings"
    if parsed.kind == "folder":
        return _folder(parsed, classes, listings)
    if parsed.kind == "tar":
        return _tar(parsed, classes, listings)
    if parsed.kind == "npz":
        return _npz(parsed, classes)
    return _hf(parsed, classes) if parsed.kind == "hf" else _torchvision(parsed, classes)


# ----------------------------------------------------------------------------------------------- specs


def _parse(text: str) -> Spec:
    prefix, _, rest = text.partition(":")
    if kind := KINDS.get(prefix):
        path, _, query = rest.partition("?")
        path = unquote(path)
        if not path:
            raise UsageError(f"{text!r} names no data set; write {prefix}:PATH")
        if kind in ("folder", "tar", "npz") or (kind == "hf" and (path[0] in "/.~" or os.path.exists(path))):
            path = _absolute(path)
        return Spec(text, kind, path, _options(text, kind, query))
    if re.match(r"[A-Za-z][A-Za-z0-9+-]+:", text) and not os.path.exists(text):
        raise UsageError(f"{text!r}: unknown kind of data set {prefix!r}; {nearest(prefix, KINDS)}")
    path = _absolute(text)
    if re.search(r"\.(tar(\.\w+)?|tgz)$", path) and not os.path.isdir(path):
        return Spec(text, "tar", path, {})
    if not os.path.exists(path):
        raise InputNotFound(f"{text!r}: no such directory or file ({path}); check the path")
    if os.path.isdir(path):
        return Spec(text, "folder", path, {})
    if path.endswith(".npz"):
        return Spec(text, "npz", path, {})
    raise UsageError(f"{text!r} is a file but neither .tar nor .npz; give a directory of images, a .tar or an .npz")


def _options(text: str, kind: Kind, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: option {part!r} has no value; write {part}=VALUE")
        if kind in OPTIONS and name not in OPTIONS[kind]:
            advice = nearest(name, OPTIONS[kind]) if OPTIONS[kind] else f"{kind}: takes none (a '?' in a path is %3F)"
            raise UsageError(f"{text!r}: unknown option {name!r}; {advice}")
        if name in options:
            raise UsageError(f"{text!r}: option {name!r} is given twice; give it once")
        options[name] = unquote(value)
    return options


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _quote(text: str, reserved: str) -> str:
    return re.sub(f"[{reserved}]", lambda match: f"%{ord(match[0]):02X}", text)


# ------------------------------------------------------------------------------ from rows to a data set


def _assemble(
    spec: Spec,
    rows: list[Row],
    fetch: Callable[[Any], Source],
    classes: Sequence[str] | None,
    names: Sequence[str] = (),
) -> Dataset:
    """Sort, check and number ``rows``; ``names`` is the data set's own class list where it has one."""
    # Python compares strings by code point, which is the bytewise order of UTF-8.
    rows = sorted((row._replace(id=_nfc(row.id)) for row in rows), key=lambda row: row.id)
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


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------------------------------ folder


def _folder(spec: Spec, classes: Sequence[str] | None, listings: Path) -> Dataset:
    if not os.path.isdir(spec.path):
        raise InputNotFound(f"{spec.text!r}: no such directory ({spec.path}); check the path")
    images = walk(spec.path, listings)
    if not images:
        raise InputNotFound(
            f"{spec.text!r}: no images (.{' .'.join(EXTENSIONS)}) in or below {spec.path};"
            " check the path, or write tar: or npz: before it"
        )
    loose = next((path for path, _ in images if "/" not in path), None)
    nested = next((path for path, _ in images if "/" in path), None)
    if loose and nested:
        raise UsageError(
            f"{spec.text!r}: images lie both in the root ({loose}) and in class directories ({nested});"
            " move the former into a directory of their own"
        )
    rows = [Row(path, _nfc(path.split("/", 1)[0]) if nested else None, str(size), path) for path, size in images]
    return _assemble(spec, rows, lambda place: Path(spec.path, place).read_bytes(), classes)


# --------------------------------------------------------------------------------------------------- tar


class Member(NamedTuple):
    """Where the bytes of one image lie."""

    tar: str
    stamp: tuple[int, int]
    """Size and mtime_ns of the tar when it was indexed."""
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


def _tar(spec: Spec, classes: Sequence[str] | None, listings: Path) -> Dataset:
    rows: list[Row] = []
    shards = _shards(spec)
    for path in shards:
        try:
            stamp, samples = index_tar(path, listings)
        except InputNotFound:
            raise
        except OSError as error:
            raise InputNotFound(f"{spec.text!r}: cannot read {path}: {error.strerror or error}") from None
        name = os.path.basename(path)
        for key, member, offset, size, label in samples:
            rows.append(Row(f"{name}/{key}", label, str(size), Member(path, stamp, member, offset, size)))
    if not rows:
        raise InputNotFound(f"{spec.text!r}: no images (.{' .'.join(EXTENSIONS)}) in {len(shards)} tar files")
    return _assemble(spec, rows, _read_member, classes)


def _read_member(place: Member) -> bytes:
    with open(place.tar, "rb", buffering=0) as file:
        if stamp_of(os.fstat(file.fileno())) != place.stamp:
            raise UnreadableImage(f"{place.tar} changed after it was listed; open the data set again")
        data = os.pread(file.fileno(), place.size, place.offset)
    if len(data) != place.size:
        raise UnreadableImage(f"{place}: {len(data)} of {place.size} bytes could be read")
    return data


def _shards(spec: Spec) -> list[str]:
    paths: list[str] = []
    missing: list[str] = []
    patterns = [spec.path] if os.path.exists(spec.path) else list(expand_braces(spec.path))
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if re.search(r"[*?[]", pattern) else []
        if os.path.exists(pattern):
            found = [pattern]
        paths += found
        missing += [] if found else [pattern]
    if missing:
        raise InputNotFound(
            f"{spec.text!r}: {len(missing)} of {len(patterns)} tar files are missing, the first is {missing[0]};"
            " check the path and the numbers in braces"
        )
    return list(dict.fromkeys(paths))


# --------------------------------------------------------------------------------------------------- npz


def _npz(spec: Spec, classes: Sequence[str] | None) -> Dataset:
    try:
        with open(spec.path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputNotFound(f"{spec.text!r}: {spec.path} is not an .npz (a zip of arrays); use numpy.savez")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            images = archive[_key(spec, archive.files, "images", ("images", "x", "X", "data"), required=True)]
            label_key = _key(spec, archive.files, "labels", ("labels", "label", "y"))
            labels = archive[label_key] if label_key else None
            id_key = _key(spec, archive.files, "ids", ("ids",))
            ids = archive[id_key] if id_key else None
    except (InputNotFound, UsageError):
        raise
    except FileNotFoundError:
        raise InputNotFound(f"{spec.text!r}: no such file ({spec.path}); check the path") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputNotFound(f"{spec.text!r}: not a readable .npz without pickled objects: {error}") from None
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))):
        raise UsageError(
            f"{spec.text!r}: images are {images.dtype} {list(images.shape)};"
            " expected uint8 [N, H, W] or [N, H, W, 1 | 3 | 4]"
        )
    if not images.size:
        raise InputNotFound(f"{spec.text!r}: no images in {spec.path} (shape {list(images.shape)})")
    count = len(images)
    for name, array in (("labels", labels), ("ids", ids)):
        if array is not None and (array.size != count or array.dtype.kind not in "iuU"):
            raise UsageError(
                f"{spec.text!r}: {name} are {array.dtype} {list(array.shape)};"
                f" expected {count} integers or strings, one for each image"
            )
    names = [f"{row:07d}" for row in range(count)] if ids is None else [str(value) for value in ids.ravel()]
    values = [None] * count if labels is None else labels.ravel().tolist()
    rows = [
        Row(names[row], checked_label(values[row], spec.text), digest(images[row]).hex(), row) for row in range(count)
    ]
    return _assemble(spec, rows, lambda place: np.asarray(images[place]), classes)


def _key(spec: Spec, keys: list[str], option: str, defaults: Sequence[str], *, required: bool = False) -> str:
    if asked := spec.options.get(option):
        if asked not in keys:
            raise UsageError(f"{spec.text!r}: no array {asked!r} for {option} in {spec.path}; {nearest(asked, keys)}")
        return asked
    found = next((name for name in defaults if name in keys), "")
    if required and not found:
        raise UsageError(
            f"{spec.text!r}: no array named {', '.join(defaults)} in {spec.path};"
            f" choose one with ?{option}=NAME from: {', '.join(sorted(keys))}"
        )
    return found


# ---------------------------------------------------------------------------------- Hugging Face, torchvision


def _hf(spec: Spec, classes: Sequence[str] | None) -> Dataset:
    try:
        import datasets
        import pyarrow.compute as compute  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise UsageError(f"{spec.text!r} needs the package 'datasets': pip install 'hdcache[hf]'") from None
    data, split = _hf_split(spec, datasets)
    pictures = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    image = spec.options.get("image") or next(iter(pictures), "image")
    label = spec.options.get("label", "label" if "label" in data.column_names else "")
    for name in (image, label, spec.options.get("id", "")):
        if name and name not in data.column_names:
            raise UsageError(f"{spec.text!r}: no column {name!r}; {nearest(name, data.column_names)}")
    # Undecoded, because datasets would decode by its own rules.
    data = data.cast_column(image, datasets.Image(decode=False))
    count = len(data)
    if not count:
        raise InputNotFound(f"{spec.text!r}: split {split!r} is empty")
    # Lengths come from the offsets of the memory-mapped table; no image is read.
    column = data.data.column(image)
    sizes = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
    paths = compute.struct_field(column, "path").to_pylist()
    values = data.data.column(label).to_pylist() if label else [None] * count
    names: list[str] = []
    if label and isinstance(data.features[label], datasets.ClassLabel):
        names = list(data.features[label].names)
        values = [names[value] if value is not None and value >= 0 else None for value in values]
    id_column = spec.options.get("id")
    ids = data.data.column(id_column).to_pylist() if id_column else [f"{split}/{row:09d}" for row in range(count)]
    rows = []
    for row in range(count):
        size = sizes[row]
        if size is None and paths[row] and os.path.exists(paths[row]):
            size = os.path.getsize(paths[row])
        if ids[row] in (None, ""):
            raise UsageError(f"{spec.text!r}: row {row} has no value in the id column {id_column!r}")
        rows.append(Row(str(ids[row]), checked_label(values[row], f"{spec.text!r}, row {row}"), str(size), row))
    only = data.select_columns([image])

    def fetch(place: int) -> bytes:
        cell = only[place][image] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise UnreadableImage(f"row {place} holds no image")
        return Path(cell["path"]).read_bytes()

    return _assemble(spec, rows, fetch, classes, names)


def _hf_split(spec: Spec, datasets: Any) -> tuple[Any, str]:
    """The table asked for and the name of its split."""
    path, asked = spec.path, spec.options.get("split")
    saved = any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            data = datasets.load_from_disk(path)
        elif os.path.isfile(path):
            data = datasets.load_dataset("parquet", data_files=path)
        elif os.path.isabs(path) and not os.path.isdir(path):
            raise FileNotFoundError("no such file or directory")
        else:
            data = datasets.load_dataset(path, spec.options.get("config"), revision=spec.options.get("revision"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputNotFound(
            f"{spec.text!r}: datasets cannot load {path}: {' '.join(str(error).split())[:300]}"
        ) from None
    if not isinstance(data, dict):
        split = str(data.split or asked or "train")
        if asked not in (None, split):
            raise UsageError(f"{spec.text!r}: {path} holds the split {split!r}, not {asked!r}")
        return data, split
    split = asked or "train"
    if split not in data:
        raise UsageError(f"{spec.text!r}: no split {split!r}; {nearest(split, data)} (split=NAME)")
    return data[split], split


def _torchvision(spec: Spec, classes: Sequence[str] | None) -> Dataset:
    import torchvision.datasets as library

    valid = [name for name in library.__all__ if isinstance(getattr(library, name), type)]
    if spec.path not in valid:
        raise UsageError(f"{spec.text!r}: torchvision has no data set {spec.path!r}; {nearest(spec.path, valid)}")
    make = getattr(library, spec.path)
    arguments = _arguments(spec, inspect.signature(make).parameters)
    try:
        data = make(**arguments)
    except (RuntimeError, OSError) as error:
        raise InputNotFound(
            f"{spec.text!r}: {' '.join(str(error).split())[:300]} (check root=, or add download=true)"
        ) from None
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{spec.text!r}: {' '.join(str(error).split())[:300]}") from None
    count = len(data)
    if not count:
        raise InputNotFound(f"{spec.text!r}: the data set is empty")
    targets = next((found for name in ("targets", "labels", "_labels") if (found := _numbers(data, name))), None)
    # Some classes keep their targets nowhere but in the items.
    values = targets or [
        int(item) if isinstance(item := data[row][1], (int, np.integer)) else -1 for row in range(count)
    ]
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in getattr(data, "classes", None) or ()]
    if len(set(names)) != len(names) or max(values) >= len(names):
        names = []
    if "train" in arguments:
        part = "train" if arguments["train"] else "test"
    else:
        part = str(arguments.get("split", arguments.get("image_set", "all")))
    content = "&".join(
        f"{name}={value}" for name, value in sorted(arguments.items()) if name not in ("root", "download")
    )
    rows = [
        Row(f"{spec.path}/{part}/{row:07d}", (names[value] if names else value) if value >= 0 else None, content, row)
        for row, value in enumerate(values)
    ]
    # torchvision does not promise thread-safe items (FakeData even reseeds torch's global generator).
    lock = threading.Lock()

    def fetch(place: int) -> Source:
        with lock:
            item = data[place][0]
        if isinstance(item, Image.Image):
            return np.asarray(item if item.mode == "L" else rgb(item))
        if isinstance(item, np.ndarray):
            return item
        raise UnreadableImage(f"torchvision gave a {type(item).__name__}, expected an image or an array")

    return _assemble(spec, rows, fetch, classes, names)


def _numbers(data: object, name: str) -> list[int] | None:
    """The attribute ``name`` if it is one integer for each sample."""
    array = np.asarray(getattr(data, name, ()))
    whole = array.ndim == 1 and array.dtype.kind in "iu" and len(array) == len(data)  # type: ignore[arg-type]
    return [int(value) for value in array] if whole else None


def _arguments(spec: Spec, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """All plain arguments of a torchvision class: options read by the type of their default, and the defaults."""
    hidden = ("transform", "target_transform", "transforms", "loader", "is_valid_file")
    known = {name: p.default for name, p in parameters.items() if name not in hidden and p.kind != p.VAR_KEYWORD}
    for name in spec.options:
        if name not in known:
            raise UsageError(f"{spec.text!r}: unknown option {name!r} for {spec.path}; {nearest(name, known)}")
    arguments: dict[str, Any] = {}
    for name, default in known.items():
        if (text := spec.options.get(name)) is not None:
            arguments[name] = _absolute(text) if name == "root" else _typed(spec, name, text, default)
        elif name == "download":
            arguments[name] = False
        elif default is not inspect.Parameter.empty:
            arguments[name] = default
        else:
            raise UsageError(f"{spec.text!r}: {spec.path} needs the option {name}; add {name}=VALUE")
    return arguments


def _typed(spec: Spec, name: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise UsageError(f"{spec.text!r}: {name}={text} is not a boolean; write true or false")
        return text.lower() in ("true", "1")
    if isinstance(default, tuple):
        return tuple(_typed(spec, name, part, 0) for part in text.split(","))
    return int(text) if not isinstance(default, str) and re.fullmatch(r"-?\d+", text) else text

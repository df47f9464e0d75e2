"""One spec for every data set: an ordered list of stable sample ids, their labels and raw sources.

====================================================  ==================================================
``/path`` or ``folder:/path``                         image folder, class = first-level directory
``video:/path``                                       folder of videos, class = first-level directory
``/path/s-{000..007}.tar``, ``tar:...``, ``wds:...``  WebDataset shards (braces and globs)
``/path/x.npz`` or ``npz:/path/x.npz?images=&...``    uint8 arrays
``hf:owner/name?split=train&image=&label=&...``       Hugging Face data set, by name or local path
``torchvision:CIFAR10?root=/data&train=true``         torchvision data set
``store:/path/train.hdc``                             the samples that a store keeps (``--pixels``)
====================================================  ==================================================

After a kind and its colon, ``?`` starts options and ``%XX`` is decoded; a plain path is taken literally.
Integer labels below zero mean "none", as in unlabelled test splits.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdcache.dataset_rows import Dataset, Row, assemble, nfc, with_classes
from hdcache.dataset_specs import Spec, parse
from hdcache.errors import InputNotFound, UnreadableImage, UsageError, nearest
from hdcache.hub_datasets import hugging_face, torchvision
from hdcache.listings import (
    EXTENSIONS,
    VIDEO_EXTENSIONS,
    checked_label,
    expand_braces,
    index_tar,
    stamp_of,
    walk,
)
from hdcache.packed import packed_dataset
from hdcache.pixels import Source, decode, digest
from hdcache.schema import DatasetCard
from hdcache.shrinking import shrunk
from hdcache.store import ABOUT, Store
from hdcache.video import require_pyav

__all__ = ["Dataset", "Source", "Subset", "decode", "digest", "open_dataset", "store_dataset"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set, as one of its own."""

    whole: Dataset
    ids: tuple[str, ...]
    """Ids of ``whole``, in its order."""

    @cached_property
    def card(self) -> DatasetCard:
        """That of the whole, with another count and fingerprint."""
        text = "\n".join([self.whole.card.fingerprint, *self.ids])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.whole.card.model_copy(update={"count": len(self.ids), "fingerprint": digest})

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Those of the whole."""
        chosen = {*self.ids}
        kept: NDArray[np.int64] = self.whole.labels[[sample_id in chosen for sample_id in self.whole.ids]]
        return kept

    def read(self, sample_id: str) -> Source:
        """As the whole reads it."""
        return self.whole.read(sample_id)


def open_dataset(spec: str, *, classes: Sequence[str] | None = None, cache: Path | None = None) -> Dataset:
    """List the data set at ``spec`` (see the table at the top of this module).

    ``classes`` forces the class list, usually that of the training split, so that labels agree between splits;
    classes that occur but are not in it are appended (legal: a k-NN evaluation counts them as wrong). ``cache``
    holds listings of folders and tars (default ``$HDCACHE_CACHE`` or ``~/.cache/hdcache``). A directory is read
    again when its mtime changed, so a file that was rewritten in place is noticed only after ``touch``-ing it.

    The fingerprint covers id and label of each sample (npz: sha256 of the pixels too; torchvision: the class and its
    options), never where the data lies or in which order it was listed. The contents of files are not in it: a damaged
    file may be mended in place, and stores hold the sha256 of every image that they have read.

    :class:`UsageError` for a spec that cannot be meant, duplicate ids or bad labels; :class:`InputNotFound` for
    data that is missing, empty or damaged.
    """
    parsed = parse(spec)
    if classes is not None and len(set(classes)) != len(classes):
        raise UsageError(f"{spec}: classes= names a class twice; give each class once")
    listings = (cache or Path(os.environ.get("HDCACHE_CACHE") or Path.home() / ".cache" / "hdcache")) / "listings"
    if parsed.kind in ("folder", "video"):
        return _folder(parsed, classes, listings)
    if parsed.kind == "tar":
        return _tar(parsed, classes, listings)
    if parsed.kind == "npz":
        return _npz(parsed, classes)
    if parsed.kind == "store":
        return _stored(parsed, classes)
    return hugging_face(parsed, classes) if parsed.kind == "hf" else torchvision(parsed, classes)


def store_dataset(store: Store, spec: str | None = None, *, kept: bool = True) -> Dataset:
    """The data set of a store: the one at ``spec``, else the samples that the store keeps (if ``kept`` ones will do), else where it was.

    Whether it is the one that the store was made from is the caller's to check: by the fingerprint. A store may come from
    anybody, and no seal covers where it says its data was: its ``download=`` is ignored, and what is read is logged before,
    as a warning where another library opens it, which may reach the network. :class:`InputNotFound` where it does not say.
    """
    card = store.card.dataset
    if not spec:
        if kept and (own := packed_dataset(store)) is not None:
            return own
        recorded = _recorded(store)
        spec = recorded.canonical()
        level = logging.WARNING if recorded.kind in ("hf", "torchvision") else logging.INFO
        log.log(level, "%s: its data is read from %r, as its %s says", store.path, spec, ABOUT)
    return shrunk(open_dataset(spec, classes=card.classes), card.shorter_side)


def _recorded(store: Store) -> Spec:
    """Where a store says that its data was."""
    if not store.about.data:
        raise InputNotFound(f"{store.path / ABOUT}: does not say where the data of this store is")
    found = parse(store.about.data)
    return replace(found, options={name: value for name, value in found.options.items() if name != "download"})


def _stored(spec: Spec, classes: Sequence[str] | None) -> Dataset:
    store = Store.open(spec.path)
    found = packed_dataset(store)
    if found is None:
        raise InputNotFound(
            f"{spec.text!r}: this store does not keep its samples, or not yet all of them; add them with --pixels source: "
            f"{store.extract_command()} --pixels source --teacher ..."
        )
    return found if classes is None else with_classes(found, classes)


# ------------------------------------------------------------------------------------------------ folder


def _folder(spec: Spec, classes: Sequence[str] | None, listings: Path) -> Dataset:
    if not os.path.isdir(spec.path):
        raise InputNotFound(f"{spec.text!r}: no such directory ({spec.path}); check the path")
    what, other = ("videos", "images") if spec.kind == "video" else ("images", "videos")
    extensions = {"images": EXTENSIONS, "videos": VIDEO_EXTENSIONS}
    files = walk(spec.path, listings, extensions[what])
    if not files:
        if walk(spec.path, listings, extensions[other]):
            prefix = {"images": "folder", "videos": "video"}[other]
            raise UsageError(f"{spec.text!r}: no {what} but {other} in {spec.path}; write {prefix}:{spec.path}")
        raise InputNotFound(
            f"{spec.text!r}: no {what} (.{' .'.join(extensions[what])}) in or below {spec.path};"
            " check the path, or write tar: or npz: before it"
        )
    if what == "videos":
        require_pyav()
    loose = next((path for path in files if "/" not in path), None)
    nested = next((path for path in files if "/" in path), None)
    if loose and nested:
        raise UsageError(
            f"{spec.text!r}: {what} lie both in the root ({loose}) and in class directories ({nested});"
            " move the former into a directory of their own"
        )
    rows = (Row(path, nfc(path.split("/", 1)[0]) if nested else None, path) for path in files)
    return assemble(spec, rows, lambda place: Path(spec.path, place).read_bytes(), classes)


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
            rows.append(Row(f"{name}/{key}", label, Member(path, stamp, member, offset, size)))
    if not rows:
        raise InputNotFound(f"{spec.text!r}: no images (.{' .'.join(EXTENSIONS)}) in {len(shards)} tar files")
    return assemble(spec, rows, _read_member, classes)


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
    rows = (Row(names[row], checked_label(values[row], spec.text), row) for row in range(count))
    return assemble(
        spec,
        rows,
        lambda place: np.asarray(images[place]),
        classes,
        content=lambda place: digest(images[place]).hex(),
    )


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

"""Data sets that another library opens: Hugging Face datasets and torchvision, imported only when asked for."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hdcache.dataset_rows import Listed, Row, assemble
from hdcache.dataset_specs import Spec, absolute
from hdcache.errors import InputNotFound, UnreadableImage, UsageError, nearest
from hdcache.listings import checked_label
from hdcache.pixels import Source, rgb


def hugging_face(spec: Spec, classes: Sequence[str] | None) -> Listed:
    """The rows of one split of a Hugging Face data set: by name, saved folder or Parquet file."""
    try:
        import datasets
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
    values = data.data.column(label).to_pylist() if label else [None] * count
    names: list[str] = []
    if label and isinstance(data.features[label], datasets.ClassLabel):
        names = list(data.features[label].names)
        values = [names[value] if value is not None and value >= 0 else None for value in values]
    id_column = spec.options.get("id")
    ids = data.data.column(id_column).to_pylist() if id_column else [f"{split}/{row:09d}" for row in range(count)]
    rows = []
    for row in range(count):
        if ids[row] in (None, ""):
            raise UsageError(f"{spec.text!r}: row {row} has no value in the id column {id_column!r}")
        rows.append(Row(str(ids[row]), checked_label(values[row], f"{spec.text!r}, row {row}"), row))
    only = data.select_columns([image])

    def fetch(place: int) -> bytes:
        cell = only[place][image] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise UnreadableImage(f"row {place} holds no image")
        return Path(cell["path"]).read_bytes()

    return assemble(spec, rows, fetch, classes, names)


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


def torchvision(spec: Spec, classes: Sequence[str] | None) -> Listed:
    """The items of a torchvision data set, made with the options of its class."""
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
        Row(f"{spec.path}/{part}/{row:07d}", (names[value] if names else value) if value >= 0 else None, row)
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

    return assemble(spec, rows, fetch, classes, names, lambda place: content)


def _numbers(data: object, name: str) -> list[int] | None:
    """The attribute ``name`` if it is one integer for each sample."""
    array = np.asarray(getattr(data, name, ()))
    whole = array.ndim == 1 and array.dtype.kind in "iu" and len(array) == len(data)  # type: ignore[arg-type]  # torchvision has no types
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
            arguments[name] = absolute(text) if name == "root" else _typed(spec, name, text, default)
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

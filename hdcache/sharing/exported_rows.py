"""Rows of one view as plain arrays for others: decoded or derived, cast, with the images that they were made of.

Blocks of rows are decoded by several threads and come in order. Each thread computes alone, so that their number changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.datasets import Dataset, store_dataset
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.geometry import read_geometry
from hdcache.reader import TeacherReader
from hdcache.samples import open_sample
from hdcache.schema import Preprocessing
from hdcache.store import GEOMETRY_COLUMNS, Store
from hdcache.taps import Coded, Tokens, parse_tap
from hdcache.target_sources import StoredTargets

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCK_ROWS, BLOCK_BYTES = 32, 64 << 20
"""Rows that are decoded together, unless they are larger than this."""

Parts = dict[str, NDArray[np.generic]]
"""What one object holds of some rows, each [rows, ...]: ``patches`` and ``prefix`` of tokens, else ``values``; of masked
teachers ``visible``."""


@dataclass(frozen=True)
class Block:
    """Some rows of a view."""

    rows: NDArray[np.int64]
    objects: dict[str, Parts]
    """By ``teacher.tap``."""
    images: NDArray[np.uint8] | None
    """uint8 [rows, 3, size, size], of clips [rows, 3, frames, size, size]; None where they were not asked for."""


class TeacherRows:
    """Rows of one teacher."""

    def __init__(self, reader: TeacherReader, taps: Sequence[str], targets: Sequence[str], dtype: torch.dtype) -> None:
        self.reader, self.name, self.taps, self.dtype = reader, reader.name, list(taps), dtype
        held = reader.record.taps
        if missing := [tap for tap in taps if tap not in held]:
            for tap in missing:
                parse_tap(tap)
            raise InputNotFound(
                f"{reader.store.path}: teacher {self.name!r} holds {', '.join(held)}, not {', '.join(missing)}; "
                "--target NAME derives what follows from a tap, relations for example"
            )
        # A stored tap is exported as it is, even where the same target would be derived from another.
        derived = [target for target in targets if target not in taps]
        self.stored = StoredTargets(reader, derived, torch.device("cpu"), torch.float32) if derived else None

    @property
    def names(self) -> list[str]:
        """What is exported of it."""
        return sorted({*self.taps, *(self.stored.derivation.plan if self.stored else ())})

    def read(self, view: int, start: int, stop: int, wanted: NDArray[np.int64]) -> dict[str, Parts]:
        """Rows ``wanted``, counted from ``start``, of the stored rows ``[start, stop)``."""
        record = self.reader.record
        derivation = self.stored.derivation if self.stored else None
        coded: dict[str, Tokens | Tensor | Coded] = {}
        for tap in sorted({*self.taps, *(derivation.taps if derivation else ())}):
            parts = {
                name: torch.from_numpy(np.ascontiguousarray(value[wanted]))
                for name, value in self.reader.rows(view, tap, start, stop).items()
            }
            coded[tap] = self.reader.coded(tap, parts)
        found = derivation.derive(coded) if derivation else {}
        for tap in self.taps:
            value = coded[tap]
            found[tap] = value.tokens() if isinstance(value, Coded) else value
        visible: Parts = {}
        if record.card.mask is not None:
            packed = self.reader.packed_masks(view, start, stop)[wanted]
            visible["visible"] = self.reader.unpacked(packed).astype(np.int32)
        return {f"{self.name}.{name}": self._parts(name, found[name]) | visible for name in self.names}

    def _parts(self, name: str, value: Tokens | Tensor) -> Parts:
        tensors = {"values": value} if isinstance(value, Tensor) else {"patches": value.patches, "prefix": value.prefix}
        return {part: self._cast(name, tensor) for part, tensor in tensors.items() if tensor.numel()}

    def _cast(self, name: str, value: Tensor) -> NDArray[np.generic]:
        cast = value.to(self.dtype).contiguous()
        if not bool(torch.isfinite(cast).all()):
            if not bool(torch.isfinite(value).all()):
                raise StoreCorrupt(
                    f"{self.reader.store.path}: {name} of teacher {self.name!r} is not finite; run 'hdcache verify' to list the "
                    "damaged objects"
                )
            kind = next(text for text, dtype in DTYPES.items() if dtype == self.dtype)
            raise UsageError(
                f"{name} of teacher {self.name!r} has values up to {float(value.abs().max()):.4g}, which {kind} cannot hold; "
                f"choose --dtype {'bf16' if self.dtype == torch.float16 else 'fp32'}"
            )
        bits = cast.view(torch.int16) if self.dtype == torch.bfloat16 else cast
        array: NDArray[np.generic] = bits.numpy()
        return array.view(np.uint16) if self.dtype == torch.bfloat16 else array


class ExportedRows:
    """The rows of one view that all of these teachers hold."""

    def __init__(
        self,
        store: Store,
        view: int,
        teachers: Sequence[TeacherRows],
        *,
        images: bool = False,
        data: str | None = None,
    ) -> None:
        self.store, self.view, self.teachers = store, view, list(teachers)
        self.seals = {teacher.name: teacher.reader.manifest(view) for teacher in teachers}
        self.geometry, self.digests = read_geometry(store, view)
        good = np.ones(store.card.dataset.count, bool)
        for seal in self.seals.values():
            good[list(seal.failed)] = False
        self.rows: NDArray[np.int64] = np.flatnonzero(good)
        """Ascending: the shuffled order in which the view is stored."""
        if not len(self.rows):
            raise InputNotFound(f"{store.path}: every row of view {view} failed in extraction; there is none to export")
        self._preprocessing: Preprocessing | None = None
        if images:
            self._preprocessing = self._one_preprocessing()
            self._dataset: Dataset = self._opened(data)

    def _one_preprocessing(self) -> Preprocessing:
        shown = {teacher.name: teacher.reader.record.card.preprocessing for teacher in self.teachers}
        # What is seen of a view is its size and filter; mean and deviation come after.
        first = next(iter(shown.values()))
        for name, other in shown.items():
            if (other.size, other.interpolation, other.frames) != (first.size, first.interpolation, first.frames):
                raise UsageError(
                    f"--images: teachers see the view in different forms ({next(iter(shown))}: {first.size} px {first.interpolation}, "
                    f"{name}: {other.size} px {other.interpolation}); export one with --teacher NAME"
                )
        return first

    def _opened(self, data: str | None) -> Dataset:
        try:
            dataset = store_dataset(self.store, data)
        except InputNotFound as error:
            raise error if data else InputNotFound(f"{error}; if the data set has moved, give --data SPEC") from None
        if dataset.card.fingerprint != self.store.card.dataset.fingerprint:
            raise StoreMismatch(
                f"{dataset.card.spec} is not the data set that {self.store.path} was made from: its samples, labels or sizes "
                "differ; give --data SPEC of the original"
            )
        return dataset

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """int64 [rows of the view]: which sample each row is."""
        found: NDArray[np.int64] = self.geometry[:, GEOMETRY_COLUMNS.index("sample")].astype(np.int64)
        return found

    def failed(self) -> list[dict[str, Any]]:
        """Rows that are left out: row, id, teacher and reason each."""
        found = [
            (row, name, reason) for name, seal in self.seals.items() for row, reason in sorted(seal.failed.items())
        ]
        ids, samples = self.store.ids, self.samples
        return [
            {"row": row, "id": ids[samples[row]], "teacher": name, "reason": reason}
            for row, name, reason in sorted(found)
        ]

    def block(self, rows: NDArray[np.int64]) -> Block:
        """These rows, ascending."""
        start, stop = int(rows[0]), int(rows[-1]) + 1
        objects: dict[str, Parts] = {}
        for teacher in self.teachers:
            objects |= teacher.read(self.view, start, stop, rows - start)
        return Block(rows, objects, None if self._preprocessing is None else self._images(rows, self._preprocessing))

    def _images(self, rows: NDArray[np.int64], preprocessing: Preprocessing) -> NDArray[np.uint8]:
        ids, spec = self.store.ids, self.store.card.views
        return np.stack(
            [
                open_sample(
                    self._dataset,
                    ids[self.samples[row]],
                    spec,
                    self.view,
                    (self.geometry[row], self.digests[row].tobytes()),
                ).pixels(preprocessing)
                for row in rows.tolist()
            ]
        )

    def blocks(self, rows: NDArray[np.int64], together: int, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Block]:
        """``rows`` in order, ``together`` at a time, ``ahead`` of them under way in ``pool``."""
        waiting: deque[Future[Block]] = deque()
        try:
            for start in range(0, len(rows), together):
                waiting.append(pool.submit(self.block, rows[start : start + together]))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def facts(self, row: int) -> dict[str, Any]:
        """What else is known of a row, as JSON: id, label, its class, and how the view was cut out."""
        _, left, top, width, height, flip, source_width, source_height, *frames = self.geometry[row].tolist()
        sample = int(self.samples[row])
        label, classes = int(self.store.labels[sample]), self.store.card.dataset.classes
        return {
            "id": self.store.ids[sample],
            "label": label,
            "class": classes[label] if label >= 0 else None,
            "sample": sample,
            "view": self.view,
            "row": row,
            "box": [left, top, width, height],
            "flip": bool(flip),
            "source_size": [source_width, source_height],
        } | ({"frames": frames} if frames else {})

"""The two layouts of an export: what a shard of rows holds, and how many bytes that will be."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdcache.errors import UsageError
from hdcache.records import canonical_json
from hdcache.sharing.exported_rows import Block, ExportedRows
from hdcache.sharing.layouts import (
    TensorCard,
    card_of,
    png,
    safetensors_parts,
    safetensors_size,
    tar_parts,
    tar_size,
)

PIXELS_BOUND = 1024
"""What a PNG may have beyond its pixels, at most some hundredths of them, for small ones."""
Rows = NDArray[np.int64]


class Shards(ABC):
    """How rows become the bytes of a file. ``objects`` and ``image`` are shapes of one row."""

    suffix = ""

    def __init__(self, source: ExportedRows) -> None:
        self.source = source
        probe = source.block(source.rows[:1])
        self.objects = {
            name: {part: TensorCard(value.shape[1:], value.dtype.name) for part, value in sorted(parts.items())}
            for name, parts in sorted(probe.objects.items())
        }
        self.image = None if probe.images is None else TensorCard(probe.images.shape[1:], "uint8")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's arrays."""
        features = sum(card.nbytes for parts in self.objects.values() for card in parts.values())
        return features + (self.image.nbytes if self.image else 0)

    @abstractmethod
    def arrays(self) -> dict[str, TensorCard]:
        """One row of each array, for the index."""

    @abstractmethod
    def size(self, rows: Rows) -> int:
        """Bytes of the file of these rows, at most: images are counted before they are compressed."""

    @abstractmethod
    def parts(self, rows: Rows, blocks: Iterable[Block]) -> Iterator[bytes]:
        """The file of these rows, whose ``blocks`` come in order, piece by piece."""


class SafetensorsShards(Shards):
    """One file of many rows: an array [rows, ...] of each part, ids as JSON in the header's metadata."""

    suffix = ".safetensors"

    def arrays(self) -> dict[str, TensorCard]:
        """See :class:`Shards`."""
        flat = {f"{name}.{part}": card for name, parts in self.objects.items() for part, card in parts.items()}
        flat |= {} if self.image is None else {"images": self.image}
        known = {name: card_of(value) for name, value in self._known(self.source.rows[:1]).items()}
        return flat | {name: TensorCard(card.shape[1:], card.dtype) for name, card in known.items()}

    def size(self, rows: Rows) -> int:
        """See :class:`Shards`."""
        whole = {name: TensorCard((len(rows), *card.shape), card.dtype) for name, card in self._cards.items()}
        return safetensors_size(whole, self._metadata(rows))

    def parts(self, rows: Rows, blocks: Iterable[Block]) -> Iterator[bytes]:
        """See :class:`Shards`."""
        known = self._known(rows)
        arrays = {
            name: np.empty((len(rows), *card.shape), card.dtype)
            for name, card in self._cards.items()
            if name not in known
        }
        done = 0
        for block in blocks:
            here = slice(done, done := done + len(block.rows))
            for name, parts in block.objects.items():
                for part, value in parts.items():
                    arrays[f"{name}.{part}"][here] = value
            if block.images is not None:
                arrays["images"][here] = block.images
        yield from safetensors_parts(arrays | known, self._metadata(rows))

    @cached_property
    def _cards(self) -> dict[str, TensorCard]:
        return self.arrays()

    def _known(self, rows: Rows) -> dict[str, NDArray[Any]]:
        samples = self.source.samples[rows]
        return {
            "row": rows,
            "sample": samples,
            "label": self.source.store.labels[samples],
            "geometry": self.source.geometry[rows],
        }

    def _metadata(self, rows: Rows) -> dict[str, str]:
        ids = self.source.store.ids
        found = [ids[sample] for sample in self.source.samples[rows].tolist()]
        return {"ids": json.dumps(found, ensure_ascii=False, separators=(",", ":"))}


class TarShards(Shards):
    """WebDataset's layout: of each sample a JSON of its facts, its label, and a safetensors object of each tap."""

    suffix = ".tar"

    def __init__(self, source: ExportedRows) -> None:
        super().__init__(source)
        if len({name.lower() for name in self.objects}) < len(self.objects):
            raise UsageError(
                f"names of teachers differ in case alone ({', '.join(self.objects)}), and WebDataset lowers it; "
                "export one with --teacher NAME"
            )

    def arrays(self) -> dict[str, TensorCard]:
        """See :class:`Shards`."""
        return {
            f"{name}.safetensors:{part}": card for name, parts in self.objects.items() for part, card in parts.items()
        }

    def size(self, rows: Rows) -> int:
        """See :class:`Shards`."""
        return tar_size(member for row in rows.tolist() for member in self._sizes(row))

    def parts(self, rows: Rows, blocks: Iterable[Block]) -> Iterator[bytes]:
        """See :class:`Shards`."""
        return tar_parts(member for block in blocks for member in self._members(block))

    @cached_property
    def _fixed(self) -> list[tuple[str, int]]:
        """Suffix and bytes of what is as long for every sample."""
        found = [(f"{name}.safetensors", safetensors_size(parts, {})) for name, parts in self.objects.items()]
        if self.image is not None:
            _, frames, *_ = self.image.shape if len(self.image.shape) == 4 else (3, 1)
            each = self.image.nbytes // frames
            found += [(name, each + each // 16 + PIXELS_BOUND) for name in self._image_names(frames)]
        return found

    def _sizes(self, row: int) -> Iterator[tuple[str, int]]:
        key = self._key(row)
        for suffix, data in self._texts(row):
            yield f"{key}.{suffix}", len(data)
        for suffix, size in self._fixed:
            yield f"{key}.{suffix}", size

    def _members(self, block: Block) -> Iterator[tuple[str, bytes]]:
        for place, row in enumerate(block.rows.tolist()):
            key = self._key(row)
            for suffix, data in self._texts(row):
                yield f"{key}.{suffix}", data
            for name, parts in sorted(block.objects.items()):
                one = {part: value[place] for part, value in parts.items()}
                yield f"{key}.{name}.safetensors", b"".join(safetensors_parts(one, {}))
            if block.images is not None:
                pixels = block.images[place]
                frames = [pixels] if pixels.ndim == 3 else list(pixels.swapaxes(0, 1))
                for suffix, frame in zip(self._image_names(len(frames)), frames, strict=True):
                    yield f"{key}.{suffix}", png(frame)

    def _image_names(self, frames: int) -> list[str]:
        clips = self.image is not None and len(self.image.shape) == 4
        return [f"frame{number:04d}.png" for number in range(frames)] if clips else ["png"]

    def _key(self, row: int) -> str:
        # Ids may hold dots and slashes, which part a key from its suffix: the sample's number is a key on any system.
        return f"{self.source.samples[row]:09d}"

    def _texts(self, row: int) -> Iterator[tuple[str, bytes]]:
        facts = self.source.facts(row)
        yield "json", canonical_json(facts)
        if facts["label"] >= 0:
            yield "cls", str(facts["label"]).encode()

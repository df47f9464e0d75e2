"""A look inside a store: a sample under its stored view, the colours of a tap, and where one token relates to.

What is returned is JSON-able. Everything comes from a store that anybody may have written: it goes through the readers
that check it, and a fault of it is an error, never a picture.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hdcache.dataset_rows import Dataset
from hdcache.errors import HdcacheError, InputNotFound, UsageError
from hdcache.geometry import read_shard_geometry
from hdcache.packed import packed_dataset
from hdcache.reader import TeacherReader
from hdcache.relations import KINDS
from hdcache.samples import Recorded, open_sample
from hdcache.schema import Preprocessing, TeacherRecord
from hdcache.sharing.colours import Colours, data_uri, map_png, png
from hdcache.sharing.originals import open_originals
from hdcache.store import GEOMETRY_COLUMNS, Store
from hdcache.taps import Tokens, parse_tap
from hdcache.targets import derivation

TOGETHER = 16
"""Rows whose tokens share their colours, so that neighbours can be compared."""
TOGETHER_VALUES = 1 << 24
"""Values of the tokens that share their colours, at most: fewer rows do where each is large."""
KEPT = 4
"""Fits, decoded rows and relations of each kind that are kept in memory."""
SIDES = (224, 384)
"""Smallest and largest side of a picture, pixels; between them it has that of the view's box."""
CLASSES = 5
"""Classes of a row of logits that are shown."""

Value = TypeVar("Value")


class Look:
    """One store, opened to be looked at. One look at a time is worked on."""

    def __init__(self, store: Store, *, originals: bool) -> None:
        """``originals``: whether pictures may be read from where the store says its data set was."""
        self.store, self._originals = store, originals
        self._readers: dict[str, TeacherReader] = {}
        self._kept: dict[str, OrderedDict[tuple[Any, ...], Any]] = {}
        self._lock, self._geometry_lock, self._data_lock = (threading.Lock() for _ in range(3))
        self._data: Dataset | str | None = None

    def row(self, teacher: str, tap: str, view: int, row: int) -> dict[str, Any]:
        """What one row is, and the map of its tokens.

        Raises
        ------
        InputNotFound
            for a teacher, tap or view that the store does not hold.
        UsageError
            for a row that does not exist.
        StoreCorrupt
            when an object of the store is not what was written.
        """
        with self._lock:
            reader = self._reader(teacher, tap)
            card, manifest = reader.record.card, reader.manifest(view)
            geometry, _ = self._recorded(view, row)
            sample, left, top, width, height, flip, source_width, source_height = (
                int(number) for number in geometry[: len(GEOMETRY_COLUMNS)]
            )
            label, classes = int(self.store.labels[sample]), self.store.card.dataset.classes
            facts: dict[str, Any] = {
                "row": row,
                "rows": manifest.rows,
                "sample": self.store.ids[sample],
                "label": classes[label] if 0 <= label < len(classes) else "",
                "failed": manifest.failed.get(row, ""),
                "box": [left, top, width, height],
                "flip": bool(flip),
                "source": [source_width, source_height],
                "frames": [int(number) for number in geometry[len(GEOMETRY_COLUMNS) :]],
                "grid": list(card.grid),
                "slots": card.slots,
                "prefix": card.prefix_tokens,
                "class_token": card.class_token,
                "kinds": relations_of(reader.record, tap),
                "heads": reader.record.taps[tap].row[0] if parse_tap(tap).what == "rel" else card.heads,
                "visible": None,
                "map": "",
                "logits": [],
            }
            if facts["failed"]:
                return facts
            if parse_tap(tap).what == "logits":
                return facts | {"logits": self._logits(reader, view, row)}
            if facts["kinds"]:
                visible = self._visible(reader, view, row)
                colours = self._colours(reader, view, tap, row).paint(
                    self._features(reader, view, tap, row)[card.prefix_tokens :]
                )
                facts["visible"] = None if visible is None else visible.tolist()
                facts["map"] = data_uri(map_png(colours, visible, card.slots, card.grid))
            return facts

    def relation(
        self, teacher: str, tap: str, view: int, row: int, token: int, kind: str, head: int | None = None
    ) -> dict[str, Any]:
        """How one token relates to all others.

        ``values`` has one number for each patch token of a whole input, null where it was hidden; ``prefix`` those of
        class and register tokens. ``token`` counts patch tokens, -1 is the class token; ``head`` None: mean of all.
        Errors are those of :meth:`row`, and :class:`UsageError` for a token that was hidden or does not exist.
        """
        with self._lock:
            reader = self._reader(teacher, tap)
            card = reader.record.card
            self._recorded(view, row)
            if reason := reader.manifest(view).failed.get(row):
                raise UsageError(f"row {row} failed: {reason}")
            kinds = relations_of(reader.record, tap)
            if kind not in kinds:
                raise UsageError(f"tap {tap} has no {kind!r}; choose from: {', '.join(kinds)}")
            visible = self._visible(reader, view, row)
            where = np.arange(card.tokens) if visible is None else visible
            prefix, heads = card.prefix_tokens, 0
            if kind == "cosine":
                features = self._features(reader, view, tap, row)
                lengths = np.linalg.norm(features, axis=1, keepdims=True)
                unit = features / np.maximum(lengths, 1e-12)
            else:
                matrix = self._relation(reader, view, tap, row, kind)
                heads = len(matrix)
                if head is not None and not 0 <= head < heads:
                    raise UsageError(f"head {head}: choose from 0 to {heads - 1}")
            found = np.flatnonzero(where == token)
            if token == -1 and prefix and card.class_token:
                place = 0
            elif len(found):
                place = prefix + int(found[0])
            else:
                raise UsageError(f"token {token}: not among the {len(where)} tokens that row {row} has")
            if kind == "cosine":
                chosen = unit @ unit[place]
            else:
                chosen = matrix[:, place].mean(axis=0) if head is None else matrix[head, place]
            whole: list[float | None] = [None] * card.tokens
            for number, value in zip(where.tolist(), chosen[prefix:].tolist(), strict=True):
                whole[number] = round(value, 6)
            return {"values": whole, "prefix": [round(value, 6) for value in chosen[:prefix].tolist()], "heads": heads}

    def image(self, view: int, row: int, slots: int = 1) -> dict[str, str]:
        """``image``, a picture of a row's sample under its stored view, or ``why`` there is none.

        Of a clip it has one frame for each of ``slots`` temporal slots, side by side.
        """
        recorded = self._recorded(view, row)
        sample, spec = self.store.ids[int(recorded[0][0])], self.store.card.views
        dataset = self._dataset()
        if isinstance(dataset, str):
            return {"image": "", "why": dataset}
        side = SIDES[0] if spec.frames else int(min(SIDES[1], max(SIDES[0], *recorded[0][3:5])))
        try:
            opened = open_sample(dataset, sample, spec, view, recorded)
            pixels = opened.pixels(Preprocessing(size=side, frames=spec.frames))
        except HdcacheError as error:
            return {"image": "", "why": str(error.args[-1])}
        frames = pixels[:, None] if pixels.ndim == 3 else pixels
        frames = frames[:, :: max(1, frames.shape[1] // max(1, slots))]
        strip = frames.transpose(2, 1, 3, 0).reshape(side, -1, 3)
        return {"image": data_uri(png(Image.fromarray(np.ascontiguousarray(strip)))), "why": ""}

    def _reader(self, teacher: str, tap: str) -> TeacherReader:
        if teacher not in self._readers:
            self._readers[teacher] = TeacherReader(self.store, teacher)
        reader = self._readers[teacher]
        if tap not in reader.record.taps:
            raise InputNotFound(f"teacher {teacher!r} holds {', '.join(reader.record.taps)}, not {tap!r}")
        return reader

    def _keep(self, what: str, key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        """What ``make`` gave for ``key``, of which the last few are kept."""
        kept = self._kept.setdefault(what, OrderedDict())
        if key not in kept:
            kept[key] = make()
        kept.move_to_end(key)
        while len(kept) > KEPT:
            kept.popitem(last=False)
        found: Value = kept[key]
        return found

    def _recorded(self, view: int, row: int) -> Recorded:
        count, shard = self.store.card.dataset.count, self.store.card.rows_per_shard
        if not 0 <= row < count:
            raise UsageError(f"row {row}: choose from 0 to {count - 1}")
        with self._geometry_lock:
            found = self._keep(
                "geometry", (view, row // shard), lambda: read_shard_geometry(self.store, view, row // shard)
            )
        if found is None:
            raise InputNotFound(f"{self.store.path}: view {view} does not hold row {row}")
        return found[0][row % shard], found[1][row % shard].tobytes()

    def _visible(self, reader: TeacherReader, view: int, row: int) -> NDArray[np.int64] | None:
        if reader.record.card.mask is None:
            return None
        found: NDArray[np.int64] = reader.unpacked(reader.packed_masks(view, row, row + 1))[0]
        return found

    def _rows(self, reader: TeacherReader, view: int, tap: str, start: int, stop: int) -> list[NDArray[np.float32]]:
        """Of each row the features [P + N, C]; of relations the mean over their heads, whose rows are features too."""
        found = reader.tap(view, tap, start, stop)
        whole = found.sequence() if isinstance(found, Tokens) else found.mean(dim=1)
        return list(whole.float().numpy())

    def _features(self, reader: TeacherReader, view: int, tap: str, row: int) -> NDArray[np.float32]:
        key = (reader.name, view, tap, row)
        return self._keep("features", key, lambda: self._rows(reader, view, tap, row, row + 1)[0])

    def _colours(self, reader: TeacherReader, view: int, tap: str, row: int) -> Colours:
        """Fitted to the rows around one, failed ones left out."""
        card, manifest = reader.record.taps[tap], reader.manifest(view)
        together = max(1, min(TOGETHER, TOGETHER_VALUES // math.prod(card.row)))
        start = row // together * together
        prefix = reader.record.card.prefix_tokens

        def fit() -> Colours:
            rows = self._rows(reader, view, tap, start, min(start + together, manifest.rows))
            good = [one[prefix:] for number, one in enumerate(rows, start) if number not in manifest.failed]
            return Colours.fit(np.concatenate(good))

        return self._keep("colours", (reader.name, view, tap, start), fit)

    def _relation(self, reader: TeacherReader, view: int, tap: str, row: int, kind: str) -> NDArray[np.float32]:
        """[H, P + N, P + N]: of each token a distribution over all."""

        @torch.inference_mode()
        def make() -> NDArray[np.float32]:
            stored, parsed = reader.tap(view, tap, row, row + 1), parse_tap(tap)
            if parsed.what == "rel":
                assert isinstance(stored, torch.Tensor)  # noqa: S101  # relations are no tokens
                return np.asarray(stored[0].float().numpy())
            target = f"block{parsed.block}.rel.{kind}"
            weights = {name: torch.from_numpy(np.array(value)) for name, value in reader.weights.items()}
            derived = derivation({target: tap}, reader.record.attention, weights).derive({tap: stored})[target]
            assert isinstance(derived, torch.Tensor)  # noqa: S101  # relations are no tokens
            return np.asarray(derived[0].numpy())

        return self._keep("relations", (reader.name, view, tap, row, kind), make)

    def _logits(self, reader: TeacherReader, view: int, row: int) -> list[list[float]]:
        """The largest probabilities: class, probability."""
        stored = reader.tap(view, "logits", row, row + 1)
        assert isinstance(stored, torch.Tensor)  # noqa: S101  # logits are no tokens
        top = stored[0].float().softmax(dim=-1).topk(min(CLASSES, stored.shape[1]))
        return [[int(number), round(float(value), 6)] for value, number in zip(*top, strict=True)]

    def _dataset(self) -> Dataset | str:
        """The samples, or why there are none to be shown."""
        with self._data_lock:
            if self._data is None:
                try:
                    self._data = self._opened()
                except (HdcacheError, OSError) as error:
                    self._data = str(error.args[-1] if error.args else error)
            return self._data

    def _opened(self) -> Dataset:
        if (own := packed_dataset(self.store)) is not None:
            return own
        if not self._originals and self.store.about.data:
            raise InputNotFound(
                "the store keeps no images; those of its data set are shown with 'hdcache serve --originals'"
            )
        return open_originals(self.store)


def relations_of(record: TeacherRecord, tap: str) -> list[str]:
    """Which relations of its tokens a tap can give: qk, vv, qq, kk; ``cosine`` of the features themselves."""
    parsed = parse_tap(tap)
    if parsed.what == "rel":
        return [parsed.kind]
    if not parsed.is_tokens:
        return []
    block = f"block{parsed.block}"
    known = block in record.attention and f"{block}/qkv_weight" in record.weights
    return [*(KINDS if known and parsed.what in ("attn_in", "qkv") else ()), "cosine"]

"""From the pixels of one batch to its stored arrays on the host, several batches under way at once.

A CPU computes one batch a lane, with its share of torch's threads: lanes never wait for each other, as the threads of one
operation do, and what else runs beside them slows down one and not all. A GPU computes batch after batch on one stream;
with two lanes the next one's pixels travel there, and the last one's arrays come back, meanwhile. What a batch holds does
not depend on lanes; its last bits may depend on the threads of an operation, as they do on the machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.encodings import Encoder
from hdcache.masks import pack_visible
from hdcache.plain_encodings import Parts, Stored
from hdcache.rendering import input_shape
from hdcache.taps import Tokens
from hdcache.teachers import Teacher

MOST_LANES = 4
"""On a CPU: each holds the activations of a batch."""
Features = Mapping[str, Tokens | Tensor]


def lanes_for(teacher: Teacher, encodings: Iterable[str]) -> int:
    """Batches to have under way at once where nothing else uses the teacher.

    One on a CPU where any of ``encodings`` is fp32: the store then holds what ``--online`` computes, to the bit, and that
    uses all threads for one batch.
    """
    if teacher.device.type == "cpu":
        return 1 if "fp32" in encodings else max(1, min(MOST_LANES, torch.get_num_threads()))
    return 2 if teacher.device.type == "cuda" else 1


@dataclass(frozen=True)
class Encoded:
    """One batch on the host."""

    parts: dict[str, Parts]
    """Stored arrays of each tap."""
    mask: NDArray[np.uint8] | None
    """Which tokens the teacher saw, packed; None for one that sees all."""
    bad: list[int]
    """Rows, counted from the batch's first, whose features are not finite."""
    clipped: int
    forward: float
    """Seconds until features and codes were computed (on a GPU with those of the batch before, and the way back)."""
    encode: float
    """Seconds of encoding; on a GPU nothing, since it is part of what the other waits for."""


class Lanes:
    """Runs batches of one teacher from several threads at once."""

    def __init__(self, teacher: Teacher, count: int) -> None:
        self.teacher, self.count = teacher, count
        self._cuda = teacher.device.type == "cuda"
        self._turn = threading.Lock()
        self._threads = torch.get_num_threads()
        if self._cuda:
            self._compute = torch.cuda.current_stream(teacher.device)
            self._there, self._back = (torch.cuda.Stream(teacher.device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's constructor has no types

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A lane's share would be left to all threads that are started from now on.
        if self._shared:
            torch.set_num_threads(self._threads)

    @property
    def _shared(self) -> bool:
        return self.count > 1 and self.teacher.device.type == "cpu"

    def begin(self) -> None:
        """To be called once in each thread that is a lane."""
        if self._shared:
            torch.set_num_threads(max(1, self._threads // self.count))

    def run(
        self, pixels: Sequence[NDArray[np.uint8] | None], ids: Sequence[str], view: int, encoders: Mapping[str, Encoder]
    ) -> Encoded:
        """Encode a batch; ``pixels`` has None for rows that could not be read, whose arrays will be those of zeros.

        Raises
        ------
        UsageError
            when the device's memory does not suffice for it, its encoding and the batches under way beside it.
        """
        with self.teacher.within_memory():
            return self._run(pixels, ids, view, encoders)

    def _run(
        self, pixels: Sequence[NDArray[np.uint8] | None], ids: Sequence[str], view: int, encoders: Mapping[str, Encoder]
    ) -> Encoded:
        gone = [row for row, found in enumerate(pixels) if found is None]
        visible = self.teacher.visible(ids, view)
        mask = None if visible is None else pack_visible(visible, self.teacher.card.tokens)
        started = time.perf_counter()
        with torch.inference_mode():
            if len(gone) == len(pixels):
                features: Features = {
                    tap: _zeros(each, len(pixels), self.teacher.device) for tap, each in encoders.items()
                }
                return self._done(
                    encoders, self._stored(encoders, features, []), features, gone, mask, started, started
                )
            blank = np.zeros(input_shape(self.teacher.card.preprocessing), np.uint8)
            images = torch.from_numpy(np.stack([blank if found is None else found for found in pixels]))
            if self._cuda:
                return self._on_gpu(images, visible, encoders, gone, mask, started)
            features = self.teacher.forward(images, list(encoders), visible)
            computed = time.perf_counter()
            return self._done(encoders, self._stored(encoders, features, gone), features, gone, mask, started, computed)

    def _stored(
        self, encoders: Mapping[str, Encoder], features: Features, blanked: Sequence[int]
    ) -> tuple[dict[str, Stored], Tensor, list[Tensor]]:
        """Codes of every tap, how many values each clipped, and sums that are finite where the features are."""
        found = {tap: encoder.stored(blank_rows(features[tap], blanked)) for tap, encoder in encoders.items()}
        sums = torch.stack([tensor.flatten(1).sum(1) for tensor in tensors_of(features)])
        stored = {tap: {name: part.contiguous() for name, part in parts.items()} for tap, (parts, _) in found.items()}
        return stored, sums, [clipped for _, clipped in found.values()]

    def _on_gpu(
        self,
        images: Tensor,
        visible: NDArray[np.int64] | None,
        encoders: Mapping[str, Encoder],
        gone: Sequence[int],
        mask: NDArray[np.uint8] | None,
        started: float,
    ) -> Encoded:
        device = self.teacher.device
        with torch.cuda.stream(self._there):
            there = images.pin_memory().to(device, non_blocking=True)
            arrived = self._there.record_event()
        # One lane after the other fills the stream; the memory that one leaves is the next one's, in the stream's order.
        with self._turn, torch.cuda.stream(self._compute):
            self._compute.wait_event(arrived)
            there.record_stream(self._compute)
            features = self.teacher.forward(there, list(encoders), visible)
            stored, sums, clipped = self._stored(encoders, features, gone)
            computed = self._compute.record_event()
        with torch.cuda.stream(self._back):
            self._back.wait_event(computed)
            host = {tap: {name: self._returned(part) for name, part in parts.items()} for tap, parts in stored.items()}
            returned, counts = self._returned(sums), [self._returned(count) for count in clipped]
            back = self._back.record_event()
        back.synchronize()  # leaves Python's lock to the other lane
        now = time.perf_counter()
        return self._done(encoders, (host, returned, counts), features, gone, mask, started, now)

    def _returned(self, part: Tensor) -> Tensor:
        """A copy in pinned memory, complete when the way back is."""
        if part.device.type != "cuda":
            return part
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        host.copy_(part, non_blocking=True)
        part.record_stream(self._back)
        return host

    def _done(
        self,
        encoders: Mapping[str, Encoder],
        found: tuple[dict[str, Stored], Tensor, list[Tensor]],
        features: Features,
        gone: Sequence[int],
        mask: NDArray[np.uint8] | None,
        started: float,
        computed: float,
    ) -> Encoded:
        stored, sums, clipped = found
        bad: list[int] = []
        # A sum may also overflow; only rows that truly hold NaN or infinity are blanked, and then all is encoded again.
        if not bool(torch.isfinite(sums).all()):
            bad = (~finite_rows(features)).nonzero().flatten().tolist()
            if bad:
                stored, _, clipped = self._stored(encoders, features, sorted({*gone, *bad}))
        parts = {
            tap: encoders[tap].parts({name: part.cpu() for name, part in arrays.items()})
            for tap, arrays in stored.items()
        }
        ended = time.perf_counter()
        return Encoded(parts, mask, bad, sum(int(count) for count in clipped), computed - started, ended - computed)


def tensors_of(features: Features) -> list[Tensor]:
    """Every tensor, each [R, ...]; those without a value are left out."""
    found = [
        tensor
        for value in features.values()
        for tensor in ([value] if isinstance(value, Tensor) else [value.prefix, value.patches])
    ]
    return [tensor for tensor in found if tensor[:1].numel()]


def finite_rows(features: Features) -> Tensor:
    """bool [R]: rows whose every value in every tap is finite."""
    return torch.stack([torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in tensors_of(features)]).all(dim=0)


def blank_rows(value: Tokens | Tensor, rows: Sequence[int]) -> Tokens | Tensor:
    """Zero failed rows: what a reader must never see should at least be the same bytes in every run."""
    if not rows:
        return value
    index = torch.tensor(list(rows))
    if isinstance(value, Tensor):
        return value.clone().index_fill_(0, index.to(value.device), 0)
    index = index.to(value.patches.device)
    return Tokens(value.prefix.clone().index_fill_(0, index, 0), value.patches.clone().index_fill_(0, index, 0))


def _zeros(encoder: Encoder, rows: int, device: torch.device) -> Tokens | Tensor:
    """Features of rows that all failed, as :func:`blank_rows` would leave them."""
    card = encoder.card
    if not card.tokens:
        return torch.zeros(rows, *card.row, device=device)
    shapes = ((rows, count, card.channels) for count in (card.prefix_tokens, card.tokens))
    return Tokens(*(torch.zeros(shape, device=device) for shape in shapes))

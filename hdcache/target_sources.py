"""Where a batch's targets come from: sealed rows of a store, or the teacher itself (``--online``).

Both give the same values to the bit when rows are stored in fp32: they share :mod:`hdcache.targets`, and a live
teacher runs the same batch shapes as extraction did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.errors import InputNotFound, UsageError
from hdcache.reader import TeacherReader
from hdcache.row_arrays import MASK_ARRAY, mask_array
from hdcache.schema import ArrayCard, TeacherRecord
from hdcache.store import Store
from hdcache.taps import Tokens, parse_tap
from hdcache.targets import Derivation, derivation, plan_targets, sources
from hdcache.teachers import Teacher

HostArrays = Mapping[str, NDArray[np.generic]]
"""Stored arrays of the rows of a batch, by ``tap/array``."""


def as_extracted(record: TeacherRecord) -> str:
    """Options of ``hdcache extract`` beside the model that make the same network again."""
    card, options = record.card, ""
    side = card.arguments.get("img_size")
    if isinstance(side, int) and f"img_size={side}" not in record.source:
        options += f" --img-size {side}"
    if card.mask is not None:
        options += f" --teacher-mask {card.mask.kind}:{card.mask.ratio:g}"
        options += f" --teacher-mask-seed {card.mask.seed}" if card.mask.seed else ""
    return options


class StoredTargets:
    """Targets from sealed rows of one teacher; ``fields`` are the settings that name it."""

    def __init__(
        self,
        reader: TeacherReader,
        targets: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        fields: Sequence[str] = (),
    ) -> None:
        self.reader, self.name, self.dtype = reader, reader.name, dtype
        record = reader.record
        self.masked = record.card.mask is not None
        try:
            plan = plan_targets(
                targets,
                list(record.taps),
                depth=record.card.depth,
                teacher=self.name,
                store=str(reader.store.path),
                command=reader.store.extract_command(),
                again=reader.store.free_name(self.name),
                model=record.source or "MODEL",
                options=as_extracted(record),
                fields=fields,
            )
        except InputNotFound as error:
            raise InputNotFound(f"{error}{reader.pull_advice()}") from None
        weights = {name: torch.from_numpy(np.array(value)).to(device) for name, value in reader.weights.items()}
        self.derivation: Derivation = derivation(plan, record.attention, weights)

    @cached_property
    def arrays(self) -> dict[str, ArrayCard]:
        """One row of each stored array that is read, by ``tap/array``."""
        cards = {
            f"{tap}/{name}": card
            for tap in self.derivation.taps
            for name, card in self.reader.record.taps[tap].arrays.items()
        }
        return cards | ({MASK_ARRAY: mask_array(self.reader.record.card)} if self.masked else {})

    def read(self, view: int, start: int, stop: int, into: Sequence[tuple[HostArrays, int] | None]) -> None:
        """Read rows ``[start, stop)`` and put each where it is wanted: into arrays of :attr:`arrays`, at a place; None: nowhere."""
        for key in self.arrays:
            places = [None if wanted is None else wanted[0][key][wanted[1]] for wanted in into]
            self.reader.copy_rows(view, key, start, stop, places)

    def expect(self, view: int, start: int, stop: int) -> None:
        """Have the system fetch rows ``[start, stop)``, which :meth:`read` will want soon."""
        for key in self.arrays:
            self.reader.expect_rows(view, key, start, stop)

    def visible(self, arrays: Mapping[str, Tensor]) -> NDArray[np.int64] | None:
        """Ascending indices int64 [R, M] of the patch tokens that the teacher saw; None: all."""
        return self.reader.unpacked(arrays[MASK_ARRAY].numpy()) if self.masked else None

    def finish(self, arrays: Mapping[str, Tensor]) -> dict[str, Tokens | Tensor]:
        """Targets of a batch from its stored arrays, on the device those are on."""
        decoded = {}
        for tap in self.derivation.taps:
            parts = {name: arrays[f"{tap}/{name}"] for name in self.reader.record.taps[tap].arrays}
            decoded[tap] = self.reader.coded(tap, parts, self.dtype)
        return self.derivation.derive(decoded)


class LiveTargets:
    """The same targets from the teacher itself, run on each batch (``--online``).

    ``held`` are the taps that a store has of this teacher: what can follow from them does so here too, because
    under bfloat16 a target that is derived from another tap is rounded otherwise.
    """

    def __init__(self, teacher: Teacher, targets: Sequence[str], held: Sequence[str] = ()) -> None:
        self.teacher, self.name = teacher, teacher.name
        plan: dict[str, str] = {}
        for target in targets:
            options = sources(parse_tap(target, teacher.card.depth))
            plan[target] = next((tap for tap in options if tap in held), options[0])
        arrays, facts = teacher.weights_for(list(dict.fromkeys(plan.values())))
        weights = {name: torch.from_numpy(value).to(teacher.device) for name, value in arrays.items()}
        self.derivation: Derivation = derivation(plan, facts, weights)

    def finish(self, pixels: Tensor, visible: NDArray[np.int64] | None = None) -> dict[str, Tokens | Tensor]:
        """Targets of uint8 pixels [B, 3, size, size] at the teacher's input size; of the ``visible`` tokens alone."""
        return self.derivation.derive(self.teacher.forward(pixels, self.derivation.taps, visible))


def open_targets(
    store: Store | None,
    wanted: Mapping[str, Sequence[str]],
    *,
    live: Mapping[str, Teacher] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    fields: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[StoredTargets], list[LiveTargets]]:
    """Targets by teacher name: live for the teachers in ``live``, from ``store`` for all others.

    ``fields`` (teacher -> settings that name it) are for messages, of training from a recipe.
    """
    known = store.teachers() if store is not None else []
    running = {
        name: LiveTargets(teacher, wanted[name], list(store.teacher(name).taps) if store and name in known else ())
        for name, teacher in (live or {}).items()
        if name in wanted
    }
    where = device or torch.device("cpu")
    stored = []
    for name, targets in wanted.items():
        if name not in running:
            if store is None:
                raise UsageError(f"no store to read targets of teacher {name!r} from")
            named = (fields or {}).get(name, ())
            stored.append(StoredTargets(TeacherReader(store, name), targets, where, dtype, named))
    return stored, list(running.values())

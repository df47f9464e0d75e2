"""Rows of one teacher, decoded; what every reader of a store goes through."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from hdcache.encodings import Encoder
from hdcache.stored_rows import StoredRows
from hdcache.taps import Coded, Tokens


class TeacherReader(StoredRows):
    """One teacher of a store: its record, encoders, frozen weights and the sealed rows of its views."""

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder of each stored tap."""
        return {
            tap: Encoder(
                card,
                {
                    name: self._constant(f"encodings/{tap}/{name}", *self._shape(value))
                    for name, value in card.constants.items()
                },
            )
            for tap, card in self.record.taps.items()
        }

    def decode(self, tap: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tokens | Tensor:
        """Decode stored arrays of any number of rows, on the device they are on."""
        return self.encoders[tap].decode(parts, dtype)

    def coded(
        self, tap: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tokens | Tensor | Coded:
        """As :meth:`decode`, but klt short of its last step, which may be joined with what follows."""
        return self.encoders[tap].coded(parts, dtype)

    def tap(self, view: int, tap: str, start: int, stop: int) -> Tokens | Tensor:
        """Rows ``[start, stop)`` of a tap, decoded to float32 on the CPU (for looking at; loading has its own path)."""
        parts = {name: torch.from_numpy(value) for name, value in self.rows(view, tap, start, stop).items()}
        return self.decode(tap, parts)

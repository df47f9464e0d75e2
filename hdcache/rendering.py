"""What pixels one row of a batch needs: the student's views, and the inputs of live teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hdcache.datasets import Dataset
from hdcache.samples import OpenedSample, Recorded, open_views
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.views import fresh_view

Pixels = NDArray[np.uint8]
"""[3, size, size], or [3, frames, size, size] of a clip."""


def input_shape(wanted: Preprocessing) -> tuple[int, ...]:
    """Shape of :data:`Pixels` for one network."""
    frames = () if wanted.frames is None else (wanted.frames,)
    return (3, *frames, wanted.size, wanted.size)


@dataclass(frozen=True)
class Rendering:
    """From a sample to the pixels of one row."""

    dataset: Dataset
    spec: ViewSpec
    student: Preprocessing
    teachers: Sequence[Preprocessing] = ()
    """Inputs of the teachers that run in the loop."""
    fresh: int = 0
    """Views that the student sees in place of the teachers' one, drawn anew in every epoch; 0: it sees theirs."""

    @property
    def inputs(self) -> list[Preprocessing]:
        """Of each array that :meth:`open` returns: the student's views first, then the live teachers'."""
        return [self.student] * max(1, self.fresh) + list(self.teachers)

    def open(self, sample_id: str, view: int, epoch: int, recorded: Recorded | None) -> list[Pixels]:
        """Read one sample once and render it for every input.

        Raises
        ------
        InputNotFound, UnreadableImage, StoreMismatch
            as :func:`~hdcache.samples.open_views` does.
        """
        numbers = [fresh_view(epoch, slot, self.fresh) for slot in range(self.fresh)]
        theirs, *fresh = open_views(self.dataset, sample_id, self.spec, view, recorded, numbers)
        rendered: dict[tuple[int, Preprocessing], Pixels] = {}

        def pixels(opened: OpenedSample, wanted: Preprocessing) -> Pixels:
            # Networks that differ in mean and std alone share their pixels.
            key = id(opened), wanted.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
            if key not in rendered:
                rendered[key] = opened.pixels(wanted)
            return rendered[key]

        return [pixels(opened, self.student) for opened in fresh or [theirs]] + [
            pixels(theirs, wanted) for wanted in self.teachers
        ]

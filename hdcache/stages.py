"""Where a loader's time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STAGES = ("read", "images", "await_images", "await_targets", "collate", "finish", "teachers")


class Stages:
    """Seconds by stage, added up over the threads that work at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count the time of a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            with self._lock:
                self._seconds[stage] += spent

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count these seconds too, by stage."""
        with self._lock:
            for stage, spent in seconds.items():
                self._seconds[stage] += spent

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)

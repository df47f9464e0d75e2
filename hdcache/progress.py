"""Progress of long work on stderr: a bar on a terminal, one line every half minute in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

LOG_SECONDS = 30.0


class Progress:
    """Counts done work and shows rate, remaining time and free-form facts.

    Use as a context manager. ``stream`` defaults to stderr; ``quiet`` shows nothing.
    """

    def __init__(self, label: str, total: int, unit: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._printed = time.monotonic()
        self._width = 0
        self._facts = ""
        self.done = 0
        self._skipped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
        if kind is None:
            self._stream.write(self.line() + "\n")
        self._stream.flush()

    def skip(self, count: int) -> None:
        """Count work that an earlier run has done; it takes no part in the rate."""
        self.done += count
        self._skipped += count

    def rest(self, seconds: float) -> None:
        """Leave ``seconds`` that just passed out of the rate: other work had them."""
        self._started += seconds

    def advance(self, count: int, facts: str = "") -> None:
        """Count ``count`` more units; ``facts`` is shown behind the rate."""
        self.done += count
        self._facts = facts or self._facts
        now = time.monotonic()
        if self._quiet or now - self._printed < (0.1 if self._terminal else LOG_SECONDS):
            return
        self._printed = now
        text = self.line()
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    @property
    def rate(self) -> float:
        """Units per second of this run."""
        return (self.done - self._skipped) / max(1e-9, time.monotonic() - self._started)

    def line(self) -> str:
        """The text of the bar as it stands."""
        left = self.total - self.done
        eta = (
            f"ETA {duration(left / self.rate)}"
            if left > 0 and self.rate > 0
            else duration(time.monotonic() - self._started)
        )
        share = 100 * self.done / max(1, self.total)
        if self.unit == "bytes":
            text = f"{self.label}  {size(self.done)} of {size(self.total)} ({share:.0f} %)  {size(self.rate)}/s  {eta}"
        else:
            text = f"{self.label}  {self.done:,}/{self.total:,} {self.unit} ({share:.0f} %)  {self.rate:,.1f} {self.unit}/s  {eta}"
        return f"{text}  {self._facts}" if self._facts else text


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{max(0.0, seconds):.1f}s"


def counted(number: int, what: str) -> str:
    """``1, "epochs"`` -> ``1 epoch``; ``2000, "epochs"`` -> ``2,000 epochs``."""
    return f"{number:,} {what.removesuffix('s') if number == 1 else what}"


def size(count: float) -> str:
    """``1536`` -> ``1.5 KB`` (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        shown = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        if abs(float(shown)) < 1000 or unit == "TB":
            return f"{shown} {unit}"
        count /= 1000
    raise AssertionError

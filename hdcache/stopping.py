"""Stop at a safe point: signals set a flag that long work asks for, so that nothing is cut in half."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from hdcache.errors import Interrupted

_received: list[int] = []


def install() -> None:
    """Let SIGTERM, SIGUSR1 (SLURM's warning) and a first Ctrl-C ask for a stop; a second Ctrl-C stops at once."""
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None)):
        if number is not None:
            signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt
    if not _received:
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        sys.stderr.write(f"\nhdcache: stopping at the next safe point{again}\n")
    _received.append(number)


def requested() -> bool:
    """Whether a signal asked for a stop."""
    return bool(_received)


def stop(saved: str) -> Interrupted:
    """The error to leave with after progress was saved: exit 75, or 130 after Ctrl-C."""
    # Of several processes that train together, one may have been told for all.
    told = signal.Signals(_received[0]).name if _received else "a signal to another process"
    error = Interrupted(f"stopped by {told} with {saved}; run the same command again to go on")
    if signal.SIGINT in _received[:1]:
        error.exit_code = 130
    return error

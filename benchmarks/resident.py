"""Resident memory of this process, as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident(what: str = "VmRSS") -> int:
    """Bytes now (``VmRSS``) or at the peak (``VmHWM``).

    Linux starts ``ru_maxrss`` of a child at its parent's; these figures begin with the program itself. Elsewhere both are
    the peak.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import ctypes
import os
import re

from hdcache.errors import UsageError

MOST_THREADS = 16
MOST_BYTES = 8 << 30
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def parse_bytes(text: str | int, what: str) -> int:
    """``100GB``, ``1.5TB``, ``800 MB``, ``2e9`` or a plain number; powers of 1000.

    Raises
    ------
    UsageError
        for anything else, of ``what``.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if match is None or not 1 <= float(match[1]) * UNITS[match[2].upper()] < 1 << 63:
        raise UsageError(f"{what} {text!r} is no number of bytes; say for example 100GB or 1.5TB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def memory_budget() -> int:
    """Bytes that one process may hold in prepared data: HDCACHE_BUFFER_BYTES, or its share of a quarter of the memory."""
    asked = os.environ.get("HDCACHE_BUFFER_BYTES")
    if asked is not None:
        return parse_bytes(asked, "HDCACHE_BUFFER_BYTES")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 * MOST_BYTES
    return min(MOST_BYTES, memory // 4) // ranks_here()


def available_cores() -> int:
    """Cores that this process may use, at most 16; ranks that torchrun started on one machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // ranks_here()))


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees for what it allocates next; False where there is no glibc.

    By default tens of megabytes go back to the system each time, and a training step on a CPU asks for as much again at once:
    the pages of a batch then cost as much as decoding it. The peak of memory stays, but it is held until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older versions refuse to allocate more than 32 MB from the heap.
    allocated = any(mallopt(_MMAP_THRESHOLD, limit) for limit in (1 << 30, 32 << 20))
    return bool(allocated and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def ranks_here() -> int:
    """Processes of this run on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

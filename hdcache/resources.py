"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import os

MOST_THREADS = 16
MOST_BYTES = 8 << 30


def memory_budget() -> int:
    """Bytes that one process may hold in prepared data: HDCACHE_BUFFER_BYTES, or its share of a quarter of the memory."""
    asked = os.environ.get("HDCACHE_BUFFER_BYTES")
    if asked is not None:
        return int(float(asked))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 * MOST_BYTES
    return min(MOST_BYTES, memory // 4) // ranks_here()


def available_cores() -> int:
    """Cores that this process may use, at most 16; ranks that torchrun started on one machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // ranks_here()))


def ranks_here() -> int:
    """Processes of this run on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

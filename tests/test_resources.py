"""Cores and memory are shared among the processes of one machine, and a user may set the memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from hdcache.errors import UsageError
from hdcache.resources import (
    MOST_BYTES,
    MOST_THREADS,
    available_cores,
    keep_freed_memory,
    memory_budget,
    parse_bytes,
    ranks_here,
)


def test_ranks_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks get a quarter of the memory each, and never less than one core."""
    monkeypatch.delenv("HDCACHE_BUFFER_BYTES", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_here() == 1
    alone, cores = memory_budget(), available_cores()
    assert 0 < alone <= MOST_BYTES
    assert 1 <= cores <= min(MOST_THREADS, os.cpu_count() or 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget() == alone // 4
    assert available_cores() == max(1, cores // 4)


def test_the_user_may_set_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "2e9")
    assert memory_budget() == 2_000_000_000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("100GB", 10**11),
        ("1.5 TB", 15 * 10**11),
        ("800mb", 8 * 10**8),
        ("12345", 12345),
        (7, 7),
        (".5k", 500),
        ("3B", 3),
        ("2e9", 2 * 10**9),
        ("1.5e3 KB", 1_500_000),
    ],
)
def test_numbers_of_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text, "budget") == count


@pytest.mark.parametrize("text", ["", "GB", "ten", "-3GB", "0", "1GiB", "5 PB", "1e99", "1e-3", "nan", "inf"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^budget {re.escape(repr(text))} is no number of bytes; say for example 100GB or 1\.5TB"
    ):
        parse_bytes(text, "budget")


def test_the_memory_that_the_user_sets_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "8GB")
    assert memory_budget() == 8 * 10**9
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "lots")
    with pytest.raises(UsageError, match=r"^HDCACHE_BUFFER_BYTES 'lots' is no number of bytes; say for example 100GB"):
        memory_budget()


def test_freed_memory_is_kept() -> None:
    """In a process of its own: what is freed and allocated again asks the system for no new pages."""
    work = """
import resource, sys
import numpy as np
from hdcache.resources import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [np.ones(3 << 20, np.uint8) for _ in range(12)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
kept = keep_freed_memory()
faults()
print(int(kept), plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    kept, plain, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("no glibc here")
    assert after < 0.2 * plain


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory()

"""Stopping: signals ask, work ends at a safe point, and the exit code says why."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from hdcache import stopping

PROGRAM = """
    import sys, time
    from hdcache import stopping
    from hdcache.errors import HdcacheError
    stopping.install()
    print(stopping.requested(), flush=True)
    try:
        for step in range(1000):
            time.sleep(0.02)
            if stopping.requested() and not {stubborn}:
                raise stopping.stop(f"step {{bool(step)}} saved")
            if stopping.requested():
                print("asked", flush=True)
    except HdcacheError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(99)
"""


def started(stubborn: bool = False) -> subprocess.Popen[str]:
    code = textwrap.dedent(PROGRAM).format(stubborn=stubborn)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_asks_and_the_exit_code_says_that_work_was_saved(name: str, code: int) -> None:
    process = started()
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert out.startswith(f"stopped by {name} with step ")
    assert out.endswith("saved; run the same command again to go on\n")


def test_a_second_interrupt_stops_at_once() -> None:
    """The first only asks; work that does not listen is cut by the second."""
    process = started(stubborn=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 99
    assert out.endswith("interrupted\n")


def test_repeated_terms_only_ask() -> None:
    """SLURM may send SIGUSR1 and SIGTERM, more than once: none of them cuts a write."""
    process = started(stubborn=True)
    assert process.stdout is not None
    for name in ("SIGUSR1", "SIGTERM", "SIGTERM"):
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == "asked\n"
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=30)


def test_a_process_that_stops_because_another_was_told() -> None:
    error = stopping.stop("step 3 saved")
    assert str(error).startswith("stopped by a signal to another process with step 3 saved; run the same")
    assert error.exit_code == 75

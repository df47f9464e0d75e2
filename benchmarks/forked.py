"""Commands of ``hdcache`` as children of one process that has loaded everything and started nothing; they may be killed.

A child is ready in milliseconds, where a new process loads torch for seconds. The parent must start no thread and use no
reader: it loads, forks, waits, and looks at files.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hdcache import arrays
from hdcache.cli import main

DURABLE = ("fsync", "link", "replace", "unlink")
"""Calls of the system between which a kill leaves one thing done and the next one not."""


def fork(work: Callable[[], object], log: Path) -> int:
    """The process id of a child that does ``work``, speaks to ``log``, and exits with the code of a command."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # a Ctrl-C is the parent's to handle
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        # Right, since the parent has imported the Rust reader and never used it.
        arrays._forked = False
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def command(arguments: Sequence[str], calls: Calls | None = None) -> Callable[[], object]:
    """What a child does that runs ``hdcache ARGUMENTS``."""

    def work() -> NoReturn:
        if calls is not None:
            calls.install()
        try:
            main([*arguments, "--quiet"])
        finally:
            if calls is not None:
                calls.tell()

    return work


def ended(child: int, seconds: float | None = None) -> int | None:
    """The exit code of a child, -9 where it was killed; None where it still runs after ``seconds``."""
    until = time.monotonic() + (seconds or 0)
    while True:
        found, status = os.waitpid(child, 0 if seconds is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def killed(child: int) -> int | None:
    """Kill a child; the exit code, which is not -9 where it had ended before."""
    os.kill(child, signal.SIGKILL)
    return ended(child)


def answer(work: Callable[[], Any], log: Path) -> Any:
    """What ``work`` returns in a child, as JSON gives it back."""
    reader, writer = os.pipe()
    child = fork(lambda: os.write(writer, json.dumps(work()).encode()), log)
    os.close(writer)
    with open(reader, "rb") as file:
        found = file.read()
    if (code := ended(child)) != 0:
        raise SystemExit(f"a child ended with {code}: {log.read_text()[-2000:]}")
    return json.loads(found)


class Calls:
    """Counts the calls of a child that make something durable, and kills it at one of them."""

    def __init__(self, told: Path, die_at: int | None = None, *, more: Sequence[tuple[Any, str]] = ()) -> None:
        """``told`` is the file to which the count is written; ``more`` are (owner, name) of calls that count too."""
        self.told, self.die_at, self.more = told, die_at, more
        self._numbers = itertools.count(1)
        self._last = 0

    def install(self) -> None:
        """Count from now on, in this process."""
        for owner, name in (*((os, name) for name in DURABLE), *self.more):
            setattr(owner, name, self._counted(getattr(owner, name), name))

    def tell(self) -> None:
        """Write down how many there were."""
        self.told.write_text(str(self._last))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            number = self._last = next(self._numbers)
            if number == self.die_at:
                if name == "fsync" and number % 2 and stat.S_ISREG(os.fstat(given[0]).st_mode):
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)  # in the middle of its last write
                self.told.write_text("died")
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **more)

        return counted


class Ordered(Calls):
    """Counts calls in a process that others start, and kills it as far on as the file ``order`` in a folder says."""

    def __init__(self, folder: str) -> None:
        super().__init__(Path(folder) / "died")
        self._order = f"{folder}/order"
        self._rename = os.rename

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        counted = super()._counted(call, name)

        def ordered(*given: Any, **more: Any) -> Any:
            taken = f"{self._order}.{os.getpid()}"
            if self.die_at is None and os.path.exists(self._order):
                try:
                    self._rename(self._order, taken)  # one process alone
                    self.die_at = self._last + int(Path(taken).read_text())
                except FileNotFoundError:
                    pass
            return counted(*given, **more)

        return ordered

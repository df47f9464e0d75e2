"""A file system or a web server that fails at the N-th call, for every N: what becomes of the store, and what is said.

    python benchmarks/failing_calls.py --out DIR            # every call of every operation, every fault: about an hour
    python benchmarks/failing_calls.py --out DIR --quick    # a drawn sample of them: seconds

The system fails with ENOSPC, EIO, EACCES or ETIMEDOUT (which, goes round with N and --seed), once or from the N-th call on, or
reads and writes half of what it was asked for. The web server answers the N-th request, or all from it on, with 404, 403, 429, 500, 503, a web page, half of the body, the
whole of it where a part was asked for, late, or by cutting the connection. A command must then succeed, with the right result,
or say what is wrong in one line with an exit code of its own; what is sealed must be good at every moment, and what verify and
info print what it was without the fault, but for the notes of about.json; and the same command without faults must end in the same bytes, with nothing else but unfinished files that ``hdcache gc`` removes.

Prints two tables and writes DIR/failing_calls.json; exit 1 where anything came out otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from failing_operations import Operation, make_operations
from failing_system import ERRORS, SHORT

from hdcache import arrays, cli, draws
from hdcache.index import CROISSANT
from hdcache.integrity import verify
from hdcache.ledgers import INDEX
from hdcache.leftovers import collect
from hdcache.sharing import objects
from hdcache.store import ABOUT, Store

EXIT_CODES = {2, 3, 4, 5, 6, 75}
ANSWERS = ("404", "403", "429", "500", "503", "html", "cut", "norange", "slow", "reset")
WAITED_OUT = {"429", "500", "503", "html", "cut", "norange", "slow", "reset", SHORT}
"""Faults after which, if they come once, the command must go on by itself."""
MOST = 20_000
LASTING = 4
"""Faults that last are tried from one call in so many on: they meet what a single one meets, and then end sooner."""


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    said: str
    trouble: str = ""
    """What of that must not be."""
    printed: str = ""
    """On stdout."""


@dataclass
class Tally:
    """What became of the faults of one kind in one operation."""

    calls: int = 0
    faults: int = 0
    succeeded: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    partial: int = 0
    """Runs that left unfinished files, which were then collected."""
    wrong: list[str] = field(default_factory=list)


def run(operation: Operation, work: Path) -> Outcome:
    """Run a command as ``hdcache`` would, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(operation.arguments(work))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            return Outcome(-1, "", f"an error that is not ours: {traceback.format_exc(limit=-6)}")
    said = err.getvalue().strip()
    lines = [line for line in said.splitlines() if line.startswith("hdcache: ")]
    if code and (code not in EXIT_CODES or len(lines) != 1 or "Traceback" in said):
        return Outcome(code, said, f"exit code {code}, and on stderr: {said[-1000:]!r}")
    return Outcome(code, said, printed=out.getvalue())


def answer(printed: str) -> Any:
    """What a command has printed as JSON, without the notes of ``about.json``: where data and weights were, and what wrote the store."""
    found = json.loads(printed)
    found.pop("written_with", None)
    found.get("dataset", {}).pop("spec", None)
    for teacher in found.get("teachers", {}).values():
        teacher.pop("source", None)
    return found


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file but locks, notes of their owners and unfinished ones."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in files
        if not path.name.endswith((".lock", ".owner", ".lease", ".partial"))
    }


def faults(root: Path) -> list[str]:
    """What is wrong with what is sealed or recorded, at any moment."""
    return verify(Store.open(root)).faults if (root / "zarr.json").is_file() else []


def harm(root: Path, before: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> list[str]:
    """What was right in a damaged store and is not any more; what is derived of the rest may be withdrawn while that is mended."""
    there = snapshot(root)
    kept = {key for key, data in before.items() if wanted.get(key) == data} - {INDEX, CROISSANT}
    return [f"{key} was right before" for key in sorted(kept) if there.get(key) != wanted[key]]


def leave_room(root: Path) -> bool:
    """Collect what is left over; whether there was anything."""
    if not (root / "zarr.json").is_file():
        return False
    found = collect(Store.open(root))
    if found.busy:
        raise RuntimeError(f"a lease is held: {found.busy}")
    return bool(found.partial)


@dataclass(frozen=True)
class Undisturbed:
    """What an operation does without a fault."""

    before: dict[str, bytes]
    after: dict[str, bytes]
    answer: Any
    """What it prints, where that is the point of it."""
    calls: int


class Campaign:
    """All faults of all operations, on a copy of each operation's start."""

    def __init__(self, work: Path, share: float, seed: int) -> None:
        self.work, self.share, self.seed = work, share, seed
        self.found: dict[tuple[str, str], Tally] = {}

    def _fresh(self, operation: Operation) -> Path:
        root = self.work / "run"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        operation.prepare(root)
        return root

    def undisturbed(self, operation: Operation) -> Undisturbed:
        """What an undisturbed run begins with, ends in and prints, and how many calls it makes."""
        root = self._fresh(operation)
        before = snapshot(root / "s")
        with operation.failing(root) as failing:
            done = run(operation, root)
        if done.code:
            raise SystemExit(f"{operation.name}: {done.said}{done.trouble}")
        answered = answer(done.printed) if operation.answers else None
        return Undisturbed(before, snapshot(root / "s"), answered, failing.count)

    def inject(self, operation: Operation, kinds: Sequence[str], *, lasting: bool) -> None:
        """One run for every N, with the kinds of fault in turn, until one ends before its N-th call; or for some of them."""
        wanted = self.undisturbed(operation)
        name = f"{kinds[0] if len(kinds) == 1 else 'an error'} {'from then on' if lasting else 'once'}"
        tally = self.found[operation.name, name] = Tally(wanted.calls)
        share = self.share / LASTING if lasting else self.share
        drawn = draws.uniform(wanted.calls, self.seed, operation.name, name)
        some = [1 + int(number) for number in (drawn <= max(share, drawn.min())).nonzero()[0]]
        for number in range(1, MOST) if share >= 1 else some:
            kind = kinds[(number + self.seed) % len(kinds)]
            root = self._fresh(operation)
            with operation.failing(root, kind, number, lasting=lasting) as failing:
                done = run(operation, root)
            if not failing.failed:
                break
            self._judge(operation, kind, lasting, f"{kind} at {number} ({failing.failed})", root, done, wanted, tally)

    def _judge(
        self, operation: Operation, kind: str, lasting: bool, at: str, root: Path, done: Outcome,
        undisturbed: Undisturbed, tally: Tally,
    ) -> None:  # fmt: skip
        wanted = undisturbed.after
        tally.faults += 1
        said = [done.trouble] if done.trouble else []
        if done.code == 0:
            tally.succeeded += 1
            if (there := snapshot(root / "s")) != wanted and there != _without_notes(wanted, kind):
                said.append("it says that all went well, and that is not so")
            if operation.answers and (printed := answer(done.printed)) != undisturbed.answer:
                apart = [key for key in printed if printed[key] != undisturbed.answer.get(key)]
                said.append(f"it prints something else: {apart}: {str({key: printed[key] for key in apart})[:300]}")
        elif not lasting and kind in WAITED_OUT:
            said.append(f"it gave up: {done.said[-300:]}")
        else:
            tally.codes[done.code] += 1
        if operation.good:
            said += [f"afterwards: {fault}" for fault in faults(root / "s")]
        else:
            said += [f"afterwards: {what}" for what in harm(root / "s", undisturbed.before, wanted)]
        again = run(operation, root)
        if again.code:
            said.append(f"without faults, again: {again.said[-300:]}{again.trouble}")
        tally.partial += leave_room(root / "s")
        if (there := snapshot(root / "s")) != wanted:
            apart = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
            said.append(f"again ends in other bytes: {apart[:3]}")
        said += [f"in the end: {fault}" for fault in faults(root / "s")]
        tally.wrong += [f"{operation.name}, {at}: {text}" for text in said]


def _without_notes(wanted: dict[str, bytes], kind: str) -> dict[str, bytes]:
    """Where a place says that there are no notes on where things came from, or refuses to say, none are copied."""
    return {key: data for key, data in wanted.items() if kind not in ("403", "404") or key != ABOUT}


def table(found: Mapping[tuple[str, str], Tally], which: int, first: str) -> str:
    """Markdown: one line for each operation (``which`` 0) or each fault (1)."""
    head = (first, "calls", "runs with a fault", "went on", "one clear error", "exit codes", "left unfinished files", "wrong")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(key[which] for key in found):
        mine = [tally for key, tally in found.items() if key[which] == name]
        codes = sum((tally.codes for tally in mine), Counter[int]())
        told = ", ".join(f"{code} ({count:,})" for code, count in sorted(codes.items()))
        sums = [sum(getattr(tally, column) for tally in mine) for column in ("faults", "succeeded", "partial")]
        calls = "" if which else f"{max(tally.calls for tally in mine):,}"
        cells = [name, calls, f"{sums[0]:,}", f"{sums[1]:,}", f"{codes.total():,}", told, sums[2], sum(len(tally.wrong) for tally in mine)]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def kinds_of(operation: Operation) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Faults that take turns, and whether they last."""
    for lasting in (False, True):
        if operation.web is not None:
            yield from (((kind,), lasting) for kind in ANSWERS)
        else:
            yield tuple(ERRORS), lasting
            yield (SHORT,), lasting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--operation", help="only those whose names hold this")
    parser.add_argument("--share", type=float, default=1.0, help="of the calls, drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one call of each operation and fault")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    # Files in memory: what a disk would do at a power cut is none of these faults.
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    share = 0.0 if asked.quick else asked.share
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base)))
        # Rust reads past Python, and waits between attempts prove nothing.
        patched: list[tuple[Any, str, Callable[..., Any] | tuple[float, ...]]] = [
            (arrays, "read_pipeline", lambda: "zarr"),
            (objects, "WAITS", (0.002,) * 5),
        ]
        for owner, name, value in patched:
            setattr(owner, name, value)
        campaign = Campaign(work, share, asked.seed)
        for operation in make_operations(work / "stores", stack):
            if asked.operation and asked.operation not in operation.name:
                continue
            for kinds, lasting in kinds_of(operation):
                campaign.inject(operation, kinds, lasting=lasting)
            sys.stderr.write(f"{operation.name}: {sum(len(t.wrong) for t in campaign.found.values())} wrong so far\n")
    print(table(campaign.found, 0, "operation"), table(campaign.found, 1, "fault"), sep="\n\n")
    wrong = [text for tally in campaign.found.values() for text in tally.wrong]
    facts = {
        f"{operation}: {kind}": {**vars(tally), "codes": dict(tally.codes)}
        for (operation, kind), tally in campaign.found.items()
    }
    (asked.out / "failing_calls.json").write_text(json.dumps(facts, indent=1))
    if wrong:
        print("\n".join(["", "wrong:", *wrong[:200]]))
        sys.exit(1)


if __name__ == "__main__":
    main()

"""SIGKILL at random moments of whatever writes a store: does the same command again always end in the same bytes?

    python benchmarks/kills.py --out DIR              # some 350 kills, twenty minutes on two cores
    python benchmarks/kills.py --out DIR --quick      # some 10 kills, without workers, bucket and web server

Each victim is a command whose result is known to the byte. It is killed at a moment drawn from the whole length of its run, or
at one of its calls that make something durable (fsync, which may find half of its file, link, rename, removal; requests to a
bucket), then run again, killed again up to twice, and at last left alone. After each kill every seal that is there must be
good (where a store was damaged before: what was good in it); now and then what was left behind is collected in between. At the end the store must hold the bytes of an undisturbed
run, and nothing else but unfinished files, which ``hdcache gc`` removes. Prints one table and writes DIR/kills.json; exit 1
where anything came out otherwise.

--seed draws which kills there are: of which victim, at which call, or after which share of its time. A kill at a call of a command
that writes from one thread comes at the same place again; among several threads their order, and after a time the machine, decide where it falls.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

# What the children use is loaded here, once.
import obstore  # noqa: F401
import psutil
import timm  # noqa: F401
import torch
import zarr  # noqa: F401
from forked import Calls, command, ended, fork, killed
from kill_victims import Services, Victim, make_stores, make_victims

import hdcache.extract.dask_engine
import hdcache.sharing.streaming
import hdcache.sharing.transfer  # noqa: F401
from hdcache import draws
from hdcache.index import CROISSANT, sealed_ledgers
from hdcache.integrity import verify
from hdcache.ledgers import INDEX
from hdcache.leftovers import collect
from hdcache.store import Store

AGAIN, MOST = 0.4, 3
"""How often a command that was killed is killed again; kills in a row."""
TRIES, PAUSE = 5, 1.0
"""How often a last run that is refused, since workers of a dead command still write, is repeated, after so many seconds."""
LIMIT = 300.0
ORPHANED = 20.0
"""Seconds within which workers must notice that their command is gone."""
CALLS_OF_A_WORKER = 300
"""About as many calls as one of two workers makes in its share of a run."""


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file of a store but locks and the notes of their owners."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.endswith((".lock", ".owner"))]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def seals(root: Path) -> dict[str, str]:
    """The digest of every seal."""
    return {ledger.key: ledger.manifest().digest() for ledger in sealed_ledgers(Store.open(root))}


def faults(root: Path) -> list[str]:
    """What is wrong with what is sealed or recorded, at any moment."""
    return verify(Store.open(root)).faults if (root / "zarr.json").is_file() else []


def harm(root: Path, before: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """What was right before a damaged store was mended, and is not now. What is derived of the rest may be withdrawn meanwhile."""
    kept = {key for key, data in before.items() if wanted.get(key) == data} - {INDEX, CROISSANT}
    there = snapshot(root)
    return [f"{key} was right before" for key in sorted(kept) if there.get(key) != wanted[key]]


class Campaign:
    """Rounds of kills, and what was found."""

    def __init__(self, folder: Path, stores: Path, seed: int) -> None:
        self.folder, self.stores, self.seed = folder, stores, seed
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.found: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self.below: list[psutil.Process] = []
        """Workers of commands that were killed."""

    def measure(self, victim: Victim, times: int) -> None:
        """Run a victim to its end: how long it takes, how many calls it makes, and that it does what is wanted."""
        for number in range(times):
            victim.prepare(work := self.folder / f"undisturbed-{number}", self.stores)
            began = time.monotonic()
            calls = None if victim.workers else Calls(self.folder / "calls", more=victim.more)
            child = fork(command(victim.arguments(work), calls), work / "log")
            if (code := ended(child)) != 0:
                raise SystemExit(f"{victim.name}: ended with {code} undisturbed: {(work / 'log').read_text()[-2000:]}")
            self.seconds[victim.name] = time.monotonic() - began
            if calls is not None and victim.name not in self.calls:
                self.calls[victim.name] = int(calls.told.read_text())
            victim.settle(work)
            if snapshot(work / "s") != snapshot(self.stores / victim.wanted):
                raise SystemExit(f"{victim.name}: an undisturbed run does not end in the same bytes")
        self.found[victim.name] = Counter()

    def round(self, victim: Victim, number: int) -> None:
        """Kill a victim once or more often, let it finish, and look at what there is."""
        found = self.found[victim.name]
        victim.prepare(work := self.folder / re.sub(r"\W+", "-", f"{victim.name} {number}"), self.stores)
        said: list[str] = []
        how: list[str] = []
        before = snapshot(work / "s")
        for attempt in range(MOST):
            draw = draws.uniform(5, self.seed, victim.name, number, attempt)
            if not self._kill(victim, work, *draw[:2].tolist()):
                break
            found["kills"] += 1
            how.append(f"{'call' if draw[0] < 0.5 else 'time'} {draw[1]:.3f}")
            found["mid-write"] += any(key.endswith(".partial") and key not in before for key in snapshot(work / "s"))
            wrong = (
                harm(work / "s", before, snapshot(self.stores / victim.wanted))
                if victim.damaged
                else faults(work / "s")
            )
            said += [f"after kill {len(how)}: {text}" for text in wrong]
            if draw[2] < AGAIN and (work / "s/zarr.json").is_file():
                collect(Store.open(work / "s"))
            if draw[3] > AGAIN:
                break
        said += self._finish(victim, work, found)
        found["kills"] += self._died()  # a worker that had not come as far before
        _, alive = psutil.wait_procs(self.below, timeout=ORPHANED)
        said += [f"process {process.pid} outlives its command" for process in alive]
        self.below = []
        found["rounds"] += 1
        found["right"] += not said
        self.wrong += [f"{victim.name}, round {number} (killed at {', '.join(how)}): {text}" for text in said]
        if not said:
            shutil.rmtree(work)

    def _kill(self, victim: Victim, work: Path, kind: float, where: float) -> bool:
        """Run a victim and kill it, or a worker of it; False where it had ended before."""
        by_call, calls = kind < 0.5, None
        if by_call and victim.workers is None:
            calls = Calls(self.folder / "calls", 1 + int(where * self.calls[victim.name]), more=victim.more)
        child = fork(command(victim.arguments(work), calls), work / "log")
        if victim.workers is not None:
            return self._kill_worker(victim, work, child, where, by_call=by_call)
        if calls is None:
            time.sleep(where * self.seconds[victim.name])
            self.below += psutil.Process(child).children(recursive=True)
            code: int | None = killed(child)
        else:
            code = ended(child, LIMIT)
        return code == -9 or self._is_right(victim, work, child, code)

    def _kill_worker(self, victim: Victim, work: Path, child: int, where: float, *, by_call: bool) -> bool:
        """Kill one of the processes that work for a command, which is to go on without it, or to say what is wrong."""
        order, done, code = self.stores / "order", False, None
        if by_call and victim.orders:
            order.write_text(str(1 + int(where * CALLS_OF_A_WORKER)))
            code = ended(child, LIMIT)
            done = self._died()
            order.unlink(missing_ok=True)
        else:
            time.sleep(where * self.seconds[victim.name])
            if (code := ended(child, 0)) is None and victim.workers is not None:
                for process in victim.workers(child)[:1]:
                    process.kill()
                    done = True
                code = ended(child, LIMIT)
        self.found[victim.name]["went on"] += done and code == 0
        return done if code in (4, 75) and done else self._is_right(victim, work, child, code) or done

    def _is_right(self, victim: Victim, work: Path, child: int, code: int | None) -> bool:
        """False where a run ended as it should; else that is noted, and the process is gone."""
        if code == 0:
            return False
        self.wrong.append(f"{victim.name}: ended with {code}: {(work / 'log').read_text()[-400:]}")
        return code is not None or bool(killed(child))

    def _died(self) -> bool:
        """Whether a worker has died at the call that it was told, since this was asked last."""
        told = self.stores / "died"
        there = told.exists()
        told.unlink(missing_ok=True)
        return there

    def _finish(self, victim: Victim, work: Path, found: Counter[str]) -> list[str]:
        for _ in range(TRIES):
            code = ended(fork(command(victim.arguments(work)), work / "log"), LIMIT)
            found["reruns"] += 1
            if code == 0:
                break
            time.sleep(PAUSE)
        else:
            return [f"ended with {code}: {(work / 'log').read_text()[-400:]}"]
        victim.settle(work)
        wanted, there = snapshot(self.stores / victim.wanted), snapshot(work / "s")
        said = [f"{key} is missing" for key in wanted.keys() - there.keys()]
        said += [f"{key} differs" for key in wanted.keys() & there.keys() if wanted[key] != there[key]]
        left = there.keys() - wanted.keys()
        found["left"] += len(left)
        said += [f"{key} is left over" for key in left if not key.endswith((".partial", ".lease"))]
        gone = collect(Store.open(work / "s"))
        found["collected"] += len(gone.partial)
        said += [f"{key} is not collected" for key in snapshot(work / "s").keys() - wanted.keys()] + gone.busy
        checked = verify(Store.open(work / "s"))
        said += [*checked.faults, *checked.unsealed, *checked.unlisted]
        found["same"] += seals(work / "s") == seals(self.stores / victim.wanted)
        return said


def table(campaign: Campaign) -> str:
    """Markdown."""
    head = ("victim", "a run", "calls", "kills", "of them in a write", "went on by itself", "rounds", "last runs repeated", "same digests", "byte-equal", "left over", "after gc")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    total: Counter[str] = Counter()
    for name, found in campaign.found.items():
        total += found
        about = [f"{campaign.seconds[name]:.2f} s", str(campaign.calls.get(name, "")) or "-"]
        lines.append(line(name, about, found))
    return "\n".join([*lines, line("all", ["", ""], total)])


def line(name: str, about: list[str], found: Counter[str]) -> str:
    cells = [
        name, *about, found["kills"], found["mid-write"], found["went on"], found["rounds"], found["reruns"] - found["rounds"],
        f"{found['same']} of {found['rounds']}", f"{found['right']} of {found['rounds']}", found["left"],
        found["left"] - found["collected"],
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, help="in all, about.  [default: 350, quick 12]")
    parser.add_argument("--victim", help="only those whose names hold this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few kills of what needs neither workers nor servers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    work = asked.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    make_stores(work / "stores")
    campaign = Campaign(work, work / "stores", asked.seed)
    with Services(work) as services:
        victims = make_victims(work / "stores", services, quick=asked.quick)
        parts = sum(part for _, part in victims)
        for victim, part in victims:
            if asked.victim and asked.victim not in victim.name:
                continue
            campaign.measure(victim, 1 if asked.quick else 2)
            wanted = max(1, round((asked.kills or (12 if asked.quick else 350)) * part / parts))
            number = 0
            while campaign.found[victim.name]["kills"] < wanted and number < 3 * wanted:
                campaign.round(victim, number)
                number += 1
            sys.stderr.write(
                f"{victim.name}: {dict(campaign.found[victim.name])}, {len(campaign.wrong)} wrong so far\n"
            )
    print(table(campaign))
    facts: dict[str, Any] = {"seconds": campaign.seconds, "calls": campaign.calls, "wrong": campaign.wrong}
    facts["found"] = {name: dict(found) for name, found in campaign.found.items()}
    (asked.out / "kills.json").write_text(json.dumps(facts, indent=1))
    if campaign.wrong:
        print("\n".join(["", "wrong:", *campaign.wrong]))
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

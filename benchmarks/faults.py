"""Damage to every object of a store, and who notices: opening, reading, ``verify --quick`` and ``verify``.

    python benchmarks/faults.py --out DIR            # some 7,000 injections in two processes: about a quarter of an hour
    python benchmarks/faults.py --out DIR --quick    # a drawn sample of them: seconds

The store (tests/lane_store.py) has every encoding, masks, failed rows, kept samples, two teachers and two views. Each object is
deleted, cut, extended, zero-filled, exchanged with its siblings, overwritten by them and by the same object of an earlier and of another
store, and has single bits flipped at drawn places; each folder is deleted; and of all these two are done at once, drawn. After each of these, everything is opened and read anew by every way of
reading, and compared to the bit with what was there before; then the store is verified, and mended for the next. The same is
done to drawn objects at the source of a streamed store, and to the files of its cache.

Prints one table and writes DIR/faults.json. Exit status 1 where anything was read that was not there, or an error was not ours.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import damage
import lane_store
import verdicts
from hdcache.draws import permutation
from hdcache.progress import Progress
from hdcache.sharing.streaming import open_store
from hdcache.store import Store
from whole_reading import read_everything

STALE = {"of an earlier version of the store": 1, "of another store": 2}
CAMPAIGNS = ("store", "source", "cache")
NAMED = {"store": "", "source": "streamed, at its source", "cache": "streamed, in its cache"}
TASK = 8
"""Injections that a process is given at a time."""
CLASSES = (
    ("about.json", r"(?:teachers/[^/]+/)?about\.json"),
    ("index.json", r"index\.json"),
    ("croissant.json", r"croissant\.json"),
    ("receipts of sealed ledgers", r".*/receipts(?:/\d+\.json)?"),
    ("manifests", r".*/manifest\.json"),
    ("the store's record", r"zarr\.json"),
    ("teachers' records", r"teachers/[^/]+/zarr\.json"),
    ("records of folders", r"(?:samples|views|teachers|.*/views(?:/\d+(?:/[^/]+)?)?|views/\d+|samples/pixels)/zarr\.json"),
    ("the samples' receipt", r"samples/receipt\.json"),
    ("metadata of arrays", r".*/zarr\.json"),
    ("constants and weights", r"teachers/[^/]+/(?:encodings|weights)(?:/.*)?"),
    ("pixel digests of verify --replay", r"teachers/[^/]+/views/\d+/pixels(?:/.*)?"),
    ("rows", r"teachers/.*"),
    ("geometry", r"views/.*"),
    ("samples", r"samples/.*"),
    ("objects of the cache", r"objects/.*"),
)  # fmt: skip


class Bench:
    """One process's copy of the store, and all that can happen to it; the same in every process."""

    def __init__(self, stores: Path, scratch: Path, seed: int, flips: int, together: int) -> None:
        os.fsync = lambda *_: None  # a power cut is none of these faults
        logging.disable(logging.WARNING)
        self.root, self.cache = scratch / "store", scratch / "cache"
        shutil.copytree(stores / "0", self.root)
        self.objects = damage.objects_of(self.root)
        others = {name: damage.objects_of(stores / str(version)) for name, version in STALE.items()}
        self.injections = {"store": damage.injections(self.objects, others, flips, seed, together)}
        self.injections["source"] = self.injections["store"]
        self.truth = read_everything(lambda: Store.open(self.root))
        broken = [f"{name}: {found}" for name, found in self.truth.items() if isinstance(found, Exception)]
        if broken or read_everything(lambda: self.streamed(self.cache)) != self.truth:
            raise SystemExit(f"the undamaged store cannot be read: {broken[:1]}")
        self.cached = damage.objects_of(self.cache)
        self.home = next(re.findall(r"stores/[^/]+", key)[0] for key in self.cached if key.startswith("stores/"))
        self.injections["cache"] = [self._at_home(one) for one in damage.injections(self._named_alike(), {}, 1, seed)]

    def streamed(self, cache: Path) -> Store:
        """The store at a URL, through a cache."""
        return open_store(f"file://{self.root}", cache=cache, cache_size="1GB")

    def _named_alike(self) -> dict[str, bytes]:
        """What is in the cache, by names that are the same in every process: its own hold the URL, which is another in each."""
        return {key.replace(self.home, "stores/URL", 1): data for key, data in self.cached.items()}

    def _at_home(self, injection: damage.Injection) -> damage.Injection:
        """The same with the names that are there."""

        def own(key: str) -> str:
            return key.replace("stores/URL", self.home, 1)

        changed = {own(key): data for key, data in injection.change.items()}
        folders = tuple(own(folder) for folder in injection.folders)
        return damage.Injection(injection.kind, own(injection.key), changed, folders)

    def run(self, campaign: str, number: int) -> dict[str, Any]:
        """One injection, and what became of it."""
        injection = self.injections[campaign][number]
        found: dict[str, Any] = {"campaign": campaign, "kind": injection.kind, "key": injection.key, "number": number}
        root = self.cache if campaign == "cache" else self.root
        with injection.applied(root, self.cached if campaign == "cache" else self.objects):
            if campaign == "store":
                read = read_everything(lambda: Store.open(self.root))
                verdict = verdicts.judge(injection, self.root, self.objects, self.truth, read)
                found |= {"quick": verdict.quick, "full": verdict.full}
            elif campaign == "source":
                empty = Path(tempfile.mkdtemp(dir=self.cache.parent))
                read = read_everything(lambda: self.streamed(empty))
                shutil.rmtree(empty, ignore_errors=True)
            else:
                read = read_everything(lambda: self.streamed(self.cache))
        reading = verdicts.reading_of(injection, self.objects, self.truth, read)
        bugs = verdict.bugs if campaign == "store" else verdicts.bugs_of(injection, root, read, reading)
        excused = all(damage.UNPROTECTED.fullmatch(key) for key in injection.change)
        wrong = verdicts.wrong_ways(self.truth, read) if reading == "wrong" else []
        return found | {"reading": reading, "wrong": wrong, "bugs": list(bugs), "excused": excused}


_bench: list[Bench] = []


def begin(stores: Path, scratch: Path, seed: int, flips: int, together: int) -> None:
    """Make the store of a process."""
    _bench.append(Bench(stores, Path(tempfile.mkdtemp(dir=scratch)), seed, flips, together))


def totals(kind: str) -> dict[str, list[int]]:
    """The numbers of the injections that there are, of those in the store of kinds that hold ``kind``."""
    found = {name: list(range(len(all_of))) for name, all_of in _bench[0].injections.items()}
    found["store"] = [number for number in found["store"] if kind in _bench[0].injections["store"][number].kind]
    return found


def run(campaign: str, numbers: list[int]) -> list[dict[str, Any]]:
    """Some injections, in a process that has begun."""
    return [_bench[0].run(campaign, number) for number in numbers]


def class_of(key: str) -> str:
    """What kind of object a key names."""
    key = re.sub(r"^stores/[^/]+/", "", key)
    if " + " in key:
        return " + ".join(sorted(class_of(part.partition(" (")[0]) for part in key.split(" + ")))
    return next((name for name, pattern in CLASSES if re.fullmatch(pattern, key)), key)


def merged(kind: str) -> str:
    """The line of the table that a kind of damage is counted in."""
    return re.sub(r"^(exchanged with|overwritten by) (.*)", r"\1 a sibling", kind)


def line(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Some injections as numbers."""
    reading = Counter(one["reading"] for one in found)
    facts: dict[str, Any] = {"name": name, "injections": len(found)}
    facts |= {key: reading[key] for key in ("open", "read", "same", "fewer", "wrong")}
    whole = all("full" in one for one in found)
    return facts | {key: sum(one[key] for one in found) if whole else None for key in ("quick", "full")}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("damage", "injections", "refused when opened", "refused when read", "read as before", "a smaller store", "**silently wrong**", "named by verify --quick", "named by verify")  # fmt: skip
    keys = ("injections", "open", "read", "same", "fewer", "wrong", "quick", "full")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows += [
        f"| {one['name']} | {' | '.join('' if one[key] is None else f'{one[key]:,}' for key in keys)} |"
        for one in lines
    ]
    return "\n".join(rows)


def counted(found: list[dict[str, Any]]) -> dict[str, int]:
    """Injections by the kind of object that they damage."""
    return dict(Counter(class_of(one["key"]) for one in found).most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=4, help="bits to flip in each object, one at a time")
    parser.add_argument("--together", type=int, default=150, help="pairs of damages to draw, of each kind of pair")
    parser.add_argument("--kind", default="", help="of those in the store, only kinds that hold this")
    parser.add_argument("--sample", type=int, help="injections to draw of those of the store.  [default: all]")
    parser.add_argument("--streamed", type=int, default=500, help="injections at a source, and in a cache")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="60 injections, and 8 of each kind of streaming; few taps")
    settings = parser.parse_args()
    if settings.quick:
        settings.flips, settings.together, settings.processes = 1, 10, 1
        settings.sample, settings.streamed = settings.sample or 60, 8
    settings.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        stores = Path(folder) / "stores"
        with lane_store.few_taps() if settings.quick else nullcontext():
            for version in (0, *STALE.values()):
                damage.write_store(stores / str(version), version)
        found = campaign(settings, stores, Path(folder))
    seconds = time.monotonic() - began
    report(settings, found, seconds)


def campaign(settings: argparse.Namespace, stores: Path, scratch: Path) -> list[dict[str, Any]]:
    """All injections, in so many processes."""
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(
        settings.processes,
        multiprocessing.get_context("spawn"),
        begin,
        (stores, scratch, settings.seed, settings.flips, settings.together),
    ) as pool:
        counts = pool.submit(totals, settings.kind).result()
        asked = {
            "store": settings.sample or len(counts["store"]),
            "source": settings.streamed,
            "cache": settings.streamed,
        }
        tasks = []
        for name in CAMPAIGNS:
            drawn = permutation(len(counts[name]), settings.seed, "faults", name)[: asked[name]].tolist()
            order = [counts[name][number] for number in drawn]
            tasks += [pool.submit(run, name, order[i : i + TASK]) for i in range(0, len(order), TASK)]
        with Progress("faults", sum(min(asked[name], len(counts[name])) for name in CAMPAIGNS), "injections") as bar:
            for task in tasks:
                done = task.result()
                found += done
                bar.advance(len(done))
    return found


def report(settings: argparse.Namespace, found: list[dict[str, Any]], seconds: float) -> None:
    """Print the table, write all of it, and fail where the store did."""
    own = [one for one in found if one["campaign"] == "store"]
    unnamed = [one for one in own if not one["full"] and not one["excused"]]
    kinds = dict.fromkeys(merged(one["kind"]) for one in sorted(own, key=lambda one: str(one["kind"])))
    lines = [line(kind, [one for one in own if merged(one["kind"]) == kind]) for kind in kinds]
    lines.append(line("**all**", own))
    lines += [line(NAMED[name], [one for one in found if one["campaign"] == name]) for name in CAMPAIGNS[1:]]
    wrong = [one for one in found if one["reading"] == "wrong"]
    bugs = [one for one in found if one["bugs"]]
    harmless = {name: counted([one for one in found if one["reading"] == "same" and one["campaign"] == name]) for name in CAMPAIGNS}  # fmt: skip
    missed = {key: counted([one for one in own if not one[key]]) for key in ("quick", "full")}
    result = {
        "settings": {key: str(value) for key, value in vars(settings).items()}, "seconds": seconds, "lines": lines,
        "read as before": harmless, "not named by verify": missed["full"], "not named by verify --quick": missed["quick"],
        "wrong": wrong, "bugs": bugs, "unnamed": unnamed, "smaller": [one for one in found if one["reading"] == "fewer"],
        "injections": found,
    }  # fmt: skip
    (settings.out / "faults.json").write_text(json.dumps(result, indent=1))
    print(table(lines))
    print(f"\nRead as before, by what was damaged: {harmless['store']}")
    print(f"Not named by verify: {missed['full']}")
    print(f"{len(found):,} injections, no two the same, in {seconds:.0f} s")
    for one in [one for one in found if one["reading"] == "wrong" or one["bugs"] or one in unnamed][:40]:
        print(
            f"{one['campaign']} {one['number']}, {one['kind']} {one['key']}: {one['wrong']} {one['bugs'][:2]}",
            file=sys.stderr,
        )
    if wrong or bugs or unnamed:
        raise SystemExit(
            f"{len(wrong)} injections were read as something else, {len(bugs)} gave a wrong error, verify named {len(unnamed)} not"
        )


if __name__ == "__main__":
    main()

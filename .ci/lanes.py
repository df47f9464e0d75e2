"""The store's side without torch, twice: on Python 3.11 with the oldest zarr that hdcache supports, and on the newest Python
with the newest zarr. `make lanes` runs it.

Each lane is a virtual environment under .lanes/ that holds no torch. It runs the tests that tests/without_torch.py names and
writes the store of tests/lane_store.py. The two stores must then be equal to the byte, and each lane reads both, row by row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LANES = ROOT / ".lanes"
OLDEST, NEWEST = (11,), (13, 12)
"""Minor versions of Python 3, the first that is found of each."""
AT_THEIR_OLDEST = ("zarr", "numcodecs")
"""Requirements that the lane of the oldest Python takes at the lowest version that pyproject.toml allows."""
NOT_FOR_STORES = ("torch", "timm", "dask[distributed]", "faiss-cpu", "huggingface-hub")
"""Dependencies that no store needs; all others are installed, those of tomorrow too."""
FOR_TESTS = ("hypothesis", "psutil", "pytest", "pytest-timeout", "tensorstore")
"""Those of the extra ``test`` that the lanes' tests need."""
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+(?:\[[^\]]*\])?)(.*)")


class Python(NamedTuple):
    """An interpreter that can make virtual environments."""

    path: str
    version: str
    """``3.11.7``."""

    @property
    def minor(self) -> int:
        return int(self.version.split(".")[1])

    @property
    def oldest(self) -> bool:
        return self.minor in OLDEST


class Lane(NamedTuple):
    """A virtual environment, made and filled."""

    name: str
    python: str
    """Path of its interpreter."""


def requirements(project: dict[str, object], *, oldest: bool) -> list[str]:
    """What a lane installs, as pyproject.toml has it."""
    needed = _by_name(project["dependencies"])
    tests = _by_name(project["optional-dependencies"]["test"])  # type: ignore[index]
    if gone := [name for name in NOT_FOR_STORES if name not in needed] + [n for n in FOR_TESTS if n not in tests]:
        raise SystemExit(f"{Path(__file__).name}: no longer in pyproject.toml: {', '.join(gone)}")
    chosen = {name: spec for name, spec in needed.items() if name not in NOT_FOR_STORES}
    chosen |= {name: tests[name] for name in FOR_TESTS}
    if oldest:
        chosen |= {name: chosen[name].replace(">=", "==") for name in AT_THEIR_OLDEST}
    return [name + spec for name, spec in chosen.items()]


def _by_name(specs: object) -> dict[str, str]:
    found = (_REQUIREMENT.fullmatch(spec) for spec in specs)  # type: ignore[attr-defined]
    return {match[1]: match[2] for match in found if match}


def places(minor: int) -> Iterator[str]:
    """Where a Python 3.``minor`` may be: on the PATH, below pyenv's folder, or this one."""
    name = f"python3.{minor}"
    if found := shutil.which(name):
        yield found
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    built = [path for path in versions.glob(f"3.{minor}.*") if path.name.rpartition(".")[2].isdecimal()]
    for folder in sorted(built, key=lambda path: int(path.name.rpartition(".")[2]), reverse=True):
        yield str(folder / "bin" / name)
    yield sys.executable


def usable(path: str) -> Python | None:
    """The interpreter at ``path``, if it runs and can make virtual environments (pyenv's shims may not, Debian's need a package)."""
    code = "import sys, venv, ensurepip; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return Python(path, done.stdout.strip()) if done.returncode == 0 else None


def find(minors: Sequence[int]) -> Python | None:
    """The first of these versions that is here."""
    for minor in minors:
        for path in places(minor):
            if (found := usable(path)) and found.minor == minor:
                return found
    return None


def asked(paths: Sequence[str]) -> list[Python]:
    """The Pythons to run, said where one is missing."""
    if paths:
        found = [usable(path) for path in paths]
        if None in found:
            raise SystemExit(f"{paths[found.index(None)]}: no Python that can make a virtual environment")
        return [python for python in found if python]
    both = {minors: find(minors) for minors in (OLDEST, NEWEST)}
    for minors, python in both.items():
        if python is None:
            names = " or ".join(f"python3.{minor}" for minor in minors)
            print(
                f"lanes: no {names} here that can make a virtual environment: that lane does not run, no stores are compared"
            )
            print("lanes: name Pythons where they are: make lanes LANE_PYTHONS='/one/python3.11 /other/python3.13'")
    return [python for python in both.values() if python]


def run(*command: str) -> bool:
    """Run a command in the repository, with nothing of the caller's Python; whether it succeeded."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    sys.stdout.flush()
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 0


def prepare(python: Python) -> Lane | None:
    """Make and fill the lane's environment, unless it holds what it should."""
    lane = Lane(python.version, str(LANES / python.version / "bin" / "python"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = requirements(project, oldest=python.oldest)
    stamp = LANES / python.version / "installed"
    if not stamp.is_file() or stamp.read_text() != "\n".join(wanted):
        print(f"lane {lane.name}: installing {', '.join(wanted)}")
        pip = [lane.python, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", "install"]
        shutil.rmtree(LANES / python.version, ignore_errors=True)
        made = run(python.path, "-m", "venv", str(LANES / python.version)) and run(*pip, *wanted)
        if not (made and run(*pip, "--no-deps", "--editable", ".")):
            return None
        stamp.write_text("\n".join(wanted))
    torchless = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    if not run(lane.python, "-c", torchless):
        print(f"lane {lane.name}: holds torch; remove {LANES / python.version} and what brings it")
        return None
    return lane


def tests(lane: Lane) -> bool:
    """Run the tests that need no torch."""
    print(f"\nlane {lane.name}: tests")
    listed = subprocess.run(
        [lane.python, "tests/without_torch.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [f"tests/{name}" for name in listed.stdout.split()]
    return run(lane.python, "-P", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files)


def write(lane: Lane, store: Path) -> bool:
    """Write the lane's store."""
    print(f"\nlane {lane.name}: write")
    return run(lane.python, "tests/lane_store.py", "write", str(store))


def objects(store: Path) -> dict[str, str]:
    """sha256 of every file of a store; locks are none of it."""
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def equal(stores: dict[str, Path]) -> bool:
    """Whether the stores, by the lanes that wrote them, hold the same files; said either way."""
    if len(stores) < 2:
        return True
    found = [objects(store) for store in stores.values()]
    keys = sorted({key for files in found for key in files})
    wrong = [key for key in keys if len({files.get(key) for files in found}) > 1]
    names = " and ".join(stores)
    if wrong:
        print(f"stores of {names} differ in {len(wrong)} of {len(keys)} files: {', '.join(wrong[:20])}")
    else:
        print(f"stores of {names} are equal to the byte: {len(keys)} files")
    return not wrong


def read(lane: Lane, store: Path, writer: str) -> bool:
    """Have a lane verify and read a store."""
    done = subprocess.run(
        [lane.python, "tests/lane_store.py", "check", str(store)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        print(f"lane {lane.name}: cannot read the store of {writer}")
        return False
    told = json.loads(done.stdout)
    versions = ", ".join(f"{name} {told[name]}" for name in ("zarr", "numcodecs", "numpy", "zarrs") if name in told)
    print(
        f"lane {lane.name} ({versions}) reads the store of {writer}: {told['arrays']} arrays of {told['rows']} rows, "
        f"each by chunks, by zarr's pipelines and by zarr alone; {told['objects']} objects verified"
    )
    return True


def main(paths: Sequence[str]) -> int:
    pythons = asked(paths)
    if not pythons:
        print("lanes: nothing ran")
        return 1
    lanes = [prepare(python) for python in pythons]
    ready = [lane for lane in lanes if lane is not None]
    # A fault in one lane hides nothing of another: all of these lists are made before they are looked at.
    passed = [tests(lane) for lane in ready]
    stores = {lane.name: LANES / "stores" / lane.name for lane in ready}
    shutil.rmtree(LANES / "stores", ignore_errors=True)
    written = [lane for lane in ready if write(lane, stores[lane.name])]
    passed += [len(ready) == len(lanes), len(written) == len(ready), equal({a.name: stores[a.name] for a in written})]
    passed += [read(lane, stores[writer.name], writer.name) for lane in written for writer in written]
    good = all(passed)
    print(f"lanes: {'passed' if good else 'FAILED'} on Python {' and '.join(lane.name for lane in ready)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

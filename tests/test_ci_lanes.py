"""How `make lanes` finds its Pythons, what it installs for them, and that it tells stores apart."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "lanes.py"
PROJECT: dict[str, Any] = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def lanes() -> Any:
    spec = importlib.util.spec_from_file_location("ci_lanes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_lanes"] = module  # its records are looked up there
    spec.loader.exec_module(module)
    return module


def fake_python(path: Path, version: str, *, broken: bool = False) -> None:
    """A program that answers as an interpreter does, or that fails as pyenv's shims and Debian's bare Pythons do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\nexit {int(broken)}\n")
    path.chmod(0o755)


def test_a_lane_installs_all_but_what_no_store_needs(lanes: Any) -> None:
    """The oldest Python has zarr and numcodecs at their floors; what pyproject.toml gains tomorrow is installed too."""
    oldest, newest = (lanes.requirements(PROJECT, oldest=old) for old in (True, False))
    assert {"zarr==3.1.6", "pydantic>=2.7"} <= set(oldest)
    assert {"zarr>=3.1.6", "pytest>=8"} <= set(newest)
    assert [a for a, b in zip(oldest, newest, strict=True) if a != b] == [
        spec.replace(">=", "==") for spec in newest if spec.startswith(("zarr>", "numcodecs>"))
    ]
    assert not [spec for spec in newest if spec.startswith(("torch", "timm", "mypy"))]
    more = PROJECT | {"dependencies": [*PROJECT["dependencies"], "obstore>=0.5"]}
    assert "obstore>=0.5" in lanes.requirements(more, oldest=False)


def test_a_requirement_that_is_gone_is_named(lanes: Any) -> None:
    fewer = PROJECT | {"dependencies": [spec for spec in PROJECT["dependencies"] if not spec.startswith("timm")]}
    with pytest.raises(SystemExit, match=r"lanes\.py: no longer in pyproject\.toml: timm$"):
        lanes.requirements(fewer, oldest=False)


def test_pythons_are_found_on_the_path_and_below_pyenv(
    lanes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that works: a shim that does not is passed over, and of patch versions the newest is taken."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(lanes.sys, "executable", str(tmp_path / "none"))
    assert lanes.find((13, 12)) is None
    for version in ("3.13.2", "3.13.10", "3.12.1"):
        fake_python(tmp_path / "pyenv/versions" / version / "bin" / f"python{version[:4]}", version)
    fake_python(tmp_path / "pyenv/versions/3.13.0rc1/bin/python3.13", "3.13.0")
    fake_python(tmp_path / "bin/python3.13", "3.13.1", broken=True)
    assert lanes.find((13, 12)).version == "3.13.10"
    assert lanes.find((12,)).version == "3.12.1"
    fake_python(tmp_path / "bin/python3.13", "3.13.1")
    assert lanes.find((13, 12)).version == "3.13.1"
    fake_python(tmp_path / "bin/python3.13", "3.14.0")
    assert lanes.find((13, 12)).version == "3.13.10", "another version than its name says"


def test_a_missing_python_is_said_and_no_failure(
    lanes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(lanes.sys, "executable", str(tmp_path / "none"))
    fake_python(tmp_path / "bin/python3.11", "3.11.4")
    (found,) = lanes.asked([])
    assert (found.version, found.oldest) == ("3.11.4", True)
    said = capsys.readouterr().out
    assert "no python3.13 or python3.12 here that can make a virtual environment: that lane does not run" in said
    assert "no python3.11" not in said
    shutil.rmtree(tmp_path / "bin")
    assert lanes.main([]) == 1
    assert "lanes: nothing ran" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no Python that can make a virtual environment"):
        lanes.asked([str(tmp_path / "bin/python3.11")])


def test_stores_are_compared_file_by_file(lanes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = {name: tmp_path / name for name in ("old", "new")}
    for store in stores.values():
        (store / "a").mkdir(parents=True)
        (store / "a/c.0").write_bytes(b"1")
        (store / ".t.lock").write_text(store.name)
    assert lanes.equal(stores)
    assert "stores of old and new are equal to the byte: 1 files" in capsys.readouterr().out
    (tmp_path / "new/a/c.0").write_bytes(b"2")
    (tmp_path / "old/a/c.1").write_bytes(b"")
    assert not lanes.equal(stores)
    assert "stores of old and new differ in 2 of 2 files: a/c.0, a/c.1" in capsys.readouterr().out
    assert lanes.equal({"old": tmp_path / "old"}), "nothing to compare with"

"""What an installed copy holds, and what importing it costs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hdcache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
TOP = [folder for folder in FOLDERS.values() if "/" not in folder]
ROOMS = [folder for folder in TOP if folder != "hdcache"]
SLOW_TO_IMPORT = ("torch", "torchvision", "timm", "zarr", "zarrs", "faiss", "pydantic", "dask")


def python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in ``cwd``, without the settings that change where it looks for modules."""
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | env
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=settings, capture_output=True, text=True)


def modules() -> set[str]:
    """Every module the checkout has, as its path in the wheel."""
    return {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).glob("*.py")
    }


def test_package_list_equals_the_folders_with_python_files() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(FOLDERS), "packages and package-dir differ"
    found = {path.parent for folder in ("hdcache", *ROOMS) for path in (ROOT / folder).rglob("*.py")}
    listed = {ROOT / folder for folder in FOLDERS.values()}
    assert found == listed, "a folder missing from pyproject.toml is missing from the wheel"
    top = {path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")} - {"tests", "benchmarks", "build", "dist"}
    assert top == set(TOP), "a top-level package that pyproject.toml does not list"


@pytest.mark.parametrize("room", ROOMS)
def test_bare_room_name_is_refused_with_the_way_out(room: str) -> None:
    done = python("-c", f"import {room}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: this folder is the package hdcache.{room}, not a top-level module" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, built by the setuptools at hand: no network, no stale build folder."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in TOP:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    done = python("-c", build, cwd=copy)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    web = {f"hdcache/sharing/web/{path.name}" for path in (ROOT / "hdcache/sharing/web").iterdir()}
    assert names - info == modules() | web | {"hdcache/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules())
    code = f"import importlib; print([importlib.import_module(name).__file__ for name in {names}])"
    done = python("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout, "a module came from the checkout, not from the wheel"


def loaded(*arguments: str, cwd: Path) -> tuple[str, list[str]]:
    """What a command prints, and which of :data:`SLOW_TO_IMPORT` it has loaded."""
    code = f"""
import sys
from hdcache.cli import main
try:
    main({[*arguments]})
except SystemExit as leave:
    assert not leave.code, leave.code
print([name for name in {SLOW_TO_IMPORT} if name in sys.modules])
"""
    done = python("-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rstrip().rpartition("\n")
    return text, list(ast.literal_eval(last))


def test_help_loads_nothing_slow(tmp_path: Path) -> None:
    text, slow = loaded("--help", cwd=tmp_path)
    assert slow == []
    assert "Usage:" in text


@pytest.mark.parametrize("command", ["info", "verify"])
def test_looking_at_a_store_loads_no_network_and_no_array(command: str, sealed_store: Path, tmp_path: Path) -> None:
    assert loaded(command, str(sealed_store), cwd=tmp_path)[1] == ["pydantic"]


def test_recipes_are_listed_without_timm(tmp_path: Path) -> None:
    assert loaded("recipes", cwd=tmp_path)[1] == ["torch", "pydantic"]


def test_console_script_names_the_command_line() -> None:
    assert PROJECT["project"]["scripts"] == {"hdcache": "hdcache.cli:main"}


def test_every_public_name_resolves() -> None:
    assert len(hdcache.__all__) == len(set(hdcache.__all__)) > 0
    missing = [name for name in hdcache.__all__ if getattr(hdcache, name, None) is None]
    assert not missing


def test_version_agrees_with_pyproject() -> None:
    assert hdcache.__version__ == PROJECT["project"]["version"]

"""``verify`` and ``repair`` as commands: what they refuse before they look, and that there is always a result to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hdcache import cli
from hdcache.extract.run import extract

COMMON: dict[str, Any] = {"precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu"}
VALUES = "teachers/t/views/0/final/values/c.0.0.0"


class Left(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Left]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)

    def call(*arguments: object) -> Left:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Left(int(left.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """16 pictures; teacher ``t`` with a tap of fp16."""
    folder = tmp_path_factory.mktemp("commands")
    data = make_npz(folder / "data.npz", 16)
    extract(data, store=folder / "s", teachers=[f"t={tiny}"], taps=["final"], encoding="fp16", **COMMON)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "s", tmp_path / "s")


def damage(root: Path) -> None:
    path = root / VALUES
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--live", "3"], 2, "--live 3: the spread of fewer than 8 rows says nothing"),
        (["--live", "0"], 2, "--live 0: the spread of fewer than 8 rows"),
        (["--replay", "0"], 2, "0 rows are no sample; ask for at least 1"),
        (["--replay", "-1"], 2, "-1 rows are no sample"),
        (["--live", "8", "--min-cosine", "2"], 2, "min_cosine 2.0 must lie between -1 and 1"),
        (["--live", "8", "--device", "foo"], 2, "device 'foo' cannot be used here"),
        (["--live", "8", "--teacher", "zz"], 3, "no teacher 'zz' (teachers: t)"),
        (["--replay", "8", "--teacher", "zz"], 3, "no teacher 'zz' (teachers: t)"),
        (["--live", "8", "--data", "nosuch"], 3, "nosuch"),
        (["--replay", "8", "--data", "nosuch"], 3, "nosuch"),
        (["--live", "8", "--threads", "-2"], 2, "-2 is not in the range x>=1"),
        (["--replay", "8", "--threads", "0"], 2, "0 is not in the range x>=1"),
    ],
)
def test_verify_refuses_before_it_looks(
    words: list[str], code: int, message: str, root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was looked at")

    monkeypatch.setattr("hdcache.integrity.verify", looked)
    left = run("verify", root, *words)
    assert (left.code, left.out) == (code, "")
    assert message in left.err


def test_images_that_are_gone_are_missed_before_the_store_is_read(
    tmp_path: Path, tiny: str, make_folder: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_folder(tmp_path / "images", 16)
    extract(str(images), store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], **COMMON)
    images.rename(tmp_path / "moved")
    monkeypatch.setattr("hdcache.integrity.verify", None)
    left = run("verify", tmp_path / "s", "--replay", 8)
    assert left.code == 3
    assert "if the data set has moved, name it: --data DATA" in left.err


@pytest.mark.parametrize("threads", [0, -2])
def test_every_command_needs_a_thread(threads: int, root: Path, run: Run) -> None:
    """Without damage too: what is wrong is wrong before anything is known."""
    for words in (
        ["repair", root], ["extract", "--store", root, "--teacher", "t=x"], ["knn-eval", "x", "--train", "y"],
        ["export-store", root, "x"], ["distill", "tinymim-tiny", "--out", "x"],
    ):  # fmt: skip
        left = run(*words, "--threads", threads)
        assert left.code == 2, words
        assert f"{threads} is not in the range x>=1" in left.err


def test_names_that_are_no_folder(root: Path, run: Run) -> None:
    for command in ("verify", "repair", "gc"):
        left = run(command, "")
        assert left.code == 2, command
        assert "STORE is empty; name the folder of a store" in left.err
        left = run(command, "http://127.0.0.1:1/x")
        assert left.code == 2, command
        assert "get it first: hdcache pull http://127.0.0.1:1/x FOLDER" in left.err
    left = run("repair", root, "--from", "http://127.0.0.1:1/x")
    assert left.code == 2
    assert "hdcache pull http://127.0.0.1:1/x COPY" in left.err
    assert "--from is empty" in run("repair", root, "--from", "").err


def test_what_is_not_run_on_a_damaged_store_is_said(root: Path, run: Run) -> None:
    damage(root)
    left = run("verify", root, "--live", 8, "--replay", 8, "-q", "--device", "cpu")
    assert left.code == 5
    assert "--live: not run; mend what is damaged first" in left.out
    assert "--replay: not run; mend what is damaged first" in left.out
    assert f"{root}: 1 damaged object, listed above" in left.err
    left = run("verify", root, "--live", 8, "--json", "-q", "--device", "cpu")
    found = json.loads(left.out)
    assert (left.code, found["live"], found["good"]) == (5, None, False)
    assert "replay" not in found


def test_an_error_is_in_the_json_too(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was found before it, if anything was."""
    for words in (["verify", root, "--live", 8, "--teacher", "zz"], ["repair", root, "--teacher", "zz=x"]):
        left = run(*words, "--json", "-q")
        found = json.loads(left.out)
        assert (left.code, found["good"], found["exit_code"]) == (3, False, 3)
        assert "no teacher 'zz'" in found["error"]
        assert found["error"] in left.err
    (root / "teachers/t/about.json").unlink()
    left = run("verify", root, "--live", 8, "--json", "-q", "--device", "cpu")
    found = json.loads(left.out)
    assert (left.code, found["good"], found["faults"]) == (3, False, [])
    assert "--teacher t=MODEL" in found["error"]
    left = run("verify", root, "--live", 8, "-q", "--device", "cpu")
    assert left.code == 3
    assert "all good" in left.out


def test_weights_that_are_gone_are_asked_for(root: Path, run: Run, tiny: str) -> None:
    """A model that this version of timm has no more is no mistake of who checks; one that is named now is."""
    about = root / "teachers/t/about.json"
    about.write_text(about.read_text().replace("vit_tiny_patch16_224", "gone_vit_tiny_patch16_224"))
    left = run("verify", root, "--live", 8, "-q", "--device", "cpu")
    assert left.code == 3
    assert "unknown model 'gone_vit_tiny_patch16_224'" in left.err
    assert "if its weights have moved, name them: --teacher t=MODEL" in left.err
    left = run("verify", root, "--live", 8, "-q", "--device", "cpu", "--teacher", "t=gone_vit")
    assert left.code == 2
    assert "if its weights have moved" not in left.err
    left = run("verify", root, "--live", 8, "-q", "--device", "cpu", "--teacher", f"t={tiny}&seed=7")
    assert left.code == 5
    assert "name the original: --teacher t=MODEL" in left.err
    assert max(map(len, left.err.split())) < 200
    assert not any(len(word.strip("'.,;()")) == 64 for word in left.err.split())


def test_the_images_are_opened_once(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdcache.extract import checked_rows

    opened: list[object] = []
    store_dataset = checked_rows.store_dataset

    def counted(*given: Any, **more: Any) -> Any:
        opened.append(given)
        return store_dataset(*given, **more)

    monkeypatch.setattr(checked_rows, "store_dataset", counted)
    assert run("verify", root, "--live", 8, "--replay", 8, "-q", "--device", "cpu").code == 0
    assert len(opened) == 1

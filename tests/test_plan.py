"""What ``hdcache plan`` says is what ``hdcache extract`` then does, and planning leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdcache.cli import main
from hdcache.datasets import Subset, open_dataset
from hdcache.errors import InputNotFound, OutOfSpace, UsageError
from hdcache.extract import plan as planning
from hdcache.extract.plan import OTHERS, check_room, format_plan, plan
from hdcache.extract.run import extract
from hdcache.store import Store

FAST: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 2, "batch": 8}


@pytest.fixture
def data(tmp_path: Path, make_npz: Callable[..., str]) -> str:
    (tmp_path / "data").mkdir()
    return make_npz(tmp_path / "data" / "data.npz", 200)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBE_ROWS", 80)


def objects(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


@pytest.mark.parametrize("settings", [{}, {"encoding": "int8"}, {"encoding": "fp16"}, {"fidelity": 0.2}])
def test_bytes_and_objects_are_those_of_the_extraction(
    settings: dict[str, Any], data: str, tmp_path: Path, tiny: str
) -> None:
    """Bytes within a tenth; a quarter where so few rows are that headers count. Objects to a few."""
    arguments: dict[str, Any] = {
        "teachers": [f"t={tiny}"], "taps": ["block2.attn_in", "final", "pooled"], "num_views": 2,
        "rows_per_shard": 100, **FAST, **settings,
    }  # fmt: skip
    found = plan(data, store=tmp_path / "s", **arguments).teachers["t"]
    done = extract(data, store=tmp_path / "s", **arguments).teachers["t"]
    assert found.rows == done["rows"] == 400
    assert found.bytes == pytest.approx(done["bytes"], rel=0.25)
    views = [tmp_path / "s" / "teachers" / "t" / "views", tmp_path / "s" / "views"]
    assert found.objects == pytest.approx(sum(map(objects, views)), abs=14)
    assert found.taps.keys() == done["taps"].keys()
    for tap, facts in found.taps.items():
        assert facts["encoding"] == done["taps"][tap]["encoding"]


def test_other_encodings_are_named_with_their_bytes(data: str, tmp_path: Path, tiny: str) -> None:
    found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final", "pooled"], **FAST).teachers["t"]
    others = found.taps["final"]["others"]
    assert list(others) == [planning.named(*other) for other in OTHERS if other != ("klt", 0.05)]
    values = 200 * 17 * 48
    assert (others["fp32"], others["fp16"]) == (4 * values, 2 * values)
    assert others["klt 20 %"] < others["klt 10 %"] < found.taps["final"]["bytes"] < others["int8"] < others["fp16"]
    assert not found.taps["pooled"]["others"]


def test_nothing_is_left_and_the_store_is_not_touched(data: str, tmp_path: Path, tiny: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    plan(data, store=home / "new" / "s", teachers=[f"t={tiny}"], **FAST)
    assert list(home.iterdir()) == []
    extract(data, store=home / "s", teachers=[f"t={tiny}"], views="gentle", **FAST)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    # An existing store says where the data is and how views are drawn.
    found = plan(store=home / "s", teachers=[f"u={tiny}&seed=1"], **FAST)
    assert (found.samples, found.teachers["u"].rows) == (200, 200)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_the_probe_sees_the_first_rows_of_view_0(data: str) -> None:
    whole = open_dataset(data)
    part = planning._sample(whole, 0)
    assert isinstance(part, Subset)
    assert part.card.count == len(part.ids) == len(set(part.ids)) == 80
    assert part.card.fingerprint != whole.card.fingerprint
    places = [whole.ids.index(sample_id) for sample_id in part.ids]
    assert places == sorted(places)
    assert np.array_equal(part.labels, whole.labels[places])
    assert np.array_equal(part.read(part.ids[3]), whole.read(part.ids[3]))
    small = Subset(whole, whole.ids[:70])
    assert planning._sample(small, 0) is small


def test_what_does_not_fit_is_refused(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the plan is printed: the user wants to see what is too large."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}"], **FAST)
    assert not found.fits
    assert "do NOT fit: 10.0 KB are free there" in format_plan(found)
    with pytest.raises(OutOfSpace, match=r"/s: about .* are needed, 10\.0 KB are free; free space, store fewer taps"):
        check_room(found)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", data, "--store", str(tmp_path / "s"), "--teacher", f"t={tiny}", "--json", "--device=cpu"])
    printed = capsys.readouterr()
    assert stopped.value.code == 6
    assert json.loads(printed.out)["fits"] is False
    assert "are needed, 10.0 KB are free" in printed.err


def test_dry_run_is_plan(data: str, tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        data,
        "--store",
        str(tmp_path / "s"),
        "--teacher",
        f"t={tiny}",
        "--json",
        "--device=cpu",
        "--tap=final",
    ]
    found = []
    for command in (["plan"], ["extract", "--dry-run"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *arguments])
        assert stopped.value.code == 0
        found.append(json.loads(capsys.readouterr().out))
    for name in ("store", "samples", "num_views", "bytes"):
        assert found[0][name] == found[1][name]
    assert found[0]["teachers"]["t"]["taps"] == found[1]["teachers"]["t"]["taps"]
    assert not (tmp_path / "s").exists()


def test_a_teacher_that_is_cheaper_than_its_rows_never_pays(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, text in ((1e6, "the store never pays: train with --online"), (0.0, "the store pays after ")):
        monkeypatch.setattr(planning, "_read_seconds", lambda *_, seconds=seconds: seconds)
        found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], **FAST)
        assert (found.teachers["t"].pays_after is None) == (seconds > 0)
        assert text in format_plan(found)


def test_break_even_is_extraction_over_what_an_epoch_saves(data: str, tmp_path: Path, tiny: str) -> None:
    found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], num_views=3, **FAST).teachers["t"]
    assert found.rows == 600
    slow, fast = found.rows_per_second
    assert slow < fast
    assert found.seconds[0] < found.seconds[1]
    saved = found.forward_seconds_per_epoch - found.read_seconds_per_epoch
    if found.pays_after is not None and saved > 1:
        assert found.pays_after == pytest.approx(sum(found.seconds) / 2 / saved, rel=0.2)
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.01)
    assert found.bottleneck in found.shares


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_views": 0}, UsageError, "num_views 0 must be at least 1"),
        ({"taps": ["block9.out"]}, UsageError, "block9.out"),
        ({"data": None}, InputNotFound, r"no store there yet; name the data set too: 'hdcache plan DATA --store"),
        ({"data": "folder:/nowhere"}, InputNotFound, "no such directory"),
        ({"encoding": "fp7"}, UsageError, "unknown encoding 'fp7'"),
    ],
)
def test_what_extraction_refuses_planning_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str, data: str, tmp_path: Path, tiny: str
) -> None:
    given = {"data": data, "teachers": [f"t={tiny}"], **FAST, **arguments}
    with pytest.raises(error, match=message):
        plan(given.pop("data"), store=tmp_path / "s", **given)
    assert not list(tmp_path.glob(".hdcache-plan-*"))


def test_too_few_samples_say_so(tmp_path: Path, make_npz: Callable[..., str], tiny: str) -> None:
    few = make_npz(tmp_path / "few.npz", 1)
    with pytest.raises(UsageError, match=r"too few samples to plan for: .* run 'hdcache extract'"):
        plan(few, store=tmp_path / "s", teachers=[f"t={tiny}"], **FAST)


def test_every_object_is_counted(data: str, tmp_path: Path, tiny: str) -> None:
    """Several teachers: each is probed alone, and the store is of all."""
    found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}", f"u={tiny}&seed=1"], taps=["final"], **FAST)
    assert list(found.teachers) == ["t", "u"]
    assert found.bytes == sum(part.bytes for part in found.teachers.values())
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], **FAST)
    assert Store.open(tmp_path / "s").teachers() == ["t"]

"""What ``hdcache plan`` says is what ``hdcache extract`` then does, and planning leaves nothing behind."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hdcache.cli import main
from hdcache.errors import InputNotFound, OutOfSpace, StoreMismatch, UsageError
from hdcache.extract import capacity, trial
from hdcache.extract.pipeline import Timing
from hdcache.extract.plan import check_room, format_plan, plan, priced
from hdcache.extract.run import extract
from hdcache.extract.trial import OTHERS, Trial, named
from hdcache.store import Store

FAST: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 2, "batch": 8}


@pytest.fixture
def data(tmp_path: Path, make_npz: Callable[..., str]) -> str:
    (tmp_path / "data").mkdir()
    return make_npz(tmp_path / "data" / "data.npz", 200)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PROBE_ROWS", 80)


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
    found = plan(
        data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final", "pooled"], fidelity=0.05, **FAST
    ).teachers["t"]
    others = found.taps["final"]["others"]
    assert list(others) == [named(*other) for other in OTHERS if other != ("klt", 0.05)]
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


def test_what_does_not_fit_is_refused(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the plan is printed: the user wants to see what is too large."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
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
        monkeypatch.setattr(trial, "_read_seconds", lambda *_, seconds=seconds: seconds)
        found = plan(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], **FAST)
        assert (found.teachers["t"].pays_after is None) == (seconds > 0)
        assert text in format_plan(found)


def test_bytes_are_within_a_tenth_where_rows_are_many(tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    """Not the headers of files decide then, but what a row needs: measured on a fifth of the rows."""
    data = make_npz(tmp_path / "many.npz", 1500)
    arguments: dict[str, Any] = {
        "teachers": [f"t={tiny}"], "taps": ["block3.attn_in", "final"], "rows_per_shard": 256, **FAST, "batch": 32,
    }  # fmt: skip
    found = plan(data, store=tmp_path / "s", **arguments).teachers["t"]
    done = extract(data, store=tmp_path / "s", **arguments).teachers["t"]
    assert found.rows == done["rows"] == 1500
    assert found.bytes == pytest.approx(done["bytes"], rel=0.1)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Trial:
    """The record of a real teacher, and seconds that are made up: 64 rows in 8, a fifth of it the teacher's."""
    root = tmp_path_factory.mktemp("tried")
    extract(make_npz(root / "d.npz", 64), store=root / "s", teachers=[f"t={tiny}"], taps=["final"], **FAST)
    timing = Timing(forward=1.6, waiting_for_images=6.0, encode=0.4)
    return Trial(Store.open(root / "s").teacher("t"), 30.0, (8.0, 12.0), 64, timing, 0.32, {"final": {"fp16": 100.0}})


def test_hours_and_break_even_follow_from_what_was_measured(tried: Trial) -> None:
    """3 views of 200 samples, 8 to 12 rows/s; an epoch of 200 costs the teacher 5 s and reading 1 s."""
    found = priced(tried, 600, 200, 64)
    assert found.seconds == (30 + 600 / 12, 30 + 600 / 8)
    assert (found.forward_seconds_per_epoch, found.read_seconds_per_epoch) == (5.0, 1.0)
    assert found.pays_after == (30 + 600 / 10) / (5 - 1)
    assert found.shares == {"reading and decoding": 0.75, "teacher forward": 0.2, "encoding": 0.05, "writing": 0.0}
    assert found.bottleneck == "reading and decoding"
    card = tried.record.taps["final"]
    assert found.bytes == found.taps["final"]["bytes"] == round(600 * card.bytes_per_row)
    assert found.taps["final"]["others"] == {"fp16": 60_000}
    # Shards of three views, four each, of codes, prefix and pixel digests; the metadata of each view.
    assert found.objects == 3 * 4 * (len(card.arrays) + 5) + 3 * (len(card.arrays) + 9)
    resumed = priced(tried, 100, 200, 64, calibrated=tried.record)
    assert resumed.seconds == (round(100 / 12, 1), 100 / 8), "a teacher that is there is not calibrated again"
    assert resumed.pays_after == 100 / 10 / (5 - 1)


def test_what_the_store_holds_costs_nothing(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"teachers": [f"t={tiny}"], "taps": ["final"], **FAST}
    extract(data, store=tmp_path / "s", rows_per_shard=40, **arguments)
    store = Store.open(tmp_path / "s")
    for number in (1, 3):
        (tmp_path / f"s/teachers/t/views/0/receipts/{number}.json").unlink()
    size = store.card.rows_per_shard
    found = plan(None, store=tmp_path / "s", num_views=2, rows_per_shard=100, **arguments).teachers["t"]
    assert found.rows == 2 * size + 200, "the second view, and what of the first is gone"
    assert found.bytes == round(found.rows * store.teacher("t").taps["final"].bytes_per_row)
    shards = -(-200 // size)
    arrays = len(store.teacher("t").taps["final"].arrays) + 1
    assert found.objects == pytest.approx((2 + shards) * (arrays + 4) + 2 * (arrays + 8), abs=arrays + 4)
    extract(data, store=tmp_path / "s", **arguments)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda _: usage._replace(free=10))
    done = plan(None, store=tmp_path / "s", **arguments)
    check_room(done)
    assert (done.bytes, done.teachers["t"].seconds) == (0, (0.0, 0.0))
    assert "  t: every row is in the store" in format_plan(done)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fidelity": 0.2}, r"teacher 't' in .* was made with other settings \(requests\[0\]\.fidelity"),
        ({"teachers": ["t=random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3&seed=4"]}, "card.weights"),
        ({"views": "gentle"}, r"views\.scale\[0\]: the store has 0\.2, asked was 0\.6"),
        ({"pixels": 16}, "its teachers have seen whole images"),
    ],
)  # fmt: skip
def test_what_the_store_refuses_planning_refuses(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    data = make_npz(tmp_path / "d.npz", 40)
    arguments: dict[str, Any] = {"store": tmp_path / "s", "teachers": [f"t={tiny}"], "taps": ["final"], **FAST}
    extract(data, **arguments)
    for command in (plan, extract):
        with pytest.raises(StoreMismatch, match=message):
            command(data, **arguments | changes)


def test_the_disk_of_a_folder_that_is_there_is_its_own(
    data: str, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder may be where another disk is mounted."""
    asked: list[Path] = []
    usage = collections.namedtuple("usage", "total used free")

    def noted(path: Path) -> Any:
        asked.append(path)
        return usage(10**12, 0, 10**12)

    monkeypatch.setattr(capacity.shutil, "disk_usage", noted)
    (tmp_path / "mounted").mkdir()
    for store in ("mounted", "none/there/yet"):
        plan(data, store=tmp_path / store, teachers=[f"t={tiny}"], taps=["final"], **FAST)
    assert asked == [tmp_path / "mounted", tmp_path]


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

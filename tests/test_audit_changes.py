"""``verify --live`` where the teacher itself gives other values now: found under every encoding, and rounding is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hdcache import cli, views
from hdcache.extract import audit as module
from hdcache.extract.audit import audit, format_audit
from hdcache.extract.run import extract
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher

PATCHES = {("t", "block3.attn_in"), ("t", "final"), ("t", "pooled"), ("x", "final"), ("b", "final")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """40 pictures; ``t``: klt and a vector, two views; ``x``: fp32; ``b``: bf16."""
    folder = tmp_path_factory.mktemp("changed")
    data = make_npz(folder / "data.npz", 40)
    common: dict[str, Any] = {"precision": "fp32", "rows_per_shard": 8, "batch": 8, "threads": 2, "device": "cpu"}
    common["store"] = folder / "s"
    extract(data, teachers=[f"t={tiny}"], taps=["block3.attn_in", "final", "pooled"], num_views=2, **common)
    for name, encoding in (("x", "fp32"), ("b", "bf16")):
        extract(data, teachers=[f"{name}={tiny}"], taps=["final"], encoding=encoding, **common)
    return folder / "s"


def look(root: Path, rows: int, **settings: Any) -> dict[str, Any]:
    return audit(Store.open(root), rows, device="cpu", threads=2, **settings)


def otherwise(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A teacher that gives other values now."""
    forward = Teacher.forward

    def other(self: Teacher, *given: Any) -> dict[str, Tokens | torch.Tensor]:
        return {
            tap: Tokens(change(value.prefix), change(value.patches)) if isinstance(value, Tokens) else change(value)
            for tap, value in forward(self, *given).items()
        }

    monkeypatch.setattr(Teacher, "forward", other)


def test_a_teacher_whose_values_grew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hundredth, under every encoding that keeps a scale: klt's own error is ten times that, bf16's a fifth."""
    otherwise(monkeypatch, lambda value: value * 1.01)
    found = look(root, 24)
    grown = {
        (name, tap): seen["scale"]["factor"]
        for name, facts in found["teachers"].items()
        for tap, seen in facts["taps"].items()
        if not seen["good"]
    }
    assert grown.keys() >= PATCHES
    assert all(abs(grown[place] - 1.01) < 0.002 for place in PATCHES)
    said = [fault for fault in found["faults"] if "% larger than those stored" in fault]
    assert len(said) == len(found["faults"]) >= len(PATCHES)
    assert "% of codes equal" in "\n".join(format_audit(found))


def test_images_that_are_resized_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another filter: far less than another image, and less than klt's certificate lets pass."""
    monkeypatch.setitem(views._FILTERS, "bicubic", Image.Resampling.BILINEAR)
    found = look(root, 24)
    wrong = {
        name for name, facts in found["teachers"].items() if any(not seen["good"] for seen in facts["taps"].values())
    }
    assert wrong == {"t", "x", "b"}
    klt = found["teachers"]["t"]["taps"]["block3.attn_in"]
    assert not klt["good"]
    assert klt["relative_error"]["all"] < klt["limits"]["relative_error"]


@pytest.mark.parametrize(("cores", "batch"), [(2, 8), (1, 5), (2, 32)])
def test_no_alarm_for_other_threads_and_batches(
    cores: int, batch: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order, and rounding as other hardware's: all rows good whatever the seed, and it says how equal."""
    load = module.live_teacher

    def other(*given: Any) -> Teacher:
        return replace(load(*given), batch=batch)

    monkeypatch.setattr(module, "live_teacher", other)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        for seed in range(3):
            found = look(root, 8 * (1 + seed % 3), seed=seed)
            assert found["faults"] == []
            assert found["teachers"]["t"]["taps"]["final"]["codes"]["equal"] > 0.99
    finally:
        torch.set_num_threads(before)


def test_no_alarm_for_rounding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 sums on other hardware, ten times over and more: few klt codes change, most fp32 ones do."""
    generator = torch.Generator().manual_seed(0)
    otherwise(monkeypatch, lambda value: value * (1 + 2e-4 * torch.randn(value.shape, generator=generator)))
    equal = []
    for seed in range(3):
        found = look(root, 8, seed=seed)
        assert found["faults"] == []
        assert found["teachers"]["x"]["taps"]["final"]["codes"]["equal"] < 0.1
        equal.append(found["teachers"]["t"]["taps"]["block3.attn_in"]["codes"]["equal"])
    assert min(equal) > 0.99
    assert min(equal) < 1


def test_a_bound_on_cosines_leaves_the_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    otherwise(monkeypatch, lambda value: value * 1.01)
    for cosine in (-1.0, 0.9):
        found = look(root, 8, min_cosine=cosine, teachers=["x"])
        assert "% larger than those stored" in found["faults"][0]
        assert "the birth certificate says" not in found["faults"][0]


def test_the_command_leaves_with_5(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    otherwise(monkeypatch, lambda value: value * 0.99)
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", str(root), "--live", "16", "-q", "--device", "cpu", "--min-cosine", "0.5"])
    captured = capsys.readouterr()
    assert left.value.code == 5
    assert "% smaller than those stored (" in captured.err
    assert (
        "teacher x, tap final: all values that the teacher gives now are 1 % smaller than those stored" in captured.out
    )
    assert "of codes equal" in captured.out


def test_a_shard_that_was_computed_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch in five with other pixels: its rows are named, and not called a change of the machine."""
    forward, calls = Teacher.forward, iter(range(100))

    def other(self: Teacher, pixels: torch.Tensor, *given: Any) -> dict[str, Tokens | torch.Tensor]:
        return forward(self, pixels.roll(1, -1) if next(calls) == 1 else pixels, *given)

    monkeypatch.setattr(Teacher, "forward", other)
    found = look(root, 40, teachers=["x"])
    assert "(8 of 40 rows have more); these rows were exchanged or damaged" in found["faults"][0]

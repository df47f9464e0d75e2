"""What two machines must have in common: versions, and the features of a fixed batch up to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdcache.errors import StoreMismatch
from hdcache.extract.machines import (
    KEPT,
    TOLERANCE,
    Fingerprint,
    check_difference,
    check_versions,
    difference,
    fingerprint,
    versions,
)
from hdcache.teachers import Teacher, load_teacher

TAPS = ["block3.attn_in", "final", "pooled"]


@pytest.fixture(scope="module")
def teacher(tiny: str) -> Teacher:
    return load_teacher(f"t={tiny}", precision="fp32", batch=8)


def test_the_same_network_has_the_same_fingerprint(teacher: Teacher, tiny: str) -> None:
    first = fingerprint(teacher, TAPS)
    assert first == fingerprint(load_teacher(f"t={tiny}", precision="fp32", batch=8), TAPS[::-1])
    assert {tap: len(values) for tap, values in first.values.items()} == dict.fromkeys(TAPS, KEPT)
    assert difference(first, first) == 0.0
    assert Fingerprint.model_validate(first.model_dump(mode="json")) == first
    assert len(first.canonical()) < 2000


def test_threads_of_torch_do_not_show(teacher: Teacher) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fingerprint(teacher, TAPS))
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_another_network_is_far_away(teacher: Teacher, tiny: str) -> None:
    other = fingerprint(load_teacher(f"t={tiny}&seed=1", precision="fp32", batch=8), TAPS)
    assert difference(other, fingerprint(teacher, TAPS)) > max(TOLERANCE.values())


def test_last_bits_are_told_from_equal_ones(teacher: Teacher) -> None:
    class Rounded(Teacher):
        def forward(self, *given: Any, **more: Any) -> Any:
            found = super().forward(*given, **more)
            found["pooled"] = found["pooled"] * (1 + 1e-6)
            return found

    one = fingerprint(teacher, TAPS)
    other = fingerprint(Rounded(**{name: getattr(teacher, name) for name in Teacher.__dataclass_fields__}), TAPS)
    assert 0 < difference(other, one) < 1e-5
    check_difference(difference(other, one), "fp32", "node")


def test_a_masked_teacher_has_a_fingerprint(tiny: str) -> None:
    masked = load_teacher(f"t={tiny}", precision="fp32", batch=8, mask="random:0.5")
    whole = replace(masked, card=masked.card.model_copy(update={"mask": None}))
    assert difference(fingerprint(masked, ["pooled"]), fingerprint(whole, ["pooled"])) > TOLERANCE["fp32"]


@given(st.floats(0, 1))
def test_only_rounding_is_let_through(found: float) -> None:
    for precision, limit in TOLERANCE.items():
        if found <= limit:
            check_difference(found, precision, "node")
        else:
            with pytest.raises(StoreMismatch, match=rf"node: the teacher gives other features there .* in {precision}"):
                check_difference(found, precision, "node")


def test_nan_is_no_rounding() -> None:
    with pytest.raises(StoreMismatch, match="that is no rounding: check the device with 'hdcache doctor'"):
        check_difference(float("nan"), "bf16", "node")


def test_versions_must_be_equal() -> None:
    here = versions("folder")
    assert {"hdcache", "torch", "timm", "pillow", "numcodecs"} <= here.keys()
    assert "av" not in here
    assert "av" in versions("video")
    check_versions(here, here, "the worker")
    for name in here:
        with pytest.raises(
            StoreMismatch, match=rf"the worker has {name} 0, this command {here[name]}.*install {name} "
        ):
            check_versions(here, {**here, name: "0"}, "the worker")
    with pytest.raises(StoreMismatch, match="the worker has hdcache none, this command"):
        check_versions({"hdcache": here["hdcache"]}, {}, "the worker")

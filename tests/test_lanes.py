"""Batches on their way to stored arrays: the same with any number of lanes, and no value that is not finite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdcache.encodings import Encoder, fit, request
from hdcache.errors import UsageError
from hdcache.extract import lanes as module
from hdcache.extract.lanes import Encoded, Lanes, blank_rows, finite_rows, lanes_for
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, load_teacher

KINDS = {"block1.out": "klt", "block2.attn_in": "int8", "block2.rel.qk": "sqrt8", "final": "fp16", "pooled": "bf16"}


@pytest.fixture
def teacher(tiny: str) -> Teacher:
    return load_teacher(f"t={tiny}", precision="fp32", batch=8)


@pytest.fixture
def pixels() -> list[np.ndarray]:
    found = np.random.default_rng(0).integers(0, 256, (32, 3, 32, 32), dtype=np.uint8)
    return list(found)


@pytest.fixture
def encoders(teacher: Teacher, pixels: list[np.ndarray]) -> dict[str, Encoder]:
    features = teacher.forward(torch.from_numpy(np.stack(pixels)), list(KINDS))
    return {tap: fit(request(tap, kind, None), features[tap], features[tap]) for tap, kind in KINDS.items()}


def run(teacher: Teacher, encoders: dict[str, Encoder], rows: list[Any], lanes: int) -> list[Encoded]:
    spans = [slice(start, start + teacher.batch) for start in range(0, len(rows), teacher.batch)]
    with Lanes(teacher, lanes) as found, ThreadPoolExecutor(lanes, initializer=found.begin) as pool:
        return list(pool.map(lambda span: found.run(rows[span], [""] * len(rows[span]), 0, encoders), spans))


def arrays(found: list[Encoded]) -> list[tuple[str, str, bytes]]:
    return [
        (tap, name, part.tobytes())
        for batch in found
        for tap, parts in batch.parts.items()
        for name, part in parts.items()
    ]


def broken(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, value: float, row: int) -> None:
    """The teacher gives ``value`` at one place of ``final`` in a row of each batch."""
    forward = Teacher.forward

    def given(self: Teacher, *args: Any) -> dict[str, Tokens | Tensor]:
        found = forward(self, *args)
        patches = found["final"].patches.clone()
        patches[row, :2, 0] = value
        return found | {"final": Tokens(found["final"].prefix, patches)}

    monkeypatch.setattr(Teacher, "forward", given)


def test_arrays_are_those_of_the_encoders(teacher: Teacher, encoders: dict[str, Encoder], pixels: list[Any]) -> None:
    found = run(teacher, encoders, pixels[:8], 1)[0]
    features = teacher.forward(torch.from_numpy(np.stack(pixels[:8])), list(encoders))
    for tap, encoder in encoders.items():
        expected, _ = encoder.encode(features[tap])
        assert found.parts[tap].keys() == expected.keys() == encoder.card.arrays.keys()
        for name, part in expected.items():
            assert found.parts[tap][name].dtype == part.dtype == encoder.card.arrays[name].dtype
            assert np.array_equal(found.parts[tap][name], part)
    assert (found.bad, found.mask) == ([], None)
    assert found.forward > 0
    assert found.encode > 0


def test_lanes_change_nothing(
    teacher: Teacher, encoders: dict[str, Encoder], pixels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*pixels[:11], None, *pixels[12:]]
    one = run(teacher, encoders, rows, 1)
    for lanes in (2, 4):
        assert arrays(run(teacher, encoders, rows, lanes)) == arrays(one)


def test_a_lane_has_its_share_of_the_threads_and_leaves_none_behind(teacher: Teacher) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with Lanes(teacher, 2) as lanes, ThreadPoolExecutor(2, initializer=lanes.begin) as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2}
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 4
        assert lanes_for(teacher, ["klt", "fp16"]) == 4
        assert lanes_for(teacher, ["klt", "fp32"]) == 1, "what --online computes, to the bit"
        assert lanes_for(replace(teacher, device=torch.device("cuda")), ["fp32"]) == 2
        assert lanes_for(replace(teacher, device=torch.device("mps")), ["klt"]) == 1
        torch.set_num_threads(16)
        assert lanes_for(teacher, ["klt"]) == module.MOST_LANES
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_those_of_zeros(
    value: float, teacher: Teacher, encoders: dict[str, Encoder], pixels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [None, *pixels[1:8]]
    whole = run(teacher, encoders, rows, 1)[0]
    assert whole.bad == []
    broken(teacher, monkeypatch, value, 3)
    found = run(teacher, encoders, rows, 1)[0]
    assert found.bad == [3]
    assert found.clipped == 0
    for tap, parts in found.parts.items():
        for name, part in parts.items():
            others = [0, 1, 2, 4, 5, 6, 7]
            assert np.array_equal(part[others], whole.parts[tap][name][others])
            assert np.array_equal(part[3], part[0]), "row 0 could not be read"


def test_large_numbers_are_finite_even_where_their_sum_is_not(
    teacher: Teacher, encoders: dict[str, Encoder], pixels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(teacher, monkeypatch, 3e38, 2)
    found = run(teacher, encoders, pixels[:8], 1)[0]
    assert found.bad == []
    assert found.clipped == 2  # fp16 ends at 65504


def test_a_row_is_finite_if_all_its_values_are() -> None:
    tokens = Tokens(torch.zeros(4, 1, 3), torch.zeros(4, 2, 3))
    tokens.prefix[1, 0, 2] = torch.inf
    tokens.patches[2, 1, 0] = torch.nan
    vector = torch.zeros(4, 5)
    vector[3, 0] = -torch.inf
    assert finite_rows({"a": tokens, "b": vector}).tolist() == [True, False, False, False]
    assert finite_rows({"b": vector}).tolist() == [True, True, True, False]


def test_blanked_rows_are_zeros_and_the_rest_is_kept() -> None:
    tokens = Tokens(torch.ones(3, 1, 2), torch.ones(3, 4, 2))
    found = blank_rows(tokens, [1])
    assert isinstance(found, Tokens)
    assert found.patches.sum((1, 2)).tolist() == [8, 0, 8]
    assert found.prefix.sum((1, 2)).tolist() == [2, 0, 2]
    assert tokens.patches.min() == 1
    assert blank_rows(tokens, []) is tokens


def test_encoding_that_does_not_fit_on_the_device_names_the_batch(
    teacher: Teacher, encoders: dict[str, Encoder], pixels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Encoder, "stored", full)
    with pytest.raises(
        UsageError, match="too little memory for 8 images at a time; give --batch a number lower than 8"
    ):
        run(teacher, encoders, pixels[:8], 1)


@pytest.mark.gpu
def test_a_gpu_gives_what_its_encoders_give(tiny: str, encoders: dict[str, Encoder], pixels: list[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    teacher = load_teacher(f"t={tiny}", precision="fp32", batch=8, device="cuda")
    rows = [*pixels[:11], None, *pixels[12:]]
    one = run(teacher, encoders, rows, 1)
    for _ in range(5):
        assert arrays(run(teacher, encoders, rows, 2)) == arrays(one)
    features = teacher.forward(torch.from_numpy(np.stack(pixels[16:24])), list(encoders))
    for tap, encoder in encoders.items():
        for name, part in encoder.encode(features[tap])[0].items():
            assert np.array_equal(one[2].parts[tap][name], part)

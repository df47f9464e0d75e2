"""Memory that is used again, and never while something still refers to it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdcache.host_memory import HostMemory


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "float16", "float32", "int64"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (7,), (2, 3, 5)])
def test_shapes_and_types_are_those_asked_for(dtype: str, shape: tuple[int, ...]) -> None:
    found = HostMemory().empty(shape, dtype)
    assert found.shape == shape
    assert found.dtype == getattr(torch, dtype)
    assert found.is_contiguous()


def test_memory_is_used_again_once_it_is_free() -> None:
    memory = HostMemory()
    first = memory.empty((100,), "uint8")
    place = first.data_ptr()
    other = memory.empty((100,), "uint8")
    assert other.data_ptr() != place
    del first
    again = memory.empty((25,), "float32")
    assert again.data_ptr() == place


def test_a_view_keeps_its_memory() -> None:
    """Slices, reshaped and retyped views, and NumPy's: none of them sees another batch."""
    memory = HostMemory()
    views: list[Callable[[Tensor], Tensor]] = [
        lambda value: value[3:5],
        lambda value: value.reshape(2, 50).T,
        lambda value: value.view(torch.int8)[10:],
        lambda value: torch.from_numpy(value.numpy()[::2]),
        lambda value: value.detach(),
    ]
    for view in views:
        kept = view(memory.empty((100,), "uint8"))
        before = kept.clone()
        gc.collect()
        for _ in range(3):
            memory.empty((100,), "uint8").fill_(77)
        assert torch.equal(kept, before)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_what_is_held_is_never_given_out_again(steps: list[tuple[int, bool]]) -> None:
    memory, held = HostMemory(), list[Tensor]()
    for value, keep in steps:
        fresh = memory.empty((16,), "uint8")
        assert fresh.data_ptr() not in {tensor.data_ptr() for tensor in held}
        fresh.fill_(value)
        if keep:
            held.append(fresh)
        elif held:
            held.pop()


def test_no_more_than_the_limit_waits_to_be_used_again() -> None:
    """Whatever a consumer held at once, and in however many sizes."""
    memory = HostMemory(limit=1000)
    held = [memory.empty((100,), "uint8") for _ in range(50)]
    held.clear()
    assert 0 < waiting(memory) <= 1000
    for size in range(1, 200):
        memory.empty((size,), "uint8")
        assert waiting(memory) <= 1000
    memory.empty((5000,), "uint8")
    assert waiting(memory) <= 1000
    place = memory.empty((64,), "uint8").data_ptr()
    assert memory.empty((64,), "uint8").data_ptr() == place, "sizes that nobody asks for make way"


def waiting(memory: HostMemory) -> int:
    found = sum(piece.nbytes for pieces in memory._free.values() for piece in pieces)
    assert found == memory._waiting
    return found


def test_threads_share_it() -> None:
    memory = HostMemory(limit=4096)

    def work(number: int) -> bool:
        mine = [memory.empty((256,), "uint8").fill_(number % 251) for _ in range(4)]
        return all(bool((one == number % 251).all()) for one in mine)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(2000)))
    assert waiting(memory) <= 4096


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_memory_is_not_used_again_while_it_is_copied() -> None:
    memory, stream = HostMemory(pinned=True), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's constructor has no types
    found = []
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for number in range(20):
            batch = memory.empty((1 << 20,), "uint8").fill_(number)
            assert batch.is_pinned()
            found.append(batch.to("cuda", non_blocking=True))
            del batch
    torch.cuda.synchronize()
    assert [set(value.unique().tolist()) for value in found] == [{number} for number in range(20)]

"""Stored integers back to tokens: the same a block at a time as all at once, on the way that the encoding went."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hdcache import klt_decoding
from hdcache.klt import dct_matrix, integers, over_grid
from hdcache.klt_decoding import JOINED, Blocks, by_token, joined, off_grid, positions, unfold


def drawn(*shape: int, seed: int = 0, spread: float = 40.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(spread).round().clamp(-127, 127)


def folded(z: Tensor, dtype: str) -> Tensor:
    return torch.from_numpy(integers(z, dtype))


@given(grid=st.lists(st.integers(1, 30), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_it_comes_back_in_fewer_products(grid: list[int], seed: int) -> None:
    """Joined or not, the matrices lead back; neighbouring axes are joined as long as the product is not large."""
    z = torch.randn(1, 2, math.prod(grid), generator=torch.Generator().manual_seed(seed))
    back = positions(tuple(grid))
    found = over_grid(over_grid(z, [dct_matrix(side) for side in grid]), back)
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    sizes = [len(matrix) for matrix in back]
    assert math.prod(sizes) == math.prod(grid)
    assert all(one * other > JOINED for one, other in itertools.pairwise(sizes))


@given(grid=st.lists(st.integers(1, 30), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_frequencies_become_tokens(grid: list[int], seed: int) -> None:
    """In token-major order, by one product or by several."""
    tokens = torch.randn(2, math.prod(grid), 3, generator=torch.Generator().manual_seed(seed))
    z = over_grid(tokens.transpose(1, 2), [dct_matrix(side) for side in grid])
    torch.testing.assert_close(off_grid(z, positions(tuple(grid))), tokens, rtol=1e-4, atol=1e-4)


def test_parts_lie_side_by_side() -> None:
    parts = [drawn(2, 3, 4).to(torch.int16), drawn(2, 5, 4, seed=1).to(torch.int8)]
    expected = torch.cat([part.float() for part in parts], dim=1)
    assert torch.equal(joined(parts, torch.float32), expected)
    assert torch.equal(by_token(parts, torch.float32), expected.transpose(1, 2))
    assert by_token(parts, torch.bfloat16).is_contiguous()


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 50])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_unfolding_goes_piece_by_piece(count: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(klt_decoding, "UNFOLDED", 7)
    z = torch.arange(count).float() - count // 2
    stored = folded(z, dtype)
    assert torch.equal(klt_decoding.unfold(stored).float(), z)
    apart = torch.stack([stored, stored], dim=1)[:, 0]
    assert torch.equal(klt_decoding.unfold(apart).float(), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [None, (3, 4), (30, 20)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_blocks_are_all_rows_in_order(
    grid: tuple[int, ...] | None, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows fit into one, and as often as one goes over them; one block at least, for its shape."""
    tokens = math.prod(grid or (12,))
    z = drawn(rows, 5, tokens)
    stored = [folded(z[:, :2] * 3, "uint16"), folded(z[:, 2:], "uint8")]
    back = [matrix.to(dtype) for matrix in positions(grid or ())]
    plain = torch.cat([z[:, :2] * 3, z[:, 2:]], dim=1)
    if grid is not None:
        plain = over_grid(plain, [dct_matrix(side).T for side in grid])
    for values in (1, 5 * tokens * 3, 1 << 30):
        monkeypatch.setattr(klt_decoding, "BLOCK_VALUES", values)
        blocks = Blocks(stored, back, dtype)
        for _ in range(2):
            found = list(blocks)
            size = max(1, values // (5 * tokens))
            assert [len(block) for block in found] == [min(size, rows - n) for n in range(0, max(1, rows), size)]
            assert {block.dtype for block in found} == {dtype}
            whole = torch.cat(found).float()
            tolerance = 1e-3 if dtype == torch.float32 else 4.0
            torch.testing.assert_close(whole, plain.transpose(1, 2), rtol=1e-2, atol=tolerance)
    alone = [next(iter(Blocks([part[n : n + 1] for part in stored], back, dtype))) for n in range(rows)]
    torch.testing.assert_close(torch.cat([whole[:0], *(one.float() for one in alone)]), whole, rtol=1e-2, atol=1e-3)


def test_what_is_signed_stays() -> None:
    signed = torch.tensor([-3, 0, 5], dtype=torch.int8)
    assert unfold(signed) is signed
    assert unfold(torch.from_numpy(np.array([0, 1, 2], np.uint16))).dtype == torch.int16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_a_gpu_makes_the_same_tokens(grid: tuple[int, ...] | None) -> None:
    """Integers to the bit, through another way of unfolding; products up to rounding; all rows in one block."""
    stored = [folded(drawn(40, 2, 12, spread=9000), "uint16"), folded(drawn(40, 3, 12, seed=1), "uint8")]
    for part in stored:
        assert torch.equal(unfold(part.cuda()).cpu(), unfold(part))
    expected = torch.cat(list(Blocks(stored, positions(grid or ()), torch.float32)))
    back = [matrix.cuda() for matrix in positions(grid or ())]
    (found,) = Blocks([part.cuda() for part in stored], back, torch.float32)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-1)

"""Stored klt integers back to patch tokens, short of the affine map that ends it: unfolded, side by side, off the grid.

On a CPU some tens of rows at a time go all the way, whatever the batch: what lies between the steps is larger than
what comes out. Fewer rows would stay in a core's cache, but each matrix product starts with a fixed cost.

Legend: R rows, N patch tokens, K kept components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hdcache.klt import dct_matrix, over_grid

JOINED = 512
"""Tokens up to which the axes of a grid are transformed back in one product: it grows with their square."""
BLOCK_VALUES = 1 << 23
"""Values that a CPU decodes together."""
UNFOLDED = 1 << 16
"""Values that it unfolds together: each of the four steps is then over memory that the one before left in the cache."""


class Blocks:
    """Patch tokens before the map, [r, N, K] each, all rows in order; each time that one goes over it, made anew.

    ``stored`` are integers [R, k, N] each, whose k add up to K; ``back`` is what :func:`positions` made, on their device
    and of ``dtype``; none where there is no DCT.
    """

    def __init__(self, stored: Sequence[Tensor], back: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.stored, self.back, self.dtype = stored, back, dtype

    def __iter__(self) -> Iterator[Tensor]:
        rows = len(self.stored[0])
        values = sum(part[:1].numel() for part in self.stored)
        size = max(1, BLOCK_VALUES // max(1, values) if self.stored[0].device.type == "cpu" else rows)
        for start in range(0, max(1, rows), size):
            whole = [unfold(part[start : start + size]) for part in self.stored]
            yield off_grid(joined(whole, self.dtype), self.back) if self.back else by_token(whole, self.dtype)


def unfold(stored: Tensor) -> Tensor:
    """The inverse of :func:`integers`, of any shape: int8 of uint8, int16 of uint16; what is signed already stays."""
    if stored.dtype not in (torch.uint8, torch.uint16):
        return stored
    signed = torch.int8 if stored.dtype == torch.uint8 else torch.int16
    if stored.device.type == "cpu":
        # NumPy goes over the bytes twice as fast as torch, which has no shifts of uint16 at all.
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        folded, out = stored.numpy().reshape(-1), whole.numpy().reshape(-1)
        signs = np.empty(min(UNFOLDED, len(out)), out.dtype)
        for start in range(0, len(out), UNFOLDED):
            part, into = folded[start : start + UNFOLDED], out[start : start + UNFOLDED]
            sign = signs[: len(into)]
            np.bitwise_and(part, 1, out=sign)
            np.negative(sign, out=sign)
            np.right_shift(part, 1, out=into)
            np.bitwise_xor(into, sign, out=into)
        return whole.view(signed)
    # Shifting the signed number drags its sign along; the mask drops it.
    number = stored.view(signed)
    return ((number >> 1) & torch.iinfo(signed).max) ^ -(number & 1)


def positions(grid: tuple[int, ...]) -> list[Tensor]:
    """Matrices for :func:`over_grid` that undo its DCT over a token grid, float32, as few as are not too large.

    One product with a matrix over two axes is many times faster than two that each move an axis to the end and back.
    """
    found: list[Tensor] = []
    for n in reversed(grid):
        back = dct_matrix(n).T.contiguous()
        if found and n * len(found[0]) <= JOINED:
            back = torch.kron(back, found.pop(0))
        found.insert(0, back)
    return found


def off_grid(z: Tensor, back: Sequence[Tensor]) -> Tensor:
    """Frequencies [R, K, N] to tokens [R, N, K] by the matrices of :func:`positions`."""
    if len(back) > 1:
        return over_grid(z, back).transpose(1, 2).contiguous()
    # The product itself turns columns into tokens: copying them there later costs more.
    return torch.bmm(back[0].expand(len(z), -1, -1), z.transpose(1, 2))


def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Integers [R, k, N] each, one after the other in ``dtype`` [R, K, N]: converted and put in place in one go."""
    rows, tokens = parts[0].shape[0], parts[0].shape[2]
    found = torch.empty(rows, sum(part.shape[1] for part in parts), tokens, dtype=dtype, device=parts[0].device)
    start = 0
    for part in parts:
        found[:, start : start + part.shape[1]].copy_(part)
        start += part.shape[1]
    return found


def by_token(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As :func:`joined`, but [R, N, K]: matrix products of half precision are slow on numbers that lie transposed."""
    rows, tokens = parts[0].shape[0], parts[0].shape[2]
    found = torch.empty(rows, tokens, sum(part.shape[1] for part in parts), dtype=dtype, device=parts[0].device)
    start = 0
    for part in parts:
        found[..., start : start + part.shape[1]].copy_(part.transpose(1, 2))
        start += part.shape[1]
    return found

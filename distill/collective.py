"""Tensors of all processes that train together, with gradients, on any device and backend.

DistributedDataParallel averages the gradients of the ranks' losses. For that to be the gradient of the mean loss,
what a rank's tensor did to the other ranks' losses has to come back to it: the gradient of a gathered tensor is
summed over all ranks. A lone process gathers nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    """[...] of every rank -> [W, ...]; backwards, the sum over ranks of what each did with this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, x)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def world_size() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """``x``, of one shape on all ranks, from each of them: [W, *x.shape], in the order of ranks, with gradient."""
    if world_size() == 1:
        return x.unsqueeze(0)
    found: Tensor = _Gather.apply(x)
    return found


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` [B, ...] of all ranks, one after another, and the place of this rank's first row, with gradient.

    B may differ between ranks (a rank that could not read an image has a row less).
    """
    if world_size() == 1:
        return x, 0
    # On the host, so that no device has to be waited for.
    counts = gather(torch.tensor(len(x))).tolist()
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    rows = [part[:count] for part, count in zip(gather(padded), counts, strict=True)]
    return torch.cat(rows), sum(counts[: distributed.get_rank()])

"""Colour jitter with factors that are functions of (seed, sample id, epoch): fresh in every epoch, equal in every run.

The operations are torchvision's (brightness, contrast, saturation, each a blend, in a random order), on a batch of
float images in [0, 1]; torchvision applies them to 8-bit images and rounds in between, the only difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hdcache import draws

_ORDERS = list(itertools.permutations(range(3)))


def draw_jitter(
    strength: tuple[float, float, float], seed: int, ids: Sequence[str], epoch: int
) -> tuple[Tensor, Tensor]:
    """Factors float32 [B, 3] from ``1 - s`` to ``1 + s`` (brightness, contrast, saturation) and an order index [B]."""
    numbers = torch.from_numpy(draws.uniform_rows(4, [(seed, name, epoch, "jitter") for name in ids]))
    spread = torch.tensor(strength, dtype=torch.float64)
    factors = (1 + (2 * numbers[:, :3] - 1) * spread).clamp_min(0).to(torch.float32)
    return factors, (numbers[:, 3] * len(_ORDERS)).long()


def apply_jitter(images: Tensor, factors: Tensor, orders: Tensor) -> Tensor:
    """Jitter ``images`` (float [B, 3, H, W] in [0, 1]); returns a new tensor in [0, 1]."""
    out = images.clone()
    # Images of one order lie together in this list, so that it goes to the device in one copy.
    places = orders.argsort(stable=True).to(images.device)
    factors = factors.to(images.device)[:, :, None, None, None]
    start = 0
    for order, count in zip(_ORDERS, orders.bincount(minlength=len(_ORDERS)).tolist(), strict=True):
        if not count:
            continue
        chosen = places[start : start + count]
        part, strength = out[chosen], factors[chosen]
        for operation in order:
            part = _blend(part, strength[:, operation], operation)
        out[chosen] = part
        start += count
    return out


@lru_cache(maxsize=16)
def _grey_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, because a copy to a device waits for all work that is queued there."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor([0.2989, 0.587, 0.114], dtype=dtype, device=device).view(1, 3, 1, 1)


def _blend(x: Tensor, factor: Tensor, operation: int) -> Tensor:
    if operation == 0:
        return (x * factor).clamp(0, 1)
    grey = (x * _grey_weights(x.device, x.dtype)).sum(dim=1, keepdim=True)
    if operation == 1:
        grey = grey.mean(dim=(2, 3), keepdim=True)
    return (grey + (x - grey) * factor).clamp(0, 1)

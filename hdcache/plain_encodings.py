"""Encodings that fit nothing to the data: each value is rounded by itself."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HALF_MAX = 65504.0

Parts = dict[str, NDArray[np.generic]]


def encode_plain(value: Tensor, encoding: str) -> tuple[Parts, int]:
    """Stored arrays, and how many values were clipped."""
    if encoding == "sqrt8":
        return {"values": (value.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu().numpy()}, 0
    if encoding == "bf16":
        return {"values": bits(value)}, 0
    if encoding == "fp16":
        half, lost = to_half(value)
        return {"values": half.cpu().numpy()}, lost
    return {"values": value.float().contiguous().cpu().numpy()}, 0


def decode_plain(stored: Tensor, encoding: str, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`encode_plain`, up to rounding."""
    if encoding == "sqrt8":
        root = stored.to(torch.float32) / 255
        square = root * root
        # Rounding each entry breaks the row sums; a relation's rows are distributions.
        return (square / square.sum(-1, keepdim=True).clamp_min(1e-12)).to(dtype)
    if encoding == "bf16":
        return stored.view(torch.bfloat16).to(dtype)
    return stored.to(dtype)


def to_half(value: Tensor) -> tuple[Tensor, int]:
    """``value`` in half precision, and how many values were clipped to its range."""
    lost = int((value.abs() > HALF_MAX).sum())
    return value.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).contiguous(), lost


def bits(value: Tensor) -> NDArray[np.generic]:
    """The bits of ``value`` in bfloat16, which NumPy has no type for."""
    return value.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()

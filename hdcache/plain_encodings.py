"""Encodings that fit nothing to the data: each value is rounded by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from hdcache.row_arrays import Parts as Parts

HALF_MAX = 65504.0

Stored = dict[str, Tensor]
"""The same on any device; unsigned integers may lie there as signed ones with the same bits."""


def encode_plain(value: Tensor, encoding: str) -> tuple[Stored, Tensor]:
    """Stored arrays, and how many values were clipped: int64 []. Neither waits for the device."""
    none = torch.zeros((), dtype=torch.int64)
    if encoding == "sqrt8":
        return {"values": (value.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)}, none
    if encoding == "bf16":
        return {"values": bits(value)}, none
    if encoding == "fp16":
        half, lost = to_half(value)
        return {"values": half}, lost
    return {"values": value.float()}, none


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


def to_half(value: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` in half precision, and how many values were clipped to its range: int64 []."""
    # On a CPU two looks cost less than what they save; NaN fails both.
    if (
        value.device.type == "cpu"
        and value.numel()
        and bool(value.amax() <= HALF_MAX)
        and bool(value.amin() >= -HALF_MAX)
    ):
        return value.to(torch.float16), torch.zeros((), dtype=torch.int64)
    lost = (value.abs() > HALF_MAX).sum()
    return value.clamp(-HALF_MAX, HALF_MAX).to(torch.float16), lost


def bits(value: Tensor) -> Tensor:
    """The bits of ``value`` in bfloat16, which NumPy has no type for, as int16."""
    return value.to(torch.bfloat16).contiguous().view(torch.int16)

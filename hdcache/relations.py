"""Token relations of self-attention and the divergence between two of them.

Legend: B images, T = P + N tokens (prefix, then patches), D width, H heads, K head width, E = 3 H K.

TinyMIM (Ren et al., CVPR 2023) section 3.1.1, Eq. 4 and 5. Everything is computed in float32, under autocast
too: relations of large heads overflow float16, and eight bits of mantissa are too few for a logarithm.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hdcache.errors import UsageError

RelationKind = Literal["qk", "vv", "qq", "kk"]
KINDS: dict[str, tuple[int, int]] = {"qk": (0, 1), "vv": (2, 2), "qq": (0, 0), "kk": (1, 1)}
"""Kind -> which two of (queries, keys, values) it relates: rows, then columns."""


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, H, T, K], of a block's QKV output [B, T, 3 H K] (timm's layout).

    ``heads`` need not be the block's own count: the columns are only cut differently (TinyMIM section 3.2).

    Raises
    ------
    UsageError
        if ``heads`` does not divide the width.
    """
    E = qkv.shape[-1]
    if heads < 1 or E % (3 * heads):
        raise _indivisible(E, heads)
    q, k, v = (split_part(part, heads) for part in qkv.chunk(3, dim=-1))
    return q, k, v


def split_part(part: Tensor, heads: int) -> Tensor:
    """[B, H, T, K] of one of queries, keys and values [B, T, H K].

    Raises
    ------
    UsageError
        if ``heads`` does not divide the width.
    """
    B, T, D = part.shape
    if heads < 1 or D % heads:
        raise _indivisible(3 * D, heads)
    return part.reshape(B, T, heads, D // heads).transpose(1, 2)


def _indivisible(width: int, heads: int) -> UsageError:
    return UsageError(
        f"QKV of width {width} = 3 x {width // 3} cannot be split into {heads} heads: {heads} does not divide {width // 3}; "
        "choose a head count that divides both the teacher's and the student's width"
    )


def relation_logits(x: Tensor, y: Tensor, scale: float | None = None) -> Tensor:
    """``x y^T * scale``: [B, H, T, K] twice -> float32 [B, H, T, T]; ``scale`` is K^(-1/2) unless given (Eq. 4)."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        scale = x.shape[-1] ** -0.5 if scale is None else scale
        # Scaling an operand [T, K] is cheaper than scaling the product [T, T].
        return (x.float() * scale) @ y.float().transpose(-2, -1)


def relation(x: Tensor, y: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over the last (key) axis of :func:`relation_logits`: float32 [B, H, T, T], rows sum to 1 (Eq. 4)."""
    return relation_logits(x, y, scale).softmax(dim=-1)


def log_relation(x: Tensor, y: Tensor, scale: float | None = None) -> Tensor:
    """Logarithm of :func:`relation`, float32 [B, H, T, T], finite where the softmax itself underflows."""
    return relation_logits(x, y, scale).log_softmax(dim=-1)


def relation_kl(teacher_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) in nats: summed over keys, averaged over images, heads and query rows (Eq. 5, 9).

    Parameters
    ----------
    teacher_probs
        [..., T], the reference distribution; detached. Entries that are 0 contribute 0.
    student_log_probs
        [..., T], natural logarithms.

    Returns
    -------
    Tensor
        scalar, float32.

    Raises
    ------
    UsageError
        if the two shapes differ.
    """
    if teacher_probs.shape != student_log_probs.shape:
        raise UsageError(
            f"relations of shape {tuple(teacher_probs.shape)} (teacher) and {tuple(student_log_probs.shape)} (student) "
            "cannot be compared: images, heads and tokens must agree"
        )
    with torch.autocast(device_type=teacher_probs.device.type, enabled=False):
        t = teacher_probs.detach().float()
        # A student row may hold -inf (log of 0); 0 * -inf must stay 0 there.
        log_p = student_log_probs.float().masked_fill(t == 0, 0.0)
        return kl_div(log_p, t, reduction="none").sum(dim=-1).mean()

"""Soft labels of a classifier: the k largest log-probabilities of a row and their classes.

Wu et al. 2022 (TinyViT, arXiv 2207.10666), section 3.1: what is left of the probability mass is spread evenly over
all other classes when a row is read. Log-probabilities are rounded down to half precision, so that the mass that is
left never becomes negative.

Legend: R rows, C classes, k kept classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdcache.plain_encodings import HALF_MAX, Parts
from hdcache.schema import ArrayCard

DEFAULT_TOP_K = 10
# A class whose share is rounded to nothing still has a finite logarithm.
SMALLEST = 1e-30


def soft_label_arrays(classes: int, top_k: int) -> dict[str, ArrayCard]:
    """Arrays of one row: ``values`` float16 [k], largest first, and ``classes`` [k]; all classes where k >= C."""
    kept = min(top_k, classes)
    index: Any = "uint16" if classes <= 1 << 16 else "int32"
    return {"values": ArrayCard(shape=(kept,), dtype="float16"), "classes": ArrayCard(shape=(kept,), dtype=index)}


def encode_soft_labels(logits_RC: Tensor, top_k: int) -> tuple[Parts, int]:
    """Stored arrays of R rows, and how many log-probabilities were clipped to half precision's range.

    Of equal logits the smaller class comes first.
    """
    sorted_RC, order_RC = logits_RC.float().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    exact = sorted_RC[:, :top_k].cpu().numpy()
    clipped = int((exact < -HALF_MAX).sum())
    exact = exact.clip(-HALF_MAX, 0)
    half = exact.astype(np.float16)
    half = np.where(half.astype(np.float32) > exact, np.nextafter(half, np.float16(-HALF_MAX)), half)
    index: Any = soft_label_arrays(logits_RC.shape[1], top_k)["classes"].dtype
    return {"values": half, "classes": order_RC[:, :top_k].cpu().numpy().astype(index)}, clipped


def decode_soft_labels(values_Rk: Tensor, classes_Rk: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Log-probabilities [R, C] of ``count`` classes: the stored ones, and an even share of the rest for all others."""
    kept = values_Rk.float()
    others = count - kept.shape[1]
    if others:
        share = (1 - kept.exp().sum(-1, keepdim=True)) / others
        dense = share.clamp_min(SMALLEST).log().expand(-1, count).clone()
    else:
        # Nothing else can take the mass that rounding down has left.
        kept = kept.log_softmax(-1)
        dense = kept.new_empty(len(kept), count)
    return dense.scatter_(1, classes_Rk.long(), kept).to(dtype)


def probabilities(logits_RC: Tensor) -> Tensor:
    """Distributions float64 [R, C] on the CPU."""
    return logits_RC.cpu().double().softmax(-1)


def divergence(exact_RC: Tensor, copy_RC: Tensor) -> Tensor:
    """KL(exact || copy) of each row's distribution, nats [R]."""
    return (exact_RC * (exact_RC.clamp_min(1e-300).log() - copy_RC.clamp_min(1e-300).log())).sum(-1)

"""What a network's attention looks like: how far each head looks, and whether its queries look at different things.

Legend: B images, H heads, P prefix tokens (class, registers), N patch tokens, T = P + N, L blocks.

Formulas as in the released code of Park et al. 2023 ("What Do Self-Supervised Vision Transformers Learn?",
cl-vs-mim, self_attention_analysis.ipynb, cells 10 and 12), which Hybrid Distill (Shi et al. 2024) reports its students
by. Where that code reads one batch of images, :func:`attention_profile` reads a fixed list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.backbones import Backbone, normalize
from hdcache.datasets import Dataset
from hdcache.errors import UsageError
from hdcache.samples import open_sample
from hdcache.schema import ViewSpec
from hdcache.taps import forward_taps, num_blocks

IMAGES = 256
DISTANCE_EPS, NMI_EPS = 1e-32, 1e-8


@dataclass(frozen=True)
class AttentionProfile:
    """Means over images of what each head of each block does."""

    blocks: tuple[int, ...]
    """1-based, in the order of the rows below."""
    distance: NDArray[np.float64]
    """[L, H] pixels; see :func:`attention_distance`."""
    nmi: NDArray[np.float64]
    """[L, H], 0 to 1; see :func:`attention_nmi`."""
    uniform_distance: float
    """The distance of a head that looks everywhere alike, to compare networks of other grids."""
    ids: tuple[str, ...]
    """The images."""

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able dict for each block, with the means over its heads."""
        return [
            {
                "block": block,
                "distance": float(distance.mean()),
                "nmi": float(nmi.mean()),
                "distance_by_head": distance.tolist(),
                "nmi_by_head": nmi.tolist(),
            }
            for block, distance, nmi in zip(self.blocks, self.distance, self.nmi, strict=True)
        ]


def patch_attention(attention: Tensor, prefix: int, eps: float) -> Tensor:
    """Attention among patch tokens: float64 [B, H, N, N] of ``attention`` [B, H, T, T], softmaxed over its last axis.

    Rows and columns of the ``prefix`` tokens are dropped, ``eps`` is added, and rows are scaled to the sum 1.
    Raises :class:`UsageError` for another shape.
    """
    if attention.ndim != 4 or attention.shape[-1] != attention.shape[-2] or not 0 <= prefix < attention.shape[-1]:
        raise UsageError(
            f"attention: expected [images, heads, tokens, tokens] with more than {prefix} tokens, found "
            f"{list(attention.shape)}; pass a block's qk relation with its prefix tokens"
        )
    patches = attention[:, :, prefix:, prefix:].double() + eps
    return patches / patches.sum(dim=-1, keepdim=True)


def attention_distance(attention: Tensor, grid: tuple[int, int], patch: int, prefix: int) -> Tensor:
    """Mean distance in pixels between a query and what it attends to: float64 [B, H].

    D = mean over q of sum over k of A(q, k) patch sqrt((row_q - row_k)^2 + (column_q - column_k)^2), with A from
    :func:`patch_attention` (eps 1e-32); ``grid`` is rows and columns of patch tokens, ``patch`` their side in pixels.
    0: every query attends to itself. Raises :class:`UsageError` where ``grid`` does not have N cells.
    """
    patches = patch_attention(attention, prefix, DISTANCE_EPS)
    distances = _distances(grid, patch).to(patches.device)
    if len(distances) != patches.shape[-1]:
        raise UsageError(
            f"attention of {patches.shape[-1]} patch tokens: expected the {grid[0]} x {grid[1]} of the grid; "
            "give the grid and the prefix tokens of the network that made it"
        )
    return torch.einsum("bhqk,qk->bhq", patches, distances).mean(dim=-1)


def attention_nmi(attention: Tensor, prefix: int) -> Tensor:
    """Normalised mutual information between queries and keys: float64 [B, H], 0 to 1.

    With p(q) = 1 / N and p(k) = sum over q of p(q) A(q, k), A from :func:`patch_attention` (eps 1e-8):
    NMI = sum over q, k of p(q) A(q, k) log(A(q, k) / p(k)), over sqrt(H(q) H(k)). 0: every query attends alike
    (collapse), one sink for all of them included; 1: each to a token of its own.
    """
    patches = patch_attention(attention, prefix, NMI_EPS)
    keys = patches.mean(dim=-2)
    information = (patches * (patches / keys.unsqueeze(-2)).log()).sum(dim=-1).mean(dim=-1)
    queries_entropy = torch.tensor(float(patches.shape[-1]), dtype=torch.float64).log()
    scale = (queries_entropy * -(keys * keys.log()).sum(dim=-1)).clamp(min=0).sqrt()
    # A single patch token has no entropy and carries no information.
    return torch.where(scale > 0, information / scale, torch.zeros_like(information)).clamp(0, 1)


def attention_profile(
    backbone: Backbone,
    dataset: Dataset,
    *,
    ids: Sequence[str] | None = None,
    images: int = IMAGES,
    blocks: Sequence[int] | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    threads: int | None = None,
) -> AttentionProfile:
    """Distance and NMI of every head of ``blocks`` (1-based; all by default), means over fixed images.

    The images are ``ids``, or ``images`` of the data set, evenly spaced in its order (all where it has fewer), under
    the centre crop of 224 / 256 of the shorter side. Attention maps are those of the network itself in fp32 (the tap
    ``blockN.rel.qk``), never held for more than ``batch_size`` images.

    Raises
    ------
    UsageError
        for no images, a block that is not there, attention that cannot be read, a network of clips, or
        videos.
    UnreadableImage
        for an image that cannot be read: other images would be another measurement.
    InputNotFound
        for an id that the data set does not have.
    """
    model: Any = backbone.model
    chosen = tuple(range(1, num_blocks(model) + 1) if blocks is None else blocks)
    wanted = tuple(spread(dataset.ids, images) if ids is None else ids)
    for name, value in (("images", len(wanted)), ("blocks", len(chosen)), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    if backbone.preprocessing.frames is not None:
        raise UsageError(f"{backbone.source} takes clips; attention distance is defined for still images only")
    if dataset.card.kind == "video":
        raise UsageError(
            f"{dataset.card.spec} holds videos; attention is measured on still images: name a data set of images"
        )
    rows, columns = model.patch_embed.grid_size
    grid, patch = (int(rows), int(columns)), int(model.patch_embed.patch_size[0])
    prefix, center = int(model.num_prefix_tokens), ViewSpec(kind="center-crop", flip=0.0)
    taps = [f"block{block}.rel.qk" for block in chosen]

    def pixels(sample_id: str) -> NDArray[np.uint8]:
        return open_sample(dataset, sample_id, center, 0).pixels(backbone.preprocessing)

    distance: list[Tensor] = []
    nmi: list[Tensor] = []
    was_training = model.training
    model.to(device).eval()
    try:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "decode") as pool:
            for start in range(0, len(wanted), batch_size):
                batch = np.stack(list(pool.map(pixels, wanted[start : start + batch_size])))
                inputs = normalize(torch.from_numpy(batch).to(device), backbone.preprocessing)
                with torch.inference_mode(), torch.autocast(inputs.device.type, enabled=False):
                    found = forward_taps(model, inputs, taps)
                    maps = [found[tap] for tap in taps]
                    distance.append(torch.stack([attention_distance(m, grid, patch, prefix) for m in maps], 1).cpu())  # type: ignore[arg-type]  # relations are tensors
                    nmi.append(torch.stack([attention_nmi(m, prefix) for m in maps], 1).cpu())  # type: ignore[arg-type]  # relations are tensors
    finally:
        model.train(was_training)
    return AttentionProfile(
        chosen,
        torch.cat(distance).mean(dim=0).numpy(),
        torch.cat(nmi).mean(dim=0).numpy(),
        float(_distances(grid, patch).mean()),
        wanted,
    )


def spread(ids: Sequence[str], count: int) -> list[str]:
    """``count`` of ``ids``, evenly spaced in their order; all where there are fewer."""
    count = min(count, len(ids))
    return [ids[index * len(ids) // count] for index in range(count)]


def _distances(grid: tuple[int, int], patch: int) -> Tensor:
    """Pixels between the cells of ``grid``: float64 [N, N]."""
    cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double() * patch
    return torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")

"""Which of the teacher's tokens AMD's student sees, and what is trained beside it: projections, generators, a decoder.

Zhao et al., AMD (arXiv 2311.03149); released code modeling_pretrain.py and masking_generator.py.

Legend: B samples, N patch tokens, V those that the student sees, F those that the teacher sees and the student does
not, T = V + F, D teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hdcache.distill.decoder import PixelDecoder, cut_normal, patch_positions, plain_blocks
from hdcache.distill.objective import Layout, initialise
from hdcache.masks import draw_among, over_slots

PURPOSE = "amd student mask"


class Counts(NamedTuple):
    """How many tokens are drawn among how many, in each of ``slots`` alike."""

    among: int
    """Tokens of one slot that the teacher sees."""
    seen: int
    """Those of them that the student sees."""
    slots: int
    """Slots that share one draw: the temporal slots under tube masks, else 1."""


class Split(NamedTuple):
    """The teacher's visible tokens, cut in two for the student."""

    seen: Tensor
    """int64 [B, V]: ascending positions, among the teacher's tokens, of those that the student sees."""
    unseen: Tensor
    """int64 [B, F]: of the others."""


def split_visible(ids: Sequence[str], epoch: int, seed: int, counts: Counts) -> Split:
    """Which of the teacher's tokens the student sees of each sample: a function of (seed, id, epoch).

    Positions are counted among the teacher's ascending tokens, so that the draw needs none of their values. Under tube
    masks these are the same cells in slot after slot, and cells are drawn.
    """
    among, count, slots = counts
    columns = np.broadcast_to(np.arange(among), (len(ids), among))
    seen = draw_among(columns, count, [(seed, sample, epoch, PURPOSE) for sample in ids])
    rest = np.ones((len(ids), among), bool)
    np.put_along_axis(rest, seen, False, axis=1)
    unseen = np.nonzero(rest)[1].reshape(len(ids), among - count)
    return Split(*(torch.from_numpy(over_slots(part, among, slots)) for part in (seen, unseen)))


class AMDHeads(nn.Module):
    """What AMD trains beside the student, and where its loss finds the targets."""

    def __init__(self, teacher: str, targets: tuple[str, ...], taps: tuple[str, ...], counts: Counts) -> None:
        super().__init__()
        self.teacher, self.targets, self.taps, self.counts = teacher, targets, taps, counts
        self.project = nn.ModuleList()
        """One linear map without bias from the student's width to the teacher's for each pair of blocks."""
        self.generators = nn.ModuleList()
        """One :class:`Generator` for each pair of blocks; empty without the part generation."""
        self.decoder: PixelDecoder | None = None


class Generator(nn.Module):
    """The teacher's tokens at F from the student's projected tokens at V (released code: no last norm)."""

    def __init__(
        self,
        layout: Layout,
        depth: int,
        heads: int,
        generator: torch.Generator,
        *,
        clips: bool,
        train_mask_token: bool,
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.blocks = plain_blocks(layout.width, depth, heads)
        self.to_empty(device="cpu")
        initialise(self, generator)
        # Where it starts matters, since by default nothing trains it.
        token = cut_normal(layout.width, generator)
        if train_mask_token:
            self.mask_token = nn.Parameter(token)
        else:
            self.register_buffer("mask_token", token)
        positions = patch_positions(layout, layout.width, clips=clips)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, direct: Tensor, seen: Tensor, unseen: Tensor) -> Tensor:
        """Tokens [B, V, D] at indices int64 [B, V] -> tokens [B, F, D] at indices int64 [B, F]."""
        positions = self.get_buffer("positions").to(direct.dtype)
        empty = self.mask_token.to(direct.dtype) + positions[unseen]
        generated: Tensor = self.blocks(torch.cat([direct + positions[seen], empty], dim=1))
        return generated[:, seen.shape[1] :]


def projection(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear map without bias, Xavier-uniform from ``generator``."""
    layer = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    initialise(layer, generator)
    return layer

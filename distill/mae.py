"""Masked autoencoding: predict the pixels of hidden patches from the visible ones. It needs no teacher or labels.

He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3
and appendix A.1; for clips Tong, Song, Wang, Wang: VideoMAE (arXiv 2203.12602), section 3. The quickstart trains one
of its own teachers with it, and it is the baseline of AMD.

Legend: B samples, N patch tokens, M visible patch tokens, C pixel values of one patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from hdcache.distill.decoder import (
    NormKind,
    PixelDecoder,
    hidden_patches,
    is_clip_network,
    pixel_decoder,
    pixel_targets,
)
from hdcache.distill.objective import Objective, Taps, student_layout
from hdcache.draws import uniform_rows
from hdcache.errors import UsageError
from hdcache.masks import draw_visible, visible_count
from hdcache.schema import MaskSpec, TeacherCard
from hdcache.taps import forward_taps

if TYPE_CHECKING:
    from hdcache.batch import Batch

PURPOSE = "mae mask"


class MAE(Objective):
    """Settings of masked autoencoding; the objective itself."""

    kind: Literal["mae"] = "mae"
    """Which objective this is."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that the student does not see (section 3; VideoMAE, section 3.3: 0.9)."""
    mask: Literal["random", "tube"] | None = None
    """Which patches: random: any (section 3); tube: the same cells in every temporal slot of a clip (VideoMAE,
    section 3.3). null: tube for clips, random for images."""
    decoder_width: int = Field(default=512, ge=4, multiple_of=4)
    """Channels of the decoder (appendix A.1)."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder (appendix A.1)."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder (released code)."""
    norm_pix: bool = True
    """Whether each target patch is normalised by its own mean and standard deviation (section 3, Tab. 1d)."""
    norm_kind: NormKind | None = None
    """patch: over all values of a patch, of the normalised input (MAE's code); channel: over each colour channel, of
    pixels in [0, 1] (VideoMAE's code). null: channel for clips, patch for images."""

    def parts(self) -> tuple[str, ...]:
        """``pixels``."""
        return ("pixels",)

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """``final``, on the visible patches."""
        return ("final",)

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> PixelDecoder:
        """The decoder."""
        self._visible(student, ("",), 0, 0)
        targets = pixel_targets(student, self.norm_pix, self.norm_kind, "mae")
        return pixel_decoder(
            student, targets, self.decoder_width, self.decoder_depth, self.decoder_heads, generator,
            prefix=True, embed_bias=targets.tubelet is None,
        )  # fmt: skip

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """Encode the visible patches, decode all of them.

        Returns ``prediction`` [B, N, C] and ``hidden`` bool [B, N], True where the student saw nothing.
        """
        visible = self._visible(student, batch.ids, batch.epoch, seed).to(batch.images.device)
        seen = forward_taps(student, batch.images, ("final",), keep=visible)["final"]
        return {"prediction": heads(seen, visible), "hidden": hidden_patches(visible, student_layout(student).tokens)}

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Mean squared error over the hidden patches only, in units of the (normalised) target."""
        assert isinstance(heads, PixelDecoder)  # noqa: S101  # programmer invariant: what build returned
        prediction, hidden = taps["prediction"], taps["hidden"]
        assert isinstance(prediction, Tensor)  # noqa: S101
        assert isinstance(hidden, Tensor)  # noqa: S101
        return {"pixels": heads.error(batch.images, prediction, hidden)}

    def _visible(self, student: nn.Module, ids: Sequence[str], epoch: int, seed: int) -> Tensor:
        """Ascending indices int64 [B, M] of the patches that each sample shows."""
        layout, clips = student_layout(student), is_clip_network(student)
        if (self.mask or ("tube" if clips else "random")) == "random":
            return visible_patches(ids, epoch, seed, layout.tokens, self.mask_ratio)
        if not clips:
            raise UsageError(
                "objective.mask 'tube' repeats cells over time, but the student reads still images; set it to null"
            )
        spec = MaskSpec(kind="tube", ratio=self.mask_ratio, seed=seed)
        visible_count(spec, layout.cells, layout.slots)
        return torch.from_numpy(draw_visible(spec, ids, epoch, layout.cells, layout.slots, PURPOSE))


def num_visible(total: int, mask_ratio: float) -> int:
    """``total`` (1 - mask_ratio) rounded down; :class:`UsageError` if that leaves nothing to see or to hide."""
    count = int(total * (1 - mask_ratio) + 1e-9)
    if not 0 < count < total:
        raise UsageError(
            f"objective.mask_ratio {mask_ratio} of {total} patches leaves {count} visible; need 1 to {total - 1}"
        )
    return count


def visible_patches(ids: Sequence[str], epoch: int, seed: int, total: int, mask_ratio: float) -> Tensor:
    """Ascending indices int64 [B, M] of the patches each sample shows: a function of (seed, id, epoch) alone."""
    noise = uniform_rows(total, [(seed, sample, epoch, PURPOSE) for sample in ids])
    chosen = np.argsort(noise, axis=1, kind="stable")[:, : num_visible(total, mask_ratio)]
    return torch.from_numpy(np.sort(chosen, axis=1))

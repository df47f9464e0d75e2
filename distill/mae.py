"""Masked autoencoding: predict the pixels of hidden patches from the visible ones. It needs no teacher or labels.

He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3
and appendix A.1. The quickstart trains one of its own teachers with it.

Legend: B images, P prefix tokens, N patch tokens, M visible patch tokens, D student width, E decoder width,
C = 3 p p pixel values of one patch of side p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hdcache.distill.objective import Taps, initialise, student_layout
from hdcache.draws import uniform_rows
from hdcache.errors import UsageError
from hdcache.schema import Record, TeacherCard
from hdcache.taps import Tokens, forward_taps

if TYPE_CHECKING:
    from hdcache.batch import Batch

NORM_EPS = 1e-6


class MAE(Record):
    """Settings of masked autoencoding; the objective itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["mae"] = "mae"
    """Which objective this is."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that the student does not see (section 3)."""
    decoder_width: int = Field(default=512, ge=4, multiple_of=4)
    """Channels of the decoder (appendix A.1)."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder (appendix A.1)."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder (released code)."""
    norm_pix: bool = True
    """Whether each target patch is normalised by its own mean and standard deviation (section 3, Tab. 1d)."""

    def parts(self) -> tuple[str, ...]:
        """``pixels``."""
        return ("pixels",)

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """Nothing: there is no teacher."""
        return {}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """``final``, on the visible patches."""
        return ("final",)

    def last_trained(self, depth: int) -> str:
        """``final``."""
        return "final"

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> MAEDecoder:
        """The decoder."""
        layout = student_layout(student)
        model: Any = student
        if self.decoder_width % self.decoder_heads:
            raise UsageError(
                f"objective.decoder_heads {self.decoder_heads} does not divide objective.decoder_width "
                f"{self.decoder_width}; choose a divisor"
            )
        num_visible(layout.grid[0] * layout.grid[1], self.mask_ratio)
        patch = model.patch_embed.patch_size
        if patch[0] != patch[1]:
            raise UsageError(
                f"objective 'mae' needs square patches, but the student's are {patch[0]}x{patch[1]} pixels"
            )
        return MAEDecoder(self, layout.width, layout.grid, layout.prefix, int(patch[0]), generator)

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """Encode the visible patches, decode all of them.

        Returns ``prediction`` [B, N, C] and ``hidden`` bool [B, N], True where the student saw nothing.
        """
        layout = student_layout(student)
        total = layout.grid[0] * layout.grid[1]
        visible = visible_patches(batch.ids, batch.epoch, seed, total, self.mask_ratio).to(batch.images.device)
        seen = forward_taps(student, batch.images, ("final",), keep=visible)["final"]
        hidden = torch.ones(len(batch.ids), total, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
        return {"prediction": heads(seen, visible), "hidden": hidden}

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Mean squared error over the hidden patches only, in units of the (normalised) target."""
        prediction, hidden = taps["prediction"], taps["hidden"]
        assert isinstance(prediction, Tensor)  # noqa: S101  # programmer invariant
        assert isinstance(hidden, Tensor)  # noqa: S101
        side = round((prediction.shape[-1] / batch.images.shape[1]) ** 0.5)
        target = patch_pixels(batch.images.float(), side)
        if self.norm_pix:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + NORM_EPS).sqrt()
        error = (prediction.float() - target).square().mean(-1)
        return {"pixels": error[hidden].mean()}


class MAEDecoder(nn.Module):
    """From visible tokens to the pixels of all patches (section 3; appendix A.1)."""

    def __init__(
        self, settings: MAE, width: int, grid: tuple[int, int], prefix: int, patch: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        inner = settings.decoder_width
        self.prefix, self.num_patches = prefix, grid[0] * grid[1]
        # Made without storage first: layers that draw their own initial values would use the global generator.
        with torch.device("meta"):
            self.embed = nn.Linear(width, inner)
            norm = partial(nn.LayerNorm, eps=NORM_EPS)
            blocks = [
                Block(inner, settings.decoder_heads, qkv_bias=True, norm_layer=norm)
                for _ in range(settings.decoder_depth)
            ]
            self.blocks = nn.Sequential(*blocks)
            self.norm = norm(inner)
            self.predict = nn.Linear(inner, 3 * patch * patch)
        self.to_empty(device="cpu")
        initialise(self, generator)
        self.mask_token = nn.Parameter(torch.empty(1, 1, inner).normal_(std=0.02, generator=generator))
        self.register_buffer("positions", sincos_positions(inner, grid).unsqueeze(0), persistent=False)

    def forward(self, seen: Tokens, visible: Tensor) -> Tensor:
        """Tokens of the visible patches and their indices [B, M] -> pixel values [B, N, C]."""
        x = self.embed(seen.sequence())
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        index = visible.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        full = self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1).scatter(1, index, patches)
        full = full + self.get_buffer("positions").to(x.dtype)
        x = self.norm(self.blocks(torch.cat([prefix, full], dim=1)))
        prediction: Tensor = self.predict(x[:, self.prefix :])
        return prediction


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
    noise = uniform_rows(total, [(seed, sample, epoch, "mae mask") for sample in ids])
    chosen = np.argsort(noise, axis=1, kind="stable")[:, : num_visible(total, mask_ratio)]
    return torch.from_numpy(np.sort(chosen, axis=1))


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, p p 3]: patches in row-major order, pixels in row-major order, channels last."""
    B, channels, height, width = images.shape
    x = images.reshape(B, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * channels)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions, float32 [rows * columns, width], as MAE's code orders them.

    The first half of the channels encodes the column, the second the row; each half holds sines, then cosines,
    with wavelengths from 2 pi to 10000 times that.

    Raises
    ------
    UsageError
        if ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise UsageError(f"sine-cosine positions need a width that is a multiple of 4, found {width}")
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    halves = [torch.outer(axis.double(), rates) for axis in (column, row)]
    return torch.cat([wave(half) for half in halves for wave in (torch.sin, torch.cos)], dim=1).float()

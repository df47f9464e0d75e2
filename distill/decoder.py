"""From what an encoder made of the visible patches to the pixels of the hidden ones: the decoder, its targets, its error.

He et al., MAE (arXiv 2111.06377), section 3 and appendix A.1, for images; Tong et al., VideoMAE (arXiv 2203.12602) and
the released code of AMD (arXiv 2311.03149), modeling_pretrain.py, for clips.

Legend: B samples, P prefix tokens, N patch tokens, M visible ones, D encoder width, E decoder width, p side of a patch,
t frames of a tubelet (1 for images), C = 3 t p p pixel values of one patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hdcache.distill.objective import Layout, initialise, student_layout
from hdcache.errors import UsageError
from hdcache.schema import Preprocessing
from hdcache.taps import Tokens
from hdcache.video_vit import sinusoid_positions

NORM_EPS = 1e-6
MASK_STD = 0.02
NormKind = Literal["patch", "channel"]


@dataclass(frozen=True)
class PixelTargets:
    """The pixel values of each patch, as a decoder predicts them."""

    patch: int
    """Side of a patch, pixels."""
    tubelet: int | None
    """Frames of a tubelet; None for still images."""
    normalise: bool
    """Whether each patch is normalised by its own mean and standard deviation."""
    kind: NormKind
    """patch: over all values of a patch of the student's input (MAE). channel: over each colour channel of it, on
    pixels in [0, 1] (VideoMAE, AMD)."""

    @property
    def values(self) -> int:
        """C, the values of one patch."""
        return 3 * (self.tubelet or 1) * self.patch**2

    def __call__(self, images: Tensor) -> Tensor:
        """Targets float32 [B, N, C] of the student's input ``images`` [B, 3, H, W] or [B, 3, F, H, W]."""
        images = images.float()
        if self.kind == "patch":
            target = patch_pixels(images, self.patch, self.tubelet)
            if self.normalise:
                variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (variance + NORM_EPS).sqrt()
            return target
        target = patch_pixels(unit_pixels(images), self.patch, self.tubelet)
        if self.normalise:
            channels = target.view(*target.shape[:-1], -1, 3)
            variance, mean = torch.var_mean(channels, dim=-2, keepdim=True)
            target = ((channels - mean) / (variance.sqrt() + NORM_EPS)).flatten(-2)
        return target


def pixel_targets(student: nn.Module, normalise: bool, kind: NormKind | None, objective: str) -> PixelTargets:
    """Targets for ``student``; ``kind`` None is ``channel`` for clips and ``patch`` for images.

    Raises
    ------
    UsageError
        when the student's patches are not square, or do not cover its input.
    """
    embed: Any = getattr(student, "patch_embed")  # noqa: B009  # nn.Module's attributes are untyped
    (rows, columns), (height, width) = embed.patch_size, embed.img_size
    if rows != columns:
        raise UsageError(f"objective {objective!r} needs square patches, but the student's are {rows}x{columns} pixels")
    if height % rows or width % rows:
        raise UsageError(
            f"patches of {rows} pixels do not cover the student's input of {height}x{width}; set student.arguments.img_size "
            f"to a multiple of {rows}"
        )
    tubelet = getattr(embed, "tubelet", None)
    return PixelTargets(int(rows), tubelet, normalise, kind or ("patch" if tubelet is None else "channel"))


def is_clip_network(student: nn.Module) -> bool:
    """Whether ``student`` reads clips."""
    return hasattr(getattr(student, "patch_embed", None), "tubelet")


def unit_pixels(images: Tensor) -> Tensor:
    """The student's input [B, 3, ...] as pixels in [0, 1]: its normalisation (ImageNet's mean and std) undone."""
    fed = Preprocessing(size=1)
    shape = (1, -1, *[1] * (images.ndim - 2))
    mean, std = (images.new_tensor(values).view(shape) for values in (fed.mean, fed.std))
    return images * std + mean


def patch_pixels(images: Tensor, patch: int, tubelet: int | None = None) -> Tensor:
    """Pixels patch by patch, in row-major order of the patches and of the pixels in each, channels last.

    [B, 3, H, W] -> [B, N, p p 3]; clips [B, 3, F, H, W] -> [B, N, t p p 3], slot after slot, and frame after frame in
    each tubelet (VideoMAE's released code, engine_for_pretraining.py).
    """
    B, channels, height, width = images.shape[0], images.shape[1], images.shape[-2], images.shape[-1]
    if tubelet is None:
        x = images.reshape(B, channels, height // patch, patch, width // patch, patch)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * channels)
    x = images.reshape(B, channels, -1, tubelet, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, tubelet * patch * patch * channels)


class PixelDecoder(nn.Module):
    """From visible tokens to the pixels of all patches (MAE, section 3 and appendix A.1; VideoMAE, section 3.3).

    The visible tokens, cast to the decoder's width, take their places among mask tokens; all get fixed positions, run
    through ``depth`` blocks and a norm, and one linear layer predicts the pixels.
    """

    def __init__(
        self,
        layout: Layout,
        targets: PixelTargets,
        width: int,
        depth: int,
        heads: int,
        generator: torch.Generator,
        *,
        embed_bias: bool,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(
                f"objective.decoder_heads {heads} does not divide objective.decoder_width {width}; choose a divisor"
            )
        self.targets, self.prefix, self.num_patches = targets, layout.prefix, layout.tokens
        # Made without storage first: layers that draw their own initial values would use the global generator.
        with torch.device("meta"):
            self.embed = nn.Linear(layout.width, width, bias=embed_bias)
            self.blocks = plain_blocks(width, depth, heads)
            self.norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.predict = nn.Linear(width, targets.values)
        self.to_empty(device="cpu")
        initialise(self, generator)
        clips = targets.tubelet is not None
        # As MAE draws it for images, as VideoMAE does for clips.
        token = (
            cut_normal(width, generator)
            if clips
            else torch.empty(1, 1, width).normal_(std=MASK_STD, generator=generator)
        )
        self.mask_token = nn.Parameter(token)
        positions = patch_positions(layout, width, clips=clips)
        self.register_buffer("positions", positions.unsqueeze(0), persistent=False)

    def forward(self, seen: Tokens, visible: Tensor) -> Tensor:
        """Tokens of the visible patches and their indices int64 [B, M] -> pixel values [B, N, C]."""
        x = self.embed(seen.sequence())
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        index = visible.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        full = self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1).scatter(1, index, patches)
        full = full + self.get_buffer("positions").to(x.dtype)
        x = self.norm(self.blocks(torch.cat([prefix, full], dim=1)))
        prediction: Tensor = self.predict(x[:, self.prefix :])
        return prediction

    def error(self, images: Tensor, prediction: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error over the ``hidden`` patches (bool [B, N]) only, in units of the (normalised) target."""
        error = (prediction.float() - self.targets(images)).square().mean(-1)
        return error[hidden].mean()


def pixel_decoder(
    student: nn.Module,
    targets: PixelTargets,
    width: int,
    depth: int,
    heads: int,
    generator: torch.Generator,
    *,
    prefix: bool,
    embed_bias: bool,
) -> PixelDecoder:
    """The decoder of ``student``, fed with its prefix tokens too (``prefix``; MAE does) or with patch tokens alone."""
    layout = student_layout(student)
    seen = Layout(layout.grid, layout.prefix if prefix else 0, layout.width, layout.slots)
    return PixelDecoder(seen, targets, width, depth, heads, generator, embed_bias=embed_bias)


def cut_normal(width: int, generator: torch.Generator) -> Tensor:
    """A mask token float32 [1, 1, width]: normal, truncated at one standard deviation (VideoMAE's and AMD's released code)."""
    return nn.init.trunc_normal_(torch.empty(1, 1, width), std=MASK_STD, a=-MASK_STD, b=MASK_STD, generator=generator)


def plain_blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    """``depth`` plain ViT blocks with an MLP of 4 ``width`` and norms of epsilon 1e-6."""
    from timm.models.vision_transformer import Block

    norm = partial(nn.LayerNorm, eps=NORM_EPS)
    return nn.Sequential(*[Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])


def hidden_patches(visible: Tensor, total: int) -> Tensor:
    """bool [B, N], True at the patches that are not among ``visible`` int64 [B, M]."""
    return torch.ones(len(visible), total, dtype=torch.bool, device=visible.device).scatter(1, visible, False)


def patch_positions(layout: Layout, width: int, *, clips: bool) -> Tensor:
    """Fixed positions of the patch tokens, float32 [N, width]: 2-D for images, 1-D on the flattened index for clips."""
    return sinusoid_positions(layout.tokens, width) if clips else sincos_positions(width, layout.grid)


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

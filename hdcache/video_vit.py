"""What turns a timm VisionTransformer into one of clips: tubelet tokens, and fixed positions on their flattened index.

Tong, Song, Wang, Wang: VideoMAE (arXiv 2203.12602), section 3; released code modeling_finetune.py. AMD's teachers and
students are such networks. There is no class token; blocks, norm and head are timm's own, so that taps read them alike.
timm alone cannot build one: ``frames`` and ``tubelet`` are arguments of :func:`hdcache.backbones.create_vit` only.

Legend: B clips, F frames, S = F / tubelet temporal slots, N = S x rows x columns tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hdcache.errors import UsageError

TUBELET = 2
# What would add tokens that have no place in the flattened index, or change the index while running.
_VOIDED = ("class_token", "reg_tokens", "dynamic_img_size", "dynamic_img_pad", "embed_layer", "pos_embed")


class TubeletEmbed(nn.Module):
    """One token for each tubelet of ``tubelet`` frames by a square of ``patch_size`` pixels, in timm's place of PatchEmbed."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        frames: int = 16,
        tubelet: int = TUBELET,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _pair(img_size), _pair(patch_size)
        self.frames, self.tubelet, self.slots = frames, tubelet, frames // tubelet
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.slots * self.grid_size[0] * self.grid_size[1]
        cut = (tubelet, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=cut, stride=cut, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B, 3, F, H, W] -> tokens [B, N, D], slot after slot, each in row-major order.

        Raises
        ------
        UsageError
            for anything but clips of the size that the network was made for.
        """
        expected = (self.frames, *self.img_size)
        if tuple(x.shape[2:]) != expected:
            found = "x".join(map(str, x.shape[2:]))
            raise UsageError(
                f"this network reads clips of {'x'.join(map(str, expected))} (frames x height x width), found {found}; "
                "build it with the frames and img_size of the data, or a network without frames for still images"
            )
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def video_arguments(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of timm.create_model for a network of clips, from those of :func:`hdcache.backbones.create_vit`.

    ``frames`` is the length of a clip, ``tubelet`` (default 2) the frames of one token. The pooled output is the mean
    over tokens after the last norm; ``fc_norm=True`` puts the norm after the mean, as VideoMAE's fine-tuning does.

    Raises
    ------
    UsageError
        for a number that cannot be meant, or an argument that a network of clips has no place for.
    """
    options = dict(arguments)
    frames, tubelet = options.pop("frames", None), options.pop("tubelet", TUBELET)
    if frames is None:
        raise UsageError(f"{architecture}: tubelet {tubelet} is given without frames; add frames=16, or leave it out")
    for name, value in (("frames", frames), ("tubelet", tubelet)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{architecture}: {name} {value!r} must be a whole number, at least 1")
    if frames % tubelet:
        raise UsageError(f"{architecture}: frames {frames} is not a multiple of tubelet {tubelet}; choose a multiple")
    if voided := [key for key in _VOIDED if options.pop(key, None)]:
        raise UsageError(
            f"{architecture}: a network of clips (frames={frames}) has no {voided[0]}; leave it out: its tokens are "
            "tubelets alone, at fixed positions"
        )
    fixed = {"class_token": False, "embed_layer": partial(TubeletEmbed, frames=frames, tubelet=tubelet)}
    return {"global_pool": "avg", "fc_norm": False} | options | fixed


def without_unset(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` without ``frames`` and ``tubelet`` where these are None: a network of still images."""
    return {key: value for key, value in arguments.items() if value is not None or key not in ("frames", "tubelet")}


def fix_video_positions(model: nn.Module) -> None:
    """Give a network of clips VideoMAE's positions, which are not trained."""
    network: Any = model
    table = sinusoid_positions(int(network.patch_embed.num_patches), int(network.embed_dim))
    network.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)


def sinusoid_positions(tokens: int, width: int) -> Tensor:
    """Fixed 1-D sine-cosine positions, float32 [tokens, width] (get_sinusoid_encoding_table of the released code).

    Channels 2i and 2i + 1 are the sine and the cosine of ``position / 10000^(2i / width)``; the position of a tubelet
    is its index in the flattened sequence, over slots, rows and columns.
    """
    channel = torch.arange(width, dtype=torch.float64)
    rates = 10000.0 ** (-2 * (channel // 2) / width)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), rates)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()

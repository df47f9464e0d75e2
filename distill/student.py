"""The network that is trained: a timm ViT with the initial weights, positions and drop path of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hdcache import draws
from hdcache.backbones import clip_preprocessing, create_vit
from hdcache.distill.decoder import is_clip_network, sincos_positions
from hdcache.distill.objective import initialise
from hdcache.distill.settings import StudentSpec
from hdcache.errors import UsageError, next_to
from hdcache.schema import Preprocessing


def build_student(spec: StudentSpec, seed: int) -> nn.Module:
    """A timm VisionTransformer without classifier, its weights a function of (spec, seed) alone.

    With ``frames`` among its arguments it reads clips, and its fixed positions are those of VideoMAE.

    Raises
    ------
    UsageError
        for an unknown architecture, arguments that do not fit, or an input that is not square.
    """
    voided = sorted(
        {"drop_path_rate", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate"}
        & spec.arguments.keys()
    )
    if voided:
        raise UsageError(
            f"student.arguments.{voided[0]} draws from a global generator, so that no run could be repeated; "
            "use student.drop_path, or leave it out"
        )
    model: Any = create_vit(
        spec.architecture,
        dict(spec.arguments) | {"num_classes": 0},
        seed=draws.integer_seed(seed, "student"),
        group="student.arguments.",
    )
    generator = torch.Generator().manual_seed(draws.integer_seed(seed, "student-mae"))
    if spec.init == "mae":
        initialise(model, generator)
        projection = model.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.data.view(projection.shape[0], -1), generator=generator)
        for token in (model.cls_token, getattr(model, "reg_token", None)):
            if token is not None:
                nn.init.normal_(token, std=0.02, generator=generator)
    if is_clip_network(model):
        if not spec.sincos_positions:
            learnt = torch.empty_like(model.pos_embed)
            model.pos_embed = nn.Parameter(nn.init.trunc_normal_(learnt, std=0.02, generator=generator))
    elif spec.sincos_positions:
        _fix_positions(model)
    if spec.freeze_patch_embed:
        model.patch_embed.requires_grad_(False)
    depth = len(model.blocks)
    for index, block in enumerate(model.blocks):
        rate = spec.drop_path if spec.drop_path_schedule == "constant" else spec.drop_path * index / max(1, depth - 1)
        if index == depth - 1 and not spec.drop_path_last_block:
            rate = 0.0
        block.drop_path1, block.drop_path2 = (KeyedDropPath(rate) if rate else nn.Identity() for _ in range(2))
    return model  # type: ignore[no-any-return]  # nn.Module's attributes are untyped


def student_input(model: nn.Module) -> Preprocessing:
    """The student's input: its own size (and frames), ImageNet's mean and std."""
    height, width = model.patch_embed.img_size  # type: ignore[union-attr, misc]  # nn.Module's attributes are untyped
    if height != width:
        raise UsageError(
            f"the student's input is {height}x{width} pixels; only square inputs are supported, set student.arguments.img_size"
        )
    frames = getattr(model.patch_embed, "frames", None)
    return Preprocessing(size=int(height)) if frames is None else clip_preprocessing(int(height), int(frames))


def _fix_positions(model: Any) -> None:
    """Fixed 2-D sine-cosine position embedding (He et al. 2021; TinyMIM A7), zero for prefix tokens."""
    if model.pos_embed is None:
        raise UsageError("the student has no position embedding; set student.sincos_positions=false")
    width = int(model.embed_dim)
    if width % 4:
        step = math.lcm(4, *(part.num_heads for part in model.modules() if hasattr(part, "num_heads")))
        widths = next_to(width, lambda number: number % step == 0, width + step)
        raise UsageError(
            f"student.arguments.embed_dim {width} is not a multiple of 4, which fixed positions need; "
            f"set student.arguments.embed_dim={widths}, or student.sincos_positions=false"
        )
    grid = tuple(model.patch_embed.grid_size)
    table = sincos_positions(width, (int(grid[0]), int(grid[1])))
    embedding = torch.cat([table.new_zeros(model.pos_embed.shape[1] - len(table), table.shape[1]), table])
    model.pos_embed = nn.Parameter(embedding.unsqueeze(0), requires_grad=False)


class KeyedDropPath(nn.Module):
    """Stochastic depth whose choices are set from outside, so that they are functions of (seed, sample id, epoch)."""

    keep: Tensor | None = None
    """bool [B] for the next forward; None keeps every path."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, D] with dropped samples zeroed and the others scaled by 1 / (1 - rate)."""
        if not self.training or self.keep is None:
            return x
        return x * (self.keep.to(x.dtype) / (1 - self.rate)).view(-1, *[1] * (x.ndim - 1))


def set_drop_paths(model: nn.Module, ids: Sequence[str], seed: int, epoch: int) -> None:
    """Draw, for the next forward of a batch of ``ids``, which paths are dropped."""
    layers = [module for module in model.modules() if isinstance(module, KeyedDropPath)]
    if not layers:
        return
    numbers = torch.from_numpy(draws.uniform_rows(len(layers), [(seed, name, epoch, "drop-path") for name in ids]))
    device = next(model.parameters()).device
    for index, layer in enumerate(layers):
        layer.keep = (numbers[:, index] >= layer.rate).to(device)

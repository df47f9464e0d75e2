"""Which teacher AMD learns from is told from the others by its mask; and which student has the same tokens.

Zhao et al., AMD (arXiv 2311.03149): direct and generation alignment compare token with token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hdcache.distill.objective import student_layout, teacher_layout
from hdcache.errors import UsageError
from hdcache.schema import MaskSpec, TeacherCard
from hdcache.video_vit import TUBELET


def mask_name(mask: MaskSpec | None) -> str:
    """How a teacher's mask is spelt on the command line."""
    return "no mask" if mask is None else f"{mask.kind}:{mask.ratio:g}"


def same_network(cards: Mapping[str, TeacherCard]) -> str | None:
    """The teacher to store again under another mask: one that has a mask before others; None where several could be meant."""
    masked = {name: card for name, card in cards.items() if card.mask is not None}
    among = masked or cards
    return min(among) if len({card.weights for card in among.values()}) == 1 else None


def free_name(name: str, ratio: float, taken: Mapping[str, TeacherCard]) -> str:
    """``name-75`` for a mask of ratio 0.75, or with a number after it where that is taken."""
    wanted = f"{name}-{100 * ratio:g}"
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(free for ending in endings if (free := wanted + ending) not in taken)


def check_layouts(student: nn.Module, name: str, card: TeacherCard) -> None:
    """Refuse a student whose patch tokens are not the teacher's, and say which arguments make them so."""
    own, theirs = student_layout(student), teacher_layout(card)
    embed: Any = student.patch_embed
    given, frames = getattr(embed, "frames", None), card.preprocessing.frames
    if (own.grid, own.slots, given) == (theirs.grid, theirs.slots, frames):
        return
    sides = [rows * int(p) for rows, p in zip(theirs.grid, embed.patch_size, strict=True)]
    settings = [f"img_size={sides[0] if sides[0] == sides[1] else sides}"] if own.grid != theirs.grid else []
    if frames is None and given is not None:
        # Of networks of clips alone; a tubelet without frames cannot be built.
        settings += ["frames=null", "tubelet=null"]
    elif frames is not None:
        settings += [f"frames={frames}"] if frames != given else []
        if (tubelet := frames // theirs.slots) != getattr(embed, "tubelet", TUBELET):
            settings.append(f"tubelet={tubelet}")
    raise UsageError(
        f"AMD compares token with token, but the student has {own} of {_read(given)} and teacher {name!r} {theirs} of "
        f"{_read(frames)}; set {', '.join(f'student.arguments.{setting}' for setting in settings)}"
    )


def _read(frames: int | None) -> str:
    return "still images" if frames is None else f"{frames} frames"

"""Which teacher is meant, and whether a student can be compared with it token by token: one clear line where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hdcache.distill.objective import Layout, student_layout, teacher_layout
from hdcache.errors import UsageError, nearest
from hdcache.schema import TeacherCard
from hdcache.taps import attention_of, parse_tap
from hdcache.targets import sources


def choose_teachers(named: Mapping[str, str | None], cards: Mapping[str, TeacherCard]) -> dict[str, str]:
    """Part of the loss -> teacher, from the names that a recipe gives (field ``PART_teacher``; None: not given).

    Raises
    ------
    UsageError
        where a name is unknown, or is not given and more than one teacher could be meant.
    """
    fields = [f"objective.{part}_teacher" for part, name in named.items() if name is None]
    there = ", ".join(sorted(cards)) or "none"
    commands = " and ".join(f"{field}=NAME" for field in fields)
    if fields and not cards:
        raise UsageError(f"{' and '.join(fields)} not given, and there is no teacher; give --store STORE")
    if fields and len(named) > 1:
        raise UsageError(
            f"{' and '.join(fields)} not given, and nothing says which teacher is meant; "
            f"the teachers are {there}: set {commands}"
        )
    if fields and len(cards) > 1:
        raise UsageError(
            f"{fields[0]} is null, which needs exactly one teacher, but there are {len(cards)} ({there}); set {commands}"
        )
    chosen = {part: next(iter(cards)) if name is None else name for part, name in named.items()}
    for part, name in chosen.items():
        if name not in cards:
            raise UsageError(f"objective.{part}_teacher: no teacher {name!r}; {nearest(name, cards)}")
    return chosen


def whole_images(name: str, card: TeacherCard, part: str, targets: Sequence[str]) -> None:
    """Refuse a teacher that saw only some of its tokens: it has no target for the others."""
    if card.mask is not None:
        raise UsageError(
            f"teacher {name!r} saw only the tokens that its mask {card.mask.kind}:{card.mask.ratio:g} left, but every token "
            f"is compared; store it without --teacher-mask: {_again(name, part, targets)}"
        )


def plain_queries(name: str, card: TeacherCard) -> None:
    """Refuse a teacher whose queries and keys are normalised after what is stored."""
    if card.qk_norm:
        raise UsageError(
            f'teacher {name!r} normalises Q and K per head, after the stored QKV; set objective.relations=["vv"], '
            "or name another objective.relation_teacher"
        )


def plain_student(student: nn.Module, block: int) -> None:
    """Refuse a student block that normalises queries and keys: they could not be cut into other heads."""
    if not isinstance(attention_of(student, block).q_norm, nn.Identity):
        raise UsageError(
            f"block{block} of the student normalises Q and K per head, so it cannot be compared with a teacher that "
            "does not; set student.arguments.qk_norm=false"
        )


def divisible(student: nn.Module, name: str, card: TeacherCard, heads: int) -> None:
    """Refuse a head count that does not divide both widths."""
    width = student_layout(student).width
    for whose, columns in ((f"teacher {name!r}", card.width), ("the student", width)):
        if columns % heads:
            raise UsageError(
                f"{heads} heads do not divide the width {columns} of {whose}; set objective.heads to a divisor of "
                f"{card.width} and {width}"
            )


def same_prefix(student: nn.Module, name: str, card: TeacherCard, field: str) -> None:
    """Refuse different class and register tokens where they are compared."""
    own, theirs = student_layout(student), teacher_layout(card)
    if own.prefix != theirs.prefix:
        raise UsageError(
            f"objective.{field} 'all' compares prefix tokens too, but the student has {own} and teacher {name!r} {theirs}; "
            f"set objective.{field}=patches"
        )


def same_grid(
    student: nn.Module, teachers: Mapping[str, tuple[str, TeacherCard]], targets: Mapping[str, Sequence[str]]
) -> None:
    """Refuse teachers (part -> name, card) whose patch grids are not the student's, with the sizes that would fit.

    ``targets`` (teacher name -> target names) are what a teacher that is stored again has to hold.
    """
    own = student_layout(student)
    model: Any = student
    layouts = {part: teacher_layout(card) for part, (_, card) in teachers.items()}
    for part, theirs in layouts.items():
        name, card = teachers[part]
        if own.slots != theirs.slots:
            raise UsageError(
                f"the student has {own}, but teacher {name!r} {theirs}; both need clips of the same number of frames"
            )
        if own.grid == theirs.grid:
            continue
        ways = [
            f"store the teacher at {_pixels(own, card.patch_size)} pixels: "
            + _again(name, part, targets[name], f" --img-size {_pixels(own, card.patch_size)}")
        ]
        if len({layout.grid for layout in layouts.values()}) == 1:
            ways.insert(0, f"set student.arguments.img_size={_pixels(theirs, int(model.patch_embed.patch_size[0]))}")
        raise UsageError(
            f"tokens are compared one by one, but the student has {own} and teacher {name!r} {theirs}; {', or '.join(ways)}"
        )


def _pixels(layout: Layout, patch: int) -> int:
    return layout.grid[0] * patch


def _again(name: str, part: str, targets: Sequence[str], more: str = "") -> str:
    """The command that stores a teacher once more under another name, and what to set then."""
    taps = " ".join(f"--tap {tap}" for tap in sorted({sources(parse_tap(target))[0] for target in targets}))
    return (
        f"'hdcache extract --store STORE --teacher {name}-2=MODEL{more} {taps}', "
        f"then set objective.{part}_teacher={name}-2"
    )

"""Which teacher is meant, and whether a student can be compared with it token by token: one clear line where not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hdcache.distill.objective import Layout, student_layout, teacher_layout
from hdcache.errors import UsageError, nearest
from hdcache.schema import TeacherCard
from hdcache.taps import attention_of, parse_tap
from hdcache.targets import sources


class Misfit(UsageError):
    """A teacher that does not fit, for whoever knows more of the store than the loss does.

    ``live`` is the message where there is no store to add a teacher to (None: the same), ``of`` the teacher whose
    network the printed command runs once more (None: another network, which only the user knows).
    """

    def __init__(self, message: str, *, live: str | None = None, of: str | None = None) -> None:
        super().__init__(message)
        self.live, self.of = live, of


def choose_teachers(
    named: Mapping[str, str | None], cards: Mapping[str, TeacherCard], needed: Mapping[str, str]
) -> dict[str, str]:
    """Part of the loss -> teacher, from the names that a recipe gives (None: not given).

    The part of an objective with a single field ``teacher`` is the empty string; the others have ``PART_teacher`` each.
    ``needed`` (part -> :func:`flags`) is what a teacher that has yet to be stored must hold.

    Raises
    ------
    UsageError
        where a name is unknown, or is not given and more than one teacher could be meant.
    """
    fields = [field_of(part) for part, name in named.items() if name is None]
    there = ", ".join(sorted(cards)) or "none"
    commands = " and ".join(f"{field}=NAME" for field in fields)
    if fields and not cards:
        adding = " and ".join(add("", "NAME", needed[part]) for part, name in named.items() if name is None)
        raise UsageError(f"{' and '.join(fields)} not given, and there is no teacher; add one{adding}")
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
            raise missing(field_of(part), name, cards, needed[part])
    return chosen


def field_of(part: str) -> str:
    """The setting that names the teacher of a part of the loss."""
    return f"objective.{part}_teacher" if part else "objective.teacher"


def missing(field: str, name: str, cards: Mapping[str, TeacherCard], needed: str) -> UsageError:
    """The error for a name that no teacher has, with those that there are and the command that adds it."""
    hint = nearest(name, cards)
    if not cards:
        hint = "there is none"
    elif hint.startswith("did you mean"):
        hint += f" The teachers are {', '.join(sorted(cards))}"
    return UsageError(f"{field}: no teacher {name!r}; {hint}; or {add('add it', name, needed)}")


def flags(targets: Iterable[str]) -> str:
    """The options of ``hdcache extract`` that store what ``targets`` follow from."""
    taps = sorted({sources(parse_tap(target))[0] for target in targets})
    return " ".join(f"--tap {tap}" + (" --top-k 10" if tap == "logits" else "") for tap in taps)


def extract_command(name: str, needed: str) -> str:
    """The command that adds a teacher; whoever knows the store puts it and a known model in place of the capitals."""
    return f"hdcache extract --store STORE --teacher {name}=MODEL {needed}".rstrip()


def add(words: str, name: str, needed: str) -> str:
    """``words`` and the command after them; a remark in brackets at the end of ``needed`` goes before the command."""
    options, bracket, remark = needed.partition("(")
    return f"{words}{f' ({remark}' if bracket else ''}: {extract_command(name, options.rstrip())}"


def three_quarters(depth: int) -> int:
    """The block (1-based) at three quarters of ``depth``, half a block rounded up."""
    return max(1, int(0.75 * depth + 0.5))


def whole_images(name: str, card: TeacherCard, part: str, targets: Sequence[str]) -> None:
    """Refuse a teacher that saw only some of its tokens: it has no target for the others."""
    if card.mask is not None:
        found = (
            f"teacher {name!r} saw only the tokens that its mask {card.mask.kind}:{card.mask.ratio:g} left, but every token "
            "is compared"
        )
        raise Misfit(
            f"{found}; store it without --teacher-mask: {_again(name, part, targets)}",
            live=f"{found}; leave --teacher-mask out",
            of=name,
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
            f"block{block} of the student normalises Q and K per head, so it cannot be cut into the teacher's heads; "
            "set student.arguments.qk_norm=false"
        )


def divisible(student: nn.Module, name: str, card: TeacherCard, asked: int | None) -> None:
    """Refuse a head count (None: the teacher's own) that does not divide both widths."""
    heads, width = asked or card.heads, student_layout(student).width
    fix = f"set objective.heads to a divisor of {card.width} and {width}"
    if asked is not None and not (card.width % card.heads or width % card.heads):
        fix = f"set objective.heads=null for the teacher's own {card.heads}, or {fix.removeprefix('set ')}"
    for whose, columns in ((f"teacher {name!r}", card.width), ("the student", width)):
        if columns % heads:
            raise UsageError(f"{heads} heads do not divide the width {columns} of {whose}; {fix}")


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
        pixels = _pixels(own, card.patch_size)
        again = _again(name, part, targets[name], f"--img-size {pixels} ")
        stored, live = f"store the teacher at {pixels} pixels: {again}", f"give a teacher that reads {pixels} pixels"
        if own.grid[0] != own.grid[1]:
            # Extraction knows square inputs only.
            stored = live = "give the student a square student.arguments.img_size"
        alike, student_side = "", _pixels(theirs, int(model.patch_embed.patch_size[0]))
        if len({layout.grid for layout in layouts.values()}) == 1:
            alike = f"set student.arguments.img_size={student_side}"
        found = f"tokens are compared one by one, but the student has {own} and teacher {name!r} {theirs}; "
        raise Misfit(
            found + (f"{alike}, or {stored}" if alike else stored),
            live=found + (alike or live),
            of=name,
        )


def class_tokens(student: nn.Module, name: str, card: TeacherCard) -> None:
    """Refuse a network without a class token where class tokens are compared."""
    model: Any = student
    for whose, has in (("the student", bool(model.has_class_token)), (f"teacher {name!r}", card.class_token)):
        if not has:
            raise UsageError(
                f"strategy 'class-token' needs a class token, which {whose} lacks; use strategy 'feature' or 'relation'"
            )


def _pixels(layout: Layout, patch: int) -> int | list[int]:
    sides = [count * patch for count in layout.grid]
    return sides[0] if sides[0] == sides[1] else sides


def _again(name: str, part: str, targets: Sequence[str], more: str = "") -> str:
    """What to set, and the command that stores a teacher once more under another name."""
    return f"set {field_of(part)}={name}-2 and add it: {extract_command(f'{name}-2', more + flags(targets))}"

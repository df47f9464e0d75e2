"""The teachers of a run: what an objective may choose its targets from, and which of them run in the loop."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from hdcache.distill.objective import Objective
from hdcache.distill.run_recipes import named
from hdcache.distill.settings import Recipe
from hdcache.distill.teacher_fit import Misfit
from hdcache.errors import UsageError
from hdcache.schema import MaskSpec, TeacherCard
from hdcache.store import Store
from hdcache.target_sources import as_extracted
from hdcache.teachers import Teacher, load_teacher, reload_teacher, split_name

Wanted = dict[str, tuple[str, ...]]
"""Teacher name -> targets that it must give for every row."""


def choose_teachers(
    recipes: Sequence[Recipe],
    store: Store | None,
    specs: Sequence[str],
    device: torch.device,
    *,
    online: bool,
    mask: str | MaskSpec | None = None,
    mask_seed: int = 0,
) -> tuple[dict[str, TeacherCard], list[Wanted], dict[str, Teacher]]:
    """Cards of all teachers there are, the targets that each recipe wants of them, and those of them that run in the loop.

    Parameters
    ----------
    recipes
        of the students that train together; a teacher that several of them read is loaded once.
    specs
        ``NAME=SPEC`` of live teachers; with a store, only for those whose weights have moved.
    mask, mask_seed
        which patch tokens live teachers see where there is no store (:func:`~hdcache.masks.parse_mask`).

    Raises
    ------
    UsageError
        when a recipe wants targets that neither a store nor a live teacher can give, or none does where some are named.
    """
    reading = [recipe for recipe in recipes if reads_teachers(recipe)]
    if reading and store is None and not online:
        raise UsageError(
            f"recipe {reading[0].name!r} reads teacher targets; give --store STORE, or --online with --teacher NAME=SPEC"
        )
    if online and not reading:
        raise UsageError(
            f"recipe {recipes[0].name!r} reads no teacher, so none can run in the loop; leave --online and --teacher out"
        )
    live = named_teachers(specs, device, mask=mask, mask_seed=mask_seed) if online and store is None else {}
    cards = teacher_cards(store, live)
    wanted = []
    for recipe in recipes:
        with named(recipe, several=len(recipes) > 1), commands_of(store):
            wanted.append(recipe.objective.wants(cards))
    every = union(wanted)
    if live and any("logits" in targets for targets in every.values()):
        # A teacher comes without its classifier until a target needs one; with it, it is another network.
        _check_classifiers(recipes, wanted)
        live = named_teachers(specs, device, every, mask=mask, mask_seed=mask_seed)
        cards = teacher_cards(store, live)
    if online and store is not None:
        live = stored_teachers(store, every, specs, device)
    return cards, wanted, live


def _check_classifiers(recipes: Sequence[Recipe], wanted: Sequence[Wanted]) -> None:
    for recipe, targets in zip(recipes, wanted, strict=True):
        for name in (name for name, asked in targets.items() if "logits" in asked):
            for other, those in zip(recipes, wanted, strict=True):
                if "logits" not in those.get(name, ("logits",)):
                    raise UsageError(
                        f"recipe {recipe.name!r} reads the classifier of teacher {name!r}, without which {other.name!r} reads it; "
                        f"name it twice (--teacher {name}=MODEL --teacher {name}-2=MODEL) and set objective.teacher in one of them"
                    )


def union(wanted: Iterable[Mapping[str, Sequence[str]]]) -> Wanted:
    """The targets that any of several students wants, by teacher."""
    found: dict[str, dict[str, None]] = {}
    for targets in wanted:
        for name, asked in targets.items():
            found.setdefault(name, {}).update(dict.fromkeys(asked))
    return {name: tuple(targets) for name, targets in found.items()}


def reads_teachers(recipe: Recipe) -> bool:
    """Whether ``recipe`` learns from teachers at all."""
    try:
        return bool(recipe.objective.wants({}))
    except UsageError:
        return True


def teacher_fields(objective: Objective, cards: Mapping[str, TeacherCard], name: str) -> tuple[str, ...]:
    """The settings that make ``objective`` read teacher ``name``: what names another one to read in its place."""
    other = f"another {name}"  # a name that no teacher can have

    def chooses(field: str) -> bool:
        changed = objective.model_copy(update={field: other})
        try:
            return other in changed.wants({**cards, other: cards[name]})
        except UsageError:
            return False

    fields = [field for field in type(objective).model_fields if field == "teacher" or field.endswith("_teacher")]
    return tuple(
        f"objective.{field}" for field in fields if getattr(objective, field) in (None, name) and chooses(field)
    )


@contextmanager
def commands_of(store: Store | None) -> Iterator[None]:
    """Complete the commands in messages from inside: the store's path, its views, and a model where a loss names it.

    Only a loss knows whether it means a known network once more (:class:`~hdcache.distill.teacher_fit.Misfit`). Of
    two ways out the one is left that is there: with a store, or with live teachers alone.
    """
    try:
        yield
    except UsageError as error:
        live, of = (error.live, error.of) if isinstance(error, Misfit) else (None, None)
        message = str(error) if store is not None or live is None else live
        message = _WAYS.sub(r"\g<live>" if store is None else r"\g<stored>", message)
        if store is None:
            message = _LIVE.sub(r"or give \1 too", message)
        else:
            for name in {match["name"] for match in _COMMAND.finditer(message)} & {*store.teachers()}:
                free = store.free_name(name)
                message = re.sub(rf"(?<=[ =]){re.escape(name)}(?=[ =])", free, message)
            message = _COMMAND.sub(lambda match: _completed(match, store, of), message)
        raise UsageError(message) from None


# As the losses spell it.
_COMMAND = re.compile(r"hdcache extract --store STORE --teacher (?P<name>\S+)=MODEL(?P<sized> --img-size)?")
_LIVE = re.compile(r"or add it(?: \([^)]*\))?: hdcache extract --store STORE (--teacher \S+=MODEL).*$")
_WAYS = re.compile(r"with --online and no store (?P<live>[^,]+), else (?P<stored>.+)$")


def _completed(match: re.Match[str], store: Store, of: str | None) -> str:
    """The command; ``of`` is the stored teacher whose network it runs once more."""
    name, model, options = match["name"], "MODEL", match["sized"] or ""
    if of is not None and of in store.teachers():
        record = store.teacher(of)
        model = record.source or model
        if not options:
            unmasked = record.card.model_copy(update={"mask": None})
            options = as_extracted(record.model_copy(update={"card": unmasked}))
    teacher = shlex.quote(f"{name}={model}")
    return f"{store.extract_command()} --teacher {teacher}{options}"


def named_teachers(
    specs: Sequence[str],
    device: torch.device,
    wanted: Mapping[str, Sequence[str]] | None = None,
    *,
    mask: str | MaskSpec | None = None,
    mask_seed: int = 0,
) -> dict[str, Teacher]:
    """Teachers to run in the loop without a store, able to give the ``wanted`` targets of each."""
    if not specs:
        raise UsageError("--online without a store needs the teachers: --teacher NAME=SPEC")
    taps = {name: [tap for tap in targets if tap == "logits"] for name, targets in (wanted or {}).items()}
    return {
        name: load_teacher(spec, device=device, taps=taps.get(name, ()), mask=mask, mask_seed=mask_seed)
        for spec, name in ((spec, split_name(spec)[0]) for spec in specs)
    }


def stored_teachers(
    store: Store, wanted: Mapping[str, Sequence[str]], specs: Sequence[str], device: torch.device
) -> dict[str, Teacher]:
    """The wanted teachers of a store, run in the loop: from where extraction found them, or from ``specs``."""
    named = dict(split_name(spec) for spec in specs)
    for name in sorted(named.keys() - wanted.keys()):
        raise UsageError(f"--teacher {name}=...: this run reads {', '.join(wanted) or 'no teacher'} of {store.path}")
    return {name: reload_teacher(store.teacher(name), named.get(name), device) for name in wanted}


def teacher_cards(store: Store | None, live: Mapping[str, Teacher]) -> dict[str, TeacherCard]:
    """Cards by teacher name: what an objective chooses its targets from."""
    cards = {name: store.teacher(name).card for name in store.teachers()} if store is not None else {}
    return cards | {name: teacher.card for name, teacher in live.items()}

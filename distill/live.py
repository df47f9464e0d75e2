"""The teachers of a run: what an objective may choose its targets from, and which of them run in the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hdcache.distill.settings import Recipe
from hdcache.errors import UsageError
from hdcache.schema import MaskSpec, TeacherCard
from hdcache.store import Store
from hdcache.teachers import Teacher, load_teacher, reload_teacher, split_name

Wanted = dict[str, tuple[str, ...]]
"""Teacher name -> targets that it must give for every row."""


def choose_teachers(
    recipe: Recipe,
    store: Store | None,
    specs: Sequence[str],
    device: torch.device,
    *,
    online: bool,
    mask: str | MaskSpec | None = None,
    mask_seed: int = 0,
) -> tuple[dict[str, TeacherCard], Wanted, dict[str, Teacher]]:
    """Cards of all teachers there are, the targets that ``recipe`` wants of them, and those of them that run in the loop.

    Parameters
    ----------
    specs
        ``NAME=SPEC`` of live teachers; with a store, only for those whose weights have moved.
    mask, mask_seed
        which patch tokens live teachers see where there is no store (:func:`~hdcache.masks.parse_mask`).

    Raises
    ------
    UsageError
        when the recipe wants targets that neither a store nor a live teacher can give.
    """
    live = named_teachers(specs, device, mask=mask, mask_seed=mask_seed) if online and store is None else {}
    cards = teacher_cards(store, live)
    wanted = recipe.objective.wants(cards)
    if live and any("logits" in targets for targets in wanted.values()):
        # A teacher comes without its classifier until a target needs one.
        live = named_teachers(specs, device, wanted, mask=mask, mask_seed=mask_seed)
        cards = teacher_cards(store, live)
    if online and store is not None:
        live = stored_teachers(store, wanted, specs, device)
    if wanted and store is None and not online:
        raise UsageError(
            f"recipe {recipe.name!r} reads teacher targets; give --store STORE, or --online with --teacher NAME=SPEC"
        )
    return cards, wanted, live


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

"""The batches of a run: what each student's own run would read, refused where those differ, opened once for all."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hdcache.datasets import Dataset
from hdcache.distill.learner import autocast_precision
from hdcache.distill.live import Wanted, teacher_fields, union
from hdcache.distill.settings import FREE_FIELDS, Recipe
from hdcache.errors import UsageError
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.schema import TeacherCard, ViewSpec
from hdcache.sharing.streaming import warn_of_small_cache
from hdcache.store import Store
from hdcache.target_sources import open_targets
from hdcache.teachers import Teacher

ALIKE = ("batch_size", "buffer_rows", "accumulate", "jitter", "second_jitter")
"""Fields of a recipe that decide its batches."""


@dataclass(frozen=True)
class Entrant:
    """A student before its run."""

    recipe: Recipe
    folder: Path
    student: nn.Module
    heads: nn.Module
    wanted: Wanted
    views: ViewSpec
    views_name: str
    """What the first line calls them."""
    options: Options


@dataclass(frozen=True)
class Sources:
    """What all students of a run read from."""

    dataset: Dataset
    store: Store | None
    cards: Mapping[str, TeacherCard]
    live: Mapping[str, Teacher]
    num_views: int | None

    def alone(self, entrant: Entrant) -> Loader:
        """The batches of the student's own run, but for its targets: their rows, views and order."""
        return Loader(
            self.dataset, entrant.options, views=entrant.views, store=self.store, num_views=self.num_views,
            teachers=list(entrant.wanted),
        )  # fmt: skip

    def together(self, entrants: Sequence[Entrant]) -> Loader:
        """Batches with what any of these students reads; their own batches are alike (:func:`check_alike`).

        Raises
        ------
        UsageError, InputNotFound
            for targets that cannot be read, or that two students want decoded to different types.
        """
        first, device = entrants[0], entrants[0].options.device
        every = union(entrant.wanted for entrant in entrants)
        dtypes = self._dtypes(entrants, device)
        stored, live = [], []
        for dtype in dict.fromkeys(dtypes.values()):
            mine = {name: targets for name, targets in every.items() if dtypes[name] == dtype}
            fields = {name: self._fields(entrants, name) for name in mine}
            opened = open_targets(self.store, mine, live=self.live, device=device, dtype=dtype, fields=fields)
            stored += opened[0]
            live += opened[1]
        loader = Loader(
            self.dataset, first.options, views=first.views, store=self.store, stored=stored, live=live,
            num_views=self.num_views, teachers=list(every),
        )  # fmt: skip
        warn_of_small_cache(stored, loader.views[0] if loader.views else 0)
        return loader

    def _fields(self, entrants: Sequence[Entrant], name: str) -> list[str]:
        """The settings that make these students read teacher ``name``."""
        reading = [entrant for entrant in entrants if name in entrant.wanted]
        return [
            *dict.fromkeys(f for entrant in reading for f in teacher_fields(entrant.recipe.objective, self.cards, name))
        ]

    def _dtypes(self, entrants: Sequence[Entrant], device: torch.device) -> dict[str, torch.dtype]:
        """What the targets of each teacher are decoded to."""
        found: dict[str, tuple[torch.dtype, str]] = {}
        for entrant in entrants:
            dtype = target_dtype(entrant.recipe, self.store, entrant.wanted, device)
            for name in entrant.wanted:
                before, other = found.setdefault(name, (dtype, entrant.recipe.name))
                if before != dtype and name not in self.live:
                    raise UsageError(
                        f"recipes {other!r} and {entrant.recipe.name!r} cannot be trained together: targets of teacher "
                        f"{name!r} are decoded to {before} for the first and {dtype} for the second; give them one amp "
                        "(--set amp=off, or bf16), or train them apart"
                    )
        return {name: dtype for name, (dtype, _) in found.items()}


class Feed:
    """The batches of a session, with what is read by those of its students that still learn."""

    def __init__(self, sources: Sources, entrants: Sequence[Entrant]) -> None:
        self._sources, self._entrants = sources, entrants
        self._wanted: Wanted = {}
        self._loader: Loader | None = None

    def __call__(self, folders: Collection[Path]) -> Loader:
        """For the students of these folders: the same loader as long as they read the same, then one that goes on from it.

        Raises
        ------
        UsageError, InputNotFound
            as :meth:`Sources.together`.
        """
        here = [entrant for entrant in self._entrants if entrant.folder in folders]
        wanted = union(entrant.wanted for entrant in here)
        if self._loader is None or wanted != self._wanted:
            loader = self._sources.together(here)
            if self._loader is not None:
                loader.go_on_from(self._loader)
            self._loader, self._wanted = loader, wanted
        return self._loader


def target_dtype(
    recipe: Recipe, store: Store | None, wanted: Mapping[str, Sequence[str]], device: torch.device
) -> torch.dtype:
    """What stored codes are decoded to: the arithmetic of the training step, float32 where rows are stored so."""
    stored = [tap.encoding for name in wanted for tap in store.teacher(name).taps.values()] if store is not None else []
    return torch.float32 if "fp32" in stored else autocast_precision(recipe, device) or torch.float32


def check_alike(entrants: Sequence[Entrant], alone: Sequence[Loader]) -> None:
    """Refuse students whose own runs (``alone``, in their order) would not see the same batches.

    Raises
    ------
    UsageError
        naming two recipes, the setting in which they differ, both values, and what to do.
    """
    for entrant, loader in zip(entrants[1:], alone[1:], strict=True):
        found = _difference(entrants[0], alone[0], entrant, loader)
        if found is not None:
            apart = f"{found.fix}, or train them apart" if found.fix else "train them apart"
            raise UsageError(
                f"recipes {entrants[0].recipe.name!r} and {entrant.recipe.name!r} cannot be trained together: {found.what} is "
                f"{_shown(found.first)} in the first and {_shown(found.second)} in the second; {apart}"
            )


class _Difference(NamedTuple):
    """What differs, both values, and how to make them alike (empty: nothing does)."""

    what: str
    first: Any
    second: Any
    fix: str = ""


def _difference(first: Entrant, one: Loader, second: Entrant, other: Loader) -> _Difference | None:
    """None where the batches are the same."""
    recipes = first.recipe, second.recipe
    views = [recipe.objective.fresh_views() for recipe in recipes]
    if views[0] != views[1]:
        return _Difference("the number of new views that the objective draws in each epoch", views[0], views[1])
    dumped = [recipe.model_dump(mode="json") for recipe in recipes]
    for field in ALIKE:
        values = [found[field] for found in dumped]
        if values[0] != values[1]:
            fix = f"{field}={_shown(values[0])}"
            quoted = f"'{fix}'" if isinstance(values[0], dict) else fix
            return _Difference(field, values[0], values[1], f"add --set {quoted}")
    seeds = [recipe.order_seed() for recipe in recipes]
    if seeds[0] != seeds[1]:
        return _Difference("seed, which orders the samples,", seeds[0], seeds[1], f"add --set data_seed={seeds[0]}")
    shapes = [entrant.options.preprocessing.model_dump(mode="json") for entrant in (first, second)]
    if shapes[0] != shapes[1]:
        size = shapes[0]["size"]
        fix = f"add --set student.arguments.img_size={size}" if shapes[1] | {"size": size} == shapes[0] else ""
        return _Difference("the student's input", shapes[0], shapes[1], fix)
    if first.views != second.views:
        return _Difference("the way that views are drawn", first.views_name, second.views_name, "give --views")
    if one.views != other.views:
        fewest = min(len(one.views), len(other.views))
        fix = f"add --num-views {fewest}" if one.views[:fewest] == other.views[:fewest] and fewest else ""
        return _Difference("the list of stored views that are complete in its teachers", one.views, other.views, fix)
    for view in one.views if one.store is not None else ():
        rows = one.rows(view), other.rows(view)
        if not np.array_equal(*rows):
            return _Difference(f"the number of usable rows of view {view}", len(rows[0]), len(rows[1]))
    return None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def identity(entrant: Entrant, sources: Sources, loader: Loader, *, online: bool) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was stopped; ``loader`` is that of the student alone.

    It holds nothing of other students, so that a run may be gone on with alone or beside any.
    """
    recipe, store, wanted = entrant.recipe, sources.store, entrant.wanted
    seals = {view: loader.seals(view) for view in loader.views}
    manifests = {
        reader.name: {str(view): seals[view][reader.name].digest() for view in loader.views}
        for reader in loader.readers
    }
    # Without a teacher the recorded views decide the rows: those of a run that reads teachers are in its manifests.
    recorded = {str(view): found[""].digest() for view, found in seals.items() if "" in found}
    live = {name: teacher.card for name, teacher in sources.live.items() if store is None and name in wanted}
    return {
        "recipe": recipe.model_dump(mode="json", exclude=FREE_FIELDS),
        "dataset": sources.dataset.card.fingerprint,
        "targets": {name: list(targets) for name, targets in wanted.items()},
        "manifests": manifests,
        "online": online and bool(wanted),
        # A store's teachers are told apart by their manifests.
        "teachers": {name: card.model_dump(mode="json") for name, card in live.items()},
        "views": loader.spec.model_dump(mode="json"),
        "num_views": len(loader.views),
        "precision": str(autocast_precision(recipe, loader.options.device)),
        **({"recorded_views": recorded} if recorded else {}),
        **({"left_out": loader.left_out} if loader.left_out else {}),
    }

"""Which recipes a run trains: by name, file or record, changed for all or for one, spread over the values of a sweep."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdcache.distill.changes import merge, nested_changes, parse_value, validated
from hdcache.distill.recipes import get_recipe, recipe_from_file
from hdcache.distill.settings import Recipe
from hdcache.errors import UsageError
from hdcache.records import check_name

Source = str | Path | Recipe
"""A name in ``hdcache recipes``, a JSON or YAML file, or a record."""


def resolve(recipe: Source, overrides: Mapping[str, Any] | None) -> Recipe:
    """A recipe from a name, a file or a record, with single fields changed."""
    if isinstance(recipe, Recipe):
        return validated(merge(recipe.model_dump(mode="json"), nested_changes(overrides or {})), "recipe")
    if isinstance(recipe, Path) or str(recipe).endswith((".json", ".yaml", ".yml")):
        return recipe_from_file(Path(recipe), overrides or {})
    return get_recipe(recipe, overrides or {})


def resolve_several(
    recipes: Sequence[Source],
    overrides: Mapping[str, Any] | None = None,
    recipe_overrides: Mapping[int, Mapping[str, Any]] | None = None,
    sweep: Mapping[str, Sequence[Any] | str] | None = None,
) -> list[Recipe]:
    """Recipes with names of their own, each of which can be a folder's.

    Parameters
    ----------
    overrides, recipe_overrides
        dotted fields to change in all recipes, and in single ones (from 1), which go before.
    sweep
        dotted field -> values (a string is read as a YAML list, brackets left out): every recipe once with each value, or
        with each combination of several fields; the value is added to its name (``tinymim-tiny-lr-0.001``).

    Raises
    ------
    UsageError
        for changes as :func:`~hdcache.distill.recipes.get_recipe` does, a recipe that there is not, a sweep without values,
        and names that are no folder's or occur twice.
    """
    single = recipe_overrides or {}
    if not recipes:
        raise UsageError("nothing to train; name at least one recipe ('hdcache recipes' lists them)")
    if beyond := sorted(number for number in single if not 1 <= number <= len(recipes)):
        raise UsageError(f"--set-recipe {beyond[0]}: there are recipes 1 to {len(recipes)}")
    swept = {field: _values(field, values) for field, values in (sweep or {}).items()}
    found: list[Recipe] = []
    for number, recipe in enumerate(recipes, 1):
        changes = {**(overrides or {}), **single.get(number, {})}
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            plan = resolve(recipe, {**changes, **chosen})
            suffix = "".join(f"-{field.rpartition('.')[2]}-{_spelled(value)}" for field, value in chosen.items())
            found.append(plan.model_copy(update={"name": check_name(plan.name + suffix, "recipe name")}))
    for number, plan in enumerate(found, 1):
        first = next(i for i, other in enumerate(found, 1) if other.name == plan.name)
        if first != number:
            # So many students come of each recipe.
            per = len(found) // len(recipes)
            one, other = (1 + (place - 1) // per for place in (first, number))
            fix = f"give one another name: --set-recipe {other}:name=OTHER"
            if one == other:
                fix = "leave out one of two --sweep values that are spelled alike in a folder's name"
            which = f"recipes {one} and {other}" if per == 1 else "two students"
            raise UsageError(f"{which} are called {plan.name!r}, which is the name of the run's folder; {fix}")
    return found


@contextmanager
def named(recipe: Recipe, *, several: bool) -> Iterator[None]:
    """Say which of ``several`` recipes a :class:`UsageError` from inside is about."""
    try:
        yield
    except UsageError as error:
        if not several:
            raise
        raise UsageError(f"recipe {recipe.name!r}: {error}") from None


def _values(field: str, given: Sequence[Any] | str) -> list[Any]:
    values = parse_value(f"[{given}]", f"--sweep {field}={given}") if isinstance(given, str) else list(given)
    if not isinstance(values, list) or not values:
        raise UsageError(f"--sweep {field}={given} has no values; give them with commas between, such as lr=1e-3,3e-4")
    return values


def _spelled(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")

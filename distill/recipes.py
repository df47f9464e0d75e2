"""Published recipes by name, what is printed of them, and how a user's changes reach them.

The recipes themselves are data: ``published_*.py``, each value with its source. ``get_recipe`` changes single fields,
``recipe_from_file`` reads a file; both name every field that cannot be meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdcache.distill import (
    published_amd,
    published_baselines,
    published_hybrid,
    published_sdssl,
    published_tinymim,
)
from hdcache.distill.changes import merge, nested_changes, parse_value, validated
from hdcache.distill.entry import Entry, fields
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, UsageError, nearest

RECIPES: dict[str, Entry] = {
    entry.recipe.name: entry
    for module in (published_tinymim, published_hybrid, published_amd, published_sdssl, published_baselines)
    for entry in module.ENTRIES
}


def get_recipe(name: str, overrides: Mapping[str, str | object] | None = None) -> Recipe:
    """The recipe ``name`` with single fields changed.

    Parameters
    ----------
    overrides
        dotted field -> value (``{"student.drop_path": "0.2"}``); a string is parsed by :func:`parse_value`.

    Raises
    ------
    UsageError
        for an unknown recipe or field (naming the nearest one) or a value that does not fit; all faults at once.
    """
    return validated(merge(_base(name), nested_changes(overrides or {})), f"recipe {name!r}")


def recipe_from_file(path: str | Path, overrides: Mapping[str, str | object] | None = None) -> Recipe:
    """A recipe from a JSON or YAML file, then changed by ``overrides`` as in :func:`get_recipe`.

    The file holds all fields, or ``base: NAME`` and those that differ from that recipe.

    Raises
    ------
    InputNotFound
        if the file cannot be read.
    UsageError
        if it is not a mapping of recipe fields, or as in :func:`get_recipe`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputNotFound(f"{path}: recipe file cannot be read ({error})") from None
    data = parse_value(text, str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of recipe fields, found {type(data).__name__}")
    base = data.pop("base", None)
    return validated(merge(merge(_base(str(base)) if base else {}, data), nested_changes(overrides or {})), str(path))


def show(name: str, overrides: Mapping[str, str | object] | None = None) -> list[tuple[str, str, str, str]]:
    """One row per field of a recipe: dotted path, value as JSON, source of that value, what the field means.

    A field that ``overrides`` changed says so, and what the recipe has there.
    """
    recipe, entry = get_recipe(name, overrides), _entry(name)
    published = {path: value for path, value, _ in fields(entry.recipe)}
    rows = []
    for path, value, meaning in fields(recipe):
        if path in published and value == published[path]:
            source = entry.source(path)
        elif path in published:
            source = f"yours; the recipe has {json.dumps(published[path])}"
        else:
            source = "yours, or the default of what you chose"
        rows.append((path, json.dumps(value), source, meaning))
    return rows


def format_recipe(name: str, overrides: Mapping[str, str | object] | None = None) -> str:
    """A recipe as a page of text: what it is for, then two lines per field."""
    entry = _entry(name)
    lines = [f"{name}: {entry.about}", f"method {entry.method}, student {entry.student}, teacher {entry.teacher}"]
    lines += [*entry.notes.splitlines(), ""]
    for path, value, source, meaning in show(name, overrides):
        lines += [f"{path:<34} {value:<22} {source}", f"    {meaning}"]
    return "\n".join(lines)


def list_recipes() -> dict[str, dict[str, str]]:
    """Name -> method, student, teacher and purpose of every recipe."""
    return {
        name: {"method": entry.method, "student": entry.student, "teacher": entry.teacher, "about": entry.about}
        for name, entry in RECIPES.items()
    }


def format_list() -> str:
    """:func:`list_recipes` as one line each."""
    listed = list_recipes()
    width = {key: max(len(facts[key]) for facts in listed.values()) for key in ("method", "student")}
    return "\n".join(
        f"{name:<{max(map(len, listed))}}  {facts['method']:<{width['method']}}  {facts['student']:<{width['student']}}  "
        f"{facts['about']} (teacher: {facts['teacher']})"
        for name, facts in listed.items()
    )


def _entry(name: str) -> Entry:
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def _base(name: str) -> dict[str, Any]:
    return _entry(name).recipe.model_dump(mode="json")

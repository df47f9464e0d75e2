"""How a user's changes reach a recipe: parse a value, merge it in, and name every field that cannot be meant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import yaml  # type: ignore[import-untyped]  # the package ships no types
from pydantic import ValidationError

from hdcache.distill.settings import Recipe
from hdcache.errors import UsageError, nearest
from hdcache.records import Record


class _Yaml12(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped
    """YAML whose plain scalars mean what YAML 1.2 says: 1e-4 is a number, off and no are words."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


_SCALARS = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
# PyYAML's own constructors read 010 as octal.
_Yaml12.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_value(text: str, where: str) -> Any:
    """The value that ``text`` spells in YAML 1.2 (JSON included): number, true, null, list, mapping or string."""
    try:
        # JSON is nearly a part of YAML 1.2; PyYAML stumbles over what is not, such as tabs.
        return json.loads(text, parse_constant=_no_number)
    except ValueError:
        pass
    try:
        return _Yaml12(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{where}: not a YAML or JSON value ({reason}); put text with special characters in quotes"
        ) from None


def _no_number(text: str) -> None:
    raise ValueError(text)


def nested_changes(overrides: Mapping[str, str | object]) -> dict[str, Any]:
    """``{"a.b": "1"}`` as ``{"a": {"b": 1}}``; strings are parsed by :func:`parse_value`, other values kept."""
    nested: dict[str, Any] = {}
    for path, value in overrides.items():
        parsed: Any = parse_value(value, f"--set {path}={value}") if isinstance(value, str) else value
        for part in reversed(path.split(".")):
            parsed = {part: parsed}
        nested = merge(nested, parsed)
    return nested


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, mapping into mapping; neither is altered."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        # Another kind of objective shares no fields with the old one, so nothing of it is kept.
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def validated(data: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that ``data`` (from ``where``) describes; :class:`UsageError` lists every fault at once."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors(include_url=False))
        raise UsageError(f"{where}: {faults} ('hdcache recipes show NAME' explains every field)") from None


def _fault(fault: Mapping[str, Any]) -> str:
    records: list[type[Record]] = [Recipe]
    path: list[str] = []
    siblings: set[str] = set()
    for part in fault["loc"]:
        kinds = {record.model_fields["kind"].default: record for record in records if "kind" in record.model_fields}
        if part in kinds:
            # pydantic puts the kind of a union's member into the path, where no user wrote it.
            records = [kinds[part]]
            continue
        path.append(str(part))
        siblings = {name for record in records for name in record.model_fields}
        fields = [record.model_fields[part] for record in records if part in record.model_fields]
        records = [inner for field in fields for inner in _records_in(field.annotation)]
    where = ".".join(path) or "recipe"
    if fault["type"] == "extra_forbidden":
        return f"unknown field {where!r}; {nearest(path[-1], siblings)}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] == "value_error":
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where}: {fault['msg']} (found {repr(fault['input'])[:80]})"


def _records_in(annotation: Any) -> list[type[Record]]:
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return [annotation]
    return [record for inner in get_args(annotation) for record in _records_in(inner)]

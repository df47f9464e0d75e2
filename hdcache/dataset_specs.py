"""What a data set spec means: its kind, its path and its options, before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from hdcache.errors import InputNotFound, UsageError, nearest

Kind = Literal["folder", "tar", "hf", "torchvision", "npz", "video", "store"]
KINDS: dict[str, Kind] = {
    "folder": "folder", "tar": "tar", "wds": "tar", "npz": "npz", "hf": "hf", "torchvision": "torchvision",
    "video": "video", "store": "store",
}  # fmt: skip
OPTIONS: dict[Kind, tuple[str, ...]] = {
    "folder": (),
    "tar": (),
    "npz": ("images", "labels", "ids"),
    "video": (),
    "store": (),
    "hf": ("split", "image", "label", "id", "revision", "config"),
}


@dataclass(frozen=True)
class Spec:
    """A parsed spec; ``text`` is what was asked, for messages."""

    text: str
    kind: Kind
    path: str
    options: Mapping[str, str]

    def canonical(self) -> str:
        """The spec with its kind and absolute path; parses to the same data set."""
        options = "&".join(f"{name}={_quote(value, '%&')}" for name, value in sorted(self.options.items()))
        return f"{self.kind}:{_quote(self.path, '%?')}" + (f"?{options}" if options else "")


def parse(text: str) -> Spec:
    """The spec that ``text`` spells (the table is in :mod:`hdcache.datasets`); paths are made absolute."""
    prefix, _, rest = text.partition(":")
    if kind := KINDS.get(prefix):
        path, _, query = rest.partition("?")
        path = unquote(path)
        if not path:
            raise UsageError(f"{text!r} names no data set; write {prefix}:PATH")
        if kind in ("folder", "tar", "npz", "video", "store") or (
            kind == "hf" and (path[0] in "/.~" or os.path.exists(path))
        ):
            path = absolute(path)
        return Spec(text, kind, path, _options(text, kind, query))
    if re.match(r"[A-Za-z][A-Za-z0-9+-]+:", text) and not os.path.exists(text):
        raise UsageError(f"{text!r}: unknown kind of data set {prefix!r}; {nearest(prefix, KINDS)}")
    path = absolute(text)
    if re.search(r"\.(tar(\.\w+)?|tgz)$", path) and not os.path.isdir(path):
        return Spec(text, "tar", path, {})
    if not os.path.exists(path):
        raise InputNotFound(f"{text!r}: no such directory or file ({path}); check the path")
    if os.path.isdir(path):
        return Spec(text, "folder", path, {})
    if path.endswith(".npz"):
        return Spec(text, "npz", path, {})
    raise UsageError(f"{text!r} is a file but neither .tar nor .npz; give a directory of images, a .tar or an .npz")


def _options(text: str, kind: Kind, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: option {part!r} has no value; write {part}=VALUE")
        if kind in OPTIONS and name not in OPTIONS[kind]:
            advice = nearest(name, OPTIONS[kind]) if OPTIONS[kind] else f"{kind}: takes none (a '?' in a path is %3F)"
            raise UsageError(f"{text!r}: unknown option {name!r}; {advice}")
        if name in options:
            raise UsageError(f"{text!r}: option {name!r} is given twice; give it once")
        options[name] = unquote(value)
    return options


def absolute(path: str) -> str:
    """``path`` from the root of the file system, ``~`` expanded."""
    return os.path.abspath(os.path.expanduser(path))


def _quote(text: str, reserved: str) -> str:
    return re.sub(f"[{reserved}]", lambda match: f"%{ord(match[0]):02X}", text)

"""The web pages of a catalogue: templates, filled in. Every value is escaped by the template engine, whatever a store says.

The files below ``web/`` hold all markup, style and script; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2

from hdcache.errors import printable
from hdcache.progress import counted, size
from hdcache.sharing.catalogue_entries import StoreEntry, TapEntry, TeacherEntry
from hdcache.sharing.catalogue_text import class_count, error_text, span, state

ASSETS = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
CLASSES = 200
"""Class names that a page shows."""


@cache
def asset(name: str) -> bytes:
    """A file of :data:`ASSETS`."""
    return files("hdcache.sharing").joinpath("web", name).read_bytes()


@cache
def asset_version(name: str) -> str:
    """Changes with the file's bytes: an address with it may be kept for ever."""
    return hashlib.sha256(asset(name)).hexdigest()[:12]


def _load(name: str) -> str:
    return asset(name).decode()


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": size, "span": span, "percent": _percent, "quoted": quoted}
    made.globals |= {
        "version_of": asset_version,
        "state": state,
        "class_count": class_count,
        "error_text": error_text,
        "counted": counted,
    }
    return made


def _visible(value: Any) -> Any:
    """Texts without what would change how others are read: bidirectional overrides, control characters."""
    return printable(value) if type(value) is str else value  # not of markup, which is made here


def quoted(path: str) -> str:
    """A store's path in an address."""
    return "" if path == "." else quote(path)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _page(template: str, /, **values: Any) -> bytes:
    return _templates().get_template(template).render(**values).encode("utf-8", "backslashreplace")


def catalogue_page(name: str, entries: Sequence[StoreEntry], query: str, total: int) -> bytes:
    """All stores that ``query`` found, of ``total``; ``name`` is what the catalogue is called."""
    good = [entry for entry in entries if not entry.fault]
    return _page(
        "catalogue.html",
        name=name,
        stores=good,
        faults=[entry for entry in entries if entry.fault],
        query=query,
        total=total,
        bytes=sum(entry.bytes for entry in good),
    )


def store_page(entry: StoreEntry, url: str, classes: Sequence[str]) -> bytes:
    """One store; ``url`` is the address that it can be pulled from."""
    name = entry.path.rpartition("/")[2] if entry.path != "." else "store.hdc"
    lookable = [_choices(teacher) for teacher in entry.teachers if teacher.views and not teacher.fault]
    return _page(
        "store.html",
        store=entry,
        classes=classes[:CLASSES],
        commands=_commands(entry, url, name),
        look=json.dumps([choice for choice in lookable if choice["taps"]]),
        smaller=_smaller,
    )


def error_page(status: int, reason: str, message: str) -> bytes:
    """What is shown in place of a page that is not there."""
    return _page("error.html", status=status, reason=reason, message=message)


def _choices(teacher: TeacherEntry) -> dict[str, Any]:
    """What the look inside offers of a teacher."""
    taps = [tap.tap for tap in teacher.taps if teacher.held is None or tap.tap in teacher.held]
    # What a stranger looks at first: the features that the network ends in.
    first = [tap for tap in taps if tap == "final"]
    taps = first + [tap for tap in taps if tap not in first]
    return {"name": teacher.name, "views": list(teacher.views), "slots": teacher.slots, "taps": taps}


def _smaller(tap: TapEntry) -> str:
    """How many times smaller than fp16 a tap is, in words."""
    return f"{tap.smaller_than_fp16:g} times" if tap.smaller_than_fp16 else "-"


def _commands(entry: StoreEntry, url: str, name: str) -> list[tuple[str, str]]:
    """What a reader of the page may want to type, each with its purpose."""
    folder = shlex.quote(f"./{name}" if name.startswith("-") else name)  # no option
    found = [
        ("Copy it to this machine", f"hdcache pull {shlex.quote(url)} {folder}"),
        ("Check every byte of the copy", f"hdcache verify {folder}"),
    ]
    trained = next((one for one in entry.teachers if one.views and one.taps), None)
    if trained is None:
        return found
    taps = [tap.tap for tap in trained.taps]
    target = "final" if "final" in taps else taps[0]
    if len(entry.teachers) > 1 or len(taps) > 1:
        part = f"--teacher {shlex.quote(trained.name)} --tap {shlex.quote(target)}"
        found.insert(1, ("Copy only a part of it", f"hdcache pull {shlex.quote(url)} {folder} {part}"))
    found.append(("See which published recipes there are", "hdcache recipes"))
    loop = (
        f"import hdcache\n\nstore = hdcache.open_store({name!r})\n"
        f"for batch in store.loader({{{trained.name!r}: [{target!r}]}}, batch_size=64, size={trained.size}):\n"
        f"    batch.images, batch.targets[{trained.name!r}][{target!r}]"
    )
    return [*found, ("Train from it in your own loop", loop)]

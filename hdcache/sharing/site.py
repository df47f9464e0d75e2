"""What the server answers at each address that is not a file of a store: pages, the catalogue, looks inside.

::

    /                       the catalogue; ?q= searches it
    /catalog.json           the same for programs
    /view/STORE             a store's page
    /look/row/STORE         JSON: ?teacher= &tap= &view= &row=
    /look/relation/STORE    JSON: the same with &token= &kind= [&head=]
    /look/image/STORE       JSON: ?view= &row= &slots=
    /assets/page.css, .js
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hdcache.errors import HdcacheError, InputNotFound, UsageError, printable
from hdcache.sharing import pages
from hdcache.sharing.catalogue import CATALOGUE_FILE, Catalogue
from hdcache.sharing.catalogue_entries import select
from hdcache.store import Store

if TYPE_CHECKING:
    # Loads torch, which takes seconds: only who looks inside waits for it.
    from hdcache.sharing.look import Look

OPEN = 4
"""Stores that are kept open to be looked into."""


@dataclass(frozen=True)
class Answer:
    """A body with its type."""

    body: bytes
    type: str = "text/html; charset=utf-8"
    cache: str = "no-cache"
    """How long a browser may keep it without asking."""
    status: int = 200


class Site:
    """The pages of one catalogue."""

    def __init__(self, catalogue: Catalogue, *, originals: bool) -> None:
        """``originals``: whether pictures may be read from where a store says its data set was."""
        self.catalogue, self._originals = catalogue, originals
        self._looks: OrderedDict[tuple[Any, ...], Look] = OrderedDict()
        self._lock = threading.Lock()

    def answer(self, path: str, query: Mapping[str, str], url: str) -> Answer:
        """The answer at an address, decoded; ``url`` is how this server was addressed, without a slash at its end.

        Raises
        ------
        InputNotFound
            where there is nothing.
        UsageError
            for parameters that cannot be meant.
        HdcacheError
            when a store cannot be read.
        """
        if path == "":
            entries, words = self.catalogue.entries(), query.get("q", "")[:200]
            return Answer(
                pages.catalogue_page(self.catalogue.root.name, select(entries, search=words), words, len(entries))
            )
        if path == CATALOGUE_FILE:
            return Answer(self.catalogue.record().model_dump_json().encode(), "application/json")
        first, _, rest = path.partition("/")
        if first == "assets" and rest in pages.ASSETS:
            kept = "max-age=31536000, immutable" if query.get("v") == pages.asset_version(rest) else "no-cache"
            return Answer(pages.asset(rest), pages.ASSETS[rest], kept)
        if first == "view":
            return self._view(rest or ".", url)
        what, _, where = rest.partition("/")
        if first == "look" and what in ("row", "relation", "image"):
            return self._look(what, where or ".", query)
        raise InputNotFound("there is nothing at this address")

    def _view(self, path: str, url: str) -> Answer:
        entry = self.catalogue.entry(path)
        if entry is None:
            raise InputNotFound(f"there is no store {path!r} here")
        classes = () if entry.fault else Store.open(self.catalogue.root / path).card.dataset.classes
        return Answer(pages.store_page(entry, url if path == "." else f"{url}/{pages.quoted(path)}", classes))

    def _look(self, what: str, path: str, query: Mapping[str, str]) -> Answer:
        entry = self.catalogue.entry(path)
        if entry is None or entry.fault:
            raise InputNotFound(f"there is no store {path!r} here that can be read")
        look = self._opened(path)
        view, row = _number(query, "view"), _number(query, "row")
        if what == "image":
            found: dict[str, Any] = dict(look.image(view, row, _number(query, "slots", 1)))
        elif what == "row":
            found = look.row(query.get("teacher", ""), query.get("tap", ""), view, row)
        else:
            head = None if query.get("head", "mean") == "mean" else _number(query, "head")
            token, kind = _number(query, "token"), query.get("kind", "")
            found = look.relation(query.get("teacher", ""), query.get("tap", ""), view, row, token, kind, head)
        shown = {name: printable(value) if isinstance(value, str) else value for name, value in found.items()}
        return Answer(json.dumps(shown, allow_nan=False).encode(), "application/json")

    def _opened(self, path: str) -> Look:
        from hdcache.sharing.look import Look

        key = (path, self.catalogue.stamp(path))
        with self._lock:
            if key not in self._looks:
                self._looks[key] = Look(Store.open(self.catalogue.root / path), originals=self._originals)
            self._looks.move_to_end(key)
            while len(self._looks) > OPEN:
                self._looks.popitem(last=False)
            return self._looks[key]


def _number(query: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = query.get(name, "")
    if not text and default is not None:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 16):
        raise UsageError(f"{name}={text[:40]!r} is no whole number")
    return int(text)


def failure(error: HdcacheError | OSError) -> tuple[int, str]:
    """Status and message of an answer that could not be given."""
    message = str(error.args[-1]) if error.args else type(error).__name__
    status = 404 if isinstance(error, InputNotFound) else 400 if isinstance(error, UsageError) else 500
    return status, " ".join(message.split())

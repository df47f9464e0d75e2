"""The pages hold what a store says as text, whatever it says, and load nothing from elsewhere."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.sharing import pages
from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.catalogue_entries import StoreEntry, TapEntry, TeacherEntry

EVIL = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}</style>&lt;"""


class Reading(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags for key, value in attributes.items() if key == name and value]


def hostile(text: str) -> StoreEntry:
    """A store that says ``text`` wherever a store can say something."""
    tap = TapEntry(tap=text, encoding=text, certificate={"relative_rmse": 0.1})
    teacher = TeacherEntry(
        name=text, architecture=text, precision=text, mask=text, licence=text, source=text, views=(0,), taps=(tap,)
    )
    broken = TeacherEntry(name=text, fault=text or "broken")
    return StoreEntry(
        path=text or "x", id="0" * 16, kind=text, noun=text, samples=3, classes=2, data=text, views=text, made_by=text,
        written_with={text: text}, teachers=(teacher, broken), sealed=True,
    )  # fmt: skip


def every_page(text: str) -> list[bytes]:
    entry = hostile(text)
    fault = StoreEntry(path=text or "x", fault=text or "broken")
    return [
        pages.catalogue_page(text, [entry, fault], text, 2),
        pages.catalogue_page(text, [], text, 0),
        pages.store_page(entry, f"http://localhost/{pages.quoted(entry.path)}", [text, "b"]),
        pages.store_page(fault, "http://localhost/x", []),
        pages.error_page(404, "Not Found", text),
    ]


def check(page: bytes) -> Reading:
    """Nothing runs, is styled or is loaded but our own two files."""
    read = Reading(page)
    assert [attributes.get("src") for tag, attributes in read.tags if tag == "script"] == [
        f"/assets/page.js?v={pages.asset_version('page.js')}"
    ]
    for tag, attributes in read.tags:
        assert tag not in ("style", "iframe", "object", "embed", "base", "form") or (
            tag == "form" and attributes.get("action", "/") == "/"
        )
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert all(value.startswith(("/", "#", "data:image/svg+xml,")) for value in read.values("href"))
    assert all(value.startswith("/assets/") for value in read.values("src"))
    return read


@pytest.mark.parametrize("page", every_page(EVIL), ids=["catalogue", "empty", "store", "unreadable", "error"])
def test_hostile_names_stay_text(page: bytes) -> None:
    read = check(page)
    assert "<script>alert(1)</script>" in read.text
    assert "{{ 7 * 7 }}" in read.text
    assert "<script>alert" not in page.decode()


@given(st.text(max_size=60))
def test_no_text_of_a_store_becomes_markup(text: str) -> None:
    shape = [[tag for tag, _ in check(page).tags] for page in every_page("x")]
    assert [[tag for tag, _ in check(page).tags] for page in every_page(text.encode("utf-8", "ignore").decode())] in (
        shape,
        [[tag for tag, _ in check(page).tags] for page in every_page("")],
    )


def test_nothing_in_a_name_changes_how_others_are_read() -> None:
    """Overrides of the direction of writing, control characters, half a letter."""
    for page in every_page("licence \u202egpl\u202c \x1b[2J \x00 \ud800 \u2066"):
        text = page.decode()
        assert all(letter.isprintable() or letter in "\n\t" for letter in text)
        assert r"\u202e" in text


def test_addresses_of_a_store_stay_here() -> None:
    """Whatever a store is called, its links lead to this server."""
    for path in (
        "javascript:alert(1)",
        "//evil.example",
        "https://evil.example",
        "../..",
        "data:text/html,x",
        "\\\\evil",
    ):
        entry = hostile("x").model_copy(update={"path": path})
        read = Reading(pages.catalogue_page("n", [entry], "", 1))
        links = [value for value in read.values("href") if value.startswith("/view")]
        assert links == [f"/view/{pages.quoted(path)}"]
        assert Reading(pages.store_page(entry, "http://localhost/x", [])).values("data-store") == [pages.quoted(path)]
        check(pages.catalogue_page("n", [entry], "", 1))


def test_what_the_look_offers_survives_its_attribute() -> None:
    page = pages.store_page(hostile(EVIL), "http://localhost/x", [])
    (choices,) = Reading(page).values("data-choices")
    assert json.loads(choices) == [{"name": EVIL, "views": [0], "slots": 1, "taps": [EVIL]}]


def test_commands_of_a_hostile_name_are_one_word(sealed_store: Path) -> None:
    name = "x; rm -rf $(echo ~) `id` '\""
    sealed_store.rename(sealed_store.parent / name)
    (entry,) = Catalogue(sealed_store.parent).entries()
    commands = dict(pages._commands(entry, f"http://h/{pages.quoted(name)}", name))
    pull = shlex.split(commands["Copy it to this machine"])
    assert pull[:2] == ["hdcache", "pull"]
    assert pull[3:] == [name]
    compile(commands["Train from it in your own loop"], "loop", "exec")


def test_a_name_is_never_an_option_of_a_command(sealed_store: Path) -> None:
    name = "--endpoint-url=http:evil"
    sealed_store.rename(sealed_store.parent / name)
    (entry,) = Catalogue(sealed_store.parent).entries()
    commands = dict(pages._commands(entry, f"http://h/{pages.quoted(name)}", name))
    assert shlex.split(commands["Copy it to this machine"])[3:] == [f"./{name}"]
    assert shlex.split(commands["Check every byte of the copy"])[2:] == [f"./{name}"]


def test_a_page_says_what_the_store_says(sealed_store: Path) -> None:
    (entry,) = Catalogue(sealed_store.parent).entries()
    page = Reading(pages.store_page(entry, "http://localhost:8008/store", ["a", "b"]))
    text = " ".join(page.text.split())
    seal = entry.teachers[0].taps[0].certificate
    for part in (
        "store", "sealed", "Images20", f"id {entry.teachers[0].id}", "licence none", f"{100 * (seal['relative_rmse'] or 0):.2f} %",
        "hdcache pull http://localhost:8008/store store", "hdcache verify store", "random resized crops of area 0.2 to 1",
    ):  # fmt: skip
        assert part in text, part


def test_a_part_of_a_copy_offers_only_what_it_holds(sealed_store: Path) -> None:
    (sealed_store / "teachers" / "t" / "held.json").write_text('{"taps":["pooled","final"]}')
    (entry,) = Catalogue(sealed_store).entries()
    page = Reading(pages.store_page(entry, "http://localhost/", []))
    assert json.loads(page.values("data-choices")[0])[0]["taps"] == ["final", "pooled"]
    assert "not in this copy" in page.text


def test_every_picture_and_field_has_a_name(sealed_store: Path) -> None:
    """What a screen reader says: each image has alternative text, each field a label, each heading its rank."""
    (entry,) = Catalogue(sealed_store.parent).entries()
    for page in (pages.store_page(entry, "http://localhost/x", ["a"]), pages.catalogue_page("n", [entry], "", 1)):
        read = Reading(page)
        assert all("alt" in attributes for tag, attributes in read.tags if tag == "img")
        ranks = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
        assert ranks[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(ranks))
        assert ("html", {"lang": "en"}) in read.tags
        text = page.decode()
        for tag, attributes in read.tags:
            if tag == "input" and "id" in attributes:
                assert f'<label for="{attributes["id"]}">' in text


def test_assets_are_there_and_change_their_address_with_their_bytes() -> None:
    for name in pages.ASSETS:
        assert len(pages.asset(name)) > 1000
        assert re.fullmatch("[0-9a-f]{12}", pages.asset_version(name))
    assert b"innerHTML" not in pages.asset("page.js"), "texts of stores are set as text"
    assert b"eval(" not in pages.asset("page.js")

"""The pages in a real browser: what is clicked, pressed and seen. Nothing is loaded from elsewhere, nothing fails."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.server import make_server

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def _missing(what: str) -> None:
    """Where tests are run for everybody a browser has to be there; elsewhere its tests may be left out."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI is set, where 'bash .ci/run' provides it")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed: pip install 'hdcache[test]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _missing(f"no browser among {', '.join(NAMES)} is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # The superuser's browser has no sandbox; it sees nothing but our own pages.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The URL of a server of a folder."""
    stop = threading.Event()
    server = make_server(Catalogue(root), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=(stop.is_set,))
    thread.start()
    try:
        yield server.url
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def url(kept_store: Path) -> Iterator[str]:
    """A server of the folder that holds the store ``store``."""
    with served(kept_store.parent) as found:
        yield found


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens a page as somebody with this screen would; at the end nothing has failed and nothing else was asked for."""
    faults: list[str] = []
    contexts = []

    def open_page(path: str, **settings: Any) -> Any:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((url, "data:")) else faults.append(request.url)
        )
        page.on(
            "response", lambda answer: faults.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
        )
        page.goto(url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def relation(page: Any) -> str:
    """What the heat map is said to show, once it is there."""
    canvas = page.locator(".panels:not([aria-busy]) canvas[aria-label*='strongest at']")
    canvas.wait_for()
    return str(canvas.get_attribute("aria-label"))


@contextmanager
def another_relation(page: Any) -> Iterator[None]:
    """What is done inside shows another heat map, with other pixels."""
    before, picture = relation(page), page.locator("canvas").screenshot()
    yield
    assert relation(page) != before
    assert page.locator("canvas").screenshot() != picture


def sample(page: Any) -> str:
    return str(page.locator("[data-say=sample]").text_content())


def test_from_the_catalogue_to_the_relations_of_a_token(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit("/", viewport={"width": 1280, "height": 900})
    assert page.locator("h1").text_content() == "Teacher stores"
    page.screenshot(path=tmp_path / "catalogue.png", full_page=True)
    page.get_by_role("link", name="store", exact=True).click()
    page.locator("[name=tap]").select_option("block3.attn_in")
    assert "Q-K relation of row 3, column 3" in relation(page)
    page.locator("img[name=picture]:not([hidden])").wait_for()
    with another_relation(page):
        page.locator("img[name=map]").click(position={"x": 8, "y": 8})
    assert "Q-K relation of row 1, column 1" in relation(page)
    with another_relation(page):
        page.locator("[name=kind]").select_option("vv")
    with another_relation(page):
        page.locator("[name=head]").select_option("2")
        page.locator("[name=class_token]").click()
    assert "V-V relation of the class token" in relation(page)
    page.screenshot(path=tmp_path / "store.png", full_page=True)
    assert (tmp_path / "catalogue.png").stat().st_size > 10_000
    assert (tmp_path / "store.png").stat().st_size > 50_000


def test_everything_can_be_done_with_the_keyboard(visit: Callable[..., Any]) -> None:
    page = visit("/view/store?tap=final&row=0&token=5")
    assert "relation of row 2, column 2" in relation(page)
    page.locator(".panels").focus()
    with another_relation(page):
        page.keyboard.press("ArrowRight")
    assert "relation of row 2, column 3" in relation(page)
    with another_relation(page):
        page.keyboard.press("ArrowDown")
    assert "relation of row 3, column 3" in relation(page)
    first = sample(page)
    page.keyboard.press("PageDown")
    page.get_by_text("row 1 of 21").wait_for()
    assert sample(page) != first
    page.keyboard.press("PageUp")
    page.get_by_text("row 0 of 21").wait_for()
    assert sample(page) == first


def test_an_address_leads_back_to_what_was_seen(visit: Callable[..., Any]) -> None:
    page = visit("/view/store?teacher=all&tap=block3.attn_in&view=0&row=4&token=9&kind=kk&head=1")
    said, seen = relation(page), sample(page)
    assert "K-K relation of row 3, column 2" in said
    again = visit(page.url.partition("127.0.0.1")[2].partition("/")[1] + page.url.split("/", 3)[3])
    assert (relation(again), sample(again)) == (said, seen)
    assert again.locator("[name=head]").input_value() == "1"


def test_a_row_that_failed_says_why(visit: Callable[..., Any], kept_store: Path) -> None:
    page = visit("/view/store")
    relation(page)
    for _ in range(21):
        if sample(page) == "b/broken.png":
            break
        row = int(page.locator("[name=row]").input_value())
        page.locator("[name=next]").click()
        page.get_by_text(f"row {row + 1} of 21").wait_for()
    page.get_by_text("This row failed when it was extracted").wait_for()
    assert page.locator("img[name=map]").is_hidden()


def test_hidden_tokens_are_blank_and_cannot_be_marked(visit: Callable[..., Any]) -> None:
    page = visit("/view/store?teacher=half&tap=final&row=1")
    relation(page)
    box = page.locator("img[name=map]").bounding_box()
    seen = set()
    for token in range(16):
        page.locator("img[name=map]").click(
            position={"x": (token % 4 + 0.5) * box["width"] / 4, "y": (token // 4 + 0.5) * box["height"] / 4}
        )
        seen |= {token} if f"&token={token}&" in page.url else set()
    assert len(seen) == 8


def test_taps_without_tokens_are_shown_for_what_they_are(visit: Callable[..., Any]) -> None:
    page = visit("/view/store?tap=logits&row=1")
    page.locator(".logits li").first.wait_for()
    shares = [float(text) for text in re.findall(r"([0-9.]+) %", page.locator(".logits").inner_text())]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    page.get_by_text("logits has no tokens to map").wait_for()
    page.locator("[name=tap]").select_option("pooled")
    page.get_by_text("pooled has no tokens to map").wait_for()
    page.locator("[name=tap]").select_option("block3.rel.vv")
    assert "V-V relation" in relation(page)


def test_a_damaged_store_shows_its_fault_and_no_picture(browser: Any, kept_store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(kept_store, tmp_path / "root" / "store")
    for path in (copy / "teachers/all/views/0/final").rglob("c.*"):
        path.write_bytes(b"")
    with served(tmp_path / "root") as url, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}/view/store?tap=block3.attn_in&row=1")
        relation(page)
        page.locator("[name=tap]").select_option("final")
        page.get_by_role("alert").get_by_text("expected").wait_for()
        assert page.locator("img[name=map]").is_hidden()
        assert page.locator("img[name=picture]").is_hidden()
        page.locator("[name=tap]").select_option("block3.attn_in")
        relation(page)
        assert page.get_by_role("alert").is_hidden()


def test_names_of_a_store_are_text(visit: Callable[..., Any]) -> None:
    page = visit("/view/store")
    relation(page)
    page.get_by_text("2 classes").click()
    assert page.locator(".classes span").first.text_content() == "<b>a<"
    assert page.locator(".classes b").count() == 0


def test_a_search_finds_and_says_when_it_does_not(visit: Callable[..., Any]) -> None:
    page = visit("/")
    page.get_by_label("Search", exact=True).fill("nowhere <i>")
    page.keyboard.press("Enter")
    page.get_by_text("No store matches.").wait_for()
    assert page.locator("i:text('nowhere')").count() == 0
    page.get_by_label("Search", exact=True).fill("vit_tiny attn_in")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name="store", exact=True).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(visit: Callable[..., Any], scheme: str) -> None:
    for path in ("/", "/view/store?tap=block3.attn_in"):
        page = visit(path, viewport={"width": 390, "height": 844}, color_scheme=scheme)
        if path != "/":
            relation(page)
        shown = page.locator("body").evaluate(
            "body => [document.documentElement.scrollWidth, getComputedStyle(body).backgroundColor]"
        )
        assert shown[0] <= 390
        dark = max(map(int, re.findall(r"\d+", shown[1])[:3])) < 80
        assert dark == (scheme == "dark")


def test_without_scripts_all_but_the_look_is_there(visit: Callable[..., Any]) -> None:
    page = visit("/view/store", java_script_enabled=False)
    assert page.locator("noscript p").is_visible()
    assert page.get_by_role("heading", name="Teachers and their birth certificates").is_visible()
    assert page.get_by_text("hdcache pull http://127.0.0.1").first.is_visible()


def test_commands_can_be_copied(visit: Callable[..., Any]) -> None:
    page = visit("/view/store", permissions=["clipboard-read", "clipboard-write"])
    relation(page)
    page.get_by_role("button", name="Copy", exact=True).first.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert (
        page.locator("body")
        .evaluate("() => navigator.clipboard.readText()")
        .startswith("hdcache pull http://127.0.0.1")
    )

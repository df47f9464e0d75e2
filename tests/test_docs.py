"""The documentation's Python blocks run, and its links lead somewhere.

The line before a ```python block says what to do with it:
``<!-- run -->`` runs it, ``<!-- run: continues -->`` runs it after the runnable block before it on the page and
with its names, ``<!-- not run: reason -->`` leaves it. A block that says nothing fails.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*(\w*)")
MARKER = re.compile(r"<!--\s*(run|run:\s*continues|not run:\s*\S.*?)\s*-->")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|\b(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    """One fenced block: the number of its first line, its language, its text, the line before its fence."""

    line: int
    language: str
    text: str
    before: str


def blocks_and_prose(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the rest of it."""
    blocks: list[Block] = []
    prose: list[str] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            prose.append(lines[number])
            number += 1
            continue
        end = number + 1
        while end < len(lines) and lines[end].strip() != fence[1]:
            end += 1
        before = next((line.strip() for line in reversed(lines[:number]) if line.strip()), "")
        text = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        blocks.append(Block(number + 2, fence[2].lower(), text, before))
        number = end + 1
    return blocks, "\n".join(prose)


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_and_prose(page)[0] if block.language in ("python", "py", "python3")]


def chains(page: Path) -> list[list[Block]]:
    """The runnable blocks of a page; those that continue each other together."""
    found: list[list[Block]] = []
    for block in python_blocks(page):
        kind = MARKER.fullmatch(block.before)
        if kind and kind[1] == "run":
            found.append([block])
        elif kind and kind[1].startswith("run:") and found:
            found[-1].append(block)
    return found


RUNNABLE = [
    pytest.param(page, chain, id=f"{page.relative_to(ROOT).as_posix()}:{chain[0].line}")
    for page in PAGES
    for chain in chains(page)
]


def test_every_python_block_says_whether_it_runs() -> None:
    wrong = []
    for page in PAGES:
        runnable = False
        for block in python_blocks(page):
            kind = MARKER.fullmatch(block.before)
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if kind is None:
                wrong.append(
                    f"{where} has no <!-- run -->, <!-- run: continues --> or <!-- not run: reason --> before it"
                )
            elif kind[1].startswith("run:") and not runnable:
                wrong.append(f"{where} continues nothing: no runnable block before it on this page")
            runnable = runnable or (kind is not None and kind[1] == "run")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("page", "chain"), RUNNABLE)
def test_python_blocks_run(page: Path, chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in chain:
        # Empty lines in front, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"(`+).+?\1", "", blocks_and_prose(page)[1])
    targets = [first or second for first, second in LINK.findall(prose)]
    dead = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            continue
        path = (page.parent / target.split("#")[0].split("?")[0]).resolve()
        if target.startswith("/") or not path.is_relative_to(ROOT) or not path.exists():
            dead.append(target)
    assert not dead, f"links that lead nowhere: {dead}"


def test_the_readme_is_here() -> None:
    assert ROOT / "README.md" in PAGES

"""The documentation's Python blocks run, its commands parse, and its links lead somewhere.

The line before a ```python block says what to do with it:
``<!-- run -->`` runs it, ``<!-- run: continues -->`` runs it after the runnable block before it on the page and
with its names, ``<!-- not run: reason -->`` leaves it. A block that says nothing fails.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import timm

from hdcache.cli import cli
from hdcache.cli_options import numbered_pairs, pairs
from hdcache.distill.recipes import RECIPES, get_recipe
from hdcache.distill.run_recipes import resolve_several
from hdcache.errors import UsageError
from hdcache.extract.run import extract
from hdcache.geometry import read_geometry
from hdcache.reader import TeacherReader
from hdcache.store import Store
from hdcache.taps import Tokens, parse_tap
from hdcache.views import parse_views

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


def command_lines(page: Path) -> list[str]:
    """Lines of code, fenced or indented by four, that call hdcache; continued lines as one."""
    blocks, prose = blocks_and_prose(page)
    code = [line for block in blocks if block.language not in ("python", "py") for line in block.text.splitlines()]
    code += [line for line in prose.splitlines() if line.startswith("    ")]
    joined = re.sub(r"\\\s*\n\s*", "", "\n".join(code))
    called = (re.fullmatch(r"\s*(?:torchrun .*? -m )?(hdcache .*)", line) for line in joined.splitlines())
    return [line[1] for line in called if line]


def resolved(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` name, inner ones of a group too, and the words after it."""
    command: click.Command = cli
    context = click.Context(command)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        assert found is not None, f"no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, without running it."""
    command, words = resolved(shlex.split(line, comments=True)[1:])
    context = command.make_context(command.name, words)
    return str(command.name), context.params


def check_values(name: str, given: dict[str, Any]) -> None:
    """What the command would read before it touches any file: recipes, fields, taps, models, views."""
    changes = pairs(given.get("changes") or (), "--set")
    if name == "show" and "name" in given:
        get_recipe(given["name"], changes)
    single = numbered_pairs(given.get("single") or (), "--set", "N")
    if name == "distill":
        resolve_several(given["recipes"], changes, single, pairs(given["sweeps"], "--sweep"))
    for number, stage in enumerate(given.get("stages") or (), start=1):
        get_recipe(stage, changes | single.get(number, {}))
    for tap in given.get("taps") or ():
        parse_tap(tap)
    if given.get("views"):
        parse_views(given["views"], 0)
    teachers = given.get("teachers") or given.get("teacher") or ()
    for teacher in (teachers,) if isinstance(teachers, str) else teachers:
        check_model(re.sub(r"^[a-z0-9-]+=", "", teacher))


def check_model(spec: str) -> None:
    """A timm architecture, with a tag of weights that exists; folders of runs are not looked for."""
    name = spec.removeprefix("timm:").removeprefix("random:").split("?")[0]
    if not name.startswith("runs/"):
        architecture, _, tag = name.partition(".")
        assert timm.is_model(architecture), f"timm has no {architecture!r}"
        assert not tag or name in timm.list_pretrained(f"{architecture}.*"), f"timm has no weights {name!r}"


COMMANDS = [
    pytest.param(line, id=f"{page.relative_to(ROOT).as_posix()}:{number}")
    for page in PAGES
    for number, line in enumerate(command_lines(page))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    """Its options, recipes, fields, values, taps and models exist."""
    check_values(*parsed(line))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("hdcache destill tinymim-b --out r", AssertionError),
        ("hdcache distill tinymim-b --out r --stroe s", click.NoSuchOption),
        ("hdcache distill tinymim-b --store s", click.MissingParameter),
        ("hdcache distill tinymim-x --out r", UsageError),
        ("hdcache distill tinymim-b --out r --set objective.head=3", UsageError),
        ("hdcache distill tinymim-b tinymim-s --out r --set-recipe 3:epochs=3", UsageError),
        ("hdcache distill tinymim-b --out r --sweep objective.head=3,4", UsageError),
        ("hdcache chain d --store s --out r --teacher m=runs/m --recipe tinymim-s --set-stage 1:objective.heads=x", UsageError),
        ("hdcache extract d --store s --teacher m=vit_base_patch16_224.nope", AssertionError),
        ("hdcache extract d --store s --teacher m=runs/m --tap block1.attn", UsageError),
        ("hdcache recipes show tinymim-x", UsageError),
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_values(*parsed(line))


def inline_code(page: Path) -> Iterator[str]:
    """What stands between single backticks, on one line."""
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", blocks_and_prose(page)[1]):
        yield " ".join(found.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_inline_commands_and_settings_exist(page: Path) -> None:
    """Pieces of commands: their options, and fields that some recipe has with a value that it takes."""
    known = {option for command in every_command(cli) for parameter in command.params for option in parameter.opts}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    wrong = []
    for code in inline_code(page):
        options: set[str] = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", code))
        if code.startswith("hdcache ") and "..." not in code.split()[1]:
            command, _ = resolved(code.split()[1:])
            options -= {option for parameter in command.params for option in parameter.opts}
            wrong += [f"{code}: no {option}" for option in options]
        elif code.startswith("--"):
            wrong += [f"{code}: no {option}" for option in options - known]
        for change in re.findall(r"(?<=--set )(?:'[^']*'|\S+)", code):
            if change != "FIELD=VALUE" and not some_recipe_takes(change.strip("'")):
                wrong.append(f"{code}: no recipe takes it")
    assert not wrong, "\n".join(wrong)


def every_command(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from every_command(inner)


def some_recipe_takes(change: str) -> bool:
    """Whether a recipe takes FIELD=VALUE; ``FIELD=...`` stands for a number."""
    for name in RECIPES:
        try:
            get_recipe(name, pairs([change.replace("...", "1")], "--set"))
        except UsageError:
            continue
        return True
    return False


FAMILIES = r"(?:tinymim|hybrid|sdssl|amd-image|amd-video|supervised|logits|mae|videomae)-[a-z0-9-]+"
NO_RECIPES = {"videomae-ssv2"}  # ways to draw views


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_recipes_that_are_named_exist(page: Path) -> None:
    codes = [[code] if not code.startswith("hdcache ") else code.split() for code in inline_code(page)]
    named = {word for words in codes for word in words if re.fullmatch(FAMILIES, word)}
    assert named - NO_RECIPES <= RECIPES.keys()


READING = [b for b in python_blocks(ROOT / "docs" / "store-format.md") if "tests/test_docs.py runs it" in b.before]


@pytest.mark.parametrize(
    ("grid", "fidelity", "arrays"),
    [
        (True, 0.3, {"codes"}),
        (False, 0.3, {"codes"}),
        (True, 0.003, {"wide", "codes"}),
        (False, 0.01, {"wide", "codes"}),
    ],
)
def test_a_store_is_read_with_zarr_and_numpy_alone(
    grid: bool, fidelity: float, arrays: set[str], tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own lines: codes that are frequencies and that are not, of 8 bits and of 16; the other encodings; ids and labels."""
    flat = np.random.default_rng(0).integers(0, 256, (80, 1, 1, 3), dtype=np.uint8)
    rough = np.random.default_rng(1).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    images = np.broadcast_to(flat, rough.shape) if grid else rough
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(80) % 3 - 1)
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {
        "device": "cpu",
        "precision": "fp32",
        "taps": ["final"],
        "views": "resize",
        "quiet": True,
    }
    for name, encoding in (("dino", "klt"), ("clip", "int8"), ("mae", "fp16"), ("deit", "bf16")):
        options["fidelity"] = fidelity if encoding == "klt" else None
        extract("npz:data.npz", store="train.hdc", teachers=[f"{name}={tiny}"], encoding=encoding, **options)
    store = Store.open("train.hdc")
    card = TeacherReader(store, "dino").record.taps["final"]
    assert (card.grid is not None, {*card.arrays} - {"prefix"}) == (grid, arrays)
    assert len(READING) == 3
    names: dict[str, Any] = {}
    for block in READING:
        exec(compile(block.text, "store-format.md", "exec", dont_inherit=True), names)  # the page is ours
    for teacher, name in (("dino", "patches"), ("clip", "int8"), ("mae", "fp16"), ("deit", "bf16")):
        expected = TeacherReader(store, teacher).tap(0, "final", 0, 8)
        assert isinstance(expected, Tokens)
        np.testing.assert_allclose(names[name], expected.patches.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
        if teacher == "dino":
            assert np.array_equal(names["prefix"], expected.prefix.numpy())
    assert names["sample"].tolist() == read_geometry(store, 0)[0][:8, 0].tolist()
    assert names["ids"] == list(store.ids)
    assert names["labels"].tolist() == store.labels.tolist()
    assert (names["classes"], names["failed"]) == (list(store.card.dataset.classes), {})

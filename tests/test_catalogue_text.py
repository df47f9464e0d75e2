"""The table of a catalogue: what it says, that it fits a terminal, and that no store can make the terminal obey it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.catalogue_entries import StoreEntry, TapEntry, TeacherEntry
from hdcache.sharing.catalogue_text import class_count, error_text, format_catalogue, plain, span, state

TEXT = st.text(max_size=200)
TAPS = st.builds(TapEntry, tap=TEXT, encoding=TEXT, bytes=st.integers(0, 10**15))
TEACHERS = st.builds(
    TeacherEntry, name=TEXT, fault=TEXT, architecture=TEXT, licence=TEXT, taps=st.lists(TAPS, max_size=3).map(tuple)
)
STORES = st.builds(
    StoreEntry, path=TEXT, fault=st.one_of(st.just(""), TEXT), made_by=TEXT, teachers=st.lists(TEACHERS, max_size=3).map(tuple)
)  # fmt: skip


def test_a_table_of_a_store(sealed_store: Path) -> None:
    entries = Catalogue(sealed_store.parent).entries()
    text = format_catalogue("/data", [*entries, StoreEntry(path="other", fault="not valid JSON")])
    assert text.startswith("1 store in /data, ")
    for part in (
        "20 images",
        "2 classes",
        "vit_tiny_patch16_224",
        "block1.attn_in klt",
        "final fp32",
        f"id {entries[0].id}",
        "sealed",
    ):
        assert part in text
    assert text.endswith("other: not valid JSON")


def test_a_part_of_a_copy_says_which_taps_it_has(sealed_store: Path) -> None:
    (sealed_store / "teachers" / "t" / "held.json").write_text('{"taps":["final"]}')
    lines = format_catalogue("/data", Catalogue(sealed_store).entries()).splitlines()
    assert "block1.attn_in" not in "".join(lines)
    assert any("held final of 3 taps" in line for line in lines)


@given(where=TEXT, entries=st.lists(STORES, max_size=3))
def test_it_fits_120_columns_and_nothing_is_obeyed(where: str, entries: list[StoreEntry]) -> None:
    lines = format_catalogue(where, entries).split("\n")
    assert all(letter.isprintable() for line in lines for letter in line)
    assert max(map(len, lines[1:]), default=0) <= 120


def test_control_letters_are_shown_as_question_marks() -> None:
    assert plain("a\x1b[31mb\nc\x9bd\u202ee") == "a?[31mb?c?d?e"


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((0,), "0"), ((0, 1, 2, 5), "0-2, 5"), ((3, 5, 6), "3, 5-6")])
def test_runs_of_views(numbers: tuple[int, ...], text: str) -> None:
    assert span(numbers) == text


def test_errors_are_those_that_mean_something() -> None:
    seal = {"relative_rmse": 0.0967, "kl": None}
    assert error_text(TapEntry(tap="final", encoding="klt", certificate=seal)) == "klt 9.7 %"
    assert error_text(TapEntry(tap="final", encoding="fp16", certificate=seal)) == "fp16"
    assert error_text(TapEntry(tap="logits", encoding="topk", certificate=seal | {"kl": 0.00123})) == "topk KL 0.0012"
    assert error_text(TapEntry(tap="final", encoding="klt")) == "klt"


def test_words_for_states_and_counts() -> None:
    assert [class_count(number) for number in (0, 1, 1000)] == ["no classes", "1 class", "1,000 classes"]
    teacher = TeacherEntry(name="t")
    assert state(StoreEntry(path="s")) == "no teacher yet"
    assert state(StoreEntry(path="s", teachers=(teacher,))) == "not complete"
    assert state(StoreEntry(path="s", teachers=(teacher,), sealed=True)) == "sealed"

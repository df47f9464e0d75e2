"""Which taps a copy says that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdcache.errors import StoreCorrupt
from hdcache.held import Held, held_taps
from hdcache.store import Store


def test_a_copy_without_a_note_has_all_taps(sealed_store: Path) -> None:
    assert held_taps(Store.open(sealed_store), "t") is None


@pytest.mark.parametrize("taps", [(), ("final",), ("final", "pooled")])
def test_a_note_says_which_taps_are_there(sealed_store: Path, taps: tuple[str, ...]) -> None:
    (sealed_store / "teachers/t/held.json").write_bytes(Held(taps=taps).canonical())
    assert held_taps(Store.open(sealed_store), "t") == {*taps}


@pytest.mark.parametrize("data", ["", "{}", '{"taps":3}', '{"taps":[],"more":1}'])
def test_a_note_that_is_none_is_refused(sealed_store: Path, data: str) -> None:
    (sealed_store / "teachers/t/held.json").write_text(data)
    with pytest.raises(StoreCorrupt, match=r"held\.json"):
        held_taps(Store.open(sealed_store), "t")

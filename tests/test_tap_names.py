"""Names of taps: every name of the grammar, and no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.errors import UsageError
from hdcache.tap_names import GRAMMAR, parse_tap


@given(
    block=st.integers(1, 9999),
    what=st.sampled_from(
        ["out", "attn_in", "qkv", "attn_out", "mid", "mlp_out", "rel.qk", "rel.vv", "rel.qq", "rel.kk"]
    ),
    heads=st.none() | st.integers(1, 9999),
)
def test_every_name_of_the_grammar_parses_to_its_parts(block: int, what: str, heads: int | None) -> None:
    kind = what.partition(".")[2]
    name = f"block{block}.{what}" + (f"@{heads}" if heads and kind else "")
    tap = parse_tap(name)
    assert (tap.name, tap.block, tap.what, tap.kind) == (name, block, "rel" if kind else what, kind)
    assert tap.heads == (heads if kind else None)
    assert tap.is_tokens == (not kind)


@pytest.mark.parametrize(
    "name",
    ["", "block0.out", "block.out", "block1", "block1.rel", "block1.rel.qv", "block01.out", "block-1.out", "Final",
     "block1.out@3", "block1.rel.qk@0", "block1.rel.qk@", "block1.out\n", "block1.out ", "block1\uff11.out", "norm",
     "block99999.out"],
)  # fmt: skip
def test_other_names_are_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown tap .*; taps are blockN\.out, blockN\.attn_in") as caught:
        parse_tap(name)
    assert GRAMMAR in str(caught.value)

"""Names of taps, parsed; what they mean is told in :mod:`hdcache.taps`. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hdcache.errors import UsageError

_NAME = re.compile(
    r"block(?P<block>[1-9][0-9]{0,3})\.(?P<what>out|attn_in|qkv|attn_out|mid|mlp_out"
    r"|rel\.(?P<kind>qk|vv|qq|kk)(@(?P<heads>[1-9][0-9]{0,3}))?)"
)
GRAMMAR = (
    "blockN.out, blockN.attn_in, blockN.qkv, blockN.attn_out, blockN.mid, blockN.mlp_out, "
    "blockN.rel.qk|vv|qq|kk[@HEADS], final, pooled, logits"
)
READS_ATTENTION = ("attn_in", "qkv", "rel")
BRANCHES = ("attn_out", "mid", "mlp_out")


@dataclass(frozen=True)
class TapName:
    """A parsed tap name. ``block`` is 1-based, 0 for the names that belong to no block."""

    name: str
    block: int
    what: str
    """out, attn_in, qkv, attn_out, mid, mlp_out, rel, final, pooled or logits."""
    kind: str = ""
    """qk, vv, qq or kk where ``what`` is rel."""
    heads: int | None = None
    """Heads to split into, where asked for (``@H``)."""

    @property
    def is_tokens(self) -> bool:
        return self.what in ("out", "attn_in", "qkv", *BRANCHES, "final")


def parse_tap(name: str, depth: int | None = None) -> TapName:
    """Parse a tap name; with ``depth``, a block beyond it is a :class:`UsageError` too."""
    if name in ("final", "pooled", "logits"):
        return TapName(name, 0, name)
    match = _NAME.fullmatch(name)
    if not match:
        raise UsageError(f"unknown tap {name!r}; taps are {GRAMMAR}")
    block = int(match["block"])
    if depth is not None and block > depth:
        raise UsageError(f"tap {name!r}: the network has {depth} blocks, block1 to block{depth}")
    heads = int(match["heads"]) if match["heads"] else None
    return TapName(name, block, "rel" if match["kind"] else match["what"], match["kind"] or "", heads)

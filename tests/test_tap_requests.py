from __future__ import annotations

import pytest

from hdcache.errors import UsageError
from hdcache.schema import TapRequest
from hdcache.tap_requests import request, request_all


@pytest.mark.parametrize(
    ("encoding", "top_k", "kept"), [("topk", 5, 5), ("topk", None, 10), (None, 3, 3), ("klt", 3, 3), ("sqrt8", 4, 4)]
)
def test_logits_are_kept_as_soft_labels(encoding: str | None, top_k: int | None, kept: int) -> None:
    assert request("logits", encoding, None, top_k) == TapRequest(tap="logits", encoding="topk", top_k=kept)


def test_top_k_leaves_the_other_taps_alone() -> None:
    """One teacher may have features as klt and logits as soft labels; the order of taps is no difference."""
    asked = request_all(["logits", "final", "final"], None, 0.1, 7)
    assert asked == [
        TapRequest(tap="final", encoding="klt", fidelity=0.1),
        TapRequest(tap="logits", encoding="topk", top_k=7),
    ]
    assert asked == request_all(["final", "logits"], None, 0.1, 7)
    assert request("logits", None, None).encoding == "fp16"


@pytest.mark.parametrize(
    ("tap", "encoding", "top_k", "message"),
    [
        ("logits", "topk", 0, "top_k 0 must be at least 1: the classes to keep of each row of logits"),
        ("logits", "fp16", 5, "top_k belongs to the topk encoding; fp16 keeps every class: drop one of the two"),
        ("final", "topk", None, "encoding topk is for logits, not for final; leave it out: --top-k alone concerns"),
        ("block1.rel.qk", "topk", 4, "encoding topk is for logits, not for block1.rel.qk"),
        ("logits", "topq", None, "unknown encoding 'topq'; did you mean 'topk'"),
    ],
)
def test_what_cannot_be_meant(tap: str, encoding: str, top_k: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(tap, encoding, None, top_k)


def test_top_k_without_logits() -> None:
    with pytest.raises(UsageError, match="top_k 10 concerns the tap logits, which is not asked for; add --tap logits"):
        request_all(["final"], None, None, 10)

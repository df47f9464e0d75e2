"""How a tap is stored: what ``--encoding``, ``--fidelity`` and ``--top-k`` mean for each kind of tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hdcache.errors import UsageError, nearest
from hdcache.schema import TapRequest
from hdcache.soft_labels import DEFAULT_TOP_K
from hdcache.taps import parse_tap

TOKEN_ENCODINGS = ("fp32", "fp16", "bf16", "int8", "klt")
RELATION_ENCODINGS = ("fp32", "fp16", "sqrt8")
DEFAULT_FIDELITY = 0.1
VECTOR_ENCODINGS = ("fp32", "fp16", "bf16")


def request_all(
    taps: Sequence[str], encoding: str | None, fidelity: float | None, top_k: int | None = None
) -> list[TapRequest]:
    """One request per tap, in the order of names, so that the same taps in another order are the same teacher.

    Raises
    ------
    UsageError
        as :func:`request` does, and for a ``top_k`` without the tap that it concerns.
    """
    if top_k is not None and "logits" not in taps:
        raise UsageError(f"top_k {top_k} concerns the tap logits, which is not asked for; add --tap logits")
    return [request(tap, encoding, fidelity, top_k) for tap in sorted(set(taps))]


def request(tap: str, encoding: str | None, fidelity: float | None, top_k: int | None = None) -> TapRequest:
    """The encoding of a tap that ``--encoding``, ``--fidelity`` and ``--top-k`` ask for, adapted to what the tap is.

    Token taps take any of fp32, fp16, bf16, int8, klt; relations fall back to sqrt8 and vectors to fp16 where
    the asked encoding has no meaning for them. ``top_k`` concerns ``logits`` alone, which are then stored as topk.

    Raises
    ------
    UsageError
        for an unknown encoding, a fidelity outside (0, 1), a fidelity or top_k for an encoding without one.
    """
    parsed = parse_tap(tap)
    known = {*TOKEN_ENCODINGS, *RELATION_ENCODINGS, "topk"}
    if encoding is not None and encoding not in known:
        raise UsageError(f"unknown encoding {encoding!r}; {nearest(encoding, known)}")
    if fidelity is not None and not 0 < fidelity < 1:
        raise UsageError(f"fidelity {fidelity} must lie between 0 and 1: the relative RMSE to allow, 0.05 is 5 %")
    if fidelity is not None and encoding not in (None, "klt"):
        raise UsageError(f"fidelity belongs to the klt encoding; {encoding} has a fixed error: drop one of the two")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k {top_k} must be at least 1: the classes to keep of each row of logits")
    if encoding == "topk" and parsed.what != "logits":
        raise UsageError(
            f"encoding topk is for logits, not for {tap}; leave it out: --top-k alone concerns logits only"
        )
    if parsed.what == "logits" and (top_k is not None or encoding == "topk"):
        if encoding in VECTOR_ENCODINGS:
            raise UsageError(f"top_k belongs to the topk encoding; {encoding} keeps every class: drop one of the two")
        return TapRequest(tap=tap, encoding="topk", top_k=DEFAULT_TOP_K if top_k is None else top_k)
    kind: Any = encoding or "klt"
    if parsed.what == "rel":
        return TapRequest(tap=tap, encoding=kind if kind in RELATION_ENCODINGS else "sqrt8")
    if not parsed.is_tokens:
        return TapRequest(tap=tap, encoding=kind if kind in VECTOR_ENCODINGS else "fp16")
    if kind == "sqrt8":
        raise UsageError(
            f"encoding sqrt8 is for relation matrices, {tap} is a token tap; use klt, int8 or a float type"
        )
    return TapRequest(
        tap=tap,
        encoding=kind,
        fidelity=(DEFAULT_FIDELITY if fidelity is None else fidelity) if kind == "klt" else None,
    )

"""What an objective asks for, derived from what a store holds.

A target has a tap's name (``block9.rel.qk@12``). It may be stored itself, or follow from a stored tap: a block's
``attn_in`` gives its ``qkv`` through one frozen matrix, and ``qkv`` gives every relation with any head count.
Cached and online runs share this file, so that equal taps give equal targets to the bit.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hdcache.errors import InputNotFound, UsageError
from hdcache.taps import Coded, TapName, Tokens, parse_tap, relation_of_parts, relation_of_qkv


@dataclass(frozen=True)
class Derivation:
    """How the targets of one teacher follow from stored taps."""

    plan: Mapping[str, str]
    """Target name -> stored tap that gives it."""
    attention: Mapping[int, FrozenAttention]
    """Per block: an attention that holds only the frozen ``qkv`` (and Q/K norms)."""

    @property
    def taps(self) -> list[str]:
        """Stored taps that have to be read."""
        return sorted(set(self.plan.values()))

    @torch.no_grad()
    def derive(self, taps: Mapping[str, Tokens | Tensor | Coded]) -> dict[str, Tokens | Tensor]:
        """Targets from decoded taps, on the device where those are. Relations are float32 probabilities.

        Of a tap that is still coded, Q, K and V follow in one product each, with the joined matrix; those that are not
        asked for are not computed.
        """
        found: dict[str, Tokens | Tensor] = {}
        parts = self._parts(taps)
        for target, source in self.plan.items():
            value, asked = taps[source], parse_tap(target)
            if target == source:
                found[target] = value.tokens() if isinstance(value, Coded) else value
            elif asked.what == "qkv":
                assert not isinstance(value, Tensor)  # noqa: S101  # attn_in is a token tap
                qkv, prefix = torch.cat([parts[source][letter] for letter in "qkv"], dim=-1), value.prefix.shape[1]
                found[target] = Tokens(qkv[:, :prefix], qkv[:, prefix:])
            else:
                found[target] = relation_of_parts(self.attention[asked.block], parts[source], asked.kind, asked.heads)
        return found

    def _parts(self, taps: Mapping[str, Tokens | Tensor | Coded]) -> dict[str, dict[str, Tensor]]:
        """Q, K and V, as far as targets need them, by the tap that they follow from."""
        wanted: dict[str, set[str]] = {}
        for target, source in self.plan.items():
            if target != source:
                asked = parse_tap(target)
                wanted.setdefault(source, set()).update("qkv" if asked.what == "qkv" else asked.kind)
        found = {}
        for source, letters in wanted.items():
            value, tap = taps[source], parse_tap(source)
            assert not isinstance(value, Tensor)  # noqa: S101  # attn_in and qkv are token taps
            found[source] = self.attention[tap.block].project(value, sorted(letters), projected=tap.what == "qkv")
        return found


class FrozenAttention(nn.Module):
    """The part of a teacher's attention that targets need."""

    def __init__(self, facts: Mapping[str, Any], block: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.num_heads = int(facts["heads"])
        self.weight = weights[f"block{block}/qkv_weight"]
        self.bias = weights.get(f"block{block}/qkv_bias")
        self._join: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.q_norm, self.k_norm = (self._norm(facts, f"block{block}/{part}_norm", weights) for part in "qk")

    @staticmethod
    def _norm(facts: Mapping[str, object], key: str, weights: Mapping[str, Tensor]) -> nn.Module:
        kind = facts["normalised"]
        if not kind:
            return nn.Identity()
        epsilon = float(str(facts["epsilon"]))
        if kind in ("LayerNorm", "LayerNormFp32"):
            return _FrozenNorm(weights.get(f"{key}_weight"), weights.get(f"{key}_bias"), epsilon, centred=True)
        if kind in ("RmsNorm", "RmsNormFp32"):
            return _FrozenNorm(weights.get(f"{key}_weight"), None, epsilon, centred=False)
        return _UnknownNorm(str(kind))

    def project(self, value: Tokens | Coded, letters: Sequence[str], *, projected: bool) -> dict[str, Tensor]:
        """Q, K and V, those of ``letters``, [B, P + N, D] each: of the block's ``attn_in``, or of its ``qkv`` (``projected``).

        Each is a product of its own, so that what else is asked for changes none of its bits.
        """
        width = len(self.weight) // 3
        columns = {letter: slice(width * i, width * (i + 1)) for i, letter in enumerate("qkv") if letter in letters}
        if projected:
            whole = (value.tokens() if isinstance(value, Coded) else value).sequence()
            return {letter: whole[..., part] for letter, part in columns.items()}
        if isinstance(value, Tokens):
            whole = value.sequence()
            return {letter: self._project(whole, part) for letter, part in columns.items()}
        patches = value.mapped([self._joined(value, letter, part) for letter, part in columns.items()])
        if not value.prefix.shape[1]:
            return dict(zip(columns, patches, strict=True))
        return {
            letter: torch.cat([self._project(value.prefix, part), mapped], dim=1)
            for (letter, part), mapped in zip(columns.items(), patches, strict=True)
        }

    def _project(self, x: Tensor, part: slice) -> Tensor:
        return functional.linear(
            x, self.weight[part].to(x.dtype), None if self.bias is None else self.bias[part].to(x.dtype)
        )

    def _joined(self, value: Coded, letter: str, part: slice) -> tuple[Tensor, Tensor]:
        """W (inverse z + mean) + b as one linear layer, made once: the product costs as much as a batch."""
        held = self._join.get(letter)
        if held is None or held[0] is not value.inverse:
            inverse, mean = value.inverse.float(), value.mean.float()
            weight, bias = self.weight[part] @ inverse.T, self.weight[part] @ mean
            bias = bias if self.bias is None else bias + self.bias[part]
            held = self._join[letter] = value.inverse, weight.to(value.inverse.dtype), bias.to(value.inverse.dtype)
        return held[1:]


class _FrozenNorm(nn.Module):
    """Layer or RMS norm over the head width, in float32."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, epsilon: float, *, centred: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon, self.centred = weight, bias, epsilon, centred

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.centred:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)
        return functional.rms_norm(x, list(x.shape[-1:]), self.weight, self.epsilon)


class _UnknownNorm(nn.Module):
    """A Q/K norm that only the teacher itself can compute; values need none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        raise UsageError(
            f"relations of a teacher with {self.kind} on Q and K cannot be derived; store the matrices: --tap blockN.rel.qk"
        )


def sources(target: TapName) -> list[str]:
    """Taps that can give ``target``, cheapest to read first."""
    block = f"block{target.block}"
    if target.what == "rel":
        # A stored matrix is exact for its own head count, but many times larger than what it follows from.
        return [f"{block}.attn_in", f"{block}.qkv", target.name]
    if target.what == "qkv":
        return [f"{block}.attn_in", target.name]
    return [target.name]


def default_block(depth: int) -> int:
    """The block (1-based) that relations are taken from and that extraction stores, when none is named.

    The last of up to 12 blocks, else three quarters of the depth: 18 of 24 (TinyMIM, Tab. 10).
    """
    return depth if depth <= 12 else int(0.75 * depth + 0.5)


def plan_targets(
    targets: Sequence[str],
    held: Sequence[str],
    *,
    depth: int,
    teacher: str,
    store: str,
    command: str = "hdcache extract --store STORE",
    again: str = "NAME",
    model: str = "MODEL",
    options: str = "",
    fields: Sequence[str] = (),
) -> dict[str, str]:
    """For each target the held tap that gives it.

    The rest is for the error's text: ``command`` adds a teacher to ``store``, ``again`` is a free name for this one,
    ``model`` and ``options`` are how extraction was told of it, and ``fields`` the settings that name it.

    Raises
    ------
    InputNotFound
        naming the ``hdcache extract`` command that would add what is missing.
    """
    plan: dict[str, str] = {}
    for name in targets:
        found = next((tap for tap in sources(parse_tap(name, depth)) if tap in held), None)
        if found is not None:
            plan[name] = found
    if len(plan) < len({*targets}):
        # The other name has to hold all that is read, what is held here included: a recipe's field names one teacher.
        named = " and ".join(f"{field}={again}" for field in fields)
        asked = f"set {named}" if named else f"ask for teacher {again!r}"
        taps = " ".join(f"--tap {tap}" for tap in sorted({sources(parse_tap(name))[0] for name in targets}))
        raise InputNotFound(
            f"{store}: teacher {teacher!r} holds {', '.join(held)}, which cannot give {', '.join(t for t in targets if t not in plan)}; "
            f"{asked}, and store it under that name too: {command} --teacher {shlex.quote(f'{again}={model}')}{options} {taps}"
        )
    return plan


def derivation(
    plan: Mapping[str, str], attention: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor]
) -> Derivation:
    """The derivation that ``plan`` (from :func:`plan_targets`) describes.

    Parameters
    ----------
    attention
        facts of each tapped block (``TeacherRecord.attention``).
    weights
        float32 tensors by the names of ``TeacherRecord.weights``, on the device where targets are wanted.
    """
    blocks = {parse_tap(target).block for target, source in plan.items() if target != source}
    frozen: dict[int, FrozenAttention] = {
        block: FrozenAttention(attention[f"block{block}"], block, weights) for block in blocks
    }
    found = Derivation(dict(plan), frozen)
    for target, source in plan.items():
        asked = parse_tap(target)
        if asked.what == "rel" and target != source:
            # A head count or a norm that cannot be meant is refused now, not at the first batch.
            width = weights[f"block{asked.block}/qkv_weight"]
            relation_of_qkv(frozen[asked.block], width.new_zeros(1, 1, len(width)), asked.kind, asked.heads)
    return found

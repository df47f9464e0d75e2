"""Which patch tokens to go on with: the redundancy score, and dropping by it stage by stage.

Li et al. (PCAE, ICLR 2023), released code models_mae.py: a token is redundant when it is like the mean token. Hybrid
Distill's progressive redundant token masking has the same stages; that it uses this very score is not confirmed.

Legend: B images, N patch tokens, K kept ones, D width. Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hdcache.draws import uniform_rows
from hdcache.errors import UsageError
from hdcache.taps import Tokens, gather_patches

Score = Callable[[Tokens, Tensor | None], Tensor]
"""From a block's output and the indices int64 [B, N] of its patch tokens in the whole grid (None: all of them) to
scores [B, N]; the tokens with the smallest are kept."""


@torch.no_grad()
def redundancy(tokens_BND: Tensor) -> Tensor:
    """Redundancy of each token: float32 [B, N], large where a token is like the others.

    s_j = < mean_k x_k , x_j > with every x L2-normalised; the mean is not normalised again, which ranks the same.
    """
    unit = normalize(tokens_BND.detach().float(), dim=-1)
    return (unit * unit.mean(1, keepdim=True)).sum(-1)


def kept_count(total: int, keep_ratio: float) -> int:
    """Tokens that one stage keeps of ``total``: ``int(total * keep_ratio)``."""
    return int(total * keep_ratio)


def lowest(scores_BN: Tensor, keep_ratio: float) -> Tensor:
    """Positions int64 [B, K] of the smallest scores in ascending order of score, equal ones in ascending position."""
    order = scores_BN.argsort(dim=1, stable=True)
    return order[:, : kept_count(scores_BN.shape[1], keep_ratio)]


def lowest_ascending(scores_BN: Tensor, keep_ratio: float) -> Tensor:
    """As :func:`lowest`, in ascending position: the order in which a network's forward goes on with them."""
    return lowest(scores_BN, keep_ratio).sort(dim=1).values


def default_stages(depth: int) -> tuple[int, ...]:
    """Blocks (1-based) after which tokens are dropped: those of index 0, L/3 and 2L/3, so 1, 5, 9 of 12."""
    return tuple(sorted({1, depth // 3 + 1, 2 * depth // 3 + 1}))


def survivors(total: int, keep_ratio: float, stages: int) -> list[int]:
    """Token counts before and after each of so many stages: 196 -> 98 -> 49 -> 24 at one half."""
    counts = [total]
    for _ in range(stages):
        counts.append(kept_count(counts[-1], keep_ratio))
    return counts


def check_stages(total: int, keep_ratio: float, stages: Sequence[int] | None, depth: int, last: int) -> None:
    """Refuse stages (None: the default ones) that do not exist, change nothing, or leave no token.

    ``last`` is the last block that is read; ``depth + 1`` where the network's output is.
    """
    chosen = sorted(default_stages(depth) if stages is None else stages)
    if chosen[-1] > depth:
        raise UsageError(
            f"objective.stages names block {chosen[-1]}, but the student has {depth} blocks; choose from 1 to {depth}, or null"
        )
    acting = [block for block in chosen if block < last]
    if not acting or (stages is not None and len(acting) < len(chosen)):
        idle = [block for block in chosen if block >= last]
        raise UsageError(
            f"objective.stages {idle} drop nothing: block {last} is the last that is read; choose blocks before it, or "
            "set objective.keep_ratio=null"
        )
    counts = survivors(total, keep_ratio, len(acting))
    if not counts[-1]:
        raise UsageError(
            f"objective.keep_ratio {keep_ratio:g} leaves no patch token after block {acting[counts.index(0) - 1]}: "
            f"{' -> '.join(str(count) for count in counts[: counts.index(0) + 1])}; "
            "raise it, name fewer objective.stages, or set it to null"
        )


class Dropping:
    """One forward's progressive dropping: :meth:`drop` is what ``forward_taps`` calls, and the survivors are noted."""

    def __init__(self, stages: Sequence[int], keep_ratio: float, score: Score) -> None:
        self._stages, self._keep_ratio, self._score = frozenset(stages), keep_ratio, score
        self._after: dict[int, Tensor] = {}
        self._now: Tensor | None = None

    @torch.no_grad()
    def drop(self, block: int, tokens: Tokens) -> Tensor | None:
        """After a block of a stage: ascending positions int64 [B, K] among ``tokens.patches``; else None."""
        if block not in self._stages:
            return None
        positions = lowest_ascending(self._score(tokens, self._now), self._keep_ratio)
        # Ascending positions among ascending indices stay ascending, so every stage's survivors are those of one grid.
        self._now = positions if self._now is None else self._now.gather(1, positions)
        self._after[block] = self._now
        return positions

    def before(self, block: int) -> Tensor | None:
        """Ascending indices int64 [B, K] in the whole grid of the tokens that ``block`` ran on; None: all."""
        past = [stage for stage in self._after if stage < block]
        return self._after[max(past)] if past else None


def own_score(tokens: Tokens, kept: Tensor | None) -> Tensor:
    """The student's own tokens decide (PCAE scores a block's output, without the final norm)."""
    return redundancy(tokens.patches)


def target_score(target_BND: Tensor) -> Score:
    """The survivors' redundancy in a teacher's tokens [B, N, D]; the student has no say."""

    def score(tokens: Tokens, kept: Tensor | None) -> Tensor:
        return redundancy(target_BND if kept is None else gather_patches(target_BND, kept, 0))

    return score


def random_score(ids: Sequence[str], epoch: int, seed: int, total: int) -> Score:
    """Random numbers as scores, a function of (seed, sample id, epoch): PCAE's control, ``random_drop``.

    One draw of ``total`` numbers serves all stages, which leaves each of them a uniform subset.
    """
    noise_BN = torch.from_numpy(uniform_rows(total, [(seed, sample, epoch, "random drop") for sample in ids])).float()

    def score(tokens: Tokens, kept: Tensor | None) -> Tensor:
        noise = noise_BN.to(tokens.patches.device)
        return noise if kept is None else noise.gather(1, kept)

    return score


def tokens_of(value: Tokens | Tensor) -> Tokens:
    """A target that is one of tokens, told to the type checker."""
    assert isinstance(value, Tokens)  # noqa: S101  # programmer invariant: every target of such a loss is
    return value


def taken(value: Tokens | Tensor, kept: Tensor | None) -> Tokens:
    """The prefix tokens and the patch tokens at ``kept`` int64 [B, K]; None: all."""
    tokens = tokens_of(value)
    return tokens if kept is None else Tokens(tokens.prefix, gather_patches(tokens.patches, kept, 0))

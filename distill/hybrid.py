"""Hybrid Distill: token relations of a masked-image-modelling teacher and final features of another, on fewer tokens.

Shi et al.: Hybrid Distillation (ICLR 2024, arXiv 2306.15876). No code was released, and the equations and settings of
the paper's body could not be confirmed: every open point is a field here, whose docstring says what is known and why
its default is what it is. docs/methods/hybrid.md has them in one table.

Legend: B images, P prefix tokens, N patch tokens, K kept ones, T = P + K, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from hdcache.distill import teacher_fit
from hdcache.distill.objective import Objective, Pool, Taps, linear, student_layout
from hdcache.distill.redundancy import (
    Dropping,
    Score,
    check_stages,
    default_stages,
    own_score,
    random_score,
    taken,
    target_score,
    tokens_of,
)
from hdcache.errors import UsageError
from hdcache.relations import KINDS, RelationKind, relation, relation_logits, split_heads
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens, forward_taps, num_blocks, parse_tap

if TYPE_CHECKING:
    from hdcache.batch import Batch

NORM_EPS = 1e-6
Part = Literal["relation", "feature"]


class HybridHeads(nn.Module):
    """What ``build`` resolved from cards and student, and the projection of the feature half."""

    def __init__(self, teachers: Mapping[str, str], scored: tuple[str, str] | None) -> None:
        super().__init__()
        self.teachers = dict(teachers)
        """Part -> teacher's name."""
        self.scored = scored
        """Teacher and target whose tokens decide what is dropped; None: no target decides."""
        self.pairs: list[tuple[str, str]] = []
        """Relation teacher's target and student's tap, one pair for each block."""
        self.num_heads = 0
        """Heads that both networks' relations are cut into."""
        self.project: nn.Module | None = None


class Hybrid(Objective):
    """Settings of Hybrid Distill; the objective itself. A recipe's ``weights`` are the paper's alpha and beta.

    Confirmed: alpha = beta = 1, two frozen teachers, relations at intermediate blocks, final features, progressive
    redundant token masking. Which of the two weights which part is not known; with both at 1 it makes no difference.
    """

    kind: Literal["hybrid"] = "hybrid"
    """Which objective this is."""
    use: tuple[Part, ...] = Field(default=("relation", "feature"), min_length=1)
    """Which halves are trained; both: the paper. One alone is the single-teacher baseline; settings of the other half
    are then not read."""
    relation_teacher: str | None = None
    """Name of the teacher whose relations are matched; the paper: MAE. null: the only teacher, where only one is read;
    with two, nothing in a store says which is which."""
    feature_teacher: str | None = None
    """Name of the teacher whose final features are matched; the paper: DeiT or CLIP. null: as relation_teacher."""
    relation_blocks: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Relation teacher's blocks, from 1. The paper: intermediate ones; which is not known. null: one, at three quarters
    of the depth (9 of 12, 18 of 24), where TinyMIM finds relations of a large MAE best (Tab. 10)."""
    student_blocks: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Student's blocks, paired with relation_blocks. Recalled: the same layer. null: three quarters of the student's
    depth; blocks that are named for the teacher must be named here too."""
    relations: tuple[RelationKind, ...] = Field(default=("qk",), min_length=1)
    """Kinds to match, among qk, vv, qq, kk. Recalled: the query-key product alone. TinyMIM's are qk and vv."""
    scores: Literal["scaled", "raw", "softmax"] = "scaled"
    """What is compared: q k^T / sqrt(head width), q k^T itself, or its softmax over the kept keys. Recalled: q k^T; its
    scale is not known. scaled: teacher and student may have heads of different width."""
    heads: int | None = Field(default=None, ge=1)
    """Heads that the loss cuts Q, K and V of both networks into (not known). null: the relation teacher's own, as TinyMIM.
    The student's block runs with its own heads all the same (a timm checkpoint has one head count)."""
    relation_tokens: Literal["all", "patches"] = "all"
    """Whether prefix tokens take part in relations (not known). all: as TinyMIM's released code; patches: teachers and
    student may have different prefix tokens."""
    combine: Literal["mean", "sum"] = "mean"
    """How blocks and kinds make one part (not known). mean: its weight means the same for any number of them."""
    relation_beta: float = Field(default=1.0, gt=0)
    """Where the relations' smooth L1 turns from quadratic to linear. Recalled: smooth L1; its beta is not known: 1 is
    PyTorch's default."""
    feature: str = "final"
    """Tap of the feature teacher. final, after its last norm: the paper's final features, which may also mean the last
    block's output: blockN.out."""
    feature_norm: Literal["layer", "none"] = "layer"
    """layer: each target token is whitened by a layer norm without affine, as in TinyMIM's Eq. 7, so that feature_beta
    and the weight mean the same for any teacher; none: as it is (not known). The student is not normed."""
    feature_tokens: Literal["all", "patches"] = "all"
    """Whether prefix tokens take part in features (not known). all: a contrastive or supervised teacher's class token
    discriminates best; patches: teacher and student may have different prefix tokens."""
    feature_beta: float = Field(default=1.0, gt=0)
    """As relation_beta, for features; in standard deviations of the target where feature_norm is layer."""
    keep_ratio: float | None = Field(default=0.5, gt=0, lt=1)
    """Share of the patch tokens that the student goes on with at each stage, rounded down; null: all. The paper's is not
    known: 0.5 is that of PCAE's released code (196 -> 98 -> 49 -> 24)."""
    stages: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Student's blocks, from 1, after which tokens are dropped. null: those of index 0, L/3, 2L/3 (1, 5, 9 of 12):
    recalled from the paper, and PCAE's default."""
    scorer: Literal["teacher", "student", "random"] = "teacher"
    """Whose tokens decide what is redundant. teacher: recalled, and the same for every epoch of a view; student: its own
    tokens at each stage, as PCAE scores; random: the control, drawn by (seed, sample id, epoch)."""
    scorer_target: Part | None = None
    """scorer teacher: which target is scored (not known): feature: the feature teacher's features; relation: the input
    of its first relation block's attention. null: feature where it is used, else relation."""

    @field_validator("feature")
    @classmethod
    def _feature_has_tokens(cls, value: str) -> str:
        try:
            has_tokens = parse_tap(value).is_tokens
        except UsageError as error:
            raise ValueError(str(error)) from None
        if not has_tokens:
            raise ValueError(f"{value!r} gives no tokens; choose final, blockN.out, blockN.attn_in or blockN.qkv")
        return value

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        for field, values in (("use", self.use), ("relations", self.relations), ("stages", self.stages or ())):
            if len(set(values)) != len(values):
                raise ValueError(f"{field} {list(values)} names one twice")
        count = len(self.relation_blocks or "1")
        if self.student_blocks is None and self.relation_blocks is not None:
            raise ValueError(
                f"relation_blocks is set, but student_blocks is null; name {count} of the student's blocks"
            )
        if self.student_blocks is not None and len(self.student_blocks) != count:
            raise ValueError(
                f"student_blocks names {len(self.student_blocks)} and relation_blocks {count} (null: 1); they are pairs"
            )
        if min((*(self.relation_blocks or ()), *(self.student_blocks or ()), *(self.stages or ())), default=1) < 1:
            raise ValueError("relation_blocks, student_blocks and stages count blocks from 1")
        if self.keep_ratio is None:
            self.refuse_unread(("stages",), "keep_ratio null")
        if self.scorer_target is not None and (self.keep_ratio is None or self.scorer != "teacher"):
            raise ValueError("scorer_target is set, but no teacher scores; set it to null")
        return self

    def parts(self) -> tuple[str, ...]:
        """``relation``, ``feature``, or one of them."""
        return self.use

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """The relation teacher's QKV, the feature teacher's features, and what is scored."""
        teachers = self._teachers(cards)
        found: dict[str, tuple[str, ...]] = {}
        for part in self.use:
            found[teachers[part]] = found.get(teachers[part], ()) + self._targets(part, cards[teachers[part]])
        if self._scored_part() is not None:
            name, target = self._scored(teachers, cards)
            found[name] = (*found.get(name, ()), target)
        for role, name in teachers.items():
            teacher_fit.whole_images(name, cards[name], role, found[name])
        if "relation" in self.use and set(self.relations) != {"vv"}:
            teacher_fit.plain_queries(teachers["relation"], cards[teachers["relation"]])
        return {name: tuple(dict.fromkeys(targets)) for name, targets in found.items()}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """The QKV of the student's blocks, and ``final`` where features are used."""
        taps = [f"block{block}.qkv" for block in self._student_blocks(depth)] if "relation" in self.use else []
        return (*dict.fromkeys(taps), *(("final",) if "feature" in self.use else ()))

    def last_trained(self, depth: int) -> str:
        """``final`` where features are used, else the block before the last one whose relations are read."""
        return "final" if "feature" in self.use else f"block{max(self._student_blocks(depth)) - 1}.out"

    def pool_trained(self) -> Pool:
        """``mean`` where what reads that layer compares patches alone."""
        read = self.feature_tokens if "feature" in self.use else self.relation_tokens
        return "mean" if read == "patches" else "cls"

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> HybridHeads:
        """One linear layer from the student's width to the features'; relations need nothing."""
        wanted, teachers, depth = self.wants(cards), self._teachers(cards), num_blocks(student)
        teacher_fit.same_grid(student, {part: (name, cards[name]) for part, name in teachers.items()}, wanted)
        scored = self._scored(teachers, cards) if self._scored_part() is not None else None
        heads = HybridHeads(teachers, scored)
        if "relation" in self.use:
            name, card = teachers["relation"], cards[teachers["relation"]]
            taps = [f"block{block}.qkv" for block in self._student_blocks(depth)]
            heads.pairs = list(zip(self._targets("relation", card), taps, strict=True))
            heads.num_heads = self.heads or card.heads
            if self.relation_tokens == "all":
                teacher_fit.same_prefix(student, name, card, "relation_tokens")
            teacher_fit.divisible(student, name, card, self.heads)
            if set(self.relations) != {"vv"}:
                for block in self._student_blocks(depth):
                    teacher_fit.plain_student(student, block)
        if "feature" in self.use:
            card = cards[teachers["feature"]]
            if self.feature_tokens == "all":
                teacher_fit.same_prefix(student, teachers["feature"], card, "feature_tokens")
            outputs = 3 * card.width if parse_tap(self.feature).what == "qkv" else card.width
            heads.project = linear(student_layout(student).width, outputs, generator)
        if self.keep_ratio is not None:
            last = depth + 1 if "feature" in self.use else max(self._student_blocks(depth))
            check_stages(student_layout(student).tokens, self.keep_ratio, self.stages, depth, last)
        return heads

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """The student's taps, each on the tokens that its block ran on: ``NAME.kept`` holds their indices [B, K]."""
        depth = num_blocks(student)
        names = self.student_taps(depth)
        if self.keep_ratio is None:
            return forward_taps(student, batch.images, names)
        score = self._score(student, batch, heads, seed)
        dropping = Dropping(self.stages or default_stages(depth), self.keep_ratio, score)
        taps = forward_taps(student, batch.images, names, drop=dropping.drop)
        kept = {f"{name}.kept": dropping.before(parse_tap(name).block or depth + 1) for name in names}
        return taps | {name: value for name, value in kept.items() if value is not None}

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Smooth L1 between relations and between features, on the tokens that the student kept; means over values."""
        assert isinstance(heads, HybridHeads)  # noqa: S101  # programmer invariant: what build returned
        values = {name: value for name, value in taps.items() if isinstance(value, Tokens)}
        kept = {name: value for name, value in taps.items() if isinstance(value, Tensor)}
        losses: dict[str, Tensor] = {}
        for part in self.use:
            targets = batch.targets[heads.teachers[part]]
            if part == "feature":
                target = taken(targets[self.feature], kept.get("final.kept"))
                losses[part] = self._feature_loss(target, values["final"], heads)
                continue
            distances: list[Tensor] = []
            for name, tap in heads.pairs:
                target = taken(targets[name], kept.get(f"{tap}.kept"))
                distances += self._distances(target, values[tap], heads.num_heads)
            stacked = torch.stack(distances)
            losses[part] = stacked.mean() if self.combine == "mean" else stacked.sum()
        return losses

    def _distances(self, target: Tokens, student: Tokens, num_heads: int) -> list[Tensor]:
        """One distance for each kind. Rows and columns of dropped tokens are gone before any product or softmax."""
        t, s = (split_heads(_chosen(value, self.relation_tokens), num_heads) for value in (target, student))
        pairs = [KINDS[kind] for kind in self.relations]
        scores = [(self._relation(t[a], t[b]).detach(), self._relation(s[a], s[b])) for a, b in pairs]
        return [smooth_l1_loss(own, theirs, beta=self.relation_beta) for theirs, own in scores]

    def _relation(self, x: Tensor, y: Tensor) -> Tensor:
        """float32 [B, H, T, T]."""
        if self.scores == "softmax":
            return relation(x, y)
        return relation_logits(x, y, 1.0 if self.scores == "raw" else None)

    def _feature_loss(self, target: Tokens, student: Tokens, heads: HybridHeads) -> Tensor:
        assert heads.project is not None  # noqa: S101
        t = _chosen(target, self.feature_tokens).detach().float()
        if self.feature_norm == "layer":
            t = layer_norm(t, t.shape[-1:], eps=NORM_EPS)
        return smooth_l1_loss(heads.project(_chosen(student, self.feature_tokens)).float(), t, beta=self.feature_beta)

    def _score(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Score:
        if self.scorer == "student":
            return own_score
        if self.scorer == "random":
            return random_score(batch.ids, batch.epoch, seed, student_layout(student).tokens)
        assert isinstance(heads, HybridHeads)  # noqa: S101
        assert heads.scored is not None  # noqa: S101
        name, target = heads.scored
        return target_score(tokens_of(batch.targets[name][target]).patches)

    def _scored_part(self) -> Part | None:
        if self.keep_ratio is None or self.scorer != "teacher":
            return None
        return self.scorer_target or ("feature" if "feature" in self.use else "relation")

    def _scored(self, teachers: Mapping[str, str], cards: Mapping[str, TeacherCard]) -> tuple[str, str]:
        """Teacher and target that are scored; only where one is."""
        part = self._scored_part()
        assert part is not None  # noqa: S101
        (target, *_) = self._targets(part, cards[teachers[part]])
        # A block's input is nearest to what PCAE scores, the output of the block before, and is stored anyway.
        return teachers[part], target if part == "feature" else target.replace(".qkv", ".attn_in")

    def _teachers(self, cards: Mapping[str, TeacherCard]) -> dict[str, str]:
        """Part -> name of its teacher, for the parts that are trained or scored."""
        parts = dict.fromkeys((*self.use, *((scored,) if (scored := self._scored_part()) else ())))
        named = {"relation": self.relation_teacher, "feature": self.feature_teacher}
        needed = {part: self._flags(part) for part in parts}
        return teacher_fit.choose_teachers({part: named[part] for part in parts}, cards, needed)

    def _flags(self, part: Part) -> str:
        """What ``hdcache extract`` is told of a teacher that is not there, whose depth is not known."""
        blocks = self.relation_blocks if part == "relation" else ()
        if blocks is None:
            return "--tap blockN.attn_in (N: three quarters of its blocks)"
        return teacher_fit.flags([f"block{block}.qkv" for block in blocks] or [self.feature])

    def _student_blocks(self, depth: int) -> tuple[int, ...]:
        """The student's blocks whose relations are read."""
        blocks = self.student_blocks or (teacher_fit.three_quarters(depth),)
        if max(blocks) > depth:
            raise UsageError(
                f"objective.student_blocks names block {max(blocks)}, but the student has {depth} blocks; "
                f"choose from 1 to {depth}, or null for three quarters of the depth"
            )
        if self.use == ("relation",) and max(blocks) == 1:
            raise UsageError(
                "relations of block 1 alone would train no block of the student; give it at least 2 blocks, or use features too"
            )
        return blocks

    def _targets(self, part: str, card: TeacherCard) -> tuple[str, ...]:
        """What one half reads of its teacher."""
        blocks = self.relation_blocks or (teacher_fit.three_quarters(card.depth),) if part == "relation" else ()
        names = tuple(f"block{block}.qkv" for block in blocks) or (self.feature,)
        last = max(parse_tap(name).block for name in names)
        if last > card.depth:
            raise UsageError(
                f"objective.{'relation_blocks' if blocks else 'feature'} names block {last}, but the {part} teacher has {card.depth} blocks; "
                f"choose from 1 to {card.depth}, or leave it at its default"
            )
        return names


def _chosen(value: Tokens, which: str) -> Tensor:
    return value.patches if which == "patches" else value.sequence()

"""TinyMIM: distil a masked-image-modelling teacher's token relations, features or class token.

Ren, Wei, Zhang, Hu: TinyMIM, CVPR 2023 (arXiv 2301.01296), section 3.1. The default is the paper's: the
softmaxed Q-K and V-V relations of one teacher block, read by the student's last block cut into the teacher's
head count. Where paper and released code leave a choice open, it is a field here and its docstring says so.

Legend: B images, P prefix tokens, N patch tokens, T = P + N, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from hdcache.distill.objective import Taps, linear, plain_forward, student_layout, teacher_layout
from hdcache.errors import UsageError, nearest
from hdcache.relations import KINDS, RelationKind, log_relation, relation_kl, split_heads
from hdcache.schema import Record, TeacherCard
from hdcache.taps import Tokens, attention_of, num_blocks, parse_tap
from hdcache.targets import default_block

if TYPE_CHECKING:
    from hdcache.batch import Batch

NORM_EPS = 1e-6


class TinyMIMHeads(nn.Module):
    """Where the loss finds its inputs, resolved once by ``build``, and the projection of the feature strategies."""

    def __init__(self, teacher: str, targets: tuple[str, ...], tap: str, project: nn.Linear | None) -> None:
        super().__init__()
        self.teacher, self.targets, self.tap, self.project = teacher, targets, tap, project


class TinyMIM(Record):
    """Settings of TinyMIM; the objective itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["tinymim"] = "tinymim"
    """Which objective this is."""
    teacher: str | None = None
    """Name of the teacher in the store; null: the only one there."""
    strategy: Literal["relation", "feature", "class-token"] = "relation"
    """What is distilled (section 3.1.2): relations (Eq. 9), features (Eq. 7-8) or the class token (Eq. 6)."""
    teacher_block: int | None = Field(default=None, ge=1)
    """Target block, from 1. null: relation: the last of up to 12 blocks, else round(0.75 depth) = 18 of 24 (Tab. 10);
    feature: the last."""
    student_block: int | None = Field(default=None, ge=1)
    """Student block that is read, from 1. null: relation: the last, as in the released code; feature and class-token:
    the network's output after its last norm (the paper says only 'the output of the student')."""
    relations: tuple[RelationKind, ...] = Field(default=("qk", "vv"), min_length=1)
    """relation: kinds to match, among qk, vv, qq, kk; Tab. 7 finds qk + vv best. Their weights are the recipe's."""
    heads: int | None = Field(default=None, ge=1)
    """relation: heads that both target block and student block are cut into (section 3.2). null: the teacher's own
    count. Set it where the teacher itself was trained with other heads in its last block (a TinyMIM teacher)."""
    tokens: Literal["all", "patches"] = "all"
    """relation, feature: whether prefix tokens take part. all: as the released code does (the paper's notation counts
    patches only); patches: rows are renormalised over patch keys, so registers or class tokens may differ."""
    feature: Literal["out", "attn_in", "qkv", "final"] | None = None
    """feature, class-token: which tensor of the teacher. null: feature: out, the paper's output feature (Tab. 6 finds
    qkv best); class-token: final, after the last norm (not stated in the paper)."""
    beta: float = Field(default=2.0, gt=0)
    """feature: where smooth L1 turns from quadratic to linear, in standard deviations of the target (Eq. 8)."""
    temperature: float = Field(default=1.0, gt=0)
    """class-token: divides both features before their softmax over channels (not stated in the paper)."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        if len(set(self.relations)) != len(self.relations):
            raise ValueError(f"relations {list(self.relations)} names a kind twice")
        if self.strategy == "relation" and self.feature is not None:
            raise ValueError("feature is set, but strategy 'relation' reads none; set it to null")
        if self.strategy != "relation" and self.heads is not None:
            raise ValueError(f"heads is set, but strategy {self.strategy!r} has no heads; set heads to null")
        if self.strategy == "relation" and self.student_block == 1:
            raise ValueError("student_block 1 would train no block at all; relations need student_block 2 or later")
        if self.feature == "final" and self.teacher_block is not None:
            raise ValueError("teacher_block is set, but feature 'final' belongs to no block; set one of them to null")
        return self

    def parts(self) -> tuple[str, ...]:
        """The relation kinds, or ``feature``, or ``class_token``."""
        return self.relations if self.strategy == "relation" else (self.strategy.replace("-", "_"),)

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """One teacher's relations of the target block, or one of its token tensors."""
        name, card = self._teacher(cards)
        if self.strategy == "relation":
            block = self.teacher_block or default_block(card.depth)
            cut = f"@{self.heads}" if self.heads else ""
            names = tuple(f"block{block}.rel.{kind}{cut}" for kind in self.relations)
        else:
            whole = self.strategy == "class-token" and self.teacher_block is None
            tensor = self.feature or ("final" if whole else "out")
            names = ("final",) if tensor == "final" else (f"block{self.teacher_block or card.depth}.{tensor}",)
        block = parse_tap(names[0]).block
        if block > card.depth:
            raise UsageError(
                f"objective.teacher_block is {block}, but teacher {name!r} has {card.depth} blocks; "
                f"choose 1 to {card.depth}, or null for the paper's choice"
            )
        return {name: names}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """The QKV of the student block (relation), ``final``, or the output of ``student_block``."""
        block = self.student_block or depth
        if block > depth:
            raise UsageError(
                f"objective.student_block is {block}, but the student has {depth} blocks; choose 2 to {depth}, or null"
            )
        if self.strategy == "relation":
            return (f"block{block}.qkv",)
        return ("final",) if self.student_block is None else (f"block{block}.out",)

    def last_trained(self, depth: int) -> str:
        """Relation: the block before the one that is read, whose tail gets no gradient (released code, vit.py)."""
        if self.strategy != "relation":
            return self.student_taps(depth)[0]
        return f"block{parse_tap(self.student_taps(depth)[0]).block - 1}.out"

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> TinyMIMHeads:
        """Nothing to train for relations; otherwise one linear layer from the student's to the target's width."""
        ((name, targets),) = self.wants(cards).items()
        card, depth = cards[name], num_blocks(student)
        (tap,) = self.student_taps(depth)
        width = student_layout(student).width
        if self.strategy == "class-token":
            _check_class_tokens(student, name, card)
        else:
            self._check_layouts(student, name, card)
        if self.strategy == "relation":
            self._check_heads(student, parse_tap(tap).block, name, card)
            return TinyMIMHeads(name, targets, tap, None)
        outputs = 3 * card.width if targets[0].endswith(".qkv") else card.width
        return TinyMIMHeads(name, targets, tap, linear(width, outputs, generator))

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """The plain forward; relation distillation stops it after the QKV of the student block."""
        return plain_forward(self, student, batch)

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Eq. 9 (one part per relation kind), Eq. 7-8 or Eq. 6."""
        assert isinstance(heads, TinyMIMHeads)  # noqa: S101  # programmer invariant: what build returned
        targets = [batch.targets[heads.teacher][name] for name in heads.targets]
        student = taps[heads.tap]
        assert isinstance(student, Tokens)  # noqa: S101
        if self.strategy == "relation":
            pairs = zip(self.relations, targets, strict=True)
            return {kind: self._relation_loss(kind, target, student) for kind, target in pairs}
        assert isinstance(targets[0], Tokens)  # noqa: S101
        assert heads.project is not None  # noqa: S101
        if self.strategy == "feature":
            return {"feature": self._feature_loss(targets[0], student, heads.project)}
        return {"class_token": self._class_token_loss(targets[0], student, heads.project)}

    def _relation_loss(self, kind: str, target: Any, student: Tokens) -> Tensor:
        """KL between relations: target [B, H, T, T] (probabilities), student qkv tokens [B, T, 3 D]."""
        num_heads = int(target.shape[1])
        if self.tokens == "patches":
            # A softmax over fewer keys is the old one renormalised, so the stored rows stay exact.
            prefix = target.shape[-1] - student.patches.shape[1]
            target = target[..., prefix:, prefix:]
            target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
        qkv = split_heads(student.patches if self.tokens == "patches" else student.sequence(), num_heads)
        rows, columns = KINDS[kind]
        return relation_kl(target, log_relation(qkv[rows], qkv[columns]))

    def _feature_loss(self, target: Tokens, student: Tokens, project: nn.Linear) -> Tensor:
        """Smooth L1 to the target whitened per token by a layer norm without learnt affine (Eq. 7-8)."""
        t = target.patches if self.tokens == "patches" else target.sequence()
        s = project(student.patches if self.tokens == "patches" else student.sequence())
        t = layer_norm(t.detach().float(), t.shape[-1:], eps=NORM_EPS)
        return smooth_l1_loss(s.float(), t, beta=self.beta)

    def _class_token_loss(self, target: Tokens, student: Tokens, project: nn.Linear) -> Tensor:
        """KL between softmaxed class tokens (Eq. 6), averaged over images."""
        t = (target.prefix[:, 0].float() / self.temperature).softmax(-1)
        s = (project(student.prefix[:, 0]).float() / self.temperature).log_softmax(-1)
        return relation_kl(t, s)

    def _teacher(self, cards: Mapping[str, TeacherCard]) -> tuple[str, TeacherCard]:
        if self.teacher is None:
            if len(cards) != 1:
                raise UsageError(
                    f"objective.teacher is null, which needs exactly one teacher, but there are {len(cards)} "
                    f"({', '.join(sorted(cards)) or 'none'}); set objective.teacher=NAME"
                )
            return next(iter(cards.items()))
        if self.teacher not in cards:
            raise UsageError(f"no teacher {self.teacher!r}; {nearest(self.teacher, cards)}")
        return self.teacher, cards[self.teacher]

    def _check_layouts(self, student: nn.Module, name: str, card: TeacherCard) -> None:
        own, theirs = student_layout(student), teacher_layout(card)
        if own.grid != theirs.grid:
            model: Any = student
            height, width = (rows * int(p) for rows, p in zip(theirs.grid, model.patch_embed.patch_size, strict=True))
            size = height if height == width else [height, width]
            raise UsageError(
                f"strategy {self.strategy!r} compares token with token, but the student has {own} and teacher {name!r} "
                f"{theirs}; set student.arguments.img_size={size}"
            )
        if self.tokens == "all" and own.prefix != theirs.prefix:
            raise UsageError(
                f"strategy {self.strategy!r} compares all tokens, but the student has {own} and teacher {name!r} "
                f"{theirs}; set objective.tokens=patches"
            )

    def _check_heads(self, student: nn.Module, block: int, name: str, card: TeacherCard) -> None:
        heads, width = self.heads or card.heads, student_layout(student).width
        for whose, columns in ((f"teacher {name!r}", card.width), ("the student", width)):
            if columns % heads:
                raise UsageError(
                    f"{heads} heads do not divide the width {columns} of {whose}; set objective.heads to a divisor of "
                    f"{card.width} and {width}"
                )
        if not isinstance(attention_of(student, block).q_norm, nn.Identity):
            raise UsageError(
                f"block{block} of the student normalises Q and K per head, so it cannot take the teacher's heads; "
                "set student.arguments.qk_norm=false"
            )


def _check_class_tokens(student: nn.Module, name: str, card: TeacherCard) -> None:
    model: Any = student
    for whose, has in (("the student", bool(model.has_class_token)), (f"teacher {name!r}", card.class_token)):
        if not has:
            raise UsageError(
                f"strategy 'class-token' needs a class token, which {whose} lacks; use strategy 'feature' or 'relation'"
            )

"""TinyMIM: distil a masked-image-modelling teacher's token relations, features or class token.

Ren, Wei, Zhang, Hu: TinyMIM, CVPR 2023 (arXiv 2301.01296), section 3.1. The default is the paper's: the
softmaxed Q-K and V-V relations of one teacher block, read by the student's last block cut into the teacher's
head count. Where paper and released code leave a choice open, it is a field here and its docstring says so.

Legend: B images, P prefix tokens, N patch tokens, M visible ones, T = P + N, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss, smooth_l1_loss

from hdcache.distill import teacher_fit
from hdcache.distill.mae import MAE
from hdcache.distill.objective import Objective, Pool, Taps, linear, student_layout
from hdcache.errors import UsageError
from hdcache.masks import draw_visible, hidden_count
from hdcache.relations import KINDS, RelationKind, log_relation, relation_kl, relation_logits, split_heads
from hdcache.schema import MaskSpec, TeacherCard
from hdcache.taps import Tokens, forward_taps, gather_patches, num_blocks, parse_tap
from hdcache.targets import default_block

if TYPE_CHECKING:
    from hdcache.batch import Batch

NORM_EPS = 1e-6
UNREAD = {
    "relation": ("feature", "beta", "temperature"),
    "feature": ("relations", "heads", "softmax", "temperature"),
    "class-token": ("relations", "heads", "softmax", "beta", "tokens"),
}
"""Fields that a strategy ignores."""


class TinyMIMHeads(nn.Module):
    """Where the loss finds its inputs, resolved once by ``build``, and what is trained beside the student.

    ``cut`` is the head count that relations are cut into, ``prefix`` the teacher's P. ``project`` belongs to the
    feature strategies, ``decoder`` to the reconstruction.
    """

    def __init__(
        self,
        teacher: str,
        targets: tuple[str, ...],
        tap: str,
        cut: int,
        prefix: int,
        project: nn.Linear | None,
        decoder: nn.Module | None,
    ) -> None:
        super().__init__()
        self.teacher, self.targets, self.tap, self.cut, self.prefix = teacher, targets, tap, cut, prefix
        self.project, self.decoder = project, decoder


class TinyMIM(Objective):
    """Settings of TinyMIM; the objective itself."""

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
    """relation: heads that the loss cuts Q, K and V of both blocks into (section 3.2). null: the teacher's own count. Set
    it where the teacher itself was trained with other heads in its last block (a TinyMIM teacher). The student's block
    runs with its own heads all the same (a timm checkpoint has one count): the loss alone cuts again."""
    tokens: Literal["all", "patches"] = "all"
    """relation, feature: whether prefix tokens take part. all: as the released code does (the paper's notation counts
    patches only); patches: rows are renormalised over patch keys, so registers or class tokens may differ."""
    softmax: bool = True
    """relation: whether relations are softmaxed (Tab. 7 has both). false: mean squared error between raw scores, each
    scaled by its own head width (the paper does not state this distance)."""
    feature: Literal["out", "attn_in", "qkv", "attn_out", "mid", "mlp_out", "final"] | None = None
    """feature, class-token: which tensor of the teacher (Tab. 6: attention attn_out, after adding mid; FFN mlp_out,
    after adding out). null: feature: out, the paper's output feature (Tab. 6 finds qkv best); class-token: final,
    after the last norm (not stated in the paper)."""
    beta: float = Field(default=2.0, gt=0)
    """feature: where smooth L1 turns from quadratic to linear, in standard deviations of the target (Eq. 8)."""
    temperature: float = Field(default=1.0, gt=0)
    """class-token: divides both features before their softmax over channels (not stated in the paper)."""
    masked_input: float | None = Field(default=None, gt=0, lt=1)
    """Share of patches that the student does not see, drawn afresh in each epoch (Tab. 12: 0.75; of clips in tubes);
    targets are restricted to what it sees. null: it sees all, as the paper's method does."""
    reconstruction: MAE | None = None
    """MAE's pixel reconstruction beside the distillation (Tab. 5, 12), as loss part pixels; its mask_ratio must be
    masked_input, because one forward of the student serves both. null: none. It reads the last block's output, which
    thus attends with the student's own heads; of the paper's adaptive block with the teacher's heads only Q, K and V
    are ever used."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        if len(set(self.relations)) != len(self.relations):
            raise ValueError(f"relations {list(self.relations)} names a kind twice")
        self.refuse_unread(UNREAD[self.strategy], f"strategy {self.strategy!r}")
        if self.reconstruction is not None and self.reconstruction.mask_ratio != self.masked_input:
            raise ValueError(
                f"reconstruction hides {self.reconstruction.mask_ratio:g} of the patches, but masked_input is "
                f"{self.masked_input}; one forward serves both: set masked_input and reconstruction.mask_ratio alike"
            )
        if self.reconstruction is not None and self.reconstruction.mask is not None:
            raise ValueError("reconstruction.mask is set, but masked_input draws the mask; set it to null")
        if self.strategy == "relation" and self.student_block == 1 and self.reconstruction is None:
            raise ValueError("student_block 1 would train no block at all; relations need student_block 2 or later")
        if self.feature == "final" and self.teacher_block is not None:
            raise ValueError("teacher_block is set, but feature 'final' belongs to no block; set one of them to null")
        return self

    def parts(self) -> tuple[str, ...]:
        """The relation kinds, or ``feature``, or ``class_token``; with a reconstruction ``pixels`` too."""
        own = self.relations if self.strategy == "relation" else (self.strategy.replace("-", "_"),)
        return (*own, "pixels") if self.reconstruction is not None else own

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """One teacher's relations of the target block (its QKV for raw scores), or one of its token tensors."""
        name = teacher_fit.choose_teachers({"": self.teacher}, cards, {"": self._flags()})[""]
        card = cards[name]
        names = self._targets(card.depth)
        teacher_fit.whole_images(name, card, "", names)
        if self.strategy == "relation" and not self.softmax and card.qk_norm and set(self.relations) != {"vv"}:
            raise UsageError(
                f"teacher {name!r} normalises queries and keys, so its raw ones are not what it compares; "
                "set objective.softmax=true, or objective.relations=[vv]"
            )
        block = parse_tap(names[0]).block
        if block > card.depth:
            raise UsageError(
                f"objective.teacher_block is {block}, but teacher {name!r} has {card.depth} blocks; "
                f"choose 1 to {card.depth}, or null for the paper's choice"
            )
        return {name: names}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """The QKV of the student block (relation), ``final``, or the output of ``student_block``; then the decoder's."""
        block = self.student_block or depth
        if block > depth:
            raise UsageError(
                f"objective.student_block is {block}, but the student has {depth} blocks; choose 2 to {depth}, or null"
            )
        if self.strategy == "relation" and block == 1 and self.reconstruction is None:
            raise UsageError(
                "relations of block 1 alone would train no block of the student; give it at least 2 blocks, or set "
                "objective.strategy=feature"
            )
        if self.strategy == "relation":
            tap = f"block{block}.qkv"
        else:
            tap = "final" if self.student_block is None else f"block{block}.out"
        return (tap,) if self.reconstruction is None or tap == "final" else (tap, "final")

    def last_trained(self, depth: int) -> str:
        """Relation: the block before the one that is read, whose tail gets no gradient (released code, vit.py)."""
        if self.reconstruction is not None:
            return "final"
        if self.strategy != "relation":
            return self.student_taps(depth)[0]
        return f"block{parse_tap(self.student_taps(depth)[0]).block - 1}.out"

    def pool_trained(self) -> Pool:
        """``mean`` where patches alone are compared and no decoder reads the class token."""
        return "mean" if self.tokens == "patches" and self.reconstruction is None else "cls"

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> TinyMIMHeads:
        """Nothing to train for relations, else a linear layer to the target's width; and MAE's decoder, if asked for."""
        ((name, targets),) = self.wants(cards).items()
        card, depth = cards[name], num_blocks(student)
        tap = self.student_taps(depth)[0]
        layout = student_layout(student)
        if self.masked_input is not None:
            hidden_count(layout.cells, self.masked_input, "objective.masked_input")
        if self.strategy == "class-token":
            teacher_fit.class_tokens(student, name, card)
        else:
            teacher_fit.same_grid(student, {"": (name, card)}, {name: targets})
            if self.tokens == "all":
                teacher_fit.same_prefix(student, name, card, "tokens")
        if self.strategy == "relation":
            teacher_fit.divisible(student, name, card, self.heads)
            teacher_fit.plain_student(student, parse_tap(tap).block)
            project = None
        else:
            outputs = 3 * card.width if targets[0].endswith(".qkv") else card.width
            project = linear(layout.width, outputs, generator)
        decoder = None
        if self.reconstruction is not None:
            try:
                decoder = self.reconstruction.build(student, {}, num_classes, generator)
            except UsageError as error:
                raise UsageError(str(error).replace("objective.", "objective.reconstruction.")) from None
        return TinyMIMHeads(name, targets, tap, self.heads or card.heads, card.prefix_tokens, project, decoder)

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """The student on the whole image, or on the patches that ``masked_input`` leaves (section 4.3, Tab. 12).

        Then the taps hold ``visible`` int64 [B, M] too, and with a reconstruction what :meth:`MAE.loss` reads.
        """
        if self.masked_input is None:
            return super().forward(student, batch, heads, seed)
        assert isinstance(heads, TinyMIMHeads)  # noqa: S101  # programmer invariant: what build returned
        layout = student_layout(student)
        spec = MaskSpec(kind="tube" if layout.slots > 1 else "random", ratio=self.masked_input, seed=seed)
        drawn = draw_visible(spec, batch.ids, batch.epoch, layout.cells, layout.slots, "tinymim mask")
        visible = torch.from_numpy(drawn).to(batch.images.device)
        taps = forward_taps(student, batch.images, self.student_taps(num_blocks(student)), keep=visible)
        taps["visible"] = visible
        if heads.decoder is not None:
            hidden = torch.ones(len(visible), layout.tokens, dtype=torch.bool, device=visible.device)
            taps["hidden"] = hidden.scatter(1, visible, False)
            taps["prediction"] = heads.decoder(taps["final"], visible)
        return taps

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Eq. 9 (one part per relation kind), Eq. 7-8 or Eq. 6; and MAE's part."""
        assert isinstance(heads, TinyMIMHeads)  # noqa: S101  # programmer invariant: what build returned
        targets = [batch.targets[heads.teacher][name] for name in heads.targets]
        student, visible = taps[heads.tap], taps.get("visible")
        assert isinstance(student, Tokens)  # noqa: S101
        assert visible is None or isinstance(visible, Tensor)  # noqa: S101
        pixels: dict[str, Tensor] = {}
        if self.reconstruction is not None:
            assert heads.decoder is not None  # noqa: S101
            pixels = self.reconstruction.loss(batch, taps, heads.decoder)
        if self.strategy == "relation":
            return self._relation_losses(targets, student, heads, visible) | pixels
        assert isinstance(targets[0], Tokens)  # noqa: S101
        assert heads.project is not None  # noqa: S101
        if self.strategy == "feature":
            return {"feature": self._feature_loss(targets[0], student, heads.project, visible)} | pixels
        return {"class_token": self._class_token_loss(targets[0], student, heads.project)} | pixels

    def _relation_losses(
        self, targets: Sequence[Any], student: Tokens, heads: TinyMIMHeads, visible: Tensor | None
    ) -> dict[str, Tensor]:
        """KL between relations [B, H, T, T]; without softmax, mean squared error between scaled scores of QKV tokens."""
        pairs = {kind: KINDS[kind] for kind in self.relations}
        s = split_heads(self._sequence(student), heads.cut)
        if not self.softmax:
            t = split_heads(self._sequence(targets[0], visible).detach(), heads.cut)
            return {
                k: mse_loss(relation_logits(s[a], s[b]), relation_logits(t[a], t[b])) for k, (a, b) in pairs.items()
            }
        maps = [restricted(target, heads.prefix, self.tokens == "all", visible) for target in targets]
        logs = [log_relation(s[a], s[b]) for a, b in pairs.values()]
        return {kind: relation_kl(t, log) for kind, t, log in zip(pairs, maps, logs, strict=True)}

    def _feature_loss(self, target: Tokens, student: Tokens, project: nn.Linear, visible: Tensor | None) -> Tensor:
        """Smooth L1 to the target whitened per token by a layer norm without learnt affine (Eq. 7-8)."""
        t = self._sequence(target, visible).detach().float()
        s = project(self._sequence(student))
        return smooth_l1_loss(s.float(), layer_norm(t, t.shape[-1:], eps=NORM_EPS), beta=self.beta)

    def _sequence(self, tokens: Tokens, visible: Tensor | None = None) -> Tensor:
        """The tokens that take part, [B, T, D]; only the ``visible`` patches where given."""
        patches = tokens.patches if visible is None else gather_patches(tokens.patches, visible, 0)
        return patches if self.tokens == "patches" else Tokens(tokens.prefix, patches).sequence()

    def _class_token_loss(self, target: Tokens, student: Tokens, project: nn.Linear) -> Tensor:
        """KL between softmaxed class tokens (Eq. 6), averaged over images."""
        t = (target.prefix[:, 0].float() / self.temperature).softmax(-1)
        s = (project(student.prefix[:, 0]).float() / self.temperature).log_softmax(-1)
        return relation_kl(t, s)

    def _targets(self, depth: int | str) -> tuple[str, ...]:
        """What is read of a teacher of ``depth`` blocks; of an unknown number ("N") where no block is named."""
        if self.strategy == "relation":
            block = self.teacher_block or (default_block(depth) if isinstance(depth, int) else depth)
            if not self.softmax:
                return (f"block{block}.qkv",)
            cut = f"@{self.heads}" if self.heads else ""
            return tuple(f"block{block}.rel.{kind}{cut}" for kind in self.relations)
        whole = self.strategy == "class-token" and self.teacher_block is None
        tensor = self.feature or ("final" if whole else "out")
        return ("final",) if tensor == "final" else (f"block{self.teacher_block or depth}.{tensor}",)

    def _flags(self) -> str:
        """What ``hdcache extract`` is told of a teacher that is not there, whose depth is not known."""
        (name, *_) = self._targets("N")
        if not name.startswith("blockN."):
            return teacher_fit.flags((name,))
        if self.strategy == "relation":
            return "(without --tap: the block that is read by default)"
        return f"--tap {name} (N: its last block)"


def restricted(target: Tensor, prefix: int, keep_prefix: bool, visible: Tensor | None = None) -> Tensor:
    """A relation [B, H, T, T] over fewer tokens: without its ``prefix`` tokens, and of ``visible`` [B, M] patches only.

    A softmax over fewer keys is the old one renormalised, so this equals restricting queries and keys before it.
    """
    if visible is not None:
        first = torch.arange(prefix, device=visible.device).expand(len(visible), -1)
        kept = torch.cat([first, visible + prefix], 1) if keep_prefix else visible + prefix
        rows = kept[:, None, :, None].expand(-1, target.shape[1], -1, target.shape[-1])
        target = target.gather(2, rows)
        target = target.gather(3, kept[:, None, None, :].expand(-1, *target.shape[1:3], -1))
    elif keep_prefix:
        return target
    else:
        target = target[..., prefix:, prefix:]
    return target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)

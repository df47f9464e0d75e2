"""AMD: a small student that sees little learns what a larger masked autoencoder made of more.

Zhao et al.: Asymmetric Masked Distillation for Pre-Training Small Foundation Models (CVPR 2024, arXiv 2311.03149);
where it and the released code differ, the code (modeling_pretrain.py, engine_for_pretraining_amd.py).

The teacher runs on its visible tokens T alone. The student sees V, a part of T that is drawn anew in every epoch. Its
projected tokens are aligned with the teacher's at V (direct), a small generator makes of them the teacher's tokens at
F = T - V (generation), and a decoder makes of its last tokens the pixels of all that it did not see.

Legend: B samples, N patch tokens, T teacher-visible ones, V student-visible, F teacher-visible and hidden from the
student, D teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, smooth_l1_loss

from hdcache.distill import teacher_fit
from hdcache.distill.amd_heads import AMDHeads, Counts, Generator, Split, projection, split_visible
from hdcache.distill.amd_teachers import check_layouts, free_name, mask_name, same_network
from hdcache.distill.decoder import NormKind, hidden_patches, is_clip_network, pixel_decoder, pixel_targets
from hdcache.distill.objective import Layout, Objective, Pool, Taps, student_layout
from hdcache.errors import UsageError, next_to
from hdcache.masks import hidden_count
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens, forward_taps, num_blocks

if TYPE_CHECKING:
    from hdcache.batch import Batch

Part = Literal["pixels", "direct", "generation"]
MaskKind = Literal["random", "tube"]
PARTS: tuple[Part, ...] = ("pixels", "direct", "generation")
DISTANCES = {"l2": mse_loss, "l1": l1_loss, "smooth_l1": smooth_l1_loss}


class AMD(Objective):
    """Settings of AMD; the objective itself."""

    kind: Literal["amd"] = "amd"
    """Which objective this is."""
    teacher: str | None = None
    """Name of the teacher in the store; null: the only one that was run with teacher_mask_ratio."""
    teacher_mask_ratio: float = Field(gt=0, lt=1)
    """Share of the cells that the teacher does not see (released scripts, video: 0.75); no default, since what was
    used for images is not published."""
    student_mask_ratio: float = Field(gt=0, lt=1)
    """Share of the cells that the student does not see (released scripts, video: 0.9); equal to teacher_mask_ratio:
    symmetric masks, without the part generation."""
    mask: MaskKind | None = None
    """What masks hide: random: any tokens; tube: the same cells in every temporal slot (released code,
    masking_generator.py). null: tube for clips, random for images."""
    use: tuple[Part, ...] = Field(default=PARTS, min_length=1)
    """Parts of the loss: pixels (reconstruction), direct (alignment at V), generation (alignment at F); the paper's is
    all three. Their weights are the recipe's (released code: 1, 1, 1)."""
    teacher_blocks: tuple[int, ...] | None = None
    """Aligned blocks of the teacher, from 1. null: the middle and the last (released scripts: 12 and 24)."""
    student_blocks: tuple[int, ...] | None = None
    """The student's blocks that are paired with them. null: the middle and the last (released scripts: 6 and 12)."""
    align: Literal["l2", "l1", "smooth_l1"] = "l2"
    """Distance of the alignments, averaged over tokens and channels (released scripts: l2)."""
    generator_depth: int = Field(default=2, ge=1)
    """Blocks of each generator (released code)."""
    generator_heads: int | None = Field(default=None, ge=1)
    """Attention heads of the generators, whose width is the teacher's. null: that width / 64, at least 1 (released code:
    16 for ViT-L)."""
    train_mask_tokens: bool = False
    """Whether the generators' mask tokens are trained. false: they keep their initial values, as in the released code,
    which holds them in a plain list that no optimizer sees."""
    decoder_width: int | None = Field(default=None, ge=1)
    """Channels of the pixel decoder. null: half the student's (released code: 192 for 384, 384 for 768)."""
    decoder_depth: int = Field(default=4, ge=1)
    """Blocks of the pixel decoder (released code)."""
    decoder_heads: int | None = Field(default=None, ge=1)
    """Attention heads of the pixel decoder. null: decoder_width / 64, at least 1 (released code: 3 and 6)."""
    norm_pix: bool = True
    """Whether each target patch is normalised by its own mean and standard deviation (released code)."""
    norm_kind: NormKind | None = None
    """channel: over each colour channel of a patch, of pixels in [0, 1] (released code, video); patch: over all its
    values, of the normalised input (MAE's code). null: channel for clips, patch for images."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if len(set(self.use)) != len(self.use):
            raise ValueError(f"use {list(self.use)} names a part twice")
        if set(self.use) == {"pixels"}:
            raise ValueError("use names pixels alone, which needs no teacher; that is objective.kind=mae")
        if self.student_mask_ratio < self.teacher_mask_ratio:
            raise ValueError(
                f"student_mask_ratio {self.student_mask_ratio:g} is below teacher_mask_ratio {self.teacher_mask_ratio:g}, "
                "but the student sees a part of what the teacher saw; raise it"
            )
        if self.student_mask_ratio == self.teacher_mask_ratio and "generation" in self.use:
            raise ValueError(
                f"student_mask_ratio and teacher_mask_ratio are both {self.teacher_mask_ratio:g}, which leaves nothing to "
                'generate; raise student_mask_ratio, or set use to ["pixels", "direct"]'
            )
        for name in ("teacher_blocks", "student_blocks"):
            blocks = getattr(self, name)
            if blocks is not None and (not blocks or min(blocks) < 1):
                raise ValueError(f"{name} {list(blocks)} must name at least one block, from 1")
        return self

    def parts(self) -> tuple[str, ...]:
        """What ``use`` names, in the order pixels, direct, generation."""
        return tuple(part for part in PARTS if part in self.use)

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """The outputs of the teacher's aligned blocks, on its visible tokens."""
        name, card = self._teacher(cards)
        return {name: self._targets(name, card)}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """The outputs of the student's aligned blocks, and ``final`` for the decoder."""
        blocks = self.student_blocks or middle_and_last(depth)
        if max(blocks) > depth:
            raise UsageError(
                f"objective.student_blocks has {max(blocks)}, but the student has {depth} blocks; choose from 1 to {depth}, "
                "or null for the middle and the last"
            )
        return (*(f"block{block}.out" for block in blocks), *(("final",) if "pixels" in self.use else ()))

    def last_trained(self, depth: int) -> str:
        """``final``, or without pixels the last aligned block."""
        blocks = self.student_blocks or middle_and_last(depth)
        return "final" if "pixels" in self.use else f"block{max(blocks)}.out"

    def pool_trained(self) -> Pool:
        """``mean``: a class token is neither aligned nor decoded, so that the last one is never trained."""
        return "mean"

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> AMDHeads:
        """One projection (and generator) for each pair of blocks, and the pixel decoder."""
        name, card = self._teacher(cards)
        own = student_layout(student)
        check_layouts(student, name, card)
        targets = self._targets(name, card)
        taps = tuple(tap for tap in self.student_taps(num_blocks(student)) if tap != "final")
        if len(taps) != len(targets):
            raise UsageError(
                f"teacher {name!r} is aligned at {', '.join(targets)}, the student at {', '.join(taps)}: they are paired in "
                "order; give objective.teacher_blocks and objective.student_blocks the same length"
            )
        counts = self._counts(name, card)
        clips = is_clip_network(student)
        heads = self.generator_heads or max(1, card.width // 64)
        if "generation" in self.use and card.width % heads:
            raise UsageError(
                f"objective.generator_heads {heads} does not divide the generators' width {card.width}, that of teacher "
                f"{name!r}; choose a divisor"
            )
        if "generation" in self.use and card.width % 4 and not clips:
            raise UsageError(
                f"the generators are as wide as teacher {name!r}, whose {card.width} channels are not a multiple of 4, which "
                'their positions need; take another teacher, or set objective.use to ["pixels", "direct"]'
            )
        made = AMDHeads(name, targets, taps, counts)
        for _ in targets:
            made.project.append(projection(own.width, card.width, generator))
            if "generation" in self.use:
                layout = Layout(own.grid, 0, card.width, own.slots)
                made.generators.append(
                    Generator(
                        layout,
                        self.generator_depth,
                        heads,
                        generator,
                        clips=clips,
                        train_mask_token=self.train_mask_tokens,
                    )
                )
        if "pixels" in self.use:
            width = self.decoder_width or own.width // 2
            if width % 4 and not clips:
                most = width + max(64, 4 * self._decoder_heads(width))  # a multiple of 64 always fits its own heads
                fitting = next_to(width, lambda n: n % 4 == 0 == n % self._decoder_heads(n), most)
                raise UsageError(
                    f"the decoder's width {width}{'' if self.decoder_width else ' (half the student width)'} is not a multiple of "
                    f"4, which its positions need; set objective.decoder_width={fitting}"
                )
            made.decoder = pixel_decoder(
                student, pixel_targets(student, self.norm_pix, self.norm_kind, "amd"), width, self.decoder_depth,
                self._decoder_heads(width), generator, prefix=False, embed_bias=False,
            )  # fmt: skip
        return made

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """Run the student on a part of the teacher's visible tokens, drawn from (seed, id, epoch)."""
        assert isinstance(heads, AMDHeads)  # noqa: S101  # programmer invariant: what build returned
        visible = batch.visible[heads.teacher]
        drawn = split_visible(batch.ids, batch.epoch, seed, heads.counts)
        split = Split(*(part.to(visible.device, non_blocking=True) for part in drawn))
        return self.run(student, batch.images, visible, split, heads)

    def run(self, student: nn.Module, images: Tensor, visible: Tensor, split: Split, heads: AMDHeads) -> Taps:
        """One forward on ``visible`` int64 [B, T], cut by ``split``.

        Returns ``seen``, ``unseen`` (the split), for each pair of blocks I ``direct.I`` [B, V, D] and ``generated.I``
        [B, F, D], and ``prediction`` [B, N, C] with ``hidden`` bool [B, N].
        """
        seen, unseen = (visible.gather(1, part) for part in split)
        found = forward_taps(student, images, self.student_taps(num_blocks(student)), keep=seen)
        out: dict[str, Tensor | Tokens] = split._asdict()
        for index, tap in enumerate(heads.taps):
            tokens = found[tap]
            assert isinstance(tokens, Tokens)  # noqa: S101  # programmer invariant
            direct = heads.project[index](tokens.patches)
            out[f"direct.{index}"] = direct
            if heads.generators:
                out[f"generated.{index}"] = heads.generators[index](direct, seen, unseen)
        if heads.decoder is not None:
            final = found["final"]
            assert isinstance(final, Tokens)  # noqa: S101
            out["prediction"] = heads.decoder(Tokens(final.prefix[:, :0], final.patches), seen)
            out["hidden"] = hidden_patches(seen, student_layout(student).tokens)
        return out

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Reconstruction, direct and generation alignment; each alignment is the mean over the pairs of blocks."""
        assert isinstance(heads, AMDHeads)  # noqa: S101  # programmer invariant
        values = {name: value for name, value in taps.items() if isinstance(value, Tensor)}
        losses: dict[str, Tensor] = {}
        if heads.decoder is not None:
            losses["pixels"] = heads.decoder.error(batch.images, values["prediction"], values["hidden"])
        for part, made, positions in (("direct", "direct", "seen"), ("generation", "generated", "unseen")):
            if part not in self.parts():
                continue
            errors = []
            for index, name in enumerate(heads.targets):
                target = batch.targets[heads.teacher][name]
                assert isinstance(target, Tokens)  # noqa: S101
                wanted = at(target.patches.detach().float(), values[positions])
                errors.append(DISTANCES[self.align](values[f"{made}.{index}"].float(), wanted))
            losses[part] = torch.stack(errors).mean()
        return losses

    def _decoder_heads(self, width: int) -> int:
        return self.decoder_heads or max(1, width // 64)

    def _kind(self, clips: bool) -> MaskKind:
        return self.mask or ("tube" if clips else "random")

    def _fits(self, card: TeacherCard) -> bool:
        """Whether a teacher was run with the mask that is asked for."""
        asked = (self._kind(card.preprocessing.frames is not None), self.teacher_mask_ratio)
        return card.mask is not None and card.mask.kind == asked[0] and math.isclose(card.mask.ratio, asked[1])

    def _teacher(self, cards: Mapping[str, TeacherCard]) -> tuple[str, TeacherCard]:
        if self.teacher is not None and self.teacher not in cards:
            clips = any(card.preprocessing.frames is not None for card in cards.values())
            raise teacher_fit.missing("objective.teacher", self.teacher, cards, self._flags(self._kind(clips)))
        asked = cards if self.teacher is None else {self.teacher: cards[self.teacher]}
        fitting = {name: card for name, card in asked.items() if self._fits(card)}
        if len(fitting) > 1:
            raise UsageError(
                f"objective.teacher is null, but {len(fitting)} teachers were run with objective.teacher_mask_ratio "
                f"{self.teacher_mask_ratio:g} ({', '.join(sorted(fitting))}); set objective.teacher=NAME"
            )
        if not fitting:
            raise self._missing(asked, cards)
        return next(iter(fitting.items()))

    def _missing(self, asked: Mapping[str, TeacherCard], cards: Mapping[str, TeacherCard]) -> UsageError:
        """Why none of these teachers will do, and the command that adds one."""
        found = [f"{name} with {mask_name(card.mask)}" for name, card in sorted(asked.items())]
        known = same_network(asked)
        card = None if known is None else asked[known]
        clips = any(each.preprocessing.frames is not None for each in ([card] if card is not None else asked.values()))
        kind = self._kind(clips)
        if card is not None:
            self._counts(known or "", card)  # no command stores a mask that hides nothing
        name = "NAME" if known is None else free_name(known, self.teacher_mask_ratio, cards)
        adding = teacher_fit.add("and add it", name, self._flags(kind, known or "", card))
        return teacher_fit.Misfit(
            f"no teacher was run with objective.teacher_mask_ratio {self.teacher_mask_ratio:g} under {kind} masks "
            f"({', '.join(found) or 'there is none'}); with --online and no store give --teacher-mask "
            f"{kind}:{self.teacher_mask_ratio:g}, else set objective.teacher={name} {adding}",
            of=known,
        )

    def _flags(self, kind: MaskKind, name: str = "", card: TeacherCard | None = None) -> str:
        """What ``hdcache extract`` is told of a teacher; without its ``card`` its depth is not known."""
        mask = f"--teacher-mask {kind}:{self.teacher_mask_ratio:g}"
        if card is not None:
            return f"{mask} {teacher_fit.flags(self._targets(name, card))}"
        if self.teacher_blocks is not None:
            return f"{mask} {teacher_fit.flags(f'block{block}.out' for block in self.teacher_blocks)}"
        return f"{mask} --tap blockM.out --tap blockN.out (M: its middle block, N: its last)"

    def _targets(self, name: str, card: TeacherCard) -> tuple[str, ...]:
        """The aligned taps of a teacher."""
        blocks = self.teacher_blocks or middle_and_last(card.depth)
        if max(blocks) > card.depth:
            raise UsageError(
                f"objective.teacher_blocks has {max(blocks)}, but teacher {name!r} has {card.depth} blocks; choose from 1 to "
                f"{card.depth}, or null for the middle and the last"
            )
        return tuple(f"block{block}.out" for block in blocks)

    def _counts(self, name: str, card: TeacherCard) -> Counts:
        """How the student's tokens are drawn, once both ratios are known to leave some."""
        kind, cells = self._kind(card.preprocessing.frames is not None), card.grid[0] * card.grid[1]
        slots = card.slots if kind == "tube" else 1
        drawn = cells * card.slots // slots
        among, seen = (
            drawn - hidden_count(drawn, getattr(self, field), f"objective.{field}")
            for field in ("teacher_mask_ratio", "student_mask_ratio")
        )
        if "generation" in self.use and seen == among:
            raise UsageError(
                f"objective.student_mask_ratio {self.student_mask_ratio:g} leaves the student all {seen} tokens that teacher "
                f'{name!r} sees, so that none is left to generate; raise it, or set objective.use to ["pixels", "direct"]'
            )
        return Counts(among, seen, slots)


def at(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens [B, M, D] of [B, T, D] at ``positions`` int64 [B, M]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def middle_and_last(depth: int) -> tuple[int, ...]:
    """12 and 24 of 24 blocks, 6 and 12 of 12 (released scripts); one block is both."""
    return tuple(sorted({max(1, depth // 2), depth}))

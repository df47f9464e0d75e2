"""SDSSL: self-distillation of intermediate layers for SimCLR, BYOL and MoCo v3.

Jang, Kim, Yoo, Kim, Kwak: Self-Distilled Self-Supervised Representation Learning (arXiv 2111.12958), after the
released code (``pl_train_moco.py``, ``pl_train_byol.py``, ``pl_train_simclr.py``, ``vision_transformer.py``). Every
layer's class token learns from the last layer's projection of another view of the same image.

The method is ``formulation="online"``: the target is the network itself, or its momentum copy, and moves with it.
``cached_final`` and ``cached_anchor`` are ours, not the paper's: they learn from a frozen teacher's stored vectors, and
their results are not results of SDSSL.

Legend: L blocks of the student, B images, D width, K channels of a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hdcache.distill import teacher_fit
from hdcache.distill.contrast import (
    Distance,
    contrasted_parts,
    cosine_distance,
    info_nce,
    predicted_parts,
    scaled_info_nce,
    unit,
)
from hdcache.distill.objective import Objective, Taps
from hdcache.distill.projectors import LayerMLPs
from hdcache.distill.schedules import cosine, ema_momentum
from hdcache.errors import UsageError
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens, forward_taps, num_blocks

if TYPE_CHECKING:
    from hdcache.batch import Batch

VIEWS = ("first", "second")
# Fields that a formulation (both cached ones are alike) or a framework ignores.
UNREAD: dict[str, tuple[str, ...]] = {
    "online": ("target",),
    "cached": ("projection_dim", "momentum", "momentum_end"),
    "simclr": ("momentum", "momentum_end"),
    "byol": ("tau",),
    "mocov3": (),
}


class SDSSL(Objective):
    """Settings of SDSSL; the objective itself."""

    kind: Literal["sdssl"] = "sdssl"
    """Which objective this is."""
    framework: Literal["simclr", "byol", "mocov3"] = "mocov3"
    """The self-supervised method that is extended (B3)."""
    formulation: Literal["online", "cached_final", "cached_anchor"] = "online"
    """online: the paper's, without a store. NOT the paper's: cached_final: every layer learns from a frozen teacher's
    stored vector; cached_anchor: the last layer does, the others from the student's own last layer (B9)."""
    intermediate: bool = True
    """Whether layers before the last learn too; false: the framework by itself, the paper's baseline (B4)."""
    tau: float = Field(default=0.2, gt=0)
    """simclr, mocov3: temperature of the contrast (B3: 0.2)."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the intermediate layers at the end; it rises from 0 by half a cosine over the run. null: the released
    settings, 1.0 for mocov3 and 0.8 for byol and simclr (B3)."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """online, byol and mocov3: momentum per step of the copy that gives targets, at the start (B4: 0.996)."""
    momentum_end: float = Field(default=1.0, ge=0, le=1)
    """The same at the end of half a cosine over the run (B4: 1)."""
    projection_dim: int = Field(default=256, ge=1)
    """online: channels of projections and predictions (B4: 256); a cached formulation has the teacher's width."""
    hidden: int = Field(default=4096, ge=1)
    """Hidden channels of the last layer's projector (B1: 4096)."""
    hidden_intermediate: int = Field(default=2048, ge=1)
    """Hidden channels of the other layers' projectors (B1: 2048)."""
    hidden_predictor: int = Field(default=4096, ge=1)
    """byol, mocov3: hidden channels of every layer's predictor (B1: 4096)."""
    teacher: str | None = None
    """Cached formulations: name of the teacher in the store; null: the only one there."""
    target: Literal["pooled", "final"] = "pooled"
    """Cached formulations: pooled: the vector that the teacher's own head pools, for most networks the class token
    after the last norm; one vector a row. final: the class token of stored final tokens, where a store has these."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        if self.formulation == "online" and self.teacher is not None:
            raise ValueError(
                "teacher is set, but formulation 'online' learns from the student itself; set teacher to null, or "
                "formulation to cached_final or cached_anchor"
            )
        self.refuse_unread(
            UNREAD["online" if self.formulation == "online" else "cached"], f"formulation {self.formulation!r}"
        )
        self.refuse_unread(UNREAD[self.framework], f"framework {self.framework!r}")
        if not self.intermediate and self.alpha is not None:
            raise ValueError("alpha is set, but intermediate is false, so nothing has this weight; set alpha to null")
        if not self.intermediate and self.formulation == "cached_anchor":
            raise ValueError(
                "formulation 'cached_anchor' without intermediate layers is 'cached_final'; set formulation to cached_final"
            )
        return self

    def fresh_views(self) -> int:
        """Two: each learns from the other, or both from a stored third."""
        return 2

    def default_views(self) -> str:
        """Crops of 0.08 to 1 of the area, as the released augmentations have them."""
        return "supervised"

    def compares_rows(self) -> bool:
        """True: images are each other's negatives, and batch norms mix them."""
        return True

    def parts(self) -> tuple[str, ...]:
        """``out``: last layer; ``mid``: mean over the others; ``det``: predictors alone, summed over layers (not simclr)."""
        if not self.intermediate:
            return ("out",)
        return ("out", "mid", "det") if self._predicts() else ("out", "mid")

    def factors(self, step: int, total: int) -> dict[str, float]:
        """``mid`` has alpha (1 - cos(pi step / total)) / 2 (B3).

        At step 0 this is 0. There the released BYOL averages all layers in one loss; its learning rate is 0 at that
        step, so that we do not follow it.
        """
        if not self.intermediate:
            return {}
        alpha = self.alpha if self.alpha is not None else 1.0 if self.framework == "mocov3" else 0.8
        return {"mid": cosine(0.0, alpha, step / max(total, 1))}

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """Nothing, or one vector of one teacher (cached formulations)."""
        if self.formulation == "online":
            return {}
        flags = teacher_fit.flags((self.target,))
        name = teacher_fit.choose_teachers({"": self.teacher}, cards, {"": flags})[""]
        teacher_fit.whole_images(name, cards[name], "", (self.target,))
        if self.target == "final" and not cards[name].class_token:
            raise UsageError(
                f"objective.target is 'final', whose class token teacher {name!r} lacks; set objective.target=pooled"
            )
        return {name: (self.target,)}

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """Outputs of all blocks, or of the last; the loss reads the class token after the network's last norm (B1)."""
        return tuple(f"block{block}.out" for block in range(1 if self.intermediate else depth, depth + 1))

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> SDSSLHeads:
        """Projectors, predictors and, for an online byol or mocov3, the momentum copy."""
        model: Any = student
        depth = num_blocks(student)
        if not model.has_class_token:
            raise UsageError(
                "objective 'sdssl' reads class tokens, which the student lacks; choose an architecture that has one"
            )
        if isinstance(model.norm, nn.Identity):
            raise UsageError(
                "objective 'sdssl' reads every layer after the last norm, which a student that pools its patches lacks; "
                "set student.arguments.global_pool=token"
            )
        if self.intermediate and depth < 2:
            raise UsageError(
                "objective.intermediate is true, but the student has one block; set objective.intermediate=false"
            )
        wanted = self.wants(cards)
        name = next(iter(wanted), None)
        return SDSSLHeads(self, student, None if name is None else (name, cards[name].width), generator)

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """Project both views; see :class:`SDSSLHeads` for what is returned."""
        assert isinstance(heads, SDSSLHeads)  # noqa: S101  # programmer invariant: what build returned
        # View by view, so that drop path and batch norms have the images of one view at a time, as in MoCo v3 and BYOL.
        seen = [class_tokens(student, images, self.student_taps(num_blocks(student))) for images in _views(batch)]
        found: dict[str, Tensor] = heads(seen[0], seen[1], _views(batch))
        return found

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """``out``, ``mid`` and ``det`` of B3; ``mid`` without its weight, ``det`` as the sum over layers."""
        assert isinstance(heads, SDSSLHeads)  # noqa: S101
        found: dict[str, Any] = dict(taps)
        projections = found["projections first"], found["projections second"]
        own = projections[0][-1], projections[1][-1]
        if self.formulation == "online" and self.framework == "simclr":
            return contrasted_parts(projections, self.tau)
        if self.formulation == "online":
            # The first view's predictions learn from what the copy makes of the second view.
            targets = found["targets second"], found["targets first"]
        else:
            vectors = batch.targets[str(heads.teacher)][self.target]
            stored = vectors.prefix[:, 0] if isinstance(vectors, Tokens) else vectors
            targets = stored, stored
        anchored = self.formulation == "cached_anchor"
        if self.framework == "simclr":
            against = (projections[0][-1:], projections[1][-1:]) if anchored else projections
            parts = predicted_parts(partial(info_nce, tau=self.tau), against, None, targets)
            # A mean over both views, as NT-Xent is one.
            parts = {part: value / 2 for part, value in parts.items()}
            return parts | ({"mid": contrasted_parts(projections, self.tau)["mid"]} if anchored else {})
        detached = (found["detached first"], found["detached second"]) if self.intermediate else None
        predictions = found["predictions first"], found["predictions second"]
        crossed = (own[1].detach(), own[0].detach()) if anchored else None
        parts = predicted_parts(self._distance(), predictions, detached, targets, crossed)
        return parts | ({"det": len(predictions[0]) * parts["det"]} if detached is not None else {})

    def after_step(self, student: nn.Module, heads: nn.Module, step: int, total: int) -> None:
        """Move the momentum copy: copy <- m copy + (1 - m) student, parameter by parameter (B4)."""
        assert isinstance(heads, SDSSLHeads)  # noqa: S101
        if heads.momentum is not None:
            keep = ema_momentum(step, total, self.momentum, self.momentum_end)
            heads.momentum.follow(student, heads.projector_last, keep)

    def averaged(self, heads: nn.Module) -> nn.Module | None:
        """The momentum copy's backbone, which the released code evaluates; None for simclr and the cached formulations."""
        assert isinstance(heads, SDSSLHeads)  # noqa: S101
        return None if heads.momentum is None else heads.momentum.backbone

    def _predicts(self) -> bool:
        return self.framework != "simclr"

    def _distance(self) -> Distance:
        return cosine_distance if self.framework == "byol" else partial(scaled_info_nce, tau=self.tau)


class Momentum(nn.Module):
    """The network that gives targets: slow copies of the backbone and of the last layer's projector (B1)."""

    def __init__(self, backbone: nn.Module, projector: LayerMLPs) -> None:
        super().__init__()
        self.backbone, self.projector = copy.deepcopy(backbone), copy.deepcopy(projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, tap: str) -> Tensor:
        """Images -> normalised projections [B, K]; batch norms use the batch, as in training."""
        return unit(self.projector(class_tokens(self.backbone, images, (tap,)))[0])

    @torch.no_grad()
    def follow(self, backbone: nn.Module, projector: nn.Module, keep: float) -> None:
        """copy <- keep copy + (1 - keep) original; buffers (batch norms' statistics) are the copy's own."""
        own = chain(self.backbone.parameters(), self.projector.parameters())
        for mean, value in zip(own, chain(backbone.parameters(), projector.parameters()), strict=True):
            mean.lerp_(value, 1 - keep)


class SDSSLHeads(nn.Module):
    """Projectors of all layers, predictors, and the momentum copy where there is one.

    ``forward`` gives, for each of the views "first" and "second": ``projections`` [L, B, K]; with predictors also
    ``predictions`` and, with intermediate layers, ``detached`` (of detached projections); ``targets`` [B, K] where there
    is a momentum copy. L is 1 without intermediate layers.
    """

    def __init__(
        self, settings: SDSSL, student: nn.Module, teacher: tuple[str, int] | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.teacher = None if teacher is None else teacher[0]
        self.detaches = settings.intermediate and settings._predicts()
        # Both views are one batch for SimCLR's batch norms, as they are for its contrast.
        self.jointly = settings.framework == "simclr"
        width, channels = int(student.embed_dim), settings.projection_dim if teacher is None else teacher[1]  # type: ignore[arg-type]  # nn.Module's attributes are untyped
        layers = num_blocks(student) if settings.intermediate else 1
        self.last_tap = f"block{num_blocks(student)}.out"

        def mlps(count: int, inputs: int, hidden: list[int], *, normalised: bool) -> LayerMLPs:
            return LayerMLPs(count, [inputs, *hidden, channels], normalised=normalised, generator=generator)

        last, lower = [settings.hidden] * 2, [settings.hidden_intermediate] * 2
        whitens = settings.framework != "byol"
        self.projector_last = mlps(1, width, last, normalised=whitens)
        self.projectors = mlps(layers - 1, width, lower, normalised=whitens) if layers > 1 else None
        self.predictors = (
            mlps(layers, channels, [settings.hidden_predictor], normalised=settings.framework == "mocov3")
            if settings._predicts()
            else None
        )
        copied = settings.formulation == "online" and settings._predicts()
        self.momentum = Momentum(student, self.projector_last) if copied else None

    def forward(self, first: Tensor, second: Tensor, images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Class tokens [L, B, D] and images of both views -> what the losses compare."""
        if self.jointly:
            both = self._project(torch.cat([first, second], dim=1))
            projections = both[:, : first.shape[1]], both[:, first.shape[1] :]
        else:
            projections = self._project(first), self._project(second)
        found = {}
        for view, projected, seen in zip(VIEWS, projections, images, strict=True):
            found[f"projections {view}"] = projected
            if self.predictors is not None:
                found[f"predictions {view}"] = self.predictors(projected)
                if self.detaches:
                    found[f"detached {view}"] = self.predictors(projected.detach())
            if self.momentum is not None:
                found[f"targets {view}"] = self.momentum(seen, self.last_tap)
        return found

    def _project(self, tokens: Tensor) -> Tensor:
        last: Tensor = self.projector_last(tokens[-1:])
        return last if self.projectors is None else torch.cat([self.projectors(tokens[:-1]), last])


def class_tokens(model: nn.Module, images: Tensor, names: tuple[str, ...]) -> Tensor:
    """Class tokens after the named blocks, each through the network's last norm (B1): [L, B, D]."""
    network: Any = model
    taps = forward_taps(model, images, names).values()
    stacked = torch.stack([tokens.prefix[:, 0] for tokens in taps if isinstance(tokens, Tokens)])
    normalised: Tensor = network.norm(stacked)
    return normalised


def _views(batch: Batch) -> tuple[Tensor, Tensor]:
    (second,) = batch.more
    return batch.images, second

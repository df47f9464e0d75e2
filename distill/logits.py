"""Soft labels: the student's linear classifier learns the class probabilities of the teacher's.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2. Stored as the
few largest log-probabilities of a row (``hdcache extract --tap logits --top-k 10``) as TinyViT does (Wu et al. 2022,
arXiv 2207.10666, section 3.1), or whole.

Legend: B images, N patch tokens, D width, C classes of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdcache.distill import teacher_fit
from hdcache.distill.objective import Objective, Pool, Taps, linear, student_layout
from hdcache.distill.supervised import check_labels, check_pooled
from hdcache.errors import UsageError
from hdcache.relations import relation_kl
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens

if TYPE_CHECKING:
    from hdcache.batch import Batch


FLAGS = teacher_fit.flags(("logits",))
"""Options of ``hdcache extract`` that store what the loss reads."""


class SoftLabelHead(nn.Module):
    """The student's classifier, and the teacher that it learns from."""

    def __init__(self, teacher: str, classify: nn.Linear) -> None:
        super().__init__()
        self.teacher, self.classify = teacher, classify


class Logits(Objective):
    """Settings of distillation by soft labels; the objective itself."""

    kind: Literal["logits"] = "logits"
    """Which objective this is."""
    teacher: str | None = None
    """Name of the teacher in the store; null: the only one there."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both before their softmax (Hinton et al. 2015, section 2); the part is multiplied by its
    square, so that gradients keep their size. 1 as in TinyViT."""
    pool: Literal["class-token", "mean"] = "class-token"
    """What the linear head reads, after the last norm: the class token, or the mean of the patch tokens."""
    hard_labels: bool = False
    """Whether the data set's own labels take part too, as part cross_entropy (Hinton et al. 2015, section 2); they must
    be the teacher's classes in the teacher's order. The factors of both parts are the recipe's weights."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """hard_labels: share of the target probability that is spread over all classes."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        if self.label_smoothing and not self.hard_labels:
            raise ValueError(
                "label_smoothing is set, but hard_labels is false; set hard_labels=true or label_smoothing=0"
            )
        return self

    def parts(self) -> tuple[str, ...]:
        """``soft_labels``, and ``cross_entropy`` where ``hard_labels`` is set."""
        return ("soft_labels", "cross_entropy") if self.hard_labels else ("soft_labels",)

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """One teacher's ``logits``."""
        name = self._teacher(cards)
        try:
            teacher_fit.whole_images(name, cards[name], "", ("logits",))
        except teacher_fit.Misfit as error:
            if cards[name].classes:
                raise
            # Stored once more without its mask, it would still have no classifier.
            raise teacher_fit.Misfit(_unclassified(name), live=error.live) from None
        return {name: ("logits",)}

    def pool_trained(self) -> Pool:
        """What the classifier reads."""
        return "mean" if self.pool == "mean" else "cls"

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """``final``."""
        return ("final",)

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> SoftLabelHead:
        """One linear layer from the student's width to the teacher's classes."""
        (name,) = self.wants(cards)
        classes = cards[name].classes
        if not classes:
            raise UsageError(_unclassified(name))
        if self.hard_labels and num_classes != classes:
            raise UsageError(
                f"objective.hard_labels needs labels that are the teacher's classes, but the data set has {num_classes} "
                f"and teacher {name!r} {classes}; set objective.hard_labels=false"
            )
        layout = student_layout(student)
        check_pooled(student, self.pool)
        return SoftLabelHead(name, linear(layout.width, classes, generator))

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """KL(teacher || student) in nats times the temperature squared, and cross-entropy in nats; means over the batch.

        Raises
        ------
        UsageError
            if ``hard_labels`` is set and a sample of the batch has no label (-1).
        """
        assert isinstance(heads, SoftLabelHead)  # noqa: S101  # programmer invariant: what build returned
        tokens, target = taps["final"], batch.targets[heads.teacher]["logits"]
        assert isinstance(tokens, Tokens)  # noqa: S101
        assert isinstance(target, Tensor)  # noqa: S101
        pooled = tokens.prefix[:, 0] if self.pool == "class-token" else tokens.patches.mean(1)
        logits = heads.classify(pooled).float()
        teacher = (target.float() / self.temperature).softmax(-1)
        divergence = relation_kl(teacher, (logits / self.temperature).log_softmax(-1))
        parts = {"soft_labels": divergence * self.temperature**2}
        if self.hard_labels:
            check_labels(batch, self.kind)
            parts["cross_entropy"] = cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return parts

    def _teacher(self, cards: Mapping[str, TeacherCard]) -> str:
        # Other teachers of the store may have been run without a classifier.
        able = {name: card for name, card in cards.items() if card.classes}
        if self.teacher is None and not able and len(cards) > 1:
            names = ", ".join(sorted(cards))
            raise teacher_fit.Misfit(
                f"objective.teacher is null, and none of the {len(cards)} teachers ({names}) was run with a classifier; set "
                "objective.teacher=NAME and add it, from a checkpoint that has one: "
                f"{teacher_fit.extract_command('NAME', FLAGS)}",
                # Teachers in the loop are loaded without their classifiers until one is chosen.
                live=f"objective.teacher is null, which needs exactly one teacher, but there are {len(cards)} ({names}); "
                "set objective.teacher=NAME",
            )
        among = (able or cards) if self.teacher is None else cards
        return teacher_fit.choose_teachers({"": self.teacher}, among, {"": FLAGS})[""]


def _unclassified(name: str) -> str:
    return (
        f"objective 'logits' needs the class probabilities of teacher {name!r}, which was run without a classifier; set "
        f"objective.teacher={name}-2 and add it, from a checkpoint that has one: "
        f"{teacher_fit.extract_command(f'{name}-2', FLAGS)}"
    )

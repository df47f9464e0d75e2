"""Plain supervised training: cross-entropy of a linear head. It needs labels and no teacher.

The quickstart trains one of its own teachers with it; it is also the "from scratch" line of a comparison. Its head stays
with the student, which can so be a teacher of soft labels.

Legend: B images, N patch tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdcache.distill.objective import Objective, Pool, Taps, linear, student_layout
from hdcache.errors import UsageError
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens

if TYPE_CHECKING:
    from hdcache.batch import Batch


class Supervised(Objective):
    """Settings of supervised training; the objective itself."""

    kind: Literal["supervised"] = "supervised"
    """Which objective this is."""
    pool: Literal["class-token", "mean"] = "class-token"
    """What the linear head reads, after the last norm: the class token, or the mean of the patch tokens."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target probability that is spread over all classes (0.1 in TinyMIM A9's fine-tuning)."""

    def parts(self) -> tuple[str, ...]:
        """``cross_entropy``."""
        return ("cross_entropy",)

    def pool_trained(self) -> Pool:
        """What the classifier reads."""
        return "mean" if self.pool == "mean" else "cls"

    def student_taps(self, depth: int) -> tuple[str, ...]:
        """``final``."""
        return ("final",)

    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> nn.Linear:
        """One linear layer from the student's width to ``num_classes``."""
        if num_classes < 2:
            raise UsageError(
                f"objective 'supervised' needs labels of at least 2 classes, but the data set has {num_classes}; "
                "use a labelled data set (one folder per class) or an objective that needs no labels, such as 'mae'"
            )
        check_pooled(student, self.pool)
        return linear(student_layout(student).width, num_classes, generator)

    def classifier(self, heads: nn.Module) -> nn.Linear:
        """The linear layer."""
        assert isinstance(heads, nn.Linear)  # noqa: S101  # programmer invariant: what build returned
        return heads

    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Cross-entropy in nats, mean over the batch.

        Raises
        ------
        UsageError
            if a sample of the batch has no label (-1).
        """
        check_labels(batch, self.kind)
        tokens = taps["final"]
        assert isinstance(tokens, Tokens)  # noqa: S101  # programmer invariant
        pooled = tokens.prefix[:, 0] if self.pool == "class-token" else tokens.patches.mean(1)
        logits = heads(pooled).float()
        return {"cross_entropy": cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)}


def check_pooled(student: nn.Module, pool: str) -> None:
    """Refuse to read a class token of a student without one."""
    if pool == "class-token" and not getattr(student, "has_class_token", False):
        raise UsageError("objective.pool is 'class-token', which the student lacks; set objective.pool=mean")


def check_labels(batch: Batch, kind: str) -> None:
    """Refuse a batch with a sample that has no label (-1); ``kind`` is the objective's."""
    unlabelled = (batch.labels < 0).nonzero()
    if len(unlabelled):
        raise UsageError(
            f"sample {batch.ids[int(unlabelled[0])]!r} has no label, but objective {kind!r} needs one for "
            "every sample; remove unlabelled samples from the data set or use an objective that needs no labels"
        )

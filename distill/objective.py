"""The contract between a loss and the trainer, and the few pieces that every loss needs.

Legend: B images, P prefix tokens (class, registers), N patch tokens, T = P + N, D width.

An objective is a frozen record of settings (a part of the recipe) and holds no tensors. What it trains beside
the student lives in the module that ``build`` returns; that module is thrown away when training ends, but for what
``classifier`` names.
"""

from __future__ import annotations

import json
import shlex
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from hdcache.records import Record
from hdcache.schema import TeacherCard
from hdcache.taps import Tokens, forward_taps, num_blocks

if TYPE_CHECKING:
    from hdcache.batch import Batch

Taps = Mapping[str, Tokens | Tensor]
Pool = Literal["cls", "mean"]


class Objective(Record):
    """What the trainer asks of a loss. Here is what most answer alike; the rest each one says for itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    def fresh_views(self) -> int:
        """Views of its own that the student sees of each sample; 0: it sees the view that teachers saw."""
        return 0

    def default_views(self) -> str | None:
        """Preset of the views of a run that has no store and names none; None: that of the data set."""
        return None

    def compares_rows(self) -> bool:
        """Whether the loss sets the rows of a batch against each other, so that a batch cannot be cut into pieces."""
        return False

    def factors(self, step: int, total: int) -> dict[str, float]:
        """Factor of each part of the loss that has a schedule, at optimizer step ``step`` of ``total``."""
        return {}

    def after_step(self, student: nn.Module, heads: nn.Module, step: int, total: int) -> None:
        """Called after optimizer step number ``step`` (from 0) of ``total``: momentum copies move here."""

    def averaged(self, heads: nn.Module) -> nn.Module | None:
        """The momentum copy of the student that ``heads`` keeps and that evaluation prefers, or None."""
        return None

    def classifier(self, heads: nn.Module) -> nn.Linear | None:
        """The layer among ``heads`` from :meth:`pool_trained` of ``final`` to the data set's classes that stays with the
        student, or None."""
        return None

    def refuse_unread(self, fields: Iterable[str], reader: str) -> None:
        """:class:`ValueError` for the first of ``fields`` that is not at its default, though ``reader`` ignores it."""
        for name in fields:
            default = type(self).model_fields[name].get_default()
            if getattr(self, name) != default:
                # The value may be the recipe's own, which the user never saw.
                text = default if isinstance(default, str) else json.dumps(default)
                raise ValueError(
                    f"{reader} does not read {name}, which is not at its default; for that add "
                    f"--set {shlex.quote(f'objective.{name}={text}')}"
                )

    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the loss's parts: the keys that :meth:`loss` returns and that a recipe's ``weights`` may have."""

    def wants(self, cards: Mapping[str, TeacherCard]) -> dict[str, tuple[str, ...]]:
        """Teacher name -> names of the targets it must give for every row; by default empty: no teacher is needed.

        Raises
        ------
        UsageError
            when ``cards`` (teacher name -> card) lacks what is needed; the message says what there is.
        """
        return {}

    @abstractmethod
    def student_taps(self, depth: int) -> tuple[str, ...]:
        """Taps of a student of ``depth`` blocks that the loss reads."""

    @abstractmethod
    def build(
        self, student: nn.Module, cards: Mapping[str, TeacherCard], num_classes: int, generator: torch.Generator
    ) -> nn.Module:
        """The modules trained beside ``student`` (projections, decoders; often none), on the CPU.

        All initial weights come from ``generator``; the global generator is left alone. Every mismatch between
        student, teachers and settings is a :class:`~hdcache.errors.UsageError` here, before the first step.
        """

    def forward(self, student: nn.Module, batch: Batch, heads: nn.Module, seed: int) -> Taps:
        """Run the student; by default on the whole ``batch.images``, up to the last of :meth:`student_taps`.

        ``seed`` is the run's; random masks are drawn from (seed, sample id, epoch).
        """
        return forward_taps(student, batch.images, self.student_taps(num_blocks(student)))

    @abstractmethod
    def loss(self, batch: Batch, taps: Taps, heads: nn.Module) -> dict[str, Tensor]:
        """Part name -> scalar float32. Gradient reaches the student and ``heads`` only, never a target.

        ``heads`` is what :meth:`build` returned, not a wrapper around it.
        """

    def last_trained(self, depth: int) -> str:
        """Tap of the deepest layer that training reaches and that may be used frozen: ``final`` or ``blockN.out``."""
        return "final"

    def pool_trained(self) -> Pool:
        """How that layer's tokens are best pooled: ``mean`` where the loss never reaches its class token, else ``cls``."""
        return "cls"


@dataclass(frozen=True)
class Layout:
    """The token layout of a network."""

    grid: tuple[int, int]
    """Rows and columns of patch tokens."""
    prefix: int
    """Class and register tokens."""
    width: int
    """Channels per token."""
    slots: int = 1
    """Temporal slots of a clip; 1 for still images."""

    @property
    def cells(self) -> int:
        """Cells of the patch grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patch tokens of a whole input."""
        return self.slots * self.cells

    def __str__(self) -> str:
        slots = f"{self.slots} slots of " if self.slots > 1 else ""
        return f"{slots}{self.grid[0]}x{self.grid[1]} patch + {self.prefix} prefix tokens"


def student_layout(student: nn.Module) -> Layout:
    """Token layout of a timm ViT."""
    model: Any = student
    rows, columns = model.patch_embed.grid_size
    slots = int(getattr(model.patch_embed, "slots", 1))
    return Layout((int(rows), int(columns)), int(model.num_prefix_tokens), int(model.embed_dim), slots)


def teacher_layout(card: TeacherCard) -> Layout:
    """Token layout of a stored teacher."""
    return Layout(card.grid, card.prefix_tokens, card.width, card.slots)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer as MAE initialises them (Xavier-uniform, zero bias), drawn from ``generator`` alone."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    initialise(layer, generator)
    return layer


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Set the linear and norm layers inside ``module`` as MAE does (He et al. 2021, appendix A.1; TinyMIM A7).

    Linear weights Xavier-uniform from ``generator``, biases 0, norms the identity; other parameters are untouched.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)

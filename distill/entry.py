"""What a published recipe is: its settings, what it is for, and where each of its values is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hdcache.distill.settings import Recipe
from hdcache.records import Record

Sources = dict[str, str]
"""Dotted field, or group of fields (``jitter``) -> paper, released code, or ``ours`` with the reason."""

# Sized so that a CPU needs minutes: 8 x 8 patches of 4 pixels.
TINY_INPUT: dict[str, Any] = {"img_size": 32, "patch_size": 4}
TINY_TEACHER = TINY_INPUT | {"embed_dim": 96, "depth": 4, "num_heads": 3}
TINY_STUDENT = TINY_INPUT | {"embed_dim": 48, "depth": 4, "num_heads": 3}
TINY_RUN: dict[str, Any] = {
    "epochs": 30, "batch_size": 64, "lr": 1e-3, "base_lr": None, "min_lr": 0.0, "warmup_epochs": 3, "amp": "off",
    "log_every": 10,
}  # fmt: skip

# Fields that no paper speaks of, and switches that most methods leave off.
RUN: Sources = {
    "name": "ours: what reports call the run",
    "seed": "ours: any number",
    "data_seed": "null: seed decides the order too",
    "buffer_rows": "ours: more mixes better and takes more memory; rows of a store are shuffled already",
    "accumulate": "ours: a batch in one piece; pieces give the same step in less memory",
    "log_every": "ours: without effect on the student",
    "save_every_epochs": "ours: without effect on the student",
    "save_every_minutes": "ours: without effect on the student",
    "student.freeze_patch_embed": "not part of the method: it is trained",
    "second_jitter": "not part of the method: the student sees one view",
    "weight_decay_end": "as weight_decay, which is constant",
    "ema": "not part of the method: no averaged student",
    "ema_end": "not part of the method: no averaged student",
}
SCALED_LR: Sources = {"lr": "null: base_lr times batch_size / 256"}
TINY: Sources = {
    "student.architecture": "ours: sized for a CPU, 8 x 8 patches of 4 pixels",
    "student.arguments": "ours: sized for a CPU, 8 x 8 patches of 4 pixels",
    "student.drop_path": "ours: none; nothing so small needs it",
    "student.drop_path_schedule": "ours: no effect without drop path",
    "student.drop_path_last_block": "ours: no effect without drop path",
    "student.init": "as the method's recipe for full size",
    "student.sincos_positions": "as the method's recipe for full size",
    "epochs": "ours: minutes on a CPU for a few thousand images",
    "batch_size": "ours: twenty steps an epoch for a thousand images",
    "lr": "ours: a common peak for AdamW on small networks; not tuned for any method",
    "base_lr": "null: lr is given",
    "min_lr": "ours: a cosine to 0",
    "warmup_epochs": "ours: a tenth of the run",
    "betas": "as the method's recipe for full size",
    "weight_decay": "as the method's recipe for full size",
    "clip_grad": "as the method's recipe for full size",
    "amp": "ours: CPUs are exact and repeatable in float32",
}


@dataclass(frozen=True)
class Entry:
    """One published recipe."""

    recipe: Recipe
    method: str
    """Short name of the method."""
    teacher: str
    """What its teachers are, with the names that the store must give them."""
    about: str
    """What it is for, in one line."""
    sources: Sources
    """Covers every field; the longest key that fits a field counts."""
    notes: str = ""
    """What the paper leaves open or has and we do not, and other settings of the paper as ``--set`` lines."""

    @property
    def student(self) -> str:
        """The student in few words."""
        spec = self.recipe.student
        side = spec.arguments.get("img_size")
        if "embed_dim" in spec.arguments:
            size = f"{spec.arguments['depth']} blocks of {spec.arguments['embed_dim']}, {side} px"
        else:
            size = spec.architecture.removesuffix("_224").replace("vit_", "ViT-").replace("_patch", "/")
        frames = spec.arguments.get("frames")
        return size if frames is None else f"{size}, {frames} frames"

    def source(self, path: str) -> str:
        """Where the value of a dotted field is from; KeyError where nothing says it."""
        group = path
        while group not in self.sources:
            group, dot, _ = group.rpartition(".")
            if not dot:
                raise KeyError(path)
        return self.sources[group]


def fields(record: Record, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted path, value and meaning of every field; the fields of inner records one by one."""
    for name, field in type(record).model_fields.items():
        value = getattr(record, name)
        if isinstance(value, Record):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, " ".join((field.description or "").split())


def derive(entry: Entry, name: str, about: str, changes: Mapping[str, Any], **others: Any) -> Entry:
    """``entry`` under another name with single fields replaced; ``others`` are fields of :class:`Entry`.

    ``sources`` among ``others`` are laid over those of ``entry``.
    """
    data = entry.recipe.model_dump(mode="json") | {"name": name}
    for path, value in changes.items():
        *groups, last = path.split(".")
        inner = data
        for group in groups:
            inner = inner[group]
        inner[last] = value.model_dump(mode="json") if isinstance(value, Record) else value
    facts = {key: getattr(entry, key) for key in ("method", "teacher", "notes")} | others
    recipe = Recipe.model_validate(data)
    # Another kind of objective shares no fields with the old one.
    same = recipe.objective.kind == entry.recipe.objective.kind
    kept = {path: source for path, source in entry.sources.items() if same or not path.startswith("objective.")}
    facts["sources"] = {**kept, **others.get("sources", {})}
    return Entry(recipe=recipe, about=about, **facts)

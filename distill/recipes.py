"""Published settings as data, and how a user's changes reach them.

A recipe is a function that returns every setting of a run; its docstring says where each value is from. "A5" and
the like are sections of docs/methods/tinymim.md. ``get_recipe`` changes single fields, ``recipe_from_file`` reads
a file; both name every field that cannot be meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hdcache.distill.changes import merge, nested_changes, parse_value, validated
from hdcache.distill.mae import MAE
from hdcache.distill.settings import Jitter, Recipe, StudentSpec
from hdcache.distill.supervised import Supervised
from hdcache.distill.tinymim import TinyMIM
from hdcache.errors import InputNotFound, UsageError, nearest
from hdcache.schema import Record

# Sized so that a CPU needs minutes: 8 x 8 patches of 4 pixels.
TINY_INPUT = {"img_size": 32, "patch_size": 4}
TINY_TEACHER = TINY_INPUT | {"embed_dim": 96, "depth": 4, "num_heads": 3}
TINY_STUDENT = TINY_INPUT | {"embed_dim": 48, "depth": 4, "num_heads": 3}


def _paper(name: str, architecture: str, objective: TinyMIM, **arguments: Any) -> Recipe:
    """TinyMIM's pre-training (A6, A7), the same for all sizes (A7: the author on commands for S and T)."""
    student = StudentSpec(
        architecture=architecture, arguments=arguments, drop_path=0.1, drop_path_schedule="constant",
        drop_path_last_block=False, init="mae", sincos_positions=True,
    )  # fmt: skip
    return Recipe(
        name=name, objective=objective, student=student, jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4),
        epochs=300, batch_size=4096, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=15, betas=(0.9, 0.95), weight_decay=0.05,
        clip_grad=None, amp="auto",
    )  # fmt: skip


def tinymim_b() -> Recipe:
    """TinyMIM-ViT-B from MAE-ViT-L.

    Paper and released code: relations Q-K and V-V (A3), block 18 of 24 and student block 12 (A4), the teacher's 16
    heads in block 12 (A5), jitter (A6), optimizer, schedule, drop path, positions, init, batch (A7). Ours: bf16
    where the paper has fp16 with a scaler; crops are those that the store holds, not fresh ones (A12).
    """
    return _paper("tinymim-b", "vit_base_patch16_224", TinyMIM())


def tinymim_s() -> Recipe:
    """TinyMIM-ViT-S from TinyMIM-ViT-B (A8); all else as ``tinymim-b``.

    The B teacher's block 12 is read with 12 heads, as the released code reads it, though it was trained with 16
    (A5, trap 3); ``objective.heads=16`` is the other reading.
    """
    return _paper("tinymim-s", "vit_small_patch16_224", TinyMIM(heads=12))


def tinymim_t() -> Recipe:
    """TinyMIM-ViT-T from TinyMIM-ViT-S (A8); all else as ``tinymim-b``.

    6 heads in blocks 1 to 11 and 12 in block 12 (A5's table; fine-tuning then uses 3). The release gives an S
    teacher 6 heads, which would not fit its own student (trap 3); we follow the student, so S is read with 12.
    """
    return _paper("tinymim-t", "vit_tiny_patch16_224", TinyMIM(heads=12), num_heads=6)


def tinymim_feature() -> Recipe:
    """Feature distillation, the paper's comparison (Eq. 7-8; Tab. 8: B 83.8 against 85.0); all else as ``tinymim-b``.

    Paper: output feature, one linear layer, layer norm without affine, smooth L1 with beta 2. Ours: all tokens take
    part, the student is read after its last norm.
    """
    return _paper("tinymim-feature", "vit_base_patch16_224", TinyMIM(strategy="feature"))


def tinymim_class_token() -> Recipe:
    """Class-token distillation, the paper's comparison (Eq. 6; Tab. 8: B 82.6 against 85.0); all else as ``tinymim-b``.

    Ours, since the paper does not say: softmax over channels at temperature 1, one linear layer to the teacher's
    width, both class tokens after the last norm.
    """
    return _paper("tinymim-class-token", "vit_base_patch16_224", TinyMIM(strategy="class-token"))


def _tiny(name: str, objective: TinyMIM | Supervised | MAE, arguments: Mapping[str, Any], **changes: Any) -> Recipe:
    student = StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(arguments))
    return Recipe(
        name=name, objective=objective, student=student,
        epochs=30, batch_size=64, lr=1e-3, warmup_epochs=3, amp="off", log_every=10, **changes,
    )  # fmt: skip


def tinymim_tiny() -> Recipe:
    """TinyMIM's relations for a few thousand small images on a CPU.

    Paper: loss, jitter, AdamW, schedule shape, positions and init, as ``tinymim-b``. Ours: the sizes, 30 epochs,
    batch 64, learning rate 1e-3, no drop path (nothing so small needs it).
    """
    return _tiny("tinymim-tiny", TinyMIM(), TINY_STUDENT, jitter=Jitter())


def supervised_tiny() -> Recipe:
    """A small labelled teacher for the quickstart, trained on a CPU. All values are ours."""
    return _tiny("supervised-tiny", Supervised(), TINY_TEACHER, jitter=Jitter())


def mae_tiny() -> Recipe:
    """A small masked autoencoder for the quickstart, trained on a CPU.

    MAE: mask ratio 0.75, normalised pixels, no jitter (He et al. 2021, section 3, Tab. 1). Ours: the sizes, 30
    epochs, batch 64, learning rate 1e-3, a decoder of 2 blocks and 64 channels.
    """
    return _tiny("mae-tiny", MAE(decoder_width=64, decoder_depth=2, decoder_heads=4), TINY_TEACHER)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tinymim-b": tinymim_b,
    "tinymim-s": tinymim_s,
    "tinymim-t": tinymim_t,
    "tinymim-feature": tinymim_feature,
    "tinymim-class-token": tinymim_class_token,
    "tinymim-tiny": tinymim_tiny,
    "supervised-tiny": supervised_tiny,
    "mae-tiny": mae_tiny,
}


def get_recipe(name: str, overrides: Mapping[str, str | object] | None = None) -> Recipe:
    """The recipe ``name`` with single fields changed.

    Parameters
    ----------
    overrides
        dotted field -> value (``{"student.drop_path": "0.2"}``); a string is parsed by :func:`parse_value`.

    Raises
    ------
    UsageError
        for an unknown recipe or field (naming the nearest one) or a value that does not fit; all faults at once.
    """
    return validated(merge(_base(name), nested_changes(overrides or {})), f"recipe {name!r}")


def recipe_from_file(path: str | Path, overrides: Mapping[str, str | object] | None = None) -> Recipe:
    """A recipe from a JSON or YAML file, then changed by ``overrides`` as in :func:`get_recipe`.

    The file holds all fields, or ``base: NAME`` and those that differ from that recipe.

    Raises
    ------
    InputNotFound
        if the file cannot be read.
    UsageError
        if it is not a mapping of recipe fields, or as in :func:`get_recipe`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputNotFound(f"{path}: recipe file cannot be read ({error})") from None
    data = parse_value(text, str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of recipe fields, found {type(data).__name__}")
    base = data.pop("base", None)
    return validated(merge(merge(_base(str(base)) if base else {}, data), nested_changes(overrides or {})), str(path))


def show(recipe: Recipe) -> list[tuple[str, str, str]]:
    """One row per field: dotted path, value as JSON, what it means with unit and source."""
    return list(_rows(recipe, ""))


def _rows(record: Record, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(record).model_fields.items():
        value = getattr(record, name)
        if isinstance(value, Record):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value), " ".join((field.description or "").split())


def _base(name: str) -> dict[str, Any]:
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]().model_dump(mode="json")

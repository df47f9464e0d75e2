"""A frozen teacher: from a spec to its card, and from pixels to taps, always in batches of one size.

Matrix products may round differently for different batch shapes. A teacher therefore always runs batches of
exactly ``batch`` images (the last one padded), during extraction and in ``--online`` runs alike: that is what
makes cached equal live to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.backbones import Backbone, load_backbone, normalize
from hdcache.errors import StoreMismatch, UsageError
from hdcache.klt import multiplies_bf16
from hdcache.masks import draw_visible, parse_mask, visible_count
from hdcache.records import check_name, differences
from hdcache.schema import MaskSpec, TeacherCard, TeacherRecord
from hdcache.taps import Tokens, attention_of, check_readable, forward_taps, num_blocks, parse_tap

_DIGEST = re.compile(r"'([0-9a-f]{12})[0-9a-f]{52}'")


@dataclass(frozen=True)
class Teacher:
    """A frozen network with the card that decides its outputs."""

    name: str
    card: TeacherCard
    backbone: Backbone
    batch: int
    device: torch.device

    def visible(self, ids: Sequence[str], view: int) -> NDArray[np.int64] | None:
        """Ascending indices int64 [R, M] of the patch tokens that this teacher sees of each sample; None: all."""
        if self.card.mask is None:
            return None
        grid = self.card.grid
        return draw_visible(self.card.mask, ids, view, grid[0] * grid[1], self.card.slots, "teacher mask")

    def forward(
        self, pixels: Tensor, taps: Sequence[str], visible: NDArray[np.int64] | None = None
    ) -> dict[str, Tokens | Tensor]:
        """Taps of R images.

        Parameters
        ----------
        pixels
            uint8 [R, 3, size, size] at this teacher's input size ([R, 3, frames, size, size] for clips).
        taps
            tap names of :mod:`hdcache.taps`.
        visible
            what :meth:`visible` drew for these rows; the taps hold these tokens only.

        Returns
        -------
        dict
            float32 taps of R rows on the teacher's device.

        Raises
        ------
        UsageError
            when ``batch`` images are too many for the device's memory.
        """
        with self.within_memory():
            return self._forward(pixels, taps, None if visible is None else torch.from_numpy(visible))

    @contextmanager
    def within_memory(self) -> Iterator[None]:
        """Have work on a batch end in a :class:`UsageError` where the device's memory does not suffice for it."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise UsageError(
                f"teacher {self.name}: {self.device} has too little memory for {self.batch} {'clips' if self.card.preprocessing.frames else 'images'} at a time; "
                f"give --batch a number lower than {self.batch}, and where a store has {self.name} already, which keeps it to its "
                "batch, another name too: --teacher NAME=..."
            ) from None

    def _forward(self, pixels: Tensor, taps: Sequence[str], visible: Tensor | None) -> dict[str, Tokens | Tensor]:
        pieces: list[dict[str, Tokens | Tensor]] = []
        for start in range(0, max(1, len(pixels)), self.batch):
            part = pixels[start : start + self.batch].to(self.device)
            keep = None if visible is None else visible[start : start + self.batch].to(self.device)
            count = len(part)
            if count < self.batch:
                part = torch.cat([part, part.new_zeros(self.batch - count, *part.shape[1:])])
                if keep is not None:
                    keep = torch.cat([keep, keep.new_zeros(self.batch - count, keep.shape[1])])
            with torch.inference_mode(), self._precision():
                found = forward_taps(self.backbone.model, normalize(part, self.card.preprocessing), taps, keep)
            pieces.append({name: _rows(value, count) for name, value in found.items()})
        # A copy is no inference tensor, as which training could not use it.
        if len(pieces) == 1 and torch.is_inference_mode_enabled():
            return pieces[0]
        return {name: _join([piece[name] for piece in pieces]) for name in taps}

    def _precision(self) -> AbstractContextManager[Any]:
        if self.card.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def weights_for(self, taps: Sequence[str]) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """The small frozen pieces that turn a stored ``attn_in`` into Q, K, V: arrays by name, and facts per block."""
        arrays: dict[str, NDArray[np.float32]] = {}
        facts: dict[str, Any] = {}
        for tap in map(parse_tap, taps):
            if tap.what not in ("attn_in", "qkv"):
                continue
            attention = attention_of(self.backbone.model, tap.block)
            prefix = f"block{tap.block}"
            modules = {"qkv": attention.qkv, "q_norm": attention.q_norm, "k_norm": attention.k_norm}
            for part, module in modules.items():
                for key, value in module.named_parameters():
                    arrays[f"{prefix}/{part}_{key}"] = value.detach().float().cpu().numpy()
            normalised = not isinstance(attention.q_norm, torch.nn.Identity)
            facts[prefix] = {
                "heads": int(attention.num_heads),
                "normalised": type(attention.q_norm).__name__ if normalised else "",
                "epsilon": float(getattr(attention.q_norm, "eps", 0.0) or 0.0),
            }
        return arrays, facts


def _rows(value: Tokens | Tensor, count: int) -> Tokens | Tensor:
    if isinstance(value, Tensor):
        return value[:count].float()
    return Tokens(value.prefix[:count].float(), value.patches[:count].float())


def _join(pieces: list[Tokens | Tensor]) -> Tokens | Tensor:
    tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
    if tensors:
        return torch.cat(tensors)
    tokens = [piece for piece in pieces if isinstance(piece, Tokens)]
    return Tokens(torch.cat([t.prefix for t in tokens]), torch.cat([t.patches for t in tokens]))


def split_name(spec: str) -> tuple[str, str]:
    """``NAME=SPEC`` -> (name, spec); without a name, one is made from the architecture or the folder's name."""
    head, sign, rest = spec.partition("=")
    if sign and not set(head) & set("?:/&"):
        return check_name(head, "teacher"), rest
    base = spec.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return check_name(re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-.") or "teacher", "teacher"), spec


def absolute_spec(spec: str) -> str:
    """``spec`` with absolute paths, so that it still means the same in another working directory."""

    def resolved(path: str) -> str:
        return str(Path(unquote(path)).expanduser().resolve())

    if "?" not in spec and Path(spec).expanduser().exists():
        return resolved(spec)
    return re.sub(r"(?<=[?&]checkpoint=)[^&]+", lambda found: quote(resolved(found[0]), safe="/"), spec)


def load_teacher(
    spec: str,
    *,
    name: str | None = None,
    img_size: int | None = None,
    precision: str = "auto",
    batch: int = 32,
    device: str | torch.device = "cpu",
    taps: Sequence[str] = (),
    mask: str | MaskSpec | None = None,
    mask_seed: int = 0,
) -> Teacher:
    """Load and freeze the teacher that ``spec`` names (``NAME=SPEC``, or a spec of :mod:`hdcache.backbones`).

    With a ``mask`` (text: :func:`~hdcache.masks.parse_mask`, drawn from ``mask_seed``) it sees a part of each sample.

    Raises
    ------
    UsageError
        for a bad spec, an unsupported network, a tap it does not have, or a mask that leaves it nothing.
    InputNotFound
        for missing weights.
    """
    own, spec = split_name(spec)
    where = torch.device(device)
    precision = choose_precision(precision, where)
    if batch < 1:
        raise UsageError(f"batch {batch} must be at least 1")
    backbone = load_backbone(spec, img_size=img_size, classifier="logits" in taps)
    backbone.model.to(where)
    depth = num_blocks(backbone.model)
    for tap in taps:
        check_readable(backbone.model, parse_tap(tap, depth))
    if "logits" in taps and not getattr(backbone.model, "num_classes", 0):
        raise UsageError(
            f"teacher {spec}: no classifier, so it gives no logits; take a checkpoint that has one, or leave the tap logits out"
        )
    if isinstance(mask, str):
        mask = parse_mask(mask, seed=mask_seed, clips=backbone.preprocessing.frames is not None)
    elif mask is None and mask_seed:
        raise UsageError(f"teacher mask seed {mask_seed} has no mask to draw; give --teacher-mask too, or leave it out")
    return Teacher(name or own, card_of(backbone, precision, mask), backbone, batch, where)


def card_of(backbone: Backbone, precision: str, mask: MaskSpec | None = None) -> TeacherCard:
    """What decides the outputs of ``backbone``, run in ``precision`` (fp32 or bf16) on the tokens that ``mask`` shows."""
    model: Any = backbone.model
    slots = int(getattr(model.patch_embed, "slots", 1))
    if mask is not None:
        rows, columns = model.patch_embed.grid_size
        visible_count(mask, rows * columns, slots)
    return TeacherCard(
        architecture=backbone.architecture,
        arguments=backbone.arguments,
        weights=backbone.weights,
        preprocessing=backbone.preprocessing,
        patch_size=int(model.patch_embed.patch_size[0]),
        grid=tuple(model.patch_embed.grid_size),
        slots=slots,
        prefix_tokens=int(model.num_prefix_tokens),
        class_token=bool(model.has_class_token),
        width=int(model.embed_dim),
        depth=len(model.blocks),
        # A block with parallel branches has no ``attn`` of its own.
        heads=next(int(part.num_heads) for part in model.blocks[0].modules() if hasattr(part, "num_heads")),
        qk_norm=any(
            not isinstance(getattr(part, "q_norm", None) or torch.nn.Identity(), torch.nn.Identity)
            for part in model.modules()
        ),
        classes=int(getattr(model, "num_classes", 0) or 0),
        mask=mask,
        precision=precision,  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    )


def reload_teacher(record: TeacherRecord, spec: str | None = None, device: str | torch.device = "cpu") -> Teacher:
    """The live network of a teacher in a store, for ``--online`` runs and checks.

    Raises
    ------
    StoreMismatch
        when its weights are not those that the store was made with.
    """
    card = record.card
    side = card.arguments.get("img_size")
    teacher = load_teacher(
        spec or record.source,
        name=record.name,
        # Extraction may have been given the size apart from the spec (--img-size).
        img_size=side if isinstance(side, int) else None,
        precision=card.precision,
        batch=record.batch,
        device=device,
        taps=list(record.taps),
        mask=card.mask,
    )
    lines = differences(teacher.card.whole(), card.told_by(teacher.card).whole())
    if lines:
        # Of two networks twelve digits tell apart.
        apart = _DIGEST.sub(r"'\1...'", "; ".join(lines))
        raise StoreMismatch(
            f"teacher {record.name}: {spec or record.source} is not the network that the store was made with "
            f"({apart}); name the original: --teacher {record.name}=MODEL"
        )
    return teacher


def choose_precision(asked: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``; ``auto`` takes bf16 on CUDA devices and CPUs that compute in it."""
    if asked in ("fp32", "bf16"):
        return asked
    if asked != "auto":
        raise UsageError(f"precision {asked!r} must be auto, fp32 or bf16")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if multiplies_bf16() else "fp32"
    return "fp32"


def choose_device(asked: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; a device that is not there is a :class:`UsageError`."""
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {asked!r} cannot be used here ({str(error).splitlines()[0][:120]}); try --device auto"
        ) from None
    return device


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` that cover ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

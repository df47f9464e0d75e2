"""Frozen features of a labelled data set: decode and render in threads, forward in the main one."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hdcache.backbones import Backbone, normalize
from hdcache.datasets import Dataset
from hdcache.errors import InputNotFound, UnreadableImage, UsageError
from hdcache.samples import open_sample
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.student_files import CONFIG_FILE
from hdcache.taps import Tokens, forward_taps, parse_tap
from hdcache.views import PRESETS

POOLS = ("cls", "mean", "cls+mean")
FRACTION = 0.875
"""Side of the centre crop over the shorter side: 224 / 256, as in DINO's evaluation."""

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


@dataclass(frozen=True)
class Features:
    """One feature row for each image that could be read, in the data set's order."""

    ids: tuple[str, ...]
    features: NDArray[np.float32]
    """[N, D], not normalised."""
    labels: NDArray[np.int64]
    """[N], indices into ``classes``; -1 where a sample has none."""
    classes: tuple[str, ...]
    layer: str
    layer_is_default: bool
    """True where ``layer`` was not asked for but is the deepest layer that training reached."""
    pool: str
    failed: dict[str, str]
    """Id -> reason, for images that could not be read; they have no row."""


def embed(
    backbone: Backbone,
    dataset: Dataset,
    *,
    layer: str | None = None,
    pool: str | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    threads: int | None = None,
    fraction: float = FRACTION,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """Run ``backbone`` over ``dataset`` and pool one layer's tokens into features float32 [N, D]; see :func:`embed_layers`.

    ``layer`` None is the deepest layer that training reached.
    """
    layers = None if layer is None else [layer]
    return embed_layers(
        backbone, dataset, layers, pool=pool, device=device, batch_size=batch_size, threads=threads,
        fraction=fraction, stride=stride, progress=progress,
    )[0]  # fmt: skip


def embed_layers(
    backbone: Backbone,
    dataset: Dataset,
    layers: Sequence[str] | None = None,
    *,
    pool: str | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    threads: int | None = None,
    fraction: float = FRACTION,
    stride: int | None = None,
    progress: Progress | None = None,
) -> tuple[Features, ...]:
    """The pooled features of several layers, in one fp32 forward pass per image: one :class:`Features` for each layer.

    Parameters
    ----------
    layers
        each ``final`` or ``blockN.out`` (1-based); None is the deepest layer that training reached. Like DINO's
        ``get_intermediate_layers``, a block's output passes the model's final norm. Where training never reached that
        norm it is still at its identity initialisation, hence a plain LayerNorm.
    pool
        ``cls``, ``mean`` (of the patch tokens; class and register tokens left out) or ``cls+mean`` (each part
        l2-normalised, then side by side: D is twice the width); None is ``cls`` for a model that has a class token, unless training
        never reached that token (``backbone.pool_trained``).
    threads
        decoders; by default one for each core. At most two batches are decoded ahead.
    fraction
        side of the centre crop as a share of the image's shorter side. There is no flip.
    stride
        for networks of clips: frames of the video from one frame of the clip, taken from its middle, to the next;
        None is what the student was trained with, 4 where that is not known.

    An image that cannot be read goes to ``failed``; no other takes its place.

    Raises
    ------
    UsageError
        for a layer or pool that this model does not have, sizes below 1, or a network of clips on images and
        the other way round.
    InputNotFound
        if no image at all could be read.
    """
    chosen = (backbone.last_trained,) if layers is None else tuple(layers)
    for layer in chosen:
        check_layer(backbone.model, layer)
    pool = check_pool(backbone.model, pool, backbone.pool_trained)
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    spec = centre_view(backbone, fraction, stride)
    if (dataset.card.kind == "video") != (spec.frames is not None):
        takes = "still images" if spec.frames is None else f"clips of {spec.frames} frames"
        raise UsageError(
            f"{dataset.card.spec} holds {dataset.card.noun}, but {backbone.architecture} takes {takes}; give data or a network of the "
            "other kind (a folder of videos is video:PATH)"
        )
    readers = threads or os.cpu_count() or 1
    rows: list[list[Tensor]] = []
    kept: list[int] = []
    failed: dict[str, str] = {}
    model, was_training = backbone.model.to(device), backbone.model.training
    model.eval()
    if progress is not None:
        progress(0, len(dataset.ids))  # the work begins: a rate counts from here
    try:
        rendered = _render_ahead(dataset, backbone.preprocessing, spec, readers, 2 * batch_size)
        while batch := list(islice(rendered, batch_size)):
            start = len(kept) + len(failed)
            images = []
            for index, result in enumerate(batch, start):
                if isinstance(result, str):
                    failed[dataset.ids[index]] = result
                else:
                    kept.append(index)
                    images.append(result)
            if images:
                pixels = torch.from_numpy(np.stack(images)).to(device)
                rows.append(_features(model, normalize(pixels, backbone.preprocessing), chosen, pool))
            if progress is not None:
                progress(start + len(batch), len(dataset.ids))
    finally:
        model.train(was_training)
    if not rows:
        raise InputNotFound(
            f"{dataset.card.spec}: expected readable {dataset.card.noun}, found none among {len(dataset.ids)} samples "
            f"(first: {next(iter(failed.items()), 'no samples')}); check the path and the files"
        )
    ids, labels = tuple(dataset.ids[index] for index in kept), np.asarray(dataset.labels, np.int64)[kept]
    return tuple(
        Features(
            ids=ids,
            features=torch.cat([batch[which] for batch in rows]).numpy(),
            labels=labels,
            classes=dataset.card.classes,
            layer=layer,
            layer_is_default=layers is None,
            pool=pool,
            failed=failed,
        )
        for which, layer in enumerate(chosen)
    )


def centre_view(backbone: Backbone, fraction: float = FRACTION, stride: int | None = None) -> ViewSpec:
    """What ``backbone`` is shown of each sample: a centre crop, and of a video the middle; see :func:`embed_layers`."""
    frames = backbone.preprocessing.frames
    if frames is None and stride is not None:
        raise UsageError(f"stride {stride}: {backbone.architecture} takes still images; leave --stride out")
    if stride is not None and stride < 1:
        raise UsageError(f"stride: expected at least 1, found {stride}")
    if frames is None:
        return ViewSpec(kind="center-crop", fraction=fraction, flip=0)
    stride = _trained_stride(backbone.source) if stride is None else stride
    return PRESETS["clip-center"].model_copy(update={"fraction": fraction, "frames": frames, "stride": stride})


def _trained_stride(source: str) -> int:
    """The stride that the student in the folder ``source`` was trained with, else that of the preset."""
    try:
        about = json.loads((Path(source) / CONFIG_FILE).read_text())["hdcache"]["trained_from"]
        return ViewSpec.model_validate(about["views"]).stride
    except (OSError, ValueError, LookupError, TypeError):
        return PRESETS["clip-center"].stride


def all_layers(model: nn.Module) -> tuple[str, ...]:
    """Every layer that can be embedded, from the first block to ``final``."""
    depth = len(model.blocks)  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    return (*(f"block{block}.out" for block in range(1, depth + 1)), "final")


def check_layer(model: nn.Module, layer: str) -> None:
    """:class:`UsageError` unless ``layer`` is ``final`` or the output of one of the model's blocks."""
    depth = len(model.blocks)  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    if parse_tap(layer, depth).what not in ("final", "out"):
        raise UsageError(
            f"layer {layer!r}: expected 'final' or 'blockN.out' with N from 1 to {depth}; use --layer final"
        )


def check_pool(model: nn.Module, pool: str | None, trained: str = "cls") -> str:
    """``pool``, or by default ``trained`` where there is a class token; :class:`UsageError` if the model cannot be pooled so."""
    has_class_token = bool(model.has_class_token)
    if pool is None:
        return trained if has_class_token else "mean"
    if pool not in POOLS:
        raise UsageError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
    if "cls" in pool and not has_class_token:
        raise UsageError(f"pool {pool!r}: the model has no class token; use --pool mean")
    return pool


@torch.inference_mode()
def _features(model: nn.Module, images: Tensor, layers: Sequence[str], pool: str) -> list[Tensor]:
    """Pooled features [B, D] (or [B, 2 D]) of each layer, float32 on the CPU."""
    with torch.autocast(images.device.type, enabled=False):
        found = forward_taps(model, images, layers)
        return [_pooled(model, found[layer], layer, pool) for layer in layers]


def _pooled(model: nn.Module, tokens: Tokens | Tensor, layer: str, pool: str) -> Tensor:
    assert isinstance(tokens, Tokens)  # noqa: S101  # check_layer admits token taps only
    if layer != "final":
        tokens = Tokens(model.norm(tokens.prefix), model.norm(tokens.patches))  # type: ignore[operator]  # nn.Module's attributes are untyped
    parts = [tokens.prefix[:, 0]] if "cls" in pool else []
    parts += [tokens.patches.mean(dim=1)] if "mean" in pool else []
    # Models that pool by averaging carry their final norm after the pooling; in all others this is the identity.
    parts = [model.fc_norm(part) for part in parts]  # type: ignore[operator]  # nn.Module's attributes are untyped
    if len(parts) > 1:
        parts = [functional.normalize(part, dim=-1) for part in parts]
    return torch.cat(parts, dim=-1).float().cpu()


def _render_ahead(
    dataset: Dataset, preprocessing: Preprocessing, spec: ViewSpec, threads: int, ahead: int
) -> Iterator[NDArray[np.uint8] | str]:
    """Pixels uint8 [3, S, S] ([3, F, S, S] of clips) of every sample in order, or why there are none; few waiting."""

    def pixels(sample_id: str) -> NDArray[np.uint8] | str:
        try:
            return open_sample(dataset, sample_id, spec, 0).pixels(preprocessing)
        except (UnreadableImage, OSError) as error:
            return str(error).removeprefix(f"{sample_id}: ") or type(error).__name__

    yield from _in_order(pixels, dataset.ids, threads, ahead)


def _in_order(
    work: Callable[[str], NDArray[np.uint8] | str], ids: Sequence[str], threads: int, ahead: int
) -> Iterator[NDArray[np.uint8] | str]:
    waiting: deque[Future[NDArray[np.uint8] | str]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for sample_id in ids:
                waiting.append(pool.submit(work, sample_id))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # An interrupted caller should not wait for images that nobody will look at.
            for future in waiting:
                future.cancel()

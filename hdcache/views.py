"""Which crop and flip (sample, view) means, and how a network's pixels come out of it.

A view is a box and a flip in the source's own pixels (after EXIF orientation), and of a video also the frames
of a clip, which share that box and flip. It is drawn from (seed, sample id, view), stored as explicit integers,
and replayed by every teacher and student; each network then resizes the box to its own input size. Nothing here
depends on torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from hdcache import draws
from hdcache.errors import UnreadableImage, UsageError, nearest
from hdcache.records import first_fault
from hdcache.schema import DatasetCard, Preprocessing, ViewSpec

Box = tuple[int, int, int, int]
"""(left, top, width, height) in source pixels."""

PRESETS: dict[str, ViewSpec] = {
    # He et al. 2021 (MAE) and TinyMIM's main_pretrain.py: area 0.2 to 1, flip 0.5.
    "mae": ViewSpec(scale=(0.2, 1.0)),
    "tinymim": ViewSpec(scale=(0.2, 1.0)),
    # The usual supervised crop (Szegedy et al. 2015).
    "supervised": ViewSpec(scale=(0.08, 1.0)),
    # Mild crops for small data and for line drawings, where a fifth of the area may hold nothing.
    "gentle": ViewSpec(scale=(0.6, 1.0)),
    "center": ViewSpec(kind="center-crop", flip=0.0),
    "resize": ViewSpec(kind="resize", flip=0.0),
    # VideoMAE's and AMD's released pre-training on Kinetics-400; on Something-Something V2 the stride is 2.
    "videomae": ViewSpec(kind="multi-scale-crop", flip=0.0, frames=16, stride=4),
    "videomae-ssv2": ViewSpec(kind="multi-scale-crop", flip=0.0, frames=16, stride=2),
    "clip-center": ViewSpec(kind="center-crop", flip=0.0, frames=16, stride=4),
}

# VideoMAE's GroupMultiScaleCrop: sides as shares of the shorter side; width and height differ by one step at most.
SCALES = (1.0, 0.875, 0.75, 0.66)
PAIRS = tuple((i, j) for i in range(len(SCALES)) for j in range(len(SCALES)) if abs(i - j) <= 1)
# Its 13 places, in quarters of the room that is left: corners, centre, middles of the sides, and the quarters.
PLACES = (
    (0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)
)  # fmt: skip

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def parse_views(text: str, seed: int = 0) -> ViewSpec:
    """A preset's name, with options after ``?`` as in ``gentle?flip=0&scale=0.7,1``, as a :class:`ViewSpec`.

    Raises
    ------
    UsageError
        for an unknown preset or option (naming the nearest) or a value out of range.
    """
    name, _, query = text.partition("?")
    if name not in PRESETS:
        raise UsageError(f"unknown views {name!r}; {nearest(name, PRESETS)}")
    fields: dict[str, object] = PRESETS[name].model_dump() | {"seed": seed}
    for option in filter(None, query.split("&")):
        key, _, value = option.partition("=")
        if key not in ViewSpec.model_fields or key == "kind":
            raise UsageError(
                f"views {text!r}: unknown option {key!r}; {nearest(key, set(ViewSpec.model_fields) - {'kind'})}"
            )
        fields[key] = value.split(",") if "," in value else value
    try:
        return ViewSpec.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"views {text!r}: {first_fault(error)}") from None


def views_text(spec: ViewSpec) -> str:
    """What :func:`parse_views` reads as the clips of ``spec``: the nearest preset, and as options what it has otherwise."""

    def changes(name: str) -> dict[str, Any]:
        given = {field: getattr(spec, field) for field in ViewSpec.model_fields}
        return {field: value for field, value in given.items() if value != getattr(PRESETS[name], field)}

    fitting = [name for name, preset in PRESETS.items() if preset.kind == spec.kind]
    name = min(fitting, key=lambda name: (len(changes(name)), PRESETS[name].frames is None))
    options = "&".join(f"{field}={_option(value)}" for field, value in changes(name).items())
    return f"{name}?{options}" if options else name


def _option(value: object) -> str:
    return ",".join(map(_option, value)) if isinstance(value, tuple) else repr(value).removesuffix(".0")


def center_box(width: int, height: int, fraction: float) -> Box:
    """The centred square whose side is ``fraction`` of the shorter side (at least one pixel)."""
    side = max(1, round(min(width, height) * fraction))
    return (width - side) // 2, (height - side) // 2, side, side


def draw(spec: ViewSpec, sample_id: str, view: int, width: int, height: int) -> tuple[Box, bool]:
    """Box and flip of ``view`` of a ``width`` x ``height`` pixel sample: a pure function of its arguments.

    ``random-resized-crop`` follows torchvision's rule: up to ten tries of (area, log-uniform ratio), the
    first box that fits wins, else the largest centred box within the ratio limits. ``multi-scale-crop`` follows
    VideoMAE's and AMD's released code: one of 10 pairs of sides, at one of 13 places; sides close to the network's
    input are not rounded to it, since several networks of different sizes replay one view.
    """
    numbers = draws.uniform(41, spec.seed, sample_id, view, "view")
    flip = bool(numbers[0] < spec.flip)
    if spec.kind == "resize":
        return (0, 0, width, height), flip
    if spec.kind == "center-crop":
        return center_box(width, height, spec.fraction), flip
    if spec.kind == "multi-scale-crop":
        return _multi_scale_box(width, height, numbers[1], numbers[2]), flip
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for area_draw, ratio_draw, left_draw, top_draw in numbers[1:].reshape(10, 4).tolist():
        area = width * height * (spec.scale[0] + area_draw * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + ratio_draw * (high - low))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(left_draw * (width - box_width + 1))
            top = int(top_draw * (height - box_height + 1))
            return (left, top, box_width, box_height), flip
    box_width = min(width, max(1, round(height * spec.ratio[1])))
    box_height = min(height, max(1, round(width / spec.ratio[0])))
    return ((width - box_width) // 2, (height - box_height) // 2, box_width, box_height), flip


def _multi_scale_box(width: int, height: int, pair_draw: float, place_draw: float) -> Box:
    sides = [max(1, int(min(width, height) * scale)) for scale in SCALES]
    across, down = PAIRS[int(pair_draw * len(PAIRS))]
    right, below = PLACES[int(place_draw * len(PLACES))]
    box_width, box_height = sides[across], sides[down]
    return right * ((width - box_width) // 4), below * ((height - box_height) // 4), box_width, box_height


def draw_frames(spec: ViewSpec, sample_id: str, view: int, count: int) -> tuple[int, ...]:
    """Indices of the frames of a clip of ``view`` in a video of ``count`` frames: a pure function of its arguments.

    ``frames`` indices ``stride`` apart. The kinds that crop at random start anywhere with equal probability (VideoMAE,
    whose released code keeps ``stride`` - 1 frames behind the clip as well); ``center-crop`` and ``resize`` take
    the middle of the video.

    Raises
    ------
    UnreadableImage
        when the video is shorter than the clip.
    """
    frames = spec.frames or 1
    span = (frames - 1) * spec.stride + 1
    if count < span:
        stride = (count - 1) // (frames - 1)
        fitting = views_text(spec.model_copy(update={"frames": min(frames, count), "stride": max(1, stride)}))
        advice = (
            f"use a smaller stride (--views '{fitting}', --stride {stride} in knn-eval)"
            if stride
            else f"leave the video out, or use networks of {count} frames or fewer at stride 1 (--views '{fitting}')"
        )
        raise UnreadableImage(
            f"{sample_id}: {count} frames, but a clip of {frames} frames at stride {spec.stride} spans {span}; {advice}"
        )
    start = (count - span) // 2
    if spec.kind in ("random-resized-crop", "multi-scale-crop"):
        start = int(draws.uniform(1, spec.seed, sample_id, view, "clip start")[0] * (count - span + 1))
    return tuple(range(start, start + span, spec.stride))


def default_views(dataset: DatasetCard) -> str:
    """The preset for a data set when none is asked for."""
    return "videomae" if dataset.kind == "video" else "mae"


def check_views(spec: ViewSpec, dataset: DatasetCard) -> None:
    """:class:`UsageError` unless clips are drawn from videos, and single images from images."""
    if dataset.kind == "video" and spec.frames is None:
        raise UsageError(
            f"{dataset.spec} holds videos, but the views ({spec.kind}) are of still images; "
            "draw clips: --views videomae, or add frames to any views: ?frames=16&stride=4"
        )
    if dataset.kind != "video" and spec.frames is not None:
        raise UsageError(
            f"{dataset.spec} holds images, but the views are clips of {spec.frames} frames; "
            "use views of still images such as --views mae, or name a folder of videos: video:PATH"
        )


def vary(spec: ViewSpec) -> bool:
    """Whether two views of one sample can differ; those of one kind without random crops, frames or flips cannot."""
    return spec.kind not in ("center-crop", "resize") or 0 < spec.flip < 1


def check_input(spec: ViewSpec, wanted: Preprocessing, network: str, store: Path | None = None) -> None:
    """:class:`UsageError` unless ``network`` (as messages call it) takes what the views give: clips or single images.

    ``store`` is where the views were recorded, which fixes them.
    """
    if wanted.frames == spec.frames:
        return
    takes = "still images" if wanted.frames is None else f"clips of {wanted.frames} frames"
    given = "still images" if spec.frames is None else f"clips of {spec.frames} frames"
    if wanted.frames is None:
        advice = "use a network of clips, or a data set of images"
    elif spec.frames is None:
        advice = f"name a folder of videos (video:PATH) and --views 'videomae?frames={wanted.frames}'"
    else:
        fitting = views_text(spec.model_copy(update={"frames": wanted.frames}))
        advice = f"use --views '{fitting}', or a network of {spec.frames} frames"
    if store is not None and wanted.frames is not None:
        advice += f" (the views of {store} are fixed: extract to another --store)"
    raise UsageError(f"{network} takes {takes}, but the views are {given}; {advice}")


def render(image: Image.Image, box: Box, flip: bool, size: int, interpolation: str = "bicubic") -> Image.Image:
    """The view as a network of input ``size`` sees it: an image of size x size.

    Crops first and resizes then, as torchvision does, so no pixel outside ``box`` leaks in.

    Raises
    ------
    ValueError
        if ``box`` does not lie inside ``image``.
    """
    left, top, width, height = box
    if left < 0 or top < 0 or width < 1 or height < 1 or left + width > image.width or top + height > image.height:
        raise ValueError(f"box {box} does not lie inside the {image.width}x{image.height} image")
    crop = image.crop((left, top, left + width, top + height))
    if crop.size != (size, size):
        crop = crop.resize((size, size), _FILTERS[interpolation])
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def fresh_view(epoch: int, slot: int, slots: int) -> int:
    """Number of a view that only a student sees, drawn anew in every epoch; negative, so that no stored view has it."""
    return -(1 + epoch * slots + slot)


def row_order(count: int, seed: int, view: int) -> NDArray[np.int64]:
    """Sample index of each row of a view: a seeded permutation, another one for each view.

    Consecutive rows are therefore already shuffled, and a reader may take them in runs.
    """
    return draws.permutation(count, seed, view, "row-order")

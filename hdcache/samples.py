"""Open one sample under one view: drawn afresh, or replayed from recorded numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.datasets import Dataset, Source, decode, digest
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.store import GEOMETRY_COLUMNS
from hdcache.video import Video
from hdcache.views import Box, draw, draw_frames, render

Recorded = tuple[NDArray[np.int32], bytes]
"""A row of a view's geometry (:func:`hdcache.store.geometry_columns`) and the sha256 of the source it was recorded from."""


@dataclass(frozen=True)
class OpenedSample:
    """A decoded source with the geometry of one view."""

    images: tuple[Image.Image, ...]
    """The still image alone, or the frames of a clip, which share box and flip."""
    box: Box
    flip: bool
    digest: bytes
    """sha256 of the source."""
    frames: tuple[int, ...] = ()
    """Indices in the video of a clip's frames."""

    @property
    def image(self) -> Image.Image:
        """The still image, or a clip's first frame: all have its size."""
        return self.images[0]

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """The view at a network's input size: uint8 [3, size, size], or [3, frames, size, size] of a clip; contiguous."""
        size, interpolation = preprocessing.size, preprocessing.interpolation
        pixels = np.empty((3, len(self.images), size, size), np.uint8)
        for number, image in enumerate(self.images):
            view = render(image, self.box, self.flip, size, interpolation)
            for plane, channel in zip(pixels, view.mode, strict=True):
                # Pillow takes a channel out of its pixels three times faster than numpy transposes them.
                plane[number] = np.frombuffer(view.tobytes("raw", channel), np.uint8).reshape(size, size)
        return pixels if self.frames else pixels[:, 0]


def open_sample(
    dataset: Dataset, sample_id: str, spec: ViewSpec, view: int, recorded: Recorded | None = None
) -> OpenedSample:
    """Read and decode one sample under one view; see :func:`open_views`."""
    return open_views(dataset, sample_id, spec, view, recorded)[0]


def open_views(
    dataset: Dataset,
    sample_id: str,
    spec: ViewSpec,
    view: int,
    recorded: Recorded | None = None,
    fresh: Sequence[int] = (),
) -> list[OpenedSample]:
    """Read and decode one sample once: under ``view`` (replayed where it was ``recorded``), then under ``fresh`` ones.

    Fresh views of a video have frames of their own.

    Raises
    ------
    InputNotFound
        when the data set has no such sample.
    UnreadableImage
        when the source cannot be read or decoded, or is a video shorter than the clip.
    StoreMismatch
        when ``recorded`` belongs to another source than the one found now, or names frames that it does not have.
    """
    with _named(sample_id):
        source = dataset.read(sample_id)
        if spec.frames is not None:
            return _open_clips(source, sample_id, spec, view, recorded, fresh)
        image = decode(source)
    found = digest(source)
    first = (
        _drawn((image,), found, spec, sample_id, view)
        if recorded is None
        else _replayed((image,), found, sample_id, recorded)
    )
    return [first, *(_drawn((image,), found, spec, sample_id, number) for number in fresh)]


def check_clip(dataset: Dataset, sample_id: str, spec: ViewSpec) -> None:
    """:class:`UnreadableImage` for what is no video, or one shorter than the clip, as :func:`open_views` has it.

    No frame is decoded, but to count those of AVI and VP8: whether one is damaged is not known.
    """
    with _named(sample_id):
        draw_frames(spec, sample_id, 0, Video(_encoded(dataset.read(sample_id))).count)


@contextmanager
def _named(sample_id: str) -> Iterator[None]:
    try:
        yield
    except InputNotFound:
        raise  # not a broken image but the wrong data set
    except UnreadableImage as error:
        raise UnreadableImage(f"{sample_id}: {str(error).removeprefix(f'{sample_id}: ')}") from None
    except OSError as error:
        raise UnreadableImage(f"{sample_id}: {error.strerror or error}") from None


def _encoded(source: Source) -> bytes:
    if not isinstance(source, bytes):
        raise UnreadableImage("an array of pixels, not a video")
    return source


def _open_clips(
    source: Source, sample_id: str, spec: ViewSpec, view: int, recorded: Recorded | None, fresh: Sequence[int]
) -> list[OpenedSample]:
    found = digest(source)
    if recorded is not None:
        _check_source(found, sample_id, recorded)  # other bytes may have fewer frames
    video = Video(_encoded(source))
    if recorded is not None and max(_recorded_frames(recorded)) >= video.count:
        raise StoreMismatch(
            f"{sample_id}: frame {max(_recorded_frames(recorded))} is recorded, but the video has {video.count} frames; "
            "run 'hdcache verify', or extract to a new store"
        )
    first = draw_frames(spec, sample_id, view, video.count) if recorded is None else _recorded_frames(recorded)
    clips = [first, *(draw_frames(spec, sample_id, number, video.count) for number in fresh)]
    # One pass over the video, however many of its clips are wanted.
    images = video.frames([index for clip in clips for index in clip])
    shown = [tuple(images[index] for index in clip) for clip in clips]
    if recorded is not None:
        opened = [_replayed(shown[0], found, sample_id, recorded)]
    else:
        opened = [_drawn(shown[0], found, spec, sample_id, view, first)]
    later = zip(fresh, clips[1:], shown[1:], strict=True)
    return opened + [_drawn(seen, found, spec, sample_id, number, clip) for number, clip, seen in later]


def _drawn(
    images: tuple[Image.Image, ...],
    found: bytes,
    spec: ViewSpec,
    sample_id: str,
    view: int,
    frames: tuple[int, ...] = (),
) -> OpenedSample:
    box, flip = draw(spec, sample_id, view, *images[0].size)
    return OpenedSample(images, box, flip, found, frames)


def _replayed(images: tuple[Image.Image, ...], found: bytes, sample_id: str, recorded: Recorded) -> OpenedSample:
    _check_source(found, sample_id, recorded, images[0].size)
    _, left, top, width, height, flipped = (int(number) for number in recorded[0][:6])
    return OpenedSample(images, (left, top, width, height), bool(flipped), found, _recorded_frames(recorded))


def _recorded_frames(recorded: Recorded) -> tuple[int, ...]:
    return tuple(int(number) for number in recorded[0][len(GEOMETRY_COLUMNS) :])


def _check_source(found: bytes, sample_id: str, recorded: Recorded, size: tuple[int, int] | None = None) -> None:
    known = tuple(int(number) for number in recorded[0][6:8])
    if found != recorded[1] or (size is not None and size != known):
        raise StoreMismatch(
            f"{sample_id}: the {'video' if _recorded_frames(recorded) else 'image'} changed since its view was recorded (sha256 {found.hex()[:12]}..., "
            f"was {recorded[1].hex()[:12]}...); restore it, or extract to a new store"
        )

"""Single frames of a video file, exact to the frame: what clips are made of.

- A video's frames are numbered from 0 in the order of their presentation. They are counted by reading the container's
  packets, without decoding, where each packet shows one frame at a known time. Otherwise (AVI keeps no presentation
  times, VP8 has packets that show nothing) the video is decoded once to count them.
- A frame is found by its presentation time, never by a position in the file: decoding starts at a key frame before it,
  so that frames which depend on later ones (B-frames) come out as they do when everything is decoded.
- Rotation that the container asks for is applied, in quarter turns; the shape of pixels (aspect ratio) is ignored.
- Nothing is guessed: damaged packets or frames raise :class:`UnreadableImage`. Damage that keeps the stream decodable
  cannot be noticed, and a Matroska file that was cut short is a shorter video.

Each video decodes in one thread and shares nothing, so any number of them may be open at once. PyAV is imported only
where a video is opened.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.errors import UnreadableImage, UsageError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

# A closed list: a playlist that calls itself .mp4 could open other files and network addresses.
FORMATS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi")
QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
"""Counter-clockwise degrees, as in FFmpeg's display matrix."""


def require_pyav() -> Any:
    """The module ``av``; :class:`UsageError` where PyAV is not installed."""
    try:
        import av
    except ImportError:
        raise UsageError("videos are decoded by PyAV, which is not installed; pip install 'hdcache[video]'") from None
    return av


class Video:
    """The first video stream of a file in memory.

    Raises
    ------
    UnreadableImage
        here and in :meth:`frames`, for what is not a whole video: no video stream, no frame, damaged bytes.
    UsageError
        where PyAV is not installed.
    """

    def __init__(self, source: bytes) -> None:
        av = require_pyav()
        if not source:
            raise UnreadableImage("the file is empty (0 bytes)")
        try:
            with (
                io.BytesIO(source) as file,
                av.open(file, options={"format_whitelist": ",".join(FORMATS)}) as container,
            ):
                if not container.streams.video:
                    raise UnreadableImage("the file holds no video stream")
                stream = container.streams.video[0]
                if not stream.codec_context:
                    raise UnreadableImage("the video is in a format that FFmpeg has no decoder for")
                self._context = stream.codec_context
                # Frames of one clip are decoded in one thread: many clips are decoded at once.
                self._context.thread_type, self._context.thread_count = "NONE", 1
                self._packets: list[Packet[Any]] = [packet for packet in container.demux(stream) if packet.size]
                hidden = container.format.name == "avi" or self._context.name == "vp8"
        except (av.FFmpegError, ValueError) as error:
            raise UnreadableImage(f"not a video that can be read ({_short(error)})") from None
        if any(packet.is_corrupt for packet in self._packets):
            raise UnreadableImage("the file is cut short or damaged (a packet is incomplete)")
        times = [packet.pts for packet in self._packets if not packet.is_discard]
        self._times: list[int] | None = None
        if not hidden and None not in times and len(set(times)) == len(times):
            self._times = sorted(time for time in times if time is not None)
        self.count = len(self._times) if self._times is not None else sum(1 for _ in self._decoded(0))
        """Frames of the video."""
        if not self.count:
            raise UnreadableImage("the video holds no frame")

    def frames(self, wanted: Sequence[int]) -> dict[int, Image.Image]:
        """The frames of the given indices, upright, mode RGB, all of one size."""
        indices = sorted(set(wanted))
        if indices and not 0 <= indices[0] <= indices[-1] < self.count:
            raise ValueError(f"frames {indices[0]} to {indices[-1]} of a video of {self.count}")
        found: dict[int, Image.Image] = {}
        for start in sorted({self._start(indices), 0}, reverse=True):
            found = self._picked(start, set(indices))
            if len(found) == len(indices):
                break
        if missing := [index for index in indices if index not in found]:
            raise UnreadableImage(f"frame {missing[0]} of {self.count} cannot be decoded; the video is damaged")
        sizes = {image.size for image in found.values()}
        if len(sizes) > 1:
            raise UnreadableImage(f"the frames have {len(sizes)} different sizes, such as {sorted(sizes)[:2]}")
        return found

    def _start(self, indices: Sequence[int]) -> int:
        """The packet to decode from: the last key frame that comes before all of the wanted frames in either order."""
        if self._times is None or not indices:
            return 0
        times = {self._times[index] for index in indices}
        first = next(place for place, packet in enumerate(self._packets) if packet.pts in times)
        keys = (
            place
            for place in range(first, 0, -1)
            if self._packets[place].is_keyframe and (self._packets[place].pts or 0) <= min(times)
        )
        return next(keys, 0)

    def _picked(self, start: int, indices: set[int]) -> dict[int, Image.Image]:
        found: dict[int, Image.Image] = {}
        # Without presentation times, a frame's index is its number in the order of presentation.
        names: dict[int | None, int] = {} if self._times is None else {self._times[index]: index for index in indices}
        for number, frame in enumerate(self._decoded(start)):
            index = number if self._times is None else names.get(frame.pts, -1)
            # A decoder that started in the middle may show frames before it has all that they depend on.
            if index in indices and not frame.is_corrupt:
                found[index] = _upright(frame)
                if len(found) == len(indices):
                    break
        return found

    def _decoded(self, start: int) -> Iterator[VideoFrame]:
        """Frames in the order of their presentation, from packet ``start`` on."""
        av = require_pyav()
        self._context.flush_buffers()
        try:
            for packet in [*self._packets[start:], None]:
                yield from self._context.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            raise UnreadableImage(f"the video cannot be decoded ({_short(error)})") from None


def _upright(frame: VideoFrame) -> Image.Image:
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    method = QUARTER_TURNS.get(round(frame.rotation / 90) * 90)
    return image if method is None else image.transpose(method)


def _short(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:200]

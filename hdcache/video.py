"""Single frames of a video file, exact to the frame: what clips are made of.

- A video's frames are numbered from 0 in the order of their presentation. They are counted by reading the container's
  packets, without decoding, where each packet shows one frame at a known time. Otherwise (AVI keeps no presentation
  times, VP8 has packets that show nothing) the video is decoded once to count them.
- A frame is found by its presentation time, never by a position in the file: decoding starts at a key frame before it,
  so that frames which depend on later ones (B-frames) come out as they do when everything is decoded. Each frame has a
  key frame of its own to start at, whichever others are asked for. In H.264 and HEVC a packet that is marked as a key
  frame counts as one only where nothing from before it is needed; with periodic intra refresh that is the first alone.
- A file that was cut out of a longer one may begin with frames that depend on what is gone. They count as frames,
  and a clip that holds one of them cannot be read.
- Frames of more pixels than Pillow allows an image are refused before they are decoded.
- Rotation that the container asks for is applied, in quarter turns; the shape of pixels (aspect ratio) is ignored.
- Nothing is guessed: damaged packets or frames raise :class:`UnreadableImage`. Damage that keeps the stream decodable
  cannot be noticed, and a Matroska file that was cut short is a shorter video.

Each video decodes in one thread and shares nothing, so any number of them may be open at once. PyAV is imported only
where a video is opened.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
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
H264_IDR, H264_SEI, RECOVERY_POINT = 5, 6, 6
HEVC_RANDOM_ACCESS = range(16, 24)


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
                _check_size(self._context.width, self._context.height)
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
        groups: dict[int, set[int]] = {}
        for index in indices:
            groups.setdefault(self._start(index), set()).add(index)
        found: dict[int, Image.Image] = {}
        for start, group in groups.items():
            found |= self._picked(start, group)
            if left := group - found.keys():
                found |= self._picked(0, left)
        if missing := [index for index in indices if index not in found]:
            raise UnreadableImage(f"frame {missing[0]} of {self.count} cannot be decoded; the video is damaged")
        sizes = {image.size for image in found.values()}
        if len(sizes) > 1:
            raise UnreadableImage(f"the frames have {len(sizes)} different sizes, such as {sorted(sizes)[:2]}")
        return found

    @cached_property
    def _places(self) -> dict[int | None, int]:
        return {packet.pts: place for place, packet in enumerate(self._packets)}

    @cached_property
    def _keys(self) -> list[int]:
        """Packets that decoding can start from, ascending."""
        context = self._context
        return [
            place
            for place, packet in enumerate(self._packets)
            if packet.is_keyframe and starts_afresh(bytes(packet), context.name, context.extradata or b"")
        ]

    def _start(self, index: int) -> int:
        """The packet to decode a frame from: the last key frame that comes before it in either order."""
        if self._times is None:
            return 0
        time = self._times[index]
        before = self._keys[: bisect_right(self._keys, self._places[time])]
        return next((place for place in reversed(before) if (self._packets[place].pts or 0) <= time), 0)

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


def starts_afresh(packet: bytes, codec: str, extradata: bytes) -> bool:
    """Whether decoding may start at a packet that is marked as a key frame, for all frames shown after it.

    H.264: an IDR picture, or a recovery point at which the pictures are exact at once (ITU-T H.264, annex D.2.8). HEVC:
    any random access picture. Other codecs are taken at their word.
    """
    if codec not in ("h264", "hevc"):
        return True
    for unit in _units(packet, codec, extradata):
        if codec == "hevc" and unit[0] >> 1 & 63 in HEVC_RANDOM_ACCESS:
            return True
        if codec == "h264" and (unit[0] & 31 == H264_IDR or (unit[0] & 31 == H264_SEI and _recovers_at_once(unit[1:]))):
            return True
    return False


def _units(packet: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """The NAL units of a packet, with their headers."""
    at = 4 if codec == "h264" else 21  # where avcC and hvcC keep the length of lengths
    if extradata[:1] != b"\x01" or len(extradata) <= at:
        yield from filter(None, packet.split(b"\x00\x00\x01")[1:])
        return
    size, place = (extradata[at] & 3) + 1, 0
    while place + size < len(packet):
        length = int.from_bytes(packet[place : place + size])
        if unit := packet[place + size : place + size + length]:
            yield unit
        place += size + length


def _recovers_at_once(messages: bytes) -> bool:
    """Whether a supplemental unit holds a recovery point of 0 frames with an exact match."""
    place = 0
    while place + 2 < len(messages):
        values = []
        for _ in range(2):  # type and size of a message: any number of 255, and a rest
            value = 0
            while place < len(messages) and messages[place] == 255:
                value, place = value + 255, place + 1
            values.append(value + (messages[place] if place < len(messages) else 0))
            place += 1
        if values[0] == RECOVERY_POINT:
            return place < len(messages) and messages[place] & 0xC0 == 0xC0
        place += values[1]
    return False


def _check_size(width: int, height: int) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise UnreadableImage(f"frames of {width}x{height} pixels, more than the {most:,} that are allowed")


def _upright(frame: VideoFrame) -> Image.Image:
    _check_size(frame.width, frame.height)
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    method = QUARTER_TURNS.get(round(frame.rotation / 90) * 90)
    return image if method is None else image.transpose(method)


def _short(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:200]

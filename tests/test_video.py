"""Videos: the right frame, counted and found without decoding everything; and clips from a folder to stored rows."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hdcache.backbones import load_backbone
from hdcache.datasets import Dataset, open_dataset
from hdcache.distill.run import distill
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage, UsageError
from hdcache.evaluate.embed import centre_view, embed
from hdcache.evaluate.run import knn_eval
from hdcache.extract.capacity import shards_ahead
from hdcache.extract.opening import SHARD_PIXELS, shard_size
from hdcache.extract.pipeline import Pipeline
from hdcache.extract.run import ExtractSummary, extract
from hdcache.geometry import read_geometry
from hdcache.info import describe_store, format_store
from hdcache.integrity import verify
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.reader import TeacherReader
from hdcache.rendering import Rendering
from hdcache.samples import OpenedSample, open_sample, open_views
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.store import GEOMETRY_COLUMNS, Store, geometry_columns
from hdcache.target_sources import open_targets
from hdcache.teachers import reload_teacher
from hdcache.video import Video, starts_afresh
from hdcache.views import PRESETS, draw, draw_frames, parse_views

COUNT = 40
# Long enough for several key frames; frames between them depend on later ones, across key frames too (open GOP).
H264 = {"bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:b-adapt=0"}
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "mp4", H264),
    "h264.mkv": ("libx264", "matroska", H264),
    "h264.mov": ("libx264", "mov", H264),
    "h264.avi": ("libx264", "avi", H264),
    "mpeg4.mp4": ("mpeg4", "mp4", {"bf": "2", "qmax": "3"}),
    "mpeg4.avi": ("mpeg4", "avi", {"bf": "2", "qmax": "3"}),
    "vp8.webm": ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "vp9.webm": ("libvpx-vp9", "webm", {"cpu-used": "8"}),
}


def painted(count: int, seed: int = 0, size: tuple[int, int] = (64, 48)) -> NDArray[np.uint8]:
    """A block that moves over a background that brightens, uint8 [count, height, width, 3]: no two frames are alike."""
    colour = np.random.default_rng(seed).integers(60, 200, 3)
    frames = np.zeros((count, size[1], size[0], 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = 20 + 200 * number // count
        left = 3 * number % (size[0] - 12)
        frame[4:16, left : left + 12] = colour
    return frames


def write_video(
    path: Path, count: int = COUNT, kind: str = "h264.mp4", seed: int = 0, options: dict[str, str] | None = None
) -> bytes:
    codec, container_format, codec_options = KINDS[kind]
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this build of FFmpeg has no encoder {codec}")
    pixels = painted(count, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container_format, container_options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=10, options=codec_options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def all_frames(source: bytes) -> list[NDArray[np.uint8]]:
    """Every frame, from first to last, decoded in the plainest way."""
    with av.open(io.BytesIO(source)) as container:
        container.streams.video[0].thread_type = "NONE"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def mp4(folder: Path) -> bytes:
    return write_video(folder / "one.mp4")


# Frames


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_the_one_that_decoding_everything_gives(kind: str, tmp_path: Path) -> None:
    source = write_video(tmp_path / kind, kind=kind)
    expected = all_frames(source)
    assert len(expected) == COUNT
    assert len({frame.tobytes() for frame in expected}) == COUNT
    video = Video(source)
    assert video.count == COUNT
    for index in reversed(range(COUNT)):
        np.testing.assert_array_equal(np.asarray(video.frames([index])[index]), expected[index])


def test_the_reference_video_has_frames_that_depend_on_later_ones(mp4: bytes) -> None:
    """Else the tests above and below would prove nothing about B-frames or open groups of pictures."""
    with av.open(io.BytesIO(mp4)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts or 0 for packet in packets]
    assert times != sorted(times)
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 3
    assert any(times[key + 1] < times[key] for key in keys[1:-1]), "a frame before a key frame is stored behind it"


@settings(max_examples=30)
@given(data=st.data())
def test_any_set_of_frames_is_exact(mp4: bytes, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, COUNT - 1), max_size=6))
    expected = all_frames(mp4)
    found = Video(mp4).frames(wanted)
    assert found.keys() == set(wanted)
    for index, image in found.items():
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected[index])


def test_mp4_is_counted_without_decoding_and_read_from_a_key_frame(
    mp4: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    decoded = Video._decoded

    def spy(self: Video, start: int) -> Iterator[Any]:
        started.append(start)
        return decoded(self, start)

    monkeypatch.setattr(Video, "_decoded", spy)
    video = Video(mp4)
    assert (video.count, started) == (COUNT, [])
    video.frames([COUNT - 1])
    assert started[0] > COUNT // 2
    assert len(started) == 1
    started.clear()
    assert Video(write_video(tmp_path / "x.avi", kind="mpeg4.avi")).count == COUNT
    assert started == [0], "AVI keeps no presentation times: its frames are counted by decoding"


def test_videos_decode_the_same_in_any_number_of_threads(mp4: bytes) -> None:
    expected = all_frames(mp4)

    def read(index: int) -> bool:
        return np.array_equal(np.asarray(Video(mp4).frames([index])[index]), expected[index])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, list(range(COUNT)) * 3))


@pytest.mark.parametrize(
    ("turn", "quarters"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_a_rotation_that_the_file_asks_for_is_applied(mp4: bytes, turn: tuple[int, ...], quarters: int) -> None:
    """The display matrix of the track (tkhd) is rewritten in the file; phones turn their videos so."""
    rotated = bytearray(mp4)
    place = rotated.find(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in turn)
    rotated[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 64 << 16, 48 << 16, 1 << 30)
    image = Video(bytes(rotated)).frames([7])[7]
    np.testing.assert_array_equal(np.asarray(image), np.rot90(all_frames(mp4)[7], quarters))


# What is no video


def _sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"no video" * 50, "not a video that can be read"),
        (PLAYLIST, "not a video that can be read"),
        (_gif(), "not a video that can be read"),
        (_sound(), "the file holds no video stream"),
    ],
    ids=["empty", "text", "playlist", "gif", "sound"],
)
def test_what_is_no_video_says_why(source: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^{reason}"):
        Video(source)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    """With the index in front (as on the web) it still opens; with the index behind it does not."""
    front = write_video(tmp_path / "front.mp4", options={"movflags": "faststart"})
    assert front.find(b"moov") < front.find(b"mdat")
    with pytest.raises(UnreadableImage, match="the file is cut short or damaged"):
        Video(front[: int(share * len(front))])
    behind = write_video(tmp_path / "behind.mp4")
    with pytest.raises(UnreadableImage, match="not a video that can be read"):
        Video(behind[: int(0.5 * len(behind))])


@settings(max_examples=60)
@given(data=st.data())
def test_damage_is_a_reason_and_never_a_crash(mp4: bytes, data: st.DataObject) -> None:
    damaged = bytearray(mp4)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableImage):
        video = Video(bytes(damaged))
        found = video.frames([0, video.count - 1])
        assert len({image.size for image in found.values()}) == 1


def test_a_codec_that_nothing_decodes_is_named_as_the_reason(mp4: bytes) -> None:
    unknown = mp4.replace(b"avc1\0", b"zzzz\0")
    assert unknown != mp4
    with pytest.raises(UnreadableImage, match="the video is in a format that FFmpeg has no decoder for"):
        Video(unknown)


def test_a_damaged_stretch_of_the_stream_is_found(mp4: bytes) -> None:
    """Zeros over the first frames' data: what cannot be decoded is not made up."""
    start = mp4.find(b"mdat") + 8
    damaged = mp4[: start + 700] + bytes(400) + mp4[start + 1100 :]
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        Video(damaged).frames(range(COUNT))


def test_frames_outside_the_video_are_a_mistake_of_the_caller(mp4: bytes) -> None:
    for index in (-1, COUNT):
        with pytest.raises(ValueError, match=f"of a video of {COUNT}"):
            Video(mp4).frames([index])
    assert Video(mp4).frames([]) == {}


def test_without_pyav_the_extra_is_named(mp4: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(mp4)
    monkeypatch.setitem(sys.modules, "av", None)
    message = r"PyAV, which is not installed; pip install 'hdcache\[video\]'"
    with pytest.raises(UsageError, match=message):
        Video(mp4)
    with pytest.raises(UsageError, match=message):
        open_dataset(f"video:{tmp_path}", cache=tmp_path / "cache")


# Data sets


def test_a_folder_of_videos_is_a_data_set(tmp_path: Path, mp4: bytes) -> None:
    for name in ("b/2.MP4", "a/1.webm", "a/x/3.mkv", "b/notes.txt", "b/cover.jpg", ".hidden/4.mp4"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mp4)
    dataset = open_dataset(f"video:{tmp_path}/d", cache=tmp_path / "cache")
    assert dataset.ids == ("a/1.webm", "a/x/3.mkv", "b/2.MP4")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert (dataset.card.kind, dataset.card.classes) == ("video", ("a", "b"))
    assert dataset.card.spec == f"video:{tmp_path}/d"
    assert dataset.read("b/2.MP4") == mp4
    # The remembered listings of one folder's images and videos do not disturb each other.
    for path in (tmp_path / "d", *(tmp_path / "d").rglob("*")):
        os.utime(path, (1e9, 1e9))
    for _ in range(2):
        assert open_dataset(f"{tmp_path}/d", cache=tmp_path / "cache").ids == ("b/cover.jpg",)
        assert open_dataset(dataset.card.spec, cache=tmp_path / "cache").card == dataset.card


def test_a_folder_of_the_other_kind_names_the_spec_to_write(
    tmp_path: Path, mp4: bytes, make_folder: Callable[..., Path]
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v/1.mp4").write_bytes(mp4)
    with pytest.raises(UsageError, match=rf"no images but videos in {tmp_path}/v; write video:{tmp_path}/v"):
        open_dataset(f"{tmp_path}/v")
    images = make_folder(tmp_path / "i", 2)
    with pytest.raises(UsageError, match=rf"no videos but images in {images}; write folder:{images}"):
        open_dataset(f"video:{images}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFound, match=r"no videos \(\.mp4 \.mkv \.webm \.avi \.mov \.m4v\)"):
        open_dataset(f"video:{tmp_path}/empty")
    (tmp_path / "v/a").mkdir()
    (tmp_path / "v/a/2.mp4").write_bytes(mp4)
    with pytest.raises(UsageError, match=r"videos lie both in the root \(1\.mp4\) and in class directories"):
        open_dataset(f"video:{tmp_path}/v")


# Samples

SPEC = parse_views("videomae?frames=4&stride=3", seed=5)
INPUT = Preprocessing(size=16, frames=4, interpolation="bilinear")


@pytest.fixture
def dataset(tmp_path: Path, mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/x.mp4").write_bytes(mp4)
    return open_dataset(f"video:{tmp_path}/data")


def row_of(sample: OpenedSample) -> tuple[NDArray[np.int32], bytes]:
    numbers = [0, *sample.box, int(sample.flip), *sample.image.size, *sample.frames]
    return np.array(numbers, np.int32), sample.digest


def test_a_drawn_clip_is_its_frames_under_one_box(dataset: Dataset, mp4: bytes) -> None:
    spec = SPEC.model_copy(update={"flip": 1.0})
    sample = open_sample(dataset, "a/x.mp4", spec, 3)
    assert sample.frames == draw_frames(spec, "a/x.mp4", 3, COUNT)
    assert (sample.box, sample.flip) == draw(spec, "a/x.mp4", 3, 64, 48)
    pixels = sample.pixels(INPUT)
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 4, 16, 16), np.uint8, True)
    frames, (left, top, width, height) = all_frames(mp4), sample.box
    for place, index in enumerate(sample.frames):
        cut = Image.fromarray(frames[index][top : top + height, left : left + width])
        expected = np.asarray(cut.resize((16, 16), Image.Resampling.BILINEAR))[:, ::-1]
        np.testing.assert_array_equal(pixels[:, place].transpose(1, 2, 0), expected)


@settings(max_examples=20)
@given(frames=st.integers(1, 6), stride=st.integers(1, 7), seed=st.integers(0, 3), view=st.integers(0, 9))
def test_a_replayed_clip_is_the_drawn_one(mp4: bytes, frames: int, stride: int, seed: int, view: int) -> None:
    spec = ViewSpec(kind="multi-scale-crop", flip=0.5, frames=frames, stride=stride, seed=seed)
    dataset: Any = type("One", (), {"read": staticmethod(lambda name: mp4)})
    drawn = open_sample(dataset, "x", spec, view)
    other = spec.model_copy(update={"seed": seed + 1})
    replayed = open_sample(dataset, "x", other, view + 1, row_of(drawn))
    assert (replayed.frames, replayed.box, replayed.flip) == (drawn.frames, drawn.box, drawn.flip)
    wanted = Preprocessing(size=8, frames=frames)
    np.testing.assert_array_equal(replayed.pixels(wanted), drawn.pixels(wanted))


def test_fresh_clips_have_frames_of_their_own_and_the_teachers_view_stays(dataset: Dataset) -> None:
    recorded = row_of(open_sample(dataset, "a/x.mp4", SPEC, 0))
    first, *fresh = open_views(dataset, "a/x.mp4", SPEC, 0, recorded, range(-8, 0))
    assert first.frames == tuple(recorded[0][8:])
    assert [sample.frames for sample in fresh] == [draw_frames(SPEC, "a/x.mp4", k, COUNT) for k in range(-8, 0)]
    assert len({sample.frames for sample in fresh}) > 4
    alone = open_sample(dataset, "a/x.mp4", SPEC, -3)
    np.testing.assert_array_equal(fresh[5].pixels(INPUT), alone.pixels(INPUT))
    rendering = Rendering(dataset, SPEC, INPUT, [INPUT], fresh=2)
    shown = [rendering.open("a/x.mp4", 0, epoch, recorded) for epoch in range(2)]
    assert len({pixels.tobytes() for found in shown for pixels in found[:2]}) == 4
    assert shown[0][2].tobytes() == shown[1][2].tobytes() == first.pixels(INPUT).tobytes()


def test_a_video_that_changed_or_is_too_short_names_the_sample(dataset: Dataset, tmp_path: Path) -> None:
    recorded = row_of(open_sample(dataset, "a/x.mp4", SPEC, 0))
    write_video(tmp_path / "data/a/x.mp4", 6)
    with pytest.raises(StoreMismatch, match=r"^a/x\.mp4: the video changed since its view was recorded"):
        open_sample(dataset, "a/x.mp4", SPEC, 0, recorded)
    message = r"^a/x\.mp4: 6 frames, but a clip of 4 frames at stride 3 spans 10; use a smaller stride \(--views 'v"
    with pytest.raises(UnreadableImage, match=message):
        open_sample(dataset, "a/x.mp4", SPEC, 0)
    (tmp_path / "data/a/x.mp4").write_bytes(_sound())
    with pytest.raises(UnreadableImage, match=r"^a/x\.mp4: the file holds no video stream$"):
        open_sample(dataset, "a/x.mp4", SPEC, 0)


# Stores, training and evaluation

TEACHER = "t=random:vit_tiny_patch16_224?img_size=32&patch_size=16&depth=2&embed_dim=24&num_heads=2&frames=4"
VIEWS = "videomae?frames=4&stride=3"
VIDEOS = 20
BAD = {"a/02.mp4": "6 frames, but a clip", "b/03.mp4": "the file holds no video stream"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The spec of 20 videos of two classes; one is too short, one has no video stream. No test may change them."""
    root = tmp_path_factory.mktemp("data")
    for number in range(VIDEOS):
        path = root / "d" / "ab"[number % 2] / f"{number:02d}.mp4"
        write_video(path, 6 if number == 2 else 14 + number, "mpeg4.mp4" if number % 3 else "h264.mp4", seed=number)
        if number == 3:
            path.write_bytes(_sound())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDCACHE_CACHE", str(root / "cache"))
        yield f"video:{root}/d"


def run(data: str | None, store: Path, teacher: str = TEACHER, **changes: Any) -> ExtractSummary:
    common = {"encoding": "fp32", "precision": "fp32", "rows_per_shard": 8, "batch": 4, "threads": 2, "device": "cpu"}
    fixed = {"taps": ["block2.out"], "views": VIEWS, **common}
    return extract(data, store=store, teachers=[teacher], **{**fixed, **changes})


@pytest.fixture(scope="module")
def clip_store(tmp_path_factory: pytest.TempPathFactory, videos: str) -> Path:
    """Two views of the videos, under one teacher; no test may change it."""
    root = tmp_path_factory.mktemp("clips")
    run(videos, root / "s", num_views=2)
    return root / "s"


def test_geometry_holds_the_frames_of_every_clip(clip_store: Path, videos: str) -> None:
    store, dataset = Store.open(clip_store), open_dataset(videos)
    assert geometry_columns(store.card.views) == (*GEOMETRY_COLUMNS, "frame_0", "frame_1", "frame_2", "frame_3")
    for view in (0, 1):
        geometry, digests = read_geometry(store, view)
        assert geometry.shape == (VIDEOS, 12)
        for numbers, digest in zip(geometry, digests, strict=True):
            name = store.ids[numbers[0]]
            if name in BAD:
                assert not numbers[1:].any()
                continue
            count = Video(bytes(dataset.read(name))).count
            assert tuple(numbers[8:]) == draw_frames(store.card.views, name, view, count)
            assert tuple(numbers[1:5]) == draw(store.card.views, name, view, 64, 48)[0]
            assert digest.tobytes() == open_sample(dataset, name, store.card.views, view).digest


def test_a_short_video_and_a_file_without_video_are_failed_rows(clip_store: Path, videos: str, tmp_path: Path) -> None:
    store = Store.open(clip_store)
    geometry, _ = read_geometry(store, 0)
    failed = TeacherReader(store, "t").manifest(0).failed
    reasons = {store.ids[geometry[row, 0]]: why for row, why in failed.items()}
    assert reasons.keys() == BAD.keys()
    for name, reason in BAD.items():
        assert reasons[name].startswith(f"{name}: {reason}")
    # The same command tries them again, and changes nothing else.
    copy = shutil.copytree(clip_store, tmp_path / "s")
    summary = run(None, copy, num_views=2)
    assert summary.teachers["t"]["rows_written"] == 0
    assert summary.failed == reasons


def test_an_extraction_that_lost_shards_ends_in_the_same_bytes(
    clip_store: Path, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    """As after a kill: some shards have no receipt, and the geometry of another is lost altogether."""
    whole = tree(clip_store)
    copy = shutil.copytree(clip_store, tmp_path / "s")
    for path in ("teachers/t/views/0/receipts/1.json", "teachers/t/views/1/receipts/0.json"):
        (copy / path).unlink()
    for path in ("views/0/receipts/2.json", "views/0/geometry/c.2.0", "views/0/manifest.json"):
        (copy / path).unlink()
    run(None, copy, num_views=2)
    assert tree(copy) == whole


def test_geometry_without_its_receipt_is_salvaged_with_its_frames(
    clip_store: Path, tmp_path: Path, videos: str, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    """The numbers are read from the array itself, so they need not be drawn again."""
    copy = shutil.copytree(clip_store, tmp_path / "s")
    for path in sorted((copy / "views/1/receipts").glob("*.json")):
        path.unlink()
    (copy / "views/1/manifest.json").unlink()
    run(None, copy, num_views=2)
    assert tree(copy) == tree(clip_store)


@pytest.mark.parametrize("fresh", [0, 2])
def test_the_loader_yields_clips_beside_the_targets_of_their_view(clip_store: Path, videos: str, fresh: int) -> None:
    store, dataset = Store.open(clip_store), open_dataset(videos)
    options = Options(batch_size=6, preprocessing=INPUT, buffer_rows=8, fresh=fresh, augment=(None,) * max(1, fresh))
    wanted = {"t": ["block2.out"]}
    stored, _ = open_targets(store, wanted)
    loader = Loader(dataset, options, views=store.card.views, store=store, stored=stored, teachers=["t"])
    teacher = reload_teacher(store.teacher("t"))
    _, live = open_targets(None, wanted, live={"t": teacher})
    online = Loader(dataset, options, views=store.card.views, store=store, live=live, teachers=["t"])
    seen = 0
    for batch, other in zip(loader, online, strict=True):
        assert batch.images.shape[1:] == (3, 4, 16, 16)
        assert batch.ids == other.ids
        assert torch.equal(batch.images, other.images)
        assert [more.shape[1:] for more in batch.more] == [(3, 4, 16, 16)] * max(0, fresh - 1)
        cached, computed = batch.targets["t"]["block2.out"], other.targets["t"]["block2.out"]
        assert torch.equal(cached.patches, computed.patches)  # type: ignore[union-attr]
        seen += len(batch.ids)
    assert seen == VIDEOS - len(BAD)


def loader_of(dataset: Dataset, views: str, wanted: Preprocessing) -> Loader:
    return Loader(dataset, Options(batch_size=2, preprocessing=wanted), views=parse_views(views))


def test_networks_and_views_of_different_kinds_are_refused(
    videos: str, tmp_path: Path, make_folder: Callable[..., Path], tiny: str, clip_store: Path
) -> None:
    """Before the first step, with the --views to use."""
    clips, images = open_dataset(videos), open_dataset(str(make_folder(tmp_path / "i", 4)))
    still = Preprocessing(size=16)
    with pytest.raises(
        UsageError, match=r"holds videos, but the views .* are of still images; draw clips: --views videomae"
    ):
        loader_of(clips, "mae", INPUT)
    with pytest.raises(UsageError, match=r"holds images, but the views are clips of 16 frames; use .* --views mae"):
        loader_of(images, "videomae", INPUT)
    with pytest.raises(UsageError, match=r"the student takes still images, but the views are clips of 4 frames; use a"):
        loader_of(clips, VIEWS, still)
    message = r"the student takes clips of 4 frames, but the views are still images; .* --views 'videomae\?frames=4'"
    with pytest.raises(UsageError, match=message):
        loader_of(images, "mae", INPUT)
    message = (
        r"the student takes clips of 4 frames, but the views are clips of 16 frames; use --views 'videomae\?frames=4'"
    )
    with pytest.raises(UsageError, match=message):
        loader_of(clips, "videomae", INPUT)
    with pytest.raises(UsageError, match="teacher i takes still images, but the views are clips of 4 frames"):
        run(videos, tmp_path / "s1", f"i={tiny}", taps=["final"])
    with pytest.raises(UsageError, match=r"teacher t takes clips of 4 frames, but the views are clips of 16 frames"):
        run(videos, tmp_path / "s2", views=None)
    with pytest.raises(UsageError, match="holds videos, but the views"):
        run(videos, tmp_path / "s3", views="center")
    with pytest.raises(UsageError, match="holds images, but the views are clips"):
        run(f"folder:{tmp_path}/i", tmp_path / "s4")
    assert not (tmp_path / "s3").exists()
    with pytest.raises(UsageError, match="the student takes still images, but the views are clips of 4 frames"):
        distill("mae-tiny", out=tmp_path / "r", store=clip_store, device="cpu")


def test_info_speaks_of_clips(clip_store: Path) -> None:
    text = format_store(describe_store(Store.open(clip_store)))
    assert "20 videos, 2 classes" in text
    assert "clips of 4 frames at stride 3, crops of" in text


def test_embedding_takes_the_middle_clip_of_every_video(videos: str) -> None:
    backbone, dataset = load_backbone(TEACHER.removeprefix("t=")), open_dataset(videos)
    found = embed(backbone, dataset, batch_size=4, threads=2, stride=3)
    assert found.pool == "mean"
    assert found.failed.keys() == BAD.keys()
    assert all(found.failed[name].startswith(reason) for name, reason in BAD.items())
    assert found.features.shape == (VIDEOS - len(BAD), 24)
    frames = Video(bytes(dataset.read("b/09.mp4"))).frames(range(23))
    middle = [np.asarray(frames[index]) for index in (6, 9, 12, 15)]
    crops = [Image.fromarray(frame[3:45, 11:53]).resize((32, 32), Image.Resampling.BILINEAR) for frame in middle]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(3, 0, 1, 2)[None] / 255
    mean, std = (
        torch.tensor(value).view(3, 1, 1, 1) for value in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    with torch.inference_mode():
        own = backbone.model((pixels - mean) / std)[0].numpy()
    np.testing.assert_allclose(found.features[found.ids.index("b/09.mp4")], own, rtol=1e-4, atol=1e-5)


def test_stride_of_an_evaluation(tmp_path: Path, videos: str, tiny: str) -> None:
    """What was asked for, else what the student was trained with, else that of the preset."""
    backbone = load_backbone(TEACHER.removeprefix("t="))
    assert centre_view(backbone) == PRESETS["clip-center"].model_copy(update={"frames": 4})
    about = '{"hdcache": {"trained_from": {"views": {"frames": 4, "stride": 2}}}}'
    (tmp_path / "config.json").write_text(about)
    student = dataclasses.replace(backbone, source=str(tmp_path))
    assert centre_view(student).stride == 2
    assert centre_view(student, 1.0, 3).stride == 3
    result = knn_eval(student, videos, ks=[1], threads=2, device="cpu")
    assert (result["stride"], result["train"]["embedded"]) == (2, VIDEOS - len(BAD))
    with pytest.raises(UsageError, match="stride: expected at least 1, found 0"):
        embed(backbone, open_dataset(videos), stride=0)
    image_network = load_backbone(tiny)
    with pytest.raises(UsageError, match="stride 2: vit_tiny_patch16_224 takes still images; leave --stride out"):
        embed(image_network, open_dataset(videos), stride=2)
    with pytest.raises(UsageError, match="holds videos, but vit_tiny_patch16_224 takes still images"):
        embed(image_network, open_dataset(videos))


def test_a_network_of_clips_is_not_shown_images(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    backbone = load_backbone(TEACHER.removeprefix("t="))
    with pytest.raises(UsageError, match=r"holds images, but vit_tiny_patch16_224 takes clips of 4 frames.*video:PATH"):
        embed(backbone, open_dataset(str(make_folder(tmp_path / "i", 2))))


def test_a_student_of_clips_is_trained_and_scored_at_its_stride(videos: str, tmp_path: Path) -> None:
    """Without a store: views are drawn, videos that cannot be read are left out by name."""
    student = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "frames": 4}
    changes = {"student.arguments": student, "epochs": 1, "warmup_epochs": 0, "batch_size": 8}
    result = distill(
        "mae-tiny", out=tmp_path / "r", data=videos, views=VIEWS, overrides=changes, device="cpu", threads=2
    )
    assert result["dropped"].keys() == BAD.keys()
    scored = knn_eval(tmp_path / "r", videos, ks=[1], threads=2, device="cpu")
    assert (scored["stride"], scored["model"]["pool"], scored["train"]["embedded"]) == (3, "mean", VIDEOS - len(BAD))
    assert scored["train"]["failed"].keys() == BAD.keys()


# Where decoding may start


@pytest.fixture(scope="module")
def refreshed(folder: Path) -> bytes:
    """H.264 without key frames but the first: pictures are renewed column by column (periodic intra refresh)."""
    KINDS["refresh.mp4"] = ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=10:min-keyint=10"})
    return write_video(folder / "refresh.mp4", kind="refresh.mp4")


def test_intra_refresh_is_no_place_to_start(refreshed: bytes) -> None:
    """The container marks its recovery points as key frames; pictures there are not whole yet."""
    with av.open(io.BytesIO(refreshed)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size) >= 3
    expected = all_frames(refreshed)
    video = Video(refreshed)
    assert video._keys == [0]
    for index in range(COUNT):
        np.testing.assert_array_equal(np.asarray(video.frames([index])[index]), expected[index])


@settings(max_examples=20)
@given(wanted=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4), kind=st.sampled_from(["mp4", "refreshed"]))
def test_a_frame_does_not_depend_on_its_company(mp4: bytes, refreshed: bytes, wanted: list[int], kind: str) -> None:
    video = Video({"mp4": mp4, "refreshed": refreshed}[kind])
    together = video.frames(wanted)
    for index in wanted:
        assert together[index].tobytes() == video.frames([index])[index].tobytes()


def test_frames_far_apart_are_read_from_key_frames_of_their_own(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    decoded = Video._decoded
    monkeypatch.setattr(Video, "_decoded", lambda self, start: started.append(start) or decoded(self, start))
    video = Video(mp4)
    video.frames([1, 2, COUNT - 1])
    assert started == [0, video._keys[-1]]


AVCC = b"\x01\x64\x00\x0a\xff"


def unit(header: int, payload: bytes = b"\x80") -> bytes:
    return (1 + len(payload)).to_bytes(4) + bytes([header]) + payload


@pytest.mark.parametrize(
    ("packet", "afresh"),
    [
        (unit(0x65), True),
        (unit(0x41), False),
        (unit(0x06, b"\x06\x01\xc4\x80") + unit(0x41), True),
        (unit(0x06, b"\x06\x01\x84\x80") + unit(0x41), False),
        (unit(0x06, b"\x06\x02\x34\x40\x80") + unit(0x41), False),
        (unit(0x06, b"\x05\xff\x01" + bytes(256) + b"\x06\x01\xc4\x80") + unit(0x41), True),
        (b"", False),
        (b"\xff\xff\xff\xff\x65", True),
        (unit(0x06, b"\x06"), False),
    ],
    ids=[
        "IDR",
        "not IDR",
        "exact at once",
        "not exact",
        "after frames",
        "second message",
        "empty",
        "cut",
        "no message",
    ],
)
def test_where_h264_starts_afresh(packet: bytes, afresh: bool) -> None:
    assert starts_afresh(packet, "h264", AVCC) is afresh
    bare = packet.replace(packet[:4], b"\x00\x00\x00\x01", 1) if packet.count(packet[:4]) == 1 and packet else b""
    if afresh and bare:
        assert starts_afresh(bare, "h264", b"")


def test_where_hevc_and_others_start_afresh() -> None:
    hvcc = bytes([1, *[0] * 20, 0xFF])
    for kind, afresh in ((1, False), (16, True), (19, True), (20, True), (21, True), (24, False), (39, False)):
        assert starts_afresh(unit(kind << 1), "hevc", hvcc) is afresh
    assert starts_afresh(b"", "vp9", b"")


@settings(max_examples=200)
@given(
    packet=st.binary(max_size=60),
    extradata=st.sampled_from([b"", AVCC, AVCC[:3]]),
    codec=st.sampled_from(["h264", "hevc"]),
)
def test_any_bytes_have_an_answer(packet: bytes, extradata: bytes, codec: str) -> None:
    assert starts_afresh(packet, codec, extradata) in (True, False)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(
    mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Video, "_decoded", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48)
    assert Video(mp4).count == COUNT
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(UnreadableImage, match="frames of 64x48 pixels, more than the 3,071 that are allowed"):
        Video(mp4)


# Refusals that come later than the views


def test_views_that_no_video_is_long_enough_for_can_be_corrected(videos: str, tmp_path: Path) -> None:
    """What only calibration can know leaves a store without a teacher, and that may be made with other views."""
    with pytest.raises(InputNotFound, match=r"none of 20 videos could be read; .* use a smaller stride \(--views 'v"):
        run(videos, tmp_path / "s", views="videomae?frames=4&stride=50")
    assert not Store.open(tmp_path / "s").begun
    run(videos, tmp_path / "s", rows_per_shard=4)
    assert Store.open(tmp_path / "s").card.views == parse_views(VIEWS)
    assert Store.open(tmp_path / "s").card.rows_per_shard < 8
    with pytest.raises(StoreMismatch, match=r"made with other settings \(views.stride"):
        run(videos, tmp_path / "s", views="videomae?frames=4&stride=2")
    with pytest.raises(StoreMismatch, match=r"\(views.stride: the store has \d+, asked was 1\)"):
        run(videos, tmp_path / "s", views="videomae?frames=4&stride=1")


def test_recorded_frames_that_a_video_does_not_have(dataset: Dataset, clip_store: Path) -> None:
    store = Store.open(clip_store)
    geometry, digests = read_geometry(store, 0)
    row = next(i for i, numbers in enumerate(geometry) if numbers[6])
    numbers = geometry[row].copy()
    numbers[-4:] += 1000
    with pytest.raises(
        StoreMismatch, match=r"frame 1\d+ is recorded, but the video has \d+ frames; run 'hdcache verify'"
    ):
        open_sample(
            open_dataset(store.card.dataset.spec),
            store.ids[numbers[0]],
            store.card.views,
            0,
            (numbers, digests[row].tobytes()),
        )


def test_pixels_that_are_held_at_once_are_bounded() -> None:
    """16 frames of 224 pixels: 2.4 MB a row."""
    row = 3 * 16 * 224 * 224
    assert shard_size(100_000, 256, row) * row <= SHARD_PIXELS
    assert shard_size(100_000, 256, row) == 96
    assert shard_size(100_000, 256, 3 * 224 * 224) == 256
    assert shard_size(100_000, 256, 10**9) == 8


def test_extraction_decodes_one_shard_at_a_time_where_memory_is_short(
    videos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    shards: list[int] = []
    decode = Pipeline._decode

    def counted(self: Pipeline, pool: Any, view: int, entries: Any) -> Any:
        futures = decode(self, pool, view, entries)
        shards.append(sum(1 for _ in futures))
        return futures

    monkeypatch.setattr(Pipeline, "_decode", counted)
    held: list[int] = []
    joined = Pipeline._joined

    def seen(self: Pipeline, *shard: Any) -> Any:
        held.append(len(shards) - len(held))
        return joined(self, *shard)

    monkeypatch.setattr(Pipeline, "_joined", seen)
    needed: list[int] = []

    def asked(name: str, rows: int, per_row: int, at_once: int = 1) -> int:
        needed.append(rows * per_row)
        return shards_ahead(name, rows, per_row, at_once)

    monkeypatch.setattr("hdcache.extract.pipeline.shards_ahead", asked)
    run(videos, tmp_path / "a")
    assert max(held) == 2
    shards.clear(), held.clear()
    monkeypatch.setattr("hdcache.extract.capacity.room_for_shards", lambda: 3 * needed[0] // 2)
    run(videos, tmp_path / "b")
    assert max(held) == 1
    assert tree(tmp_path / "a").keys() == tree(tmp_path / "b").keys()
    assert verify(Store.open(tmp_path / "b")).good

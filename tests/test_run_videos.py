"""Videos that cannot be read, in a run without a store: named before its first step, and left out of all of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hdcache.datasets import Dataset, open_dataset
from hdcache.distill.ranks import Ranks
from hdcache.distill.run import distill
from hdcache.distill.run_report import format_run
from hdcache.distill.run_videos import unreadable_videos
from hdcache.errors import InputNotFound, Interrupted, UsageError
from hdcache.loader import Loader
from hdcache.video import Video
from hdcache.views import parse_views

VIEWS = "videomae?frames=4&stride=3"
STUDENT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "frames": 4}
SETTINGS = {"student.arguments": STUDENT, "warmup_epochs": 0, "batch_size": 4}
COUNT = 12
BAD = {
    "a/02.mp4": "a/02.mp4: 6 frames, but a clip of 4 frames at stride 3 spans 10; use a smaller stride "
    "(--views 'videomae?frames=4&stride=1', --stride 1 in knn-eval)",
    "b/05.mp4": "b/05.mp4: the file is empty (0 bytes)",
}


def write(path: Path, count: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos of two classes; one is too short, one is empty. No test may change them."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(COUNT):
        write(root / "d" / "ab"[number % 2] / f"{number:02d}.mp4", 6 if number == 2 else 12 + number, number)
    (root / "d/b/05.mp4").write_bytes(b"")
    return root / "d"


@pytest.fixture
def videos(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(written, tmp_path / "d")


def run(videos: Path, out: Path, views: str = VIEWS, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"views": views, "device": "cpu", "threads": 2}
    return distill("mae-tiny", out=out, data=f"video:{videos}", overrides=SETTINGS | changes, **common)


def find(dataset: Dataset, out: Path, views: str = VIEWS) -> dict[str, str]:
    return unreadable_videos(dataset, parse_views(views), out, Ranks(), threads=2, quiet=True)


def test_they_are_named_before_the_first_step_and_take_no_part(
    videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = Loader.epoch

    def told(self: Loader, number: int, start: int = 0) -> Any:
        assert len(caplog.messages) == 1, "said before the first batch is asked for"
        for batch in epoch(self, number, start):
            assert len(batch.ids) == 4
            yield batch

    monkeypatch.setattr(Loader, "epoch", told)
    result = run(videos, tmp_path / "r", epochs=1)
    assert caplog.messages == [
        "2 of 12 videos cannot be read and are left out: a/02.mp4, b/05.mp4 (the first: " + BAD["a/02.mp4"] + ")"
    ]
    assert result["dropped"] == BAD
    assert result["steps"] == 2, "10 videos are 2 whole batches of 4"
    assert "\n2 videos could not be read and took no part (see 'dropped' in run.json)\n" in format_run(result)
    assert "mae-tiny: 2 steps in " in format_run(result)
    one = result | {"steps": 1, "seconds": 0.4, "dropped": {"a": "why"}}
    assert "mae-tiny: 1 step in 0.4s, no teacher" in format_run(one)
    assert "\n1 video could not be read" in format_run(one)
    one["data"] = result["data"] | {"kind": "folder"}
    assert "\n1 image could not be read" in format_run(one)


def test_the_first_line_counts_those_that_are_left(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = SETTINGS | {"epochs": 1}
    distill(
        "mae-tiny", out=tmp_path / "r", data=f"video:{videos}", views=VIEWS, overrides=changes, device="cpu",
        threads=2, quiet=False,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert said.startswith("check  12/12 videos (100 %)")
    assert "mae-tiny: 10 videos, a new view (" in said
    assert ", 2 steps of 4 in 1 epoch, " in said


def test_without_one_that_can_be_read_there_is_no_run(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputNotFound) as refused:
        run(videos, tmp_path / "r", "videomae?frames=4&stride=50", epochs=1)
    message = f"video:{videos}: none of 12 videos could be read; the first: a/00.mp4: 12 frames, but a clip of 4 frames"
    assert str(refused.value.args[-1]).startswith(message)
    assert not (tmp_path / "r").exists()
    shutil.rmtree(videos / "b")
    for path in sorted((videos / "a").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputNotFound, match=r"none of 1 video could be read; the first: a/00\.mp4: 12 frames"):
        find(open_dataset(f"video:{videos}"), tmp_path / "r", "videomae")


def test_those_that_are_left_must_fill_a_batch(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="10 usable rows do not fill one batch of 11; choose a smaller batch_size"):
        run(videos, tmp_path / "r", epochs=1, batch_size=11)


def test_frames_are_counted_and_not_decoded(
    videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Video, "_decoded", lambda *_: pytest.fail("decoded"))
    dataset = open_dataset(f"video:{videos}")
    assert find(dataset, tmp_path / "r") == BAD
    for number in (4, 6, 7, 8):
        (videos / "ab"[number % 2] / f"{number:02d}.mp4").write_bytes(b"no video")
    caplog.clear()
    assert len(find(dataset, tmp_path / "r")) == 6
    named = "a/02.mp4, a/04.mp4, a/06.mp4, a/08.mp4, b/05.mp4 and 1 more (the first: a/02.mp4: 6 frames"
    assert f"6 of 12 videos cannot be read and are left out: {named}" in caplog.text
    assert find(dataset, tmp_path / "r", "videomae?frames=1&stride=1").keys() == {
        *("b/05.mp4", "a/04.mp4", "a/06.mp4", "b/07.mp4", "a/08.mp4")
    }
    for number in (4, 5, 6, 7, 8):
        write(videos / "ab"[number % 2] / f"{number:02d}.mp4", 12, number)
    caplog.clear()
    assert find(dataset, tmp_path / "r", "videomae?frames=1&stride=1") == {}
    assert not caplog.messages


def test_a_stop_is_heard_while_they_are_looked_at(videos: Path, tmp_path: Path, signals: None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM with no step taken; run the same command again to go on"):
        find(open_dataset(f"video:{videos}"), tmp_path / "r")


def test_a_run_that_goes_on_keeps_to_what_it_began_with(
    videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, though the videos were mended meanwhile: another number of rows would be other batches."""
    changes = {"epochs": 2, "save_every_epochs": 1}
    run(videos, tmp_path / "whole", **changes)
    epoch = Loader.epoch

    def stopped(self: Loader, number: int, start: int = 0) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, start)

    monkeypatch.setattr(Loader, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(videos, tmp_path / "run", **changes)
    monkeypatch.undo()
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    for name in BAD:
        write(videos / name, 20, 0)
    caplog.clear()
    result = run(videos, tmp_path / "run", **changes)
    assert (result["resumed_at"], result["steps"], result["dropped"]) == (2, 4, BAD)
    assert not caplog.messages
    one, other = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other
    # Where nothing was left out, nothing is later.
    run(videos, tmp_path / "mended", epochs=1)
    (videos / "a/00.mp4").write_bytes(b"")
    assert find(open_dataset(f"video:{videos}"), tmp_path / "mended") == {}


WORKER = """
import json, sys
from pathlib import Path
from hdcache.datasets import open_dataset
from hdcache.distill.ranks import join_ranks, leave_ranks
from hdcache.distill.run_videos import unreadable_videos
from hdcache.views import parse_views
ranks, found = join_ranks(), []
for data in sys.argv[3:]:
    dataset = open_dataset(data)
    opened = []
    read = type(dataset).read
    type(dataset).read = lambda self, name: opened.append(name) or read(self, name)
    left = unreadable_videos(dataset, parse_views(sys.argv[1]), Path(sys.argv[2]), ranks, threads=1, quiet=True)
    type(dataset).read = read
    found.append([left, sorted(opened)])
leave_ranks(ranks)
print(json.dumps(found))
"""


def test_two_processes_share_the_work_and_know_the_same(
    videos: Path, tmp_path: Path, together: Callable[..., list[str]]
) -> None:
    """Else they would take different rows, and wait for each other for ever."""
    good = shutil.copytree(videos, tmp_path / "good")
    for name in BAD:
        (good / name).unlink()
    outputs = together(WORKER, VIEWS, tmp_path / "r", f"video:{videos}", f"video:{good}")
    one, other = (json.loads(output.splitlines()[-1]) for output in outputs)
    ids = open_dataset(f"video:{videos}").ids
    assert [found[0] for found in one] == [found[0] for found in other] == [BAD, {}]
    assert (one[0][1], other[0][1]) == (list(ids[::2]), list(ids[1::2]))
    told = "2 of 12 videos cannot be read and are left out: a/02.mp4, b/05.mp4"
    assert [told in output for output in outputs] == [True, False]

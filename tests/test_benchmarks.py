"""The scripts under benchmarks/ run from end to end on a handful of images, and score what they say they score."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
TEACHER = "random:vit_tiny_patch16_224?img_size=64&patch_size=8&depth=2&embed_dim=48&num_heads=3"
LINES = {"amd": 4, "hybrid": 6, "sdssl": 9, "tinymim": 7, "video": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS/FILE and test/CLASS/FILE: 160 and 16 images of four classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 4)):
        for label in "abcd":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(root / split / label / f"{label}{number}.png")
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of videos."""
    av = pytest.importorskip("av")
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                with av.open(str(root / split / label / f"{label}{number}.mp4"), "w") as container:
                    stream = container.add_stream("libx264", rate=12)
                    stream.width = stream.height = 64
                    stream.pix_fmt = "yuv420p"
                    for _ in range(20):
                        frame = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                    container.mux(stream.encode())
    return root


@pytest.fixture
def claims() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    import claims

    yield claims
    sys.path.remove(str(SCRIPTS))


def call(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(LINES))
def test_every_claim_ends_in_a_table(method: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = images
    data = [f"--train={root / 'train'}", f"--test={root / 'test'}", f"--probe-labels={root}", f"--teacher={TEACHER}"]
    if method == "video":
        root = request.getfixturevalue("videos")
        data = [f"--train=video:{root / 'train'}", f"--test=video:{root / 'test'}"]
    short = ["--seeds=1", "--epochs=1", "--teacher-epochs=1", "--num-views=1", f"--out={tmp_path}"]
    printed = call("claims.py", method, *data, *short)
    result = json.loads((tmp_path / f"{method}.json").read_text())
    assert len(result["scores"]) == LINES[method]
    first = printed.splitlines()[: LINES[method] + 2]
    assert first[0] == "| student | k-NN | linear probe |"
    assert [line.split(" | ")[0].strip("| ") for line in first[2:]] == list(result["scores"])


def test_what_is_scored_is_the_network_that_the_method_evaluates(claims: Any, tmp_path: Path) -> None:
    """BYOL and MoCo v3 are judged by their momentum copy."""
    scored: list[tuple[str, str]] = []

    class Bench(claims.Bench):  # type: ignore[misc]  # a script without types
        def __init__(self) -> None:
            self.settings = type("Settings", (), {"seeds": 2, "epochs": 3, "method": "sdssl"})()
            self.out, self.scorer = tmp_path, type("Scorer", (), {"score": lambda _, *of: scored.append(of)})()

        def train(self, folder: str, recipe: str, *_: Any) -> dict[str, Any]:
            out = str(tmp_path / folder)
            return {"out": out} | ({"preferred": f"{out}/ema"} if "byol" in recipe else {})

    variants = [claims.Variant(name, f"sdssl-{name}-tiny", pool="cls") for name in ("byol", "simclr")]
    Bench().compare(variants, {})
    assert scored == [
        (f"{tmp_path}/sdssl-{name}", "cls") for name in ("byol-0/ema", "simclr-0", "byol-1/ema", "simclr-1")
    ]


def test_a_table_names_the_best_layer_and_the_spread(claims: Any) -> None:
    runs = [{"k-NN": {"a": 10.0 + seed, "b": 30.0 - seed}, "linear probe": {"a": 5.0, "b": 5.0}} for seed in (0, 2, 4)]
    lines = claims.table({"one": runs}).splitlines()
    assert lines[2] == "| one | 28.00 ± 2.00 % (b) | 5.00 ± 0.00 % (a) |"
    assert claims.layer_tables({"one": runs}).splitlines()[:3] == [
        "| k-NN | a | b |", "|---|---|---|", "| one | 12.00 ± 2.00 | 28.00 ± 2.00 |"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("study", "lines"), [("fidelity", 11), ("views", 6)])
def test_every_study_ends_in_tables(
    study: str, lines: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = TEACHER.replace("depth=2", "depth=12")
    data = [f"--train={images / 'train'}", f"--test={images / 'test'}", f"--probe-labels={images}", f"--teacher={deep}"]
    printed = call("studies.py", study, *data, "--seeds=1", "--epochs=1", "--num-views=1", f"--out={tmp_path}")
    result = json.loads((tmp_path / f"{study}.json").read_text())
    assert len(result["scores"]) == lines
    for head in ("| store | bytes a row |", "| student | seconds a run |", "| student | k-NN | linear probe |"):
        assert head in printed


@pytest.mark.slow
def test_sizes_are_of_every_encoding_and_layout(images: Path, tmp_path: Path) -> None:
    taps = ["--tap=block2.attn_in", "--tap=final"]
    few = ["--calibration=40", "--images=24", "--precision=fp32", f"--out={tmp_path}"]
    printed = call("size.py", f"--train={images / 'train'}", f"--teacher=a={TEACHER}", *taps, *few)
    found = json.loads((tmp_path / "size.json").read_text())["lines"]
    assert len(found) == 2 * (4 + 9) == len(printed.splitlines()) - 2
    for line in found:
        if line["encoding"].startswith("klt"):
            asked = float(line["encoding"].split()[1]) / 100
            assert line["relative_rmse"] == pytest.approx(asked, rel=0.3)
        if line["encoding"] == "fp16":
            assert line["bytes_per_row"] == pytest.approx(2 * 65 * 48, rel=0.1)
            assert line["relative_rmse"] < 1e-3


@pytest.mark.slow
def test_memory_prints_one_line_for_each_kind_of_run(images: Path, tmp_path: Path) -> None:
    student = '{"img_size":64,"patch_size":8,"embed_dim":48,"depth":3,"num_heads":3}'
    printed = call(
        "memory.py", f"--train={images / 'train'}", f"--relation-teacher=a={TEACHER}", f"--feature-teacher=b={TEACHER}",
        f"--out={tmp_path / 'out'}", f"--student={student}", "--relation-tap=block2.attn_in", "--repeats=1",
    )  # fmt: skip
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| store", "| online", "| alone"]
    found = json.loads((tmp_path / "out" / "memory.json").read_text())["best"]
    assert all(kind["rss"] > 10**8 for kind in found.values())

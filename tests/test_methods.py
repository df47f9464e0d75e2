"""Every method that learns from teachers: from a store as from the live network, in two processes as in one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hdcache.distill.recipes import get_recipe
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.extract.run import extract

pytestmark = pytest.mark.timeout(280)

COUNT, BATCH, STEPS = 40, 8, 10
TAPS = ["block2.attn_in", "block3.attn_in", "block2.out", "block3.out", "final", "pooled"]
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
CLIPS = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3&frames=4&tubelet=2"
SIZES = {"objective.hidden": 32, "objective.hidden_intermediate": 16, "objective.hidden_predictor": 32}
AMD = {
    "objective.teacher_mask_ratio": 0.5, "objective.student_mask_ratio": 0.75, "objective.teacher_blocks": [2, 3],
    "objective.student_blocks": [2, 3], "objective.decoder_width": 16, "objective.decoder_depth": 1,
    "objective.decoder_heads": 2, "objective.generator_depth": 1,
}  # fmt: skip


class Method(NamedTuple):
    """A recipe, what is changed in it, and whether it learns from clips."""

    recipe: str
    changes: dict[str, Any]
    clips: bool = False


METHODS = {
    "tinymim": Method("tinymim-tiny", {"objective.teacher": "whole"}),
    "tinymim feature": Method("tinymim-feature-tiny", {"objective.teacher": "whole"}),
    "hybrid": Method(
        "hybrid-tiny",
        {
            "objective.relation_teacher": "whole", "objective.feature_teacher": "other", "objective.relation_blocks": [2],
            "objective.student_blocks": [2], "objective.stages": [1, 2],
        },
    ),
    "hybrid student scorer": Method(
        "hybrid-tiny",
        {
            "objective.relation_teacher": "whole", "objective.feature_teacher": "other", "objective.relation_blocks": [2],
            "objective.student_blocks": [2], "objective.stages": [1, 2], "objective.scorer": "student",
        },
    ),
    "amd image": Method("amd-image-tiny", AMD),
    "amd video": Method("amd-video-tiny", AMD, clips=True),
    "sdssl cached_final": Method("sdssl-cached-final-tiny", SIZES | {"objective.teacher": "whole"}),
    "sdssl cached_anchor": Method("sdssl-cached-anchor-tiny", SIZES | {"objective.teacher": "whole"}),
    "logits": Method("logits-tiny", {"objective.teacher": "classes"}),
}  # fmt: skip


def plan(name: str, epochs: int = 2) -> Recipe:
    """Ten steps by default: two epochs of five, each with the views that were stored."""
    method = METHODS[name]
    student = STUDENT | ({"frames": 4, "tubelet": 2} if method.clips else {})
    common = {"epochs": epochs, "batch_size": BATCH, "warmup_epochs": 0, "log_every": 1, "amp": "off"}
    return get_recipe(method.recipe, common | {"student.arguments": student} | method.changes)


def write_clip(path: Path, number: int) -> None:
    import av

    noise = np.random.default_rng(number).integers(0, 256, (8, 5, 5, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 40
        stream.pix_fmt = "yuv420p"
        for picture in noise:
            frame = av.VideoFrame.from_ndarray(np.kron(picture, np.ones((8, 8, 1), np.uint8)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, tiny: str, make_npz: Callable[..., str]) -> Path:
    """Two views of 40 pictures under four fp32 teachers: two that see all, one masked, one with a classifier."""
    root = tmp_path_factory.mktemp("images")
    data = make_npz(root / "data.npz", COUNT)
    for name, spec, taps, mask in (
        ("whole", tiny, TAPS, None),
        ("other", f"{tiny}&seed=1", ["final"], None),
        ("masked", tiny, TAPS, "random:0.5"),
        ("classes", f"{tiny}&num_classes=5", ["logits"], None),
    ):
        settings: dict[str, Any] = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "threads": 2}
        extract(
            data, store=root / "s", teachers=[f"{name}={spec}"], taps=taps, num_views=2, teacher_mask=mask, **settings
        )
    return root / "s"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two views of 40 short videos under a teacher that sees half of each tube."""
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDCACHE_CACHE", str(root / "cache"))
        for number in range(COUNT):
            path = root / "data" / "ab"[number % 2] / f"{number:02d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, number)
        extract(
            f"video:{root / 'data'}", store=root / "s", teachers=[f"masked={CLIPS}"], taps=TAPS, num_views=2,
            views="videomae?frames=4&stride=1", teacher_mask="tube:0.5", encoding="fp32", precision="fp32", device="cpu",
            batch=8, threads=2,
        )  # fmt: skip
        yield root / "s"


@pytest.fixture
def store(request: pytest.FixtureRequest, name: str) -> Path:
    made: Path = request.getfixturevalue("clips" if METHODS[name].clips else "images")
    return made


def losses(folder: Path) -> list[dict[str, float]]:
    """Every part of the loss, step by step."""
    timed = {"epoch", "samples_per_second", "wait_share", "weight_decay", "lr"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_from_the_store_equal_ten_steps_with_the_teacher(name: str, store: Path, tmp_path: Path) -> None:
    """Every loss and every byte of the student; and it is the teacher that was learnt from."""
    recipe = plan(name)
    results = {
        source: distill(recipe, out=tmp_path / source, store=store, online=source == "live", device="cpu", threads=2)
        for source in ("stored", "live")
    }
    assert [result["steps"] for result in results.values()] == [STEPS, STEPS]
    assert results["stored"]["targets"] == results["live"]["targets"]
    assert any(results["stored"]["targets"].values())
    stored, live = (losses(tmp_path / source) for source in ("stored", "live"))
    assert len(stored) == STEPS
    assert stored == live
    assert all(math.isfinite(value) for line in stored for value in line.values())
    assert stored[0]["loss"] != stored[-1]["loss"]
    student = [(tmp_path / source / "student.safetensors").read_bytes() for source in ("stored", "live")]
    assert student[0] == student[1]


RANKS = """
import json, sys
import torch
from hdcache.distill import run
from hdcache.distill.settings import Recipe
run.leave_ranks = lambda ranks: None
for recipe, out, store in json.loads(sys.argv[1]):
    run.distill(Recipe.model_validate(recipe), out=out, store=store, device="cpu", threads=1)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, together: Callable[..., list[str]], images: Path, clips: Path
) -> Path:
    """Five steps of every method in one pair of processes, one folder each."""
    out = tmp_path_factory.mktemp("two")
    jobs = [
        (plan(name, 1).model_dump(mode="json"), str(out / name), str(clips if METHODS[name].clips else images))
        for name in METHODS
    ]
    together(RANKS, json.dumps(jobs))
    return out


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_losses_of_one(name: str, store: Path, tmp_path: Path, two_processes: Path) -> None:
    """On the same global batches: the first step within the rounding of a sum, later ones as it grows."""
    distill(plan(name, 1), out=tmp_path / "one", store=store, device="cpu", threads=2)
    one, two = losses(tmp_path / "one"), losses(two_processes / name)
    assert len(one) == len(two) == STEPS // 2
    for part in one[0]:
        assert two[0][part] == pytest.approx(one[0][part], rel=1e-6, abs=1e-7), part
        assert [line[part] for line in two] == pytest.approx([line[part] for line in one], rel=1e-4, abs=1e-7), part

"""From images to an accuracy: extract, distill, evaluate, meeting on disk only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hdcache.distill.run import distill
from hdcache.evaluate.run import knn_eval
from hdcache.extract.run import extract
from hdcache.integrity import verify
from hdcache.store import Store

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 50]])
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def pictures(path: Path, count: int, seed: int) -> str:
    """Noisy pictures of four colours: chance is 25 %."""
    noise = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = COLOURS[labels][:, None, None] + noise.integers(-60, 61, (count, 36, 36, 3))
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return f"npz:{path}"


@pytest.mark.parametrize("encoding", ["klt", "int8"])
def test_from_images_to_an_accuracy(encoding: str, tmp_path: Path, tiny: str) -> None:
    train, test = pictures(tmp_path / "train.npz", 96, 0), pictures(tmp_path / "test.npz", 40, 1)
    taps = ["block3.attn_in", "final"]
    summary = extract(
        train, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=taps, num_views=2, encoding=encoding, device="cpu"
    )
    assert summary.failed == {}
    assert verify(Store.open(tmp_path / "s")).good
    changes = {"student.arguments": STUDENT, "epochs": 4, "batch_size": 32, "warmup_epochs": 1, "objective.strategy": "feature",
               "objective.feature": "final"}  # fmt: skip
    run = distill("tinymim-tiny", out=tmp_path / "run", store=tmp_path / "s", overrides=changes, device="cpu")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert run["loss"] < first["loss"]
    result = knn_eval(str(tmp_path / "run"), train, test, ks=(5,))
    assert result["model"]["layer"] == run["last_trained"] == "final"
    assert result["chance"]["uniform"] == 25
    assert result["knn"][0]["top1"] > 60

"""k-NN against the answers of DINO's published code."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from hdcache.evaluate.knn import knn_classify

GOLDEN = Path(os.environ.get("HDCACHE_GOLDEN") or Path(__file__).parent / "data" / "golden")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("knn*.safetensors")), ids=lambda path: path.stem)
def test_knn_golden(path: Path) -> None:
    with safe_open(path, "np") as file:
        settings = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    expected = {name: float(value) for name, value in arrays.items() if name.startswith("expected.")}
    ks = sorted({int(match[1]) for name in expected if (match := re.search(r"\.k(\d+)$", name))})
    assert ks
    result = knn_classify(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
        ks,
        float(settings["T"]),
        classes=range(int(settings["num_classes"])),
        compat_dino=True,
    )
    for k, accuracy in result.per_k.items():
        assert accuracy.top1 == pytest.approx(expected.pop(f"expected.top1.k{k}"), abs=1e-4)
        assert accuracy.top5 == pytest.approx(expected.pop(f"expected.top5_dino.k{k}"), abs=1e-4)
    assert not expected

"""The quickstart, shortened: the same steps, files and table as the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hdcache import quickstart
from hdcache.errors import UsageError


def test_digits_are_split_once_and_completely(tmp_path: Path) -> None:
    """Every digit lies in exactly one of the two files, and a second call writes nothing."""
    train, test = (Path(path) for path in quickstart.write_digits(tmp_path))
    counts = [np.load(path)["images"].shape[0] for path in (train, test)]
    assert counts == [1297, 500]
    stamp = train.stat().st_mtime_ns
    quickstart.write_digits(tmp_path)
    assert train.stat().st_mtime_ns == stamp


def test_the_printed_command_is_what_a_shell_needs() -> None:
    """Lists repeat their option, recipe fields go through --set, flags stand alone, odd characters are quoted."""
    line = quickstart.command_line("distill", "r", store="a b", online=True, teacher=["x", "y"], **{"set epochs": 3})
    assert line == "hdcache distill r --store 'a b' --online --teacher x --teacher y --set epochs=3"


def test_without_scikit_learn_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"hdcache\[quickstart\]"):
        quickstart.write_digits(tmp_path)


@pytest.mark.slow
def test_the_distilled_student_beats_the_untrained_one(tmp_path: Path) -> None:
    """The whole quickstart: table complete, student above its own start and below its teacher's ceiling of 100 %."""
    result = quickstart.run_quickstart(tmp_path / "out", quiet=True)
    top1 = {name: score["top1"] for name, score in result["knn"].items()}
    assert top1["student-untrained"] < top1["student-relations"]
    assert top1["student-untrained"] < top1["student-features"]
    assert "times smaller than fp16" in quickstart.format_result(result)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["knn"] == json.loads(json.dumps(result["knn"]))
    again = quickstart.run_quickstart(tmp_path / "out", quiet=True)
    assert again["knn"] == result["knn"], "a second call finds everything done"
    assert again["samples_per_second"] == result["samples_per_second"]

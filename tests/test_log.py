"""The log of a run: what a resumed run keeps of it. What is written, test_trainer.py sees in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hdcache.distill.log import Log, forget_after
from hdcache.distill.ranks import Ranks
from hdcache.distill.state import Position

CPU = torch.device("cpu")


def write(path: Path, *entries: object, torn: str = "") -> None:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries) + torn)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_steps_to_come_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert forget_after(path, 5) == []
    entries = [{"step": step, "loss": step / 10} for step in (1, 5, 10)]
    write(path, *entries, torn='{"step": 1')
    assert forget_after(path, 7) == entries[:2]
    assert [line["step"] for line in read(path)] == [1, 5]
    assert forget_after(path, 0) == []
    assert path.read_text() == ""


def test_a_log_goes_on_with_the_last_loss_and_the_steps_measured(tmp_path: Path) -> None:
    """A measurement is no loss: where one is the last line, the mean is that of the line before."""
    lines = [
        {"epoch": 0, "step": 0, "knn": {"final": 1.0}},
        {"epoch": 0, "step": 4, "loss": 0.5},
        {"epoch": 1, "step": 4, "knn": {"final": 2.0}},
        {"epoch": 2, "step": 8, "knn": {"final": 3.0}},
    ]
    write(tmp_path / "metrics.jsonl", *lines)
    log = Log(tmp_path, Ranks(), 1, Position(1, 0, 4), CPU)
    assert (log.mean, log.measured) == (0.5, {0, 4})
    log.note(Position(2, 0, 8), {"block2.out": 4.0, "block1.out": 5.0})
    log.close()
    assert log.measured == {0, 4, 8}
    assert read(tmp_path / "metrics.jsonl") == [
        *lines[:3],
        {"epoch": 2, "step": 8, "knn": {"block2.out": 4.0, "block1.out": 5.0}},
    ]


def test_a_new_log_is_empty(tmp_path: Path) -> None:
    log = Log(tmp_path, Ranks(), 1, Position(), CPU)
    assert (log.mean, log.measured) == (None, set())
    log.close()
    assert read(tmp_path / "metrics.jsonl") == []


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path, Ranks(1, 2), 1, Position(), CPU)
    log.note(Position(), {"final": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_time_of_other_work_takes_no_part_in_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hdcache.distill.log.time.monotonic", lambda: now[0])
    log = Log(tmp_path, Ranks(), 1, Position(), CPU)
    now[0] += 52
    log.rest(50)
    log.add(Position(0, 1, 1), {"loss": torch.tensor(1.0)}, {"lr": 0.1, "weight_decay": 0.0}, 16, 0.0, last=False)
    log.close()
    assert read(tmp_path / "metrics.jsonl")[0]["samples_per_second"] == 8


def test_the_last_line_is_of_the_last_step(tmp_path: Path) -> None:
    """However long an interval is: what a run reports as its last loss is that."""
    log = Log(tmp_path, Ranks(), 4, Position(), CPU)
    group = {"lr": 0.1, "weight_decay": 0.0}
    for step in range(1, 7):
        log.add(Position(0, step, step), {"loss": torch.tensor(float(step))}, group, 16, 0.0, last=step == 6)
    log.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (4, 3.0), (6, 5.5)]
    assert log.mean == 5.5

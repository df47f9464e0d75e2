"""A saved state: what is loaded is what was saved, to the bit, and nothing else is accepted."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hdcache.distill import state
from hdcache.distill.state import STATE_FILE, Position, load_state, save_state, saved_facts, saved_position
from hdcache.errors import OutOfSpace, StoreMismatch

ABOUT = {"recipe": {"lr": 0.1, "seed": 3, "betas": (0.9, 0.95)}, "manifests": {"t": {"0": "abc"}}, "online": False}


class Run:
    """Two modules of which one shares a tensor, an averaged copy, and an optimizer that has taken steps."""

    def __init__(self, seed: int, steps: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            student = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
            heads = nn.Linear(4, 2)
        self.modules: dict[str, nn.Module] = {"student": student, "heads": heads, "ema": copy.deepcopy(student)}
        named = [*student.named_parameters(prefix="student"), *heads.named_parameters(prefix="heads")]
        self.names = [name for name, _ in named]
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=0.1)
        for _ in range(steps):
            heads(student(torch.ones(2, 3) * seed)).square().sum().backward()
            # A parameter without gradient has no moments, as a block that an objective does not reach.
            student[1].bias.grad = None
            self.optimizer.step()

    def save(self, folder: Path, position: Position, about: dict[str, Any] = ABOUT) -> None:
        save_state(folder, position, self.modules, self.optimizer, self.names, about)

    def load(self, folder: Path, about: dict[str, Any] = ABOUT) -> Position | None:
        return load_state(folder, self.modules, self.optimizer, self.names, about)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"{name}/{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{self.names[index]}/{key}": value for key, value in values.items()}
        return found


POSITION = Position(epoch=2, batch=3, step=11, seconds=1.5, logged={"loss": 0.1 + 0.2, "qk": 1e-40}, counted=2)


def test_a_loaded_state_is_the_saved_one_to_the_bit(tmp_path: Path) -> None:
    first, second = Run(1, 3), Run(2, 0)
    first.save(tmp_path, POSITION)
    assert second.load(tmp_path) == POSITION
    saved, loaded = first.tensors(), second.tensors()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert "optimizer/student.1.bias/exp_avg" not in saved
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_loaded_optimizer_takes_the_same_next_step(tmp_path: Path) -> None:
    first, second = Run(1, 3), Run(2, 1)
    first.save(tmp_path, POSITION)
    second.load(tmp_path)
    for run in (first, second):
        run.optimizer.zero_grad()
        run.modules["heads"](run.modules["student"](torch.ones(2, 3))).sum().backward()
        run.modules["student"][1].bias.grad = None  # type: ignore[index]
        run.optimizer.step()
    ones, twos = first.tensors(), second.tensors()
    assert all(torch.equal(ones[key], twos[key]) for key in ones)


def test_no_state_is_no_position(tmp_path: Path) -> None:
    assert Run(1, 0).load(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": ABOUT["recipe"] | {"lr": 0.2}}, r"recipe\.lr: it has 0\.1, asked was 0\.2"),  # type: ignore[operator]
        ({"manifests": {"t": {"0": "xyz"}}}, r"manifests\.t\.0: it has 'abc', asked was 'xyz'"),
        ({"online": True}, r"online: it has False, asked was True"),
    ],
)
def test_a_state_of_another_run_is_refused_by_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    Run(1, 1).save(tmp_path, POSITION)
    other = Run(2, 0)
    before = {key: value.clone() for key, value in other.tensors().items()}
    with pytest.raises(
        StoreMismatch, match=rf"belongs to a run with other settings \({message}\); repeat them, or give"
    ):
        other.load(tmp_path, ABOUT | change)
    assert all(torch.equal(before[key], value) for key, value in other.tensors().items())


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_state_is_refused(length: int, tmp_path: Path) -> None:
    Run(1, 1).save(tmp_path, POSITION)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        StoreMismatch, match=r"state\.safetensors: not a readable state \(.*\); delete it to start again"
    ):
        Run(1, 0).load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"about": "{}"}, {"about": "{", "position": "{}"}])
def test_another_safetensors_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / STATE_FILE, metadata=metadata)
    with pytest.raises(StoreMismatch, match="not a readable state"):
        Run(1, 0).load(tmp_path, {})


def test_a_full_disk_keeps_the_state_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(1, 1).save(tmp_path, POSITION)
    before = (tmp_path / STATE_FILE).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def no_sync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, name, value in ((state, "save_file", full), (os, "fsync", no_sync)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(
                OutOfSpace, match=r"cannot be written \(.*No space left.*\); the state saved before is kept"
            ):
                Run(2, 1).save(tmp_path, POSITION)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_other_errors_of_the_disk_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        Run(1, 1).save(tmp_path, POSITION)


def test_facts_of_a_state_are_read_without_its_tensors(tmp_path: Path) -> None:
    assert (saved_facts(tmp_path), saved_position(tmp_path)) == ({}, Position())
    Run(1, 1).save(tmp_path, POSITION)
    assert (saved_facts(tmp_path), saved_position(tmp_path)) == (json.loads(json.dumps(ABOUT)), POSITION)
    (tmp_path / STATE_FILE).write_bytes(b"torn")
    assert (saved_facts(tmp_path), saved_position(tmp_path)) == ({}, Position())

"""The log of a run: losses and what was measured on the way, one JSON line each, continued where a run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hdcache.distill.ranks import Ranks
from hdcache.distill.state import Position
from hdcache.errors import HdcacheError


class LossNotFinite(HdcacheError):
    """The loss has become infinite or not a number: this student learns no more."""


class Log:
    """``metrics.jsonl`` (and TensorBoard where it is installed).

    One line every ``log_every`` steps and at the end, means over all ranks; and ``{"epoch", "step", "knn": {layer: percent}}`` for each
    measurement of the student in between.
    """

    def __init__(self, folder: Path, ranks: Ranks, every: int, position: Position, device: torch.device) -> None:
        self._every, self._ranks = every, ranks
        self._sums = {name: torch.tensor(value, device=device) for name, value in position.logged.items()}
        self._count = position.counted
        self._since = time.monotonic()
        self.mean: float | None = None
        """Mean loss of the last logged interval."""
        self.measured: set[int] = set()
        """Steps whose measurement is in the log already."""
        self._board: Any = None
        self._file: Any = None
        if ranks.first:
            path = folder / "metrics.jsonl"
            for entry in forget_after(path, position.step):
                self.mean = entry.get("loss", self.mean)
                if "knn" in entry:
                    self.measured.add(entry["step"])
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
            self._board = tensorboard(folder, position.step)

    def _totals(self, step: int) -> dict[str, float]:
        """The sums since the last line, averaged over ranks; every rank must ask at the same step."""
        if not self._sums:
            return {}
        values = torch.stack([self._sums[name] for name in sorted(self._sums)])
        if self._ranks.world > 1:
            torch.distributed.all_reduce(values)
            values /= self._ranks.world
        totals = dict(zip(sorted(self._sums), values.tolist(), strict=True))
        if not math.isfinite(totals["loss"]):
            raise LossNotFinite(
                f"the loss is {totals['loss']} at step {step}; the last saved state is kept: lower the learning rate "
                "(--set lr=...), set clip_grad, or turn mixed precision off (--set amp=off), in a new --out folder"
            )
        return totals

    def pause(self, position: Position) -> None:
        """Note in ``position`` what the next log line has so far; a loss that is not finite is raised, never saved."""
        position.logged, position.counted = self._totals(position.step), self._count

    def add(
        self,
        position: Position,
        parts: dict[str, Tensor],
        group: dict[str, Any],
        batch_size: int,
        wait_share: float,
        *,
        last: bool,
    ) -> float | None:
        """Count a step; at the end of an interval, or of the run, write its means and return the mean loss."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._count += 1
        if position.step % self._every and position.step != 1 and not last:
            return None
        means = {name: value / self._count for name, value in self._totals(position.step).items()}
        now = time.monotonic()
        entry = {
            "epoch": position.epoch,
            "step": position.step,
            **means,
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "samples_per_second": round(self._count * batch_size / max(now - self._since, 1e-9), 1),
            "wait_share": round(wait_share, 4),
        }
        self._sums, self._count, self._since, self.mean = {}, 0, now, means["loss"]
        self._write(entry, {f"train/{name}": value for name, value in entry.items()})
        return self.mean

    def note(self, position: Position, knn: Mapping[str, float]) -> None:
        """Write a line of measurements: layer -> k-NN accuracy in percent, after ``epoch`` whole epochs."""
        self.measured.add(position.step)
        entry = {"epoch": position.epoch, "step": position.step, "knn": dict(knn)}
        self._write(entry, {f"knn/{layer}": value for layer, value in knn.items()})

    def rest(self, seconds: float) -> None:
        """Leave ``seconds`` that just passed out of the rate."""
        self._since += seconds

    def _write(self, entry: dict[str, Any], scalars: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps that a resumed run takes again, and a torn last one; the lines kept."""
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            kept.append(entry)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), encoding="utf-8")
    os.replace(partial, path)
    return kept


def tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides what was logged after ``step``, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

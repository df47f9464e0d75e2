"""The training loop: schedules, steps, log, saved states. It never mentions an objective by name.

Deliberately not here: evaluation (run ``hdcache knn-eval`` on the result), and any choice that a recipe should make.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hdcache import stopping
from hdcache.batch import Batch
from hdcache.distill.objective import Objective
from hdcache.distill.ranks import Ranks, stop_asked
from hdcache.distill.schedules import ema_momentum, learning_rate, weight_decay
from hdcache.distill.settings import Recipe
from hdcache.distill.state import Position, load_state, save_state
from hdcache.distill.student import set_drop_paths
from hdcache.errors import HdcacheError
from hdcache.loader import Loader
from hdcache.progress import Progress
from hdcache.teachers import choose_precision


class Step(nn.Module):
    """Student, heads and loss as one module, so that DistributedDataParallel sees every gradient."""

    def __init__(self, objective: Objective, student: nn.Module, heads: nn.Module, seed: int) -> None:
        super().__init__()
        self.objective, self.student, self.heads, self.seed = objective, student, heads, seed

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        taps = self.objective.forward(self.student, batch, self.heads, self.seed)
        return self.objective.loss(batch, taps, self.heads)


@dataclass
class Outcome:
    """What a training run did."""

    steps: int
    seconds: float
    """Training seconds over all sessions."""
    samples_per_second: float
    """Of this session."""
    wait_share: float
    """Share of this session's time that was spent waiting for data."""
    loss: float | None
    """Mean loss of the last logged interval; None where no step was logged."""
    resumed_at: int
    """Step at which this session started."""


def train(
    recipe: Recipe,
    objective: Objective,
    student: nn.Module,
    heads: nn.Module,
    loader: Loader,
    folder: Path,
    *,
    device: torch.device,
    ranks: Ranks,
    about: dict[str, Any],
    publish: Callable[[nn.Module | None], None],
    quiet: bool,
) -> tuple[Outcome, nn.Module | None]:
    """Train ``student`` in place for ``recipe.epochs``; returns the outcome and the averaged student, if asked for.

    ``about`` is saved with the state, and a resumed run must bring the same. ``publish`` is called after every saved
    state, with the averaged student, to write a student that can be used.

    Raises
    ------
    HdcacheError
        when the loss is not finite (the last saved state stays), or a signal asked for a stop (state saved).
    """
    step_module = Step(objective, student, heads, recipe.seed).to(device).train()
    averaged = copy.deepcopy(student).eval().requires_grad_(False) if recipe.ema is not None else None
    optimizer, names = build_optimizer(step_module, recipe)
    modules: dict[str, nn.Module] = {"student": student, "heads": heads} | (
        {"ema": averaged} if averaged is not None else {}
    )
    position = load_state(folder, modules, optimizer, names, about) or Position()
    if ranks.first:
        (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1))
    wrapped: nn.Module = step_module
    if ranks.world > 1:
        # An objective may leave a part of the student without gradient (TinyMIM's last block).
        wrapped = nn.parallel.DistributedDataParallel(
            step_module, device_ids=[device.index or 0] if device.type == "cuda" else None, find_unused_parameters=True
        )
    # Views may differ in how many of their rows are usable.
    total = sum(loader.batches_per_epoch(epoch) for epoch in range(recipe.epochs))
    warmup = round(recipe.warmup_epochs * total / max(1, recipe.epochs))
    precision = autocast_precision(recipe, device)
    weights = recipe.loss_weights()
    resumed_at, started, waited = position.step, time.monotonic(), loader.waited
    before, saved = position.seconds, started

    def save(log: Log) -> None:
        position.seconds = before + time.monotonic() - started
        log.pause(position)
        if ranks.first:
            save_state(folder, position, modules, optimizer, names, about)
            publish(averaged)

    with (
        closing(Log(folder, ranks, recipe.log_every, position, device)) as log,
        Progress("distill", total * recipe.batch_size, "samples", quiet=quiet or not ranks.first) as bar,
    ):
        bar.skip(position.step * recipe.batch_size)
        while position.epoch < recipe.epochs:
            batches = loader.epoch(position.epoch, position.batch)
            for _, pieces in itertools.groupby(batches, key=lambda piece: piece.index):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(position.step, total, warmup, recipe.peak_lr(), recipe.min_lr)
                    if group["decays"]:
                        group["weight_decay"] = weight_decay(
                            position.step, total, recipe.weight_decay, recipe.weight_decay_end
                        )
                parts = one_step(wrapped, student, optimizer, pieces, recipe, weights, precision, device)
                if averaged is not None:
                    update_average(
                        averaged, student, ema_momentum(position.step, total, recipe.ema or 0.0, recipe.ema_end)
                    )
                position.step += 1
                position.batch += 1
                session = time.monotonic() - started
                share = (loader.waited - waited) / max(session, 1e-9)
                line = log.add(position, parts, optimizer.param_groups[0], recipe.batch_size, share)
                bar.advance(
                    recipe.batch_size,
                    f"loss {line:.4f}  waiting for data {100 * share:.0f} %" if line is not None else "",
                )
                if time.monotonic() - saved > 60 * recipe.save_every_minutes:
                    save(log)
                    saved = time.monotonic()
                if stop_asked(ranks, position.step, recipe.log_every):
                    save(log)
                    raise stopping.stop(f"epoch {position.epoch}, step {position.step} saved in {folder}")
            position.epoch, position.batch = position.epoch + 1, 0
            if position.epoch % recipe.save_every_epochs == 0 or position.epoch == recipe.epochs:
                save(log)
                saved = time.monotonic()
    session = max(time.monotonic() - started, 1e-9)
    done = position.step - resumed_at
    return Outcome(
        position.step,
        position.seconds,
        done * recipe.batch_size / session,
        (loader.waited - waited) / session,
        log.mean,
        resumed_at,
    ), averaged


def one_step(
    wrapped: nn.Module,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[Batch],
    recipe: Recipe,
    weights: dict[str, float],
    precision: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """One optimizer step on one (local) batch, in the pieces it comes in; returns the parts of the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        set_drop_paths(student, piece.ids, recipe.seed, piece.epoch)
        share, last = piece.share, piece.piece == piece.pieces - 1
        sync = (
            nullcontext() if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped.no_sync()
        )
        with sync:
            with torch.autocast(device.type, precision) if precision is not None else nullcontext():
                parts = wrapped(piece)
                loss = sum((weights[name] * value for name, value in parts.items()), torch.zeros((), device=device))
            (loss * share).backward()
        for name, value in parts.items() | {("loss", loss)}:
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() * share
    if recipe.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), recipe.clip_grad)
    optimizer.step()
    return sums


def build_optimizer(module: nn.Module, recipe: Recipe) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW with no weight decay on norms and biases (MAE's and TinyMIM's rule); and the parameters' names in its order."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = [(n, p) for n, p in trained if p.ndim > 1]
    others = [(n, p) for n, p in trained if p.ndim <= 1]
    groups = [
        {"params": [p for _, p in decayed], "weight_decay": recipe.weight_decay, "decays": True},
        {"params": [p for _, p in others], "weight_decay": 0.0, "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas), [name for name, _ in decayed + others]


def autocast_precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """bfloat16 where the recipe's ``amp`` asks for it and the device computes in it; None is float32."""
    if recipe.amp == "off":
        return None
    if recipe.amp == "bf16" or choose_precision("auto", device) == "bf16":
        return torch.bfloat16
    return None


@torch.no_grad()
def update_average(averaged: nn.Module, student: nn.Module, momentum: float) -> None:
    """averaged <- momentum * averaged + (1 - momentum) * student, parameter by parameter."""
    for mean, value in zip(averaged.parameters(), student.parameters(), strict=True):
        mean.lerp_(value.detach(), 1 - momentum)


class Log:
    """``metrics.jsonl`` (and TensorBoard where it is installed): one line every ``log_every`` steps, means over all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, every: int, position: Position, device: torch.device) -> None:
        self._every, self._ranks = every, ranks
        self._sums = {name: torch.tensor(value, device=device) for name, value in position.logged.items()}
        self._count = position.counted
        self._since = time.monotonic()
        self.mean: float | None = None
        """Mean loss of the last logged interval."""
        self._board: Any = None
        self._file: Any = None
        if ranks.first:
            path = folder / "metrics.jsonl"
            self.mean = forget_after(path, position.step)
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
            raise HdcacheError(
                f"the loss is {totals['loss']} at step {step}; the last saved state is kept: lower the learning rate "
                "(--set lr=...), set clip_grad, or turn mixed precision off (--set amp=off), in a new --out folder"
            )
        return totals

    def pause(self, position: Position) -> None:
        """Note in ``position`` what the next log line has so far; a loss that is not finite is raised, never saved."""
        position.logged, position.counted = self._totals(position.step), self._count

    def add(
        self, position: Position, parts: dict[str, Tensor], group: dict[str, Any], batch_size: int, wait_share: float
    ) -> float | None:
        """Count a step; at the end of an interval write its means and return the mean loss."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._count += 1
        if position.step % self._every and position.step != 1:
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
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                self._board.add_scalar(f"train/{name}", value, position.step)
        return self.mean

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def forget_after(path: Path, step: int) -> float | None:
    """Drop the lines of steps that a resumed run takes again, and a torn last one; the loss of the last line kept."""
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
    return float(kept[-1]["loss"]) if kept else None


def tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides what was logged after ``step``, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

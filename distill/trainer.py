"""The training loop: schedules, steps, log, saved states. It never mentions an objective by name.

Deliberately not here: evaluation (``measure`` comes from outside), and any choice that a recipe should make.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdcache import stopping
from hdcache.batch import Batch
from hdcache.distill.log import Log
from hdcache.distill.objective import Objective
from hdcache.distill.ranks import Ranks, agree, first_alone
from hdcache.distill.schedules import ema_momentum, learning_rate, weight_decay
from hdcache.distill.settings import Recipe
from hdcache.distill.state import Position, load_state, save_state
from hdcache.distill.student import set_drop_paths
from hdcache.loader import Loader
from hdcache.options import Trained
from hdcache.progress import Progress
from hdcache.schema import Preprocessing
from hdcache.teachers import choose_precision

Monitor = Callable[[nn.Module, Preprocessing, Trained], dict[str, float]]
"""Called with (student, its input, :class:`~hdcache.options.Trained`); returns layer -> accuracy in percent, and leaves the
student and its mode as they were."""


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
    device_memory: int | None
    """Most bytes that tensors of this process held on its GPU at once, teachers in the loop included; None on a CPU."""


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
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    measure_every: int = 1,
) -> tuple[Outcome, nn.Module | None]:
    """Train ``student`` in place for ``recipe.epochs``; returns the outcome and the averaged student, if asked for.

    ``about`` is saved with the state, and a resumed run must bring the same. ``publish`` is called after every saved
    state, with the averaged student, to write a student that can be used. ``measure`` is given the averaged student,
    or the student where there is none, before the first step, after every ``measure_every`` epochs and after the last
    one; what it returns is logged. Only the first process measures. Training is the same with and without it.

    Raises
    ------
    HdcacheError
        when the loss is not finite (the last saved state stays), or a signal asked for a stop (state saved).
    """
    step_module = Step(objective, student, heads, recipe.seed).to(device).train()
    averaged = copy.deepcopy(student).eval().requires_grad_(False) if recipe.ema is not None else None
    # What evaluation prefers: the recipe's own average, else one that the objective keeps among its heads.
    preferred = averaged if averaged is not None else objective.averaged(heads)
    optimizer, names = build_optimizer(step_module, recipe)
    modules: dict[str, nn.Module] = {"student": student, "heads": heads} | (
        {"ema": averaged} if averaged is not None else {}
    )
    position = load_state(folder, modules, optimizer, names, about) or Position()
    if ranks.first:
        (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1))
    wrapped: nn.Module = step_module
    if ranks.world > 1:
        # An objective may leave a part of the student without gradient (TinyMIM's last block), so the search for it stays
        # on. Where it finds nothing, torch warns in every run, from C++ and past Python's filters; so it finds this.
        step_module.register_parameter("unused", nn.Parameter(torch.zeros((), device=device)))
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
            publish(preferred)

    def measured(log: Log, bar: Progress) -> float:
        """Measure if it is due and not in the log; the seconds that it took."""
        last = position.epoch == recipe.epochs
        if measure is None or position.batch or (position.epoch % measure_every and not last):
            return 0.0
        began = time.monotonic()
        with first_alone(ranks):
            if ranks.first and position.step not in log.measured:
                log.note(position, measure(student if preferred is None else preferred))
        seconds = time.monotonic() - began
        log.rest(seconds)
        bar.rest(seconds)
        return seconds

    with (
        closing(Log(folder, ranks, recipe.log_every, position, device)) as log,
        Progress("distill", total * recipe.batch_size, "samples", quiet=quiet or not ranks.first) as bar,
        ExitStack() as running,
    ):
        bar.skip(position.step * recipe.batch_size)
        # Before the first step; in a resumed run, what the one before it was stopped from measuring.
        started += measured(log, bar)
        while position.epoch < recipe.epochs:
            # Left early, by a stop or an error, it must end its threads at once.
            batches = running.enter_context(closing(loader.epoch(position.epoch, position.batch)))
            for _, pieces in itertools.groupby(batches, key=lambda piece: piece.index):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(position.step, total, warmup, recipe.peak_lr(), recipe.min_lr)
                    if group["decays"]:
                        group["weight_decay"] = weight_decay(
                            position.step, total, recipe.weight_decay, recipe.weight_decay_end
                        )
                now = {part: weights[part] * factor for part, factor in objective.factors(position.step, total).items()}
                parts = one_step(wrapped, student, optimizer, pieces, recipe, weights | now, precision, device)
                objective.after_step(student, heads, position.step, total)
                if averaged is not None:
                    update_average(
                        averaged, student, ema_momentum(position.step, total, recipe.ema or 0.0, recipe.ema_end)
                    )
                position.step += 1
                position.batch += 1
                session = time.monotonic() - started
                share = (loader.waited - waited) / max(session, 1e-9)
                ends = position.step == total
                line = log.add(position, parts, optimizer.param_groups[0], recipe.batch_size, share, last=ends)
                bar.advance(
                    recipe.batch_size,
                    f"loss {line:.4f}  waiting for data {100 * share:.0f} %" if line is not None else "",
                )
                due = time.monotonic() - saved > 60 * recipe.save_every_minutes
                stop, due = agree(ranks, position.step, recipe.log_every, save=due)
                if stop or due:
                    save(log)
                    saved = time.monotonic()
                if stop:
                    raise stopping.stop(f"epoch {position.epoch}, step {position.step} saved in {folder}")
            position.epoch, position.batch = position.epoch + 1, 0
            if position.epoch % recipe.save_every_epochs == 0 or position.epoch == recipe.epochs:
                save(log)
                saved = time.monotonic()
            # After the state is safe: measuring may take long, and a scheduler may not wait.
            started += measured(log, bar)
    session = max(time.monotonic() - started, 1e-9)
    done = position.step - resumed_at
    return Outcome(
        position.step,
        position.seconds,
        done * recipe.batch_size / session,
        (loader.waited - waited) / session,
        log.mean,
        resumed_at,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    ), preferred


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

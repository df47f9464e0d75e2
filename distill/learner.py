"""One student in training: its modules, optimizer, schedules, position, log and saved states.

It takes whole batches or, where they do not fit, their pieces one by one; whether others learn from the same ones makes no
difference to it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdcache.batch import Batch
from hdcache.distill.log import Log, LossNotFinite
from hdcache.distill.objective import Objective
from hdcache.distill.ranks import Ranks, first_alone
from hdcache.distill.schedules import ema_momentum, learning_rate, weight_decay
from hdcache.distill.settings import Recipe
from hdcache.distill.state import Position, load_state, save_state
from hdcache.distill.student import set_drop_paths, student_input
from hdcache.options import Trained
from hdcache.schema import Preprocessing
from hdcache.student_files import save_student
from hdcache.taps import num_blocks
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
    """Training seconds over all sessions, those of students beside this one included."""
    samples_per_second: float | None
    """Of this session; None where it had no step to take."""
    wait_share: float | None
    """Share of this session's time that was spent on data, waiting for it or decoding it; None as above."""
    loss: float | None
    """Mean loss of the last logged interval; None where no step was logged."""
    resumed_at: int
    """Step at which this session started."""
    device_memory: int | None
    """Most bytes that tensors of this process held on its GPU at once, other students and teachers in the loop included; None
    on a CPU."""


class Learner:
    """One student in training, from its saved state on where ``folder`` has one.

    Parameters
    ----------
    total
        optimizer steps of the whole run.
    about
        saved with the state; a run that goes on must bring the same.
    stride
        frames from one to the next in the clips that the student is shown; for ``monitor``.
    monitor, monitor_every
        as for :func:`hdcache.distill.run.distill`; given the averaged student where there is one.

    Raises
    ------
    StoreMismatch
        when the saved state is that of other settings or targets.
    """

    def __init__(
        self, recipe: Recipe, student: nn.Module, heads: nn.Module, folder: Path, *,
        total: int, device: torch.device, ranks: Ranks, about: dict[str, Any], stride: int | None = None,
        monitor: Monitor | None = None, monitor_every: int = 1,
    ) -> None:  # fmt: skip
        self.recipe, self.student, self.heads, self.folder = recipe, student, heads, folder
        self.total, self.device, self.about = total, device, about
        self._ranks, self._monitor, self._monitor_every = ranks, monitor, monitor_every
        objective = recipe.objective
        self.trained = Trained(objective.last_trained(num_blocks(student)), objective.pool_trained(), stride)
        step_module = Step(objective, student, heads, recipe.seed).to(device).train()
        averaged = copy.deepcopy(student).eval().requires_grad_(False) if recipe.ema is not None else None
        self._ema = averaged
        self.preferred = averaged if averaged is not None else objective.averaged(heads)
        """What evaluation prefers to the student: the recipe's own average, else one that the objective keeps, or None."""
        self.optimizer, self._names = build_optimizer(step_module, recipe)
        self._modules = {"student": student, "heads": heads} | ({"ema": averaged} if averaged is not None else {})
        self.position = load_state(folder, self._modules, self.optimizer, self._names, about) or Position()
        self.resumed_at, self._saved = self.position.step, self.place
        self._wrapped: nn.Module = step_module
        if ranks.world > 1:
            # An objective may leave a part of the student without gradient (TinyMIM's last block), so the search for it stays
            # on. Where it finds nothing, torch warns in every run, from C++ and past Python's filters; so it finds this.
            step_module.register_parameter("unused", nn.Parameter(torch.zeros((), device=device)))
            devices = [device.index or 0] if device.type == "cuda" else None
            self._wrapped = nn.parallel.DistributedDataParallel(
                step_module, device_ids=devices, find_unused_parameters=True
            )
        self._warmup = round(recipe.warmup_epochs * total / max(1, recipe.epochs))
        self.precision = autocast_precision(recipe, device)
        self._weights = recipe.loss_weights()
        self.failed: LossNotFinite | None = None
        """Why it stopped learning while others went on."""
        self.outcome: Outcome | None = None
        """What it did, from its last step on."""

    @contextmanager
    def at_work(self, waited: float) -> Iterator[None]:
        """Keep the log open and the clock running; ``waited`` is as for :meth:`step`."""
        self._started, self._waited, self._before = time.monotonic(), waited, self.position.seconds
        if self._ranks.first:
            (self.folder / "recipe.json").write_text(self.recipe.model_dump_json(indent=1))
        with closing(Log(self.folder, self._ranks, self.recipe.log_every, self.position, self.device)) as self.log:
            yield

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and number in it of the batch that it learns from next."""
        return self.position.epoch, self.position.batch

    @property
    def learning(self) -> bool:
        """Whether it has steps to take."""
        return self.failed is None and self.position.epoch < self.recipe.epochs

    def step(self, piece: Batch, waited: float) -> bool:
        """Learn from one piece of the next batch, with the last one take an optimizer step; True if that wrote a log line.

        ``waited`` are the seconds that were spent on data since the batches were opened.

        Raises
        ------
        LossNotFinite
            at the end of a logged interval; the last saved state stays.
        """
        recipe, position = self.recipe, self.position
        if piece.piece == 0:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(position.step, self.total, self._warmup, recipe.peak_lr(), recipe.min_lr)
                if group["decays"]:
                    group["weight_decay"] = weight_decay(
                        position.step, self.total, recipe.weight_decay, recipe.weight_decay_end
                    )
            factors = recipe.objective.factors(position.step, self.total)
            self._now = self._weights | {part: self._weights[part] * factor for part, factor in factors.items()}
            self._parts: dict[str, Tensor] = {}
        set_drop_paths(self.student, piece.ids, recipe.seed, piece.epoch)
        add_gradients(self._wrapped, piece, self._now, self.precision, self.device, self._parts)
        if piece.piece < piece.pieces - 1:
            return False
        if recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self._wrapped.parameters(), recipe.clip_grad)
        self.optimizer.step()
        # Of several students, only the one that steps holds gradients.
        self.optimizer.zero_grad(set_to_none=True)
        recipe.objective.after_step(self.student, self.heads, position.step, self.total)
        if self._ema is not None:
            momentum = ema_momentum(position.step, self.total, recipe.ema or 0.0, recipe.ema_end)
            update_average(self._ema, self.student, momentum)
        position.step += 1
        position.batch += 1
        group, ends = self.optimizer.param_groups[0], position.step == self.total
        share = self.wait_share(waited)
        return self.log.add(position, self._parts, group, recipe.batch_size, share, last=ends) is not None

    def wait_share(self, waited: float) -> float:
        """Share of this session that was spent on data; ``waited`` is as for :meth:`step`."""
        return (waited - self._waited) / max(time.monotonic() - self._started, 1e-9)

    def end_epoch(self) -> bool:
        """Go to the next epoch; True if a state is due."""
        self.position.epoch, self.position.batch = self.position.epoch + 1, 0
        return self.position.epoch % self.recipe.save_every_epochs == 0 or not self.learning

    def save(self) -> None:
        """Save a state, and a student that can be used; nothing where it has not moved since the last one.

        Raises
        ------
        LossNotFinite
            and nothing is written.
        """
        if self.place == self._saved:
            return
        self.position.seconds = self._before + time.monotonic() - self._started
        self.log.pause(self.position)
        if self._ranks.first:
            save_state(self.folder, self.position, self._modules, self.optimizer, self._names, self.about)
            self.publish()
        self._saved = self.place

    def publish(self) -> None:
        """Write the student, and its average, so that timm loads them."""
        recipe, last_trained = self.recipe, self.trained.last_trained
        named, given, shape = recipe.student.architecture, recipe.student.arguments, student_input(self.student)
        facts = {
            "recipe": recipe.model_dump(mode="json"),
            "trained_from": self.about,
            "pool_trained": self.trained.pool,
        }
        kept = recipe.objective.classifier(self.heads)
        save_student(self.folder, self.student, named, given, shape, last_trained, facts, kept)
        # A head that was trained beside the student does not fit its average.
        if self.preferred is not None:
            save_student(self.folder / "ema", self.preferred, named, given, shape, last_trained, facts)

    def measure(self) -> float:
        """Measure the student if that is due and not in the log; the seconds that it took."""
        position, last = self.position, self.position.epoch == self.recipe.epochs
        if self._monitor is None or position.batch or (position.epoch % self._monitor_every and not last):
            return 0.0
        began = time.monotonic()
        with first_alone(self._ranks):
            if self._ranks.first and position.step not in self.log.measured:
                model = self.student if self.preferred is None else self.preferred
                self.log.note(position, self._monitor(model, student_input(self.student), self.trained))
        return time.monotonic() - began

    def rest(self, seconds: float, waited: float = 0.0) -> None:
        """Leave ``seconds`` that just passed, ``waited`` of them spent on data, out of what training took."""
        self._started += seconds
        self._waited += waited
        self.log.rest(seconds)

    def finish(self, waited: float) -> None:
        """Note the outcome; ``waited`` is as for :meth:`step`."""
        session, cuda = max(time.monotonic() - self._started, 1e-9), self.device.type == "cuda"
        done = self.position.step - self.resumed_at
        self.outcome = Outcome(
            self.position.step,
            self.position.seconds,
            done * self.recipe.batch_size / session if done else None,
            self.wait_share(waited) if done else None,
            self.log.mean,
            self.resumed_at,
            torch.cuda.max_memory_allocated(self.device) if cuda else None,
        )


def add_gradients(
    module: nn.Module,
    piece: Batch,
    weights: dict[str, float],
    precision: torch.dtype | None,
    device: torch.device,
    sums: dict[str, Tensor],
) -> None:
    """Add the gradient of one piece of a batch, weighed by its share of it, to ``module``, and its loss's parts to ``sums``."""
    last = piece.piece == piece.pieces - 1
    parallel = isinstance(module, nn.parallel.DistributedDataParallel)
    with nullcontext() if last or not parallel else module.no_sync():  # type: ignore[operator]  # nn.Module's attributes are untyped
        with torch.autocast(device.type, precision) if precision is not None else nullcontext():
            parts = module(piece)
            loss = sum((weights[name] * value for name, value in parts.items()), torch.zeros((), device=device))
        (loss * piece.share).backward()
    for name, value in parts.items() | {("loss", loss)}:
        sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() * piece.share


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

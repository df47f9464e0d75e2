"""Learning rate, weight decay and momentum as functions of the step: nothing here holds state.

TinyMIM A7 (main_pretrain.py, util/lr_sched.py): linear warm-up, then half a cosine, set for every iteration.
"""

from __future__ import annotations

import math

from hdcache.errors import UsageError

REFERENCE_BATCH = 256


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """The learning rate for ``global_batch`` images per step, from one given for 256 (linear scaling rule)."""
    return base_lr * global_batch / REFERENCE_BATCH


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` (progress 0) to ``end`` (progress 1); progress is clipped to [0, 1]."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float = 0.0) -> float:
    """The learning rate of optimizer step ``step`` (from 0).

    It rises linearly from 0 at step 0 to ``peak`` at ``warmup_steps``, then falls by half a cosine to ``minimum``
    at ``total_steps``, which is one past the last step.

    Raises
    ------
    UsageError
        unless 0 <= warmup_steps < total_steps.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UsageError(
            f"warm-up of {warmup_steps} steps does not fit into {total_steps} steps; "
            "lower warmup_epochs or raise epochs"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(peak, minimum, (step - warmup_steps) / (total_steps - warmup_steps))


def weight_decay(step: int, total_steps: int, start: float, end: float | None = None) -> float:
    """``start`` throughout, or half a cosine from ``start`` to ``end`` over ``total_steps``."""
    return start if end is None else cosine(start, end, step / max(total_steps, 1))


def ema_momentum(step: int, total_steps: int, start: float, end: float | None = None) -> float:
    """Share of the old average that one update keeps: ``start``, or half a cosine from ``start`` to ``end``."""
    return start if end is None else cosine(start, end, step / max(total_steps, 1))

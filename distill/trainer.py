"""The training loop: batches, each learnt by one student after the other. It never mentions an objective by name.

Deliberately not here: what a step is (:mod:`hdcache.distill.learner`), and evaluation, which comes from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from hdcache import stopping
from hdcache.distill.learner import Learner
from hdcache.distill.log import LossNotFinite
from hdcache.distill.ranks import Ranks, agree
from hdcache.loader import Loader
from hdcache.progress import Progress


def train(
    learners: Sequence[Learner],
    feed: Callable[[Collection[Path]], Loader],
    ended: Callable[[Learner, Loader], None],
    *,
    ranks: Ranks,
    quiet: bool,
) -> None:
    """Train every student to the end of its epochs, on the same batches; each has its ``outcome`` then.

    ``feed`` opens what the students of some folders read, asked again before each epoch; ``ended`` is called for each
    student that has come to its end, at once.

    A batch is read once. All students learn from one piece of it before the next piece is made. One that is further than
    the others, because a run was killed between two saves, waits for them. One whose loss is not finite learns no more, and
    says so in ``failed``; its last saved state stays.

    Raises
    ------
    Interrupted
        when a signal asked for a stop (all states saved).
    """
    loader = feed([learner.folder for learner in _learning(learners) or learners])
    longest, batch_size = max(learner.total for learner in learners), loader.options.batch_size
    with (
        Progress("distill", longest * batch_size, "samples", quiet=quiet or not ranks.first) as bar,
        ExitStack() as work,
    ):
        for learner in learners:
            work.enter_context(learner.at_work(loader.waited))
        # Before the first step; in a resumed run, what the one before it was stopped from measuring.
        _measure(learners, learners, bar)
        _finish(learners, loader, ended)
        bar.skip(0 if _learning(learners) else longest * batch_size)
        saved = time.monotonic()
        while here := _learning(learners):
            loader = feed([learner.folder for learner in here])
            (epoch, start), reached = min((learner.place, learner.position.step) for learner in here)
            bar.skip(reached * batch_size - bar.done)
            # Left early, by a stop or an error, it must end its threads at once.
            batches = work.enter_context(closing(loader.epoch(epoch, start)))
            since = time.monotonic(), loader.waited
            for piece in batches:
                here = [learner for learner in _learning(learners) if learner.place == (epoch, piece.index)]
                if not here:
                    break
                logged = [_attempt(learner, partial(learner.step, piece, loader.waited)) for learner in here]
                if piece.piece < piece.pieces - 1:
                    continue
                reached += 1
                now = time.monotonic(), loader.waited
                for learner in _learning(learners):
                    if learner not in here:
                        learner.rest(now[0] - since[0], now[1] - since[1])
                since = now
                bar.advance(batch_size, _facts(learners, here[0].wait_share(loader.waited)) if any(logged) else "")
                recipes = [learner.recipe for learner in here]
                due = now[0] - saved > 60 * min(recipe.save_every_minutes for recipe in recipes)
                stop, due = agree(ranks, reached, min(recipe.log_every for recipe in recipes), save=due)
                if stop or due:
                    _save(_learning(learners))
                    saved = time.monotonic()
                if stop and _learning(learners):
                    raise stopping.stop(f"epoch {epoch}, step {reached} saved in {_folders(learners)}")
            batches.close()
            through = [one for one in _learning(learners) if one.place == (epoch, loader.batches_per_epoch(epoch))]
            if due_now := [learner for learner in through if learner.end_epoch()]:
                _save(due_now)
                saved = time.monotonic()
            # After the states are safe: measuring may take long, and a scheduler may not wait.
            _measure(through, learners, bar)
            _finish(through, loader, ended)


def _learning(learners: Sequence[Learner]) -> list[Learner]:
    return [learner for learner in learners if learner.learning]


def _attempt(learner: Learner, work: Callable[[], bool | None]) -> bool:
    """Whether ``work`` says so; a loss that is not finite ends this student alone."""
    try:
        return bool(work())
    except LossNotFinite as error:
        learner.failed = error
        return False


def _save(learners: Sequence[Learner]) -> None:
    for learner in learners:
        _attempt(learner, learner.save)


def _measure(due: Sequence[Learner], learners: Sequence[Learner], bar: Progress) -> None:
    """Measure each student of ``due``; the time is no training time of any."""
    for learner in (learner for learner in due if learner.failed is None):
        seconds = learner.measure()
        for one in learners:
            one.rest(seconds)
        bar.rest(seconds)


def _finish(learners: Sequence[Learner], loader: Loader, ended: Callable[[Learner, Loader], None]) -> None:
    for learner in learners:
        if not learner.learning and learner.failed is None:
            learner.finish(loader.waited)
            ended(learner, loader)


def _facts(learners: Sequence[Learner], wait_share: float) -> str:
    """What the bar says beside the rate: the last mean loss of every student, in their order."""
    means = (learner.log.mean for learner in learners)
    losses = " ".join("-" if mean is None else f"{mean:.4f}" for mean in means)
    return f"loss {losses}  for data {100 * wait_share:.0f} %"


def _folders(learners: Sequence[Learner]) -> str:
    if len(learners) == 1:
        return str(learners[0].folder)
    return f"{learners[0].folder.parent} for {', '.join(learner.recipe.name for learner in _learning(learners))}"

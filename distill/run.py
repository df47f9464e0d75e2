"""From a store to students: the story of ``hdcache distill``.

    hdcache distill tinymim-tiny --store train.hdc --out runs/a
    hdcache distill tinymim-tiny hybrid-tiny --store train.hdc --out runs

With ``--online`` the teachers run in the loop through the same code: the baseline for every claim of the cache.
Objectives without a teacher (``supervised``, ``mae``) need no store: ``--data folder:train``.
Several recipes train from the same batches, read once; each student is that of its own run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hdcache import draws
from hdcache.distill.learner import Learner, Monitor
from hdcache.distill.live import choose_teachers, commands_of
from hdcache.distill.log import LossNotFinite
from hdcache.distill.ranks import Ranks, join_ranks, leave_ranks, rank_device
from hdcache.distill.run_batches import Entrant, Feed, Sources, check_alike, identity
from hdcache.distill.run_recipes import Source, named, resolve, resolve_several
from hdcache.distill.run_report import header, report
from hdcache.distill.run_settings import RunSettings, open_data
from hdcache.distill.run_videos import unreadable_videos
from hdcache.distill.run_views import choose_views
from hdcache.distill.settings import Recipe
from hdcache.distill.state import STATE_FILE, saved_facts, saved_position
from hdcache.distill.student import build_student, student_input
from hdcache.distill.trainer import train
from hdcache.durable import durable_write
from hdcache.errors import UsageError
from hdcache.leases import lease
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.resources import available_cores
from hdcache.schema import MaskSpec, ViewSpec
from hdcache.sharing.streaming import open_store
from hdcache.teachers import choose_device


def distill(
    recipe: Source,
    *,
    out: str | Path,
    store: str | Path | None = None,
    data: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    online: bool = False,
    teachers: Sequence[str] = (),
    teacher_mask: str | MaskSpec | None = None,
    teacher_mask_seed: int = 0,
    views: str | ViewSpec | None = None,
    num_views: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    monitor: Monitor | None = None,
    monitor_every: int = 1,
    cache_size: str | int | None = None,
) -> dict[str, Any]:
    """Train a student and write it to ``out``; the same call again goes on where it stopped.

    Parameters
    ----------
    recipe
        name in ``hdcache recipes``, a JSON or YAML file, or a :class:`Recipe`.
    store
        where the teachers' targets are, a folder or a URL (:func:`hdcache.sharing.streaming.open_store`); optional for
        objectives without a teacher, and for ``online``.
    data
        data-set spec, when it is not (or no longer) where the store says, or when there is no store.
    overrides
        dotted recipe fields to change (``{"student.drop_path": 0.1}``).
    online
        run the teachers in the loop instead of reading their targets.
    teachers
        ``NAME=SPEC`` of live teachers; with a store, only for those whose weights have moved.
    teacher_mask, teacher_mask_seed
        which patch tokens live teachers see, without a store; a store's teachers have a mask of their own, or none.
    views, num_views
        without a store: how views are drawn (None: as the objective asks, else by the data set) and how many distinct
        ones, where the objective does not draw fresh ones; with one: how many of its views to use.
    monitor, monitor_every
        called with (student, its input, :class:`~hdcache.options.Trained`) before the first step, after every
        ``monitor_every`` epochs and at the end; what it returns, layer -> percent, is in ``metrics.jsonl``. The k-NN one is ``hdcache.evaluate.monitor.knn_monitor``. Training is the same without it.

    cache_size
        of a store at a URL: bytes that its objects may take on this machine, ``50GB``.

    Returns
    -------
    dict
        what is also in ``out/run.json``: steps, seconds, samples per second, share of time waiting for data, loss.
    """
    settings = RunSettings(
        store=store, data=data, online=online, teachers=teachers, teacher_mask=teacher_mask,
        teacher_mask_seed=teacher_mask_seed, views=views, num_views=num_views, device=device, threads=threads,
        quiet=quiet, monitor=monitor, monitor_every=monitor_every, cache_size=cache_size,
    )  # fmt: skip
    (result,) = _train([resolve(recipe, overrides)], [Path(out).expanduser()], settings)
    return result


def distill_several(
    recipes: Sequence[Source],
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    recipe_overrides: Mapping[int, Mapping[str, Any]] | None = None,
    sweep: Mapping[str, Sequence[Any] | str] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train several students from the same batches, each into the folder ``out/<name of its recipe>``.

    Targets are read and decoded once (teachers in the loop run once) for all students. Each of them is the student that
    :func:`distill` makes of its recipe, to the bit on a CPU, and can be gone on with alone or beside others. So all recipes
    must agree in what decides their batches; what they differ in is refused before the start. The states of all students
    are in memory at once.

    Parameters
    ----------
    recipes, overrides, recipe_overrides, sweep
        as for :func:`~hdcache.distill.run_recipes.resolve_several`.
    settings
        all other parameters of :func:`distill`, shared by all students.

    Returns
    -------
    list of dict
        for each student what :func:`distill` returns, and ``beside``: the recipes of those that learnt from the same
        batches. Seconds and samples per second are those of all together.

    Raises
    ------
    LossNotFinite
        when the loss of some students was; it names them. The others are finished.
    """
    plans, folder = resolve_several(recipes, overrides, recipe_overrides, sweep), Path(out).expanduser()
    if (folder / STATE_FILE).exists():
        raise UsageError(f"{folder} holds a run of one student; give several a folder for all of theirs with --out")
    return _train(plans, [folder / plan.name for plan in plans], RunSettings(**settings))


def _train(plans: Sequence[Recipe], folders: Sequence[Path], settings: RunSettings) -> list[dict[str, Any]]:
    settings.check(folders)
    ranks = join_ranks()
    for plan in plans:
        if plan.batch_size % ranks.world:
            raise UsageError(
                f"batch_size {plan.batch_size} is not a multiple of the {ranks.world} processes that share it"
            )
    sources, entrants = _enter(plans, folders, settings, ranks)
    own = [sources.alone(entrant) for entrant in entrants] if len(entrants) > 1 else []
    check_alike(entrants, own)
    # Nothing is read for students that have nothing to learn any more.
    behind = [entrant for entrant in entrants if saved_position(entrant.folder).epoch < entrant.recipe.epochs]
    feed = Feed(sources, entrants)
    loader = feed([entrant.folder for entrant in behind or entrants])
    own = own or [loader]
    if sources.store is None and sources.dataset.card.kind == "video":
        begun = next((folder for folder in folders if saved_facts(folder)), folders[0])
        threads, quiet = loader.options.threads, settings.quiet
        missing = unreadable_videos(sources.dataset, loader.spec, begun, ranks, threads=threads, quiet=quiet)
        for one in {loader, *own}:
            one.leave_out(missing)
    started = time.time()
    with ExitStack() as locks:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(lease(folder / f".lock-{ranks.rank}"))
        learners = [
            Learner(
                entrant.recipe, entrant.student, entrant.heads, entrant.folder,
                total=sum(batches.batches_per_epoch(epoch) for epoch in range(entrant.recipe.epochs)),
                device=entrant.options.device, ranks=ranks,
                about=identity(entrant, sources, batches, online=settings.online), stride=entrant.views.stride,
                monitor=settings.monitor, monitor_every=settings.monitor_every,
            )
            for entrant, batches in zip(entrants, own, strict=True)
        ]  # fmt: skip
        if ranks.first and not settings.quiet:
            for entrant, batches in zip(entrants, own, strict=True):
                sys.stderr.write(header(entrant.recipe, batches, entrant.folder, entrant.views_name))
        learning = [learner for learner in learners if learner.learning]
        for learner in learning:
            others = [other.recipe.name for other in learning if other is not learner]
            learner.position.beside = [*dict.fromkeys([*learner.position.beside, *others])]
        results: dict[Path, dict[str, Any]] = {}

        def ended(learner: Learner, loader: Loader) -> None:
            results[learner.folder] = _record(learner, loader, started, ranks)

        train(learners, feed, ended, ranks=ranks, quiet=settings.quiet)
    check_finished(learners)
    leave_ranks(ranks)
    return [results[folder] for folder in folders]


def _enter(
    plans: Sequence[Recipe], folders: Sequence[Path], settings: RunSettings, ranks: Ranks
) -> tuple[Sources, list[Entrant]]:
    """What the students read from, and the students with their heads, all untrained."""
    device = rank_device(choose_device(settings.device), ranks)
    store = open_store(settings.store, cache_size=settings.cache_size) if settings.store is not None else None
    dataset = open_data(store, settings.data)
    views = [choose_views(plan, store, dataset, settings.views) for plan in plans]
    cards, wanted, live = choose_teachers(
        plans, store, settings.teachers, device, online=settings.online, mask=settings.teacher_mask,
        mask_seed=settings.teacher_mask_seed,
    )  # fmt: skip
    entrants = []
    for plan, folder, (spec, called), targets in zip(plans, folders, views, wanted, strict=True):
        if settings.num_views is not None and plan.objective.fresh_views() and not targets:
            raise UsageError(
                f"--num-views {settings.num_views}: recipe {plan.name!r} draws new views in every epoch and reads no stored ones; leave it out"
            )
        with named(plan, several=len(plans) > 1), commands_of(store):
            student = build_student(plan.student, plan.seed)
            generator = torch.Generator().manual_seed(draws.integer_seed(plan.seed, "heads"))
            heads = plan.objective.build(student, cards, len(dataset.card.classes), generator)
        options = Options(
            batch_size=plan.batch_size,
            preprocessing=student_input(student),
            seed=plan.order_seed(),
            buffer_rows=plan.buffer_rows,
            augment=plan.augmentations(),
            fresh=plan.objective.fresh_views(),
            # The same steps for any number of processes, and as the released code does.
            drop_last=True,
            pieces=plan.accumulate,
            rank=ranks.rank,
            world=ranks.world,
            threads=available_cores() if settings.threads is None else settings.threads,
            device=device,
        )
        entrants.append(Entrant(plan, folder, student, heads, targets, spec, called, options))
    return Sources(dataset, store, cards, live, settings.num_views), entrants


def _record(learner: Learner, loader: Loader, started: float, ranks: Ranks) -> dict[str, Any]:
    """Write ``run.json`` and the finished student, unless an earlier session has."""
    path = learner.folder / "run.json"
    if learner.position.step == learner.resumed_at and path.is_file():
        before: dict[str, Any] = json.loads(path.read_text())
        return before
    result = report(learner, loader, started)
    if ranks.first:
        learner.publish()
        durable_write(path, json.dumps(result, indent=1).encode())
    return result


def check_finished(learners: Sequence[Learner]) -> None:
    """Raise why students of ``learners`` learnt no more before their end."""
    failed = [(learner.recipe.name, learner.failed) for learner in learners if learner.failed is not None]
    if failed and len(learners) == 1:
        raise failed[0][1]
    if failed:
        rest = "; the others have" if len(failed) < len(learners) else ""
        reasons = "; ".join(f"{name}: {error}" for name, error in failed)
        raise LossNotFinite(f"{len(failed)} of {len(learners)} students have not finished{rest}: {reasons}")

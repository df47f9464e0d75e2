"""From a store to a student: the story of ``hdcache distill``.

    hdcache distill tinymim-tiny --store train.hdc --out runs/a

With ``--online`` the teachers run in the loop through the same code: the baseline for every claim of the cache.
Objectives without a teacher (``supervised``, ``mae``) need no store: ``--data folder:train``.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdcache import draws
from hdcache.datasets import Dataset, open_dataset
from hdcache.distill.changes import merge, nested_changes, validated
from hdcache.distill.live import choose_teachers, commands_of, teacher_fields
from hdcache.distill.ranks import join_ranks, leave_ranks, rank_device
from hdcache.distill.recipes import get_recipe, recipe_from_file
from hdcache.distill.run_videos import unreadable_videos
from hdcache.distill.run_views import choose_views
from hdcache.distill.settings import Recipe
from hdcache.distill.student import build_student, student_input
from hdcache.distill.trainer import Monitor, Outcome, autocast_precision, train
from hdcache.durable import durable_write
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.loader import Loader
from hdcache.options import Options, Trained
from hdcache.progress import counted, duration
from hdcache.resources import available_cores
from hdcache.schema import MaskSpec, ViewSpec
from hdcache.store import Store, write_lock
from hdcache.student_files import save_student
from hdcache.taps import num_blocks
from hdcache.target_sources import open_targets
from hdcache.teachers import Teacher, choose_device


def distill(
    recipe: str | Path | Recipe,
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
) -> dict[str, Any]:
    """Train a student and write it to ``out``; the same call again goes on where it stopped.

    Parameters
    ----------
    recipe
        name in ``hdcache recipes``, a JSON or YAML file, or a :class:`Recipe`.
    store
        where the teachers' targets are; optional for objectives without a teacher, and for ``online``.
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

    Returns
    -------
    dict
        what is also in ``out/run.json``: steps, seconds, samples per second, share of time waiting for data, loss.
    """
    plan = resolve(recipe, overrides)
    if views is not None and store is not None:
        raise UsageError("--views is for runs without a store; with --store its own are used: leave --views out")
    folder = Path(out).expanduser()
    if monitor_every < 1:
        raise UsageError(f"monitor_every {monitor_every} must be at least 1 epoch")
    check_settings(folder, online=online, teachers=teachers, num_views=num_views, threads=threads)
    if (teacher_mask is not None or teacher_mask_seed) and (store is not None or not online):
        raise UsageError(
            "--teacher-mask concerns teachers that run in the loop without a store (--online --teacher NAME=SPEC); "
            "those of a store keep the masks they were extracted with: leave it out"
        )
    ranks = join_ranks()
    if plan.batch_size % ranks.world:
        raise UsageError(f"batch_size {plan.batch_size} is not a multiple of the {ranks.world} processes that share it")
    where = rank_device(choose_device(device), ranks)
    opened = Store.open(store) if store is not None else None
    dataset = open_data(opened, data)
    spec, views_name = choose_views(plan, opened, dataset, views)
    cards, wanted, live = choose_teachers(
        plan, opened, teachers, where, online=online, mask=teacher_mask, mask_seed=teacher_mask_seed
    )
    if num_views is not None and plan.objective.fresh_views() and not wanted:
        raise UsageError(
            f"--num-views {num_views}: recipe {plan.name!r} draws new views in every epoch and reads no stored ones; leave it out"
        )
    student = build_student(plan.student, plan.seed)
    last_trained, pool = plan.objective.last_trained(num_blocks(student)), plan.objective.pool_trained()
    trained = Trained(last_trained, pool, spec.stride)
    generator = torch.Generator().manual_seed(draws.integer_seed(plan.seed, "heads"))
    with commands_of(opened):
        heads = plan.objective.build(student, cards, len(dataset.card.classes), generator)
    stored, running = open_targets(
        opened, wanted, live=live, device=where, dtype=target_dtype(plan, opened, wanted, where),
        fields={name: teacher_fields(plan.objective, cards, name) for name in wanted},
    )  # fmt: skip
    options = Options(
        batch_size=plan.batch_size,
        preprocessing=student_input(student),
        seed=plan.seed,
        buffer_rows=plan.buffer_rows,
        augment=plan.augmentations(),
        fresh=plan.objective.fresh_views(),
        # The same steps for any number of processes, and as the released code does.
        drop_last=True,
        pieces=plan.accumulate,
        rank=ranks.rank,
        world=ranks.world,
        threads=available_cores() if threads is None else threads,
        device=where,
    )
    loader = Loader(
        dataset,
        options,
        views=spec,
        store=opened,
        stored=stored,
        live=running,
        num_views=num_views,
        teachers=list(wanted),
    )
    if opened is None and dataset.card.kind == "video":
        loader.leave_out(unreadable_videos(dataset, spec, folder, ranks, threads=options.threads, quiet=quiet))
    about = identity(plan, dataset, opened, loader, wanted, online, live) | {
        "precision": str(autocast_precision(plan, where))
    }
    folder.mkdir(parents=True, exist_ok=True)
    with write_lock(folder / f".lock-{ranks.rank}"):
        started = time.time()

        def publish(averaged: nn.Module | None) -> None:
            facts = {"recipe": plan.model_dump(mode="json"), "trained_from": about, "pool_trained": pool}
            named, given = plan.student.architecture, plan.student.arguments
            kept = plan.objective.classifier(heads)
            save_student(folder, student, named, given, options.preprocessing, last_trained, facts, kept)
            # A head that was trained beside the student does not fit its average.
            if averaged is not None:
                save_student(folder / "ema", averaged, named, given, options.preprocessing, last_trained, facts)

        if ranks.first and not quiet:
            sys.stderr.write(header(plan, loader, where, folder, views_name))
        outcome, averaged = train(
            plan, plan.objective, student, heads, loader, folder,
            device=where, ranks=ranks, about=about, publish=publish, quiet=quiet,
            measure=monitor and (lambda model: monitor(model, options.preprocessing, trained)), measure_every=monitor_every,
        )  # fmt: skip
        finished = folder / "run.json"
        if outcome.steps == outcome.resumed_at and finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text())
        else:
            result = {"out": str(folder)} | report(
                plan, outcome, dataset, opened, about, loader, where, started, last_trained
            )
            result["preferred"] = str(folder if averaged is None else folder / "ema")
            if ranks.first:
                publish(averaged)
                durable_write(finished, json.dumps(result, indent=1).encode())
    leave_ranks(ranks)
    return result


def header(recipe: Recipe, loader: Loader, device: torch.device, folder: Path, name: str) -> str:
    """What is about to happen, in one line; ``name`` is what its views are called."""
    steps = sum(loader.batches_per_epoch(epoch) for epoch in range(recipe.epochs))
    if fresh := recipe.objective.fresh_views():
        views = f"{fresh} new views ({name}) in each epoch"
    elif not loader.views:
        views = f"a new view ({name}) in each epoch"
    else:
        stored = "" if loader.store is None else "stored "
        views = f"{counted(len(loader.views), f'{stored}views')} ({name})"
    return (
        f"{recipe.name}: {counted(len(loader.ids) - len(loader.left_out), loader.dataset.card.noun)}, {views}, "
        f"{counted(steps, 'steps')} of {recipe.batch_size} in {counted(recipe.epochs, 'epochs')}, "
        f"peak learning rate {recipe.peak_lr():.3g}, {autocast_precision(recipe, device) or torch.float32} on {device}, to {folder}\n"
    )


def resolve(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None) -> Recipe:
    """A recipe from a name, a file or a record, with single fields changed."""
    if isinstance(recipe, Recipe):
        return validated(merge(recipe.model_dump(mode="json"), nested_changes(overrides or {})), "recipe")
    if isinstance(recipe, Path) or str(recipe).endswith((".json", ".yaml", ".yml")):
        return recipe_from_file(Path(recipe), overrides or {})
    return get_recipe(recipe, overrides or {})


def open_data(store: Store | None, data: str | None) -> Dataset:
    """The data set of a store, wherever it is now; or the one that ``data`` names."""
    if store is None:
        if data is None:
            raise UsageError(
                "nothing to train on; give --store STORE, or --data DATA for an objective without a teacher"
            )
        return open_dataset(data)
    spec = data or store.card.dataset.spec
    try:
        dataset = open_dataset(spec, classes=store.card.dataset.classes)
    except InputNotFound as error:
        raise InputNotFound(f"{error}; if the data set has moved, say where with --data") from None
    if dataset.card.fingerprint != store.card.dataset.fingerprint:
        raise StoreMismatch(
            f"{spec} is not the data set that {store.path} was made from ({dataset.card.count} samples, fingerprint "
            f"{dataset.card.fingerprint[:12]}..., expected {store.card.dataset.count}, {store.card.dataset.fingerprint[:12]}...)"
        )
    return dataset


def check_settings(
    folder: Path, *, online: bool, teachers: Sequence[str], num_views: int | None, threads: int | None
) -> None:
    """Refuse what cannot be meant before anything is opened."""
    for setting, value in (("num_views", num_views), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{setting} {value} must be at least 1")
    if teachers and not online:
        raise UsageError("--teacher names teachers to run in the loop; add --online, or drop it to read the store")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give --out a folder")


def identity(
    recipe: Recipe,
    dataset: Dataset,
    store: Store | None,
    loader: Loader,
    wanted: Mapping[str, Sequence[str]],
    online: bool,
    live: Mapping[str, Teacher],
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was stopped."""
    seals = {view: loader.seals(view) for view in loader.views}
    manifests = {
        reader.name: {str(view): seals[view][reader.name].digest() for view in loader.views}
        for reader in loader.readers
    }
    # Without a teacher the recorded views decide the rows: those of a run that reads teachers are in its manifests.
    recorded = {str(view): found[""].digest() for view, found in seals.items() if "" in found}
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"log_every", "save_every_epochs", "save_every_minutes"}),
        "dataset": dataset.card.fingerprint,
        "targets": {name: list(targets) for name, targets in wanted.items()},
        "manifests": manifests,
        "online": online,
        # A store's teachers are told apart by their manifests.
        "teachers": {name: teacher.card.model_dump(mode="json") for name, teacher in live.items() if store is None},
        "views": loader.spec.model_dump(mode="json"),
        "num_views": len(loader.views),
        **({"recorded_views": recorded} if recorded else {}),
        **({"left_out": loader.left_out} if loader.left_out else {}),
    }


def report(
    recipe: Recipe,
    outcome: Outcome,
    dataset: Dataset,
    store: Store | None,
    about: Mapping[str, Any],
    loader: Loader,
    device: torch.device,
    started: float,
    last_trained: str,
) -> dict[str, Any]:
    """The JSON-able record of the run."""
    return {
        "recipe": recipe.name,
        "epochs": recipe.epochs,
        **asdict(outcome),
        "device": str(device),
        "amp": str(autocast_precision(recipe, device)),
        "store": str(store.path) if store else None,
        "data": dataset.card.model_dump(mode="json", exclude={"classes"}),
        "online": about["online"],
        "targets": about["targets"],
        "dropped": loader.dropped,
        "last_trained": last_trained,
        "pool_trained": recipe.objective.pool_trained(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "host": platform.node(),
        "versions": {name: version(name) for name in ("hdcache", "torch", "timm", "zarr", "numpy")},
    }


def format_run(result: Mapping[str, Any]) -> str:
    """The record as a few lines."""
    source = "teachers in the loop" if result["online"] else "targets from the store"
    where = source if result["targets"] else "no teacher"
    noun = "videos" if result["data"]["kind"] == "video" else "images"
    loss = "none" if result["loss"] is None else f"{result['loss']:.4f}"
    return (
        f"{result['recipe']}: {counted(result['steps'], 'steps')} in {duration(result['seconds'])}, {where}; "
        f"{result['samples_per_second']:,.0f} samples/s, {100 * result['wait_share']:.0f} % of the time waiting for data; last loss {loss}\n"
        f"frozen features are best read at {result['last_trained']}, the last layer that training reached\n"
        + (
            f"{counted(len(result['dropped']), noun)} could not be read and took no part (see 'dropped' in run.json)\n"
            if result["dropped"]
            else ""
        )
        # Of two students the one that evaluation prefers; runs of older versions do not say.
        + f"score it: hdcache knn-eval {result.get('preferred', result['out'])} --train DATA --test DATA"
    )


def target_dtype(
    recipe: Recipe, store: Store | None, wanted: Mapping[str, Sequence[str]], device: torch.device
) -> torch.dtype:
    """What stored codes are decoded to: the arithmetic of the training step, float32 where rows are stored so."""
    stored = [tap.encoding for name in wanted for tap in store.teacher(name).taps.values()] if store is not None else []
    return torch.float32 if "fp32" in stored else autocast_precision(recipe, device) or torch.float32

"""What is said and written about a run: the line before it, ``run.json`` and the lines after it."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hdcache.distill.learner import Learner, autocast_precision
from hdcache.distill.settings import Recipe
from hdcache.loader import Loader
from hdcache.progress import counted, duration


def header(recipe: Recipe, loader: Loader, folder: Path, name: str) -> str:
    """What is about to happen, in one line; ``name`` is what its views are called."""
    device = loader.options.device
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


def report(learner: Learner, loader: Loader, started: float) -> dict[str, Any]:
    """The JSON-able record of the run."""
    assert learner.outcome is not None  # noqa: S101  # training has ended
    recipe = learner.recipe
    shared = {"beside": learner.position.beside} if learner.position.beside else {}
    return {
        "out": str(learner.folder),
        "recipe": recipe.name,
        "epochs": recipe.epochs,
        **asdict(learner.outcome),
        "stages": loader.stages,
        **shared,
        "device": str(learner.device),
        "amp": str(autocast_precision(recipe, learner.device)),
        "store": loader.store.files.where if loader.store else None,
        "data": loader.dataset.card.model_dump(mode="json", exclude={"classes"}),
        "online": learner.about["online"],
        "targets": learner.about["targets"],
        "dropped": loader.dropped,
        "last_trained": learner.trained.last_trained,
        "pool_trained": learner.trained.pool,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "host": platform.node(),
        "versions": {name: version(name) for name in ("hdcache", "torch", "timm", "zarr", "numpy")},
        "preferred": str(learner.folder if learner.preferred is None else learner.folder / "ema"),
    }


def format_run(result: Mapping[str, Any]) -> str:
    """The record as a few lines."""
    source = "teachers in the loop" if result["online"] else "targets from the store"
    where = source if result["targets"] else "no teacher"
    noun = "videos" if result["data"]["kind"] == "video" else "images"
    loss = "none" if result["loss"] is None else f"{result['loss']:.4f}"
    beside = f", beside {counted(len(result['beside']), 'others')}" if "beside" in result else ""
    rate = "no step in this session"
    if result["samples_per_second"] is not None:
        rate = f"{result['samples_per_second']:,.0f} samples/s, {100 * result['wait_share']:.0f} % of the time for data"
    return (
        f"{result['recipe']}: {counted(result['steps'], 'steps')} in {duration(result['seconds'])}{beside}, {where}; {rate}; last loss {loss}\n"
        f"frozen features are best read at {result['last_trained']}, the last layer that training reached\n"
        + (
            f"{counted(len(result['dropped']), noun)} could not be read and took no part (see 'dropped' in run.json)\n"
            if result["dropped"]
            else ""
        )
        # Of two students the one that evaluation prefers; runs of older versions do not say.
        + f"score it: hdcache knn-eval {result.get('preferred', result['out'])} --train DATA --test DATA"
    )

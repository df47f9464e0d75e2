"""Sequential distillation: each finished student is the next one's teacher (TinyMIM, section 3.3).

    hdcache chain DATA --store S --out RUNS --teacher mae=vit_large_patch16_224.mae \
        --recipe tinymim-b --recipe tinymim-s --recipe tinymim-t

Each stage extracts exactly the taps that its recipe reads of the stage's teacher, then distills from them. All stages
are tried against each other before the first one starts: the last must not fail on a typing error after a week.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdcache import draws
from hdcache.backbones import Backbone
from hdcache.datasets import open_dataset
from hdcache.distill.live import commands_of, reads_teachers
from hdcache.distill.run import distill
from hdcache.distill.run_recipes import resolve
from hdcache.distill.run_views import check_varied
from hdcache.distill.settings import FREE_FIELDS, Recipe
from hdcache.distill.state import saved_facts
from hdcache.distill.student import build_student, student_input
from hdcache.durable import durable_write
from hdcache.errors import StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.progress import counted, duration, size
from hdcache.records import check_name, differences
from hdcache.schema import ViewSpec
from hdcache.store import Store
from hdcache.tap_requests import request
from hdcache.taps import check_readable, num_blocks, parse_tap
from hdcache.target_sources import LiveTargets
from hdcache.targets import sources
from hdcache.teachers import Teacher, card_of, choose_device, choose_precision, load_teacher, split_name
from hdcache.views import default_views, parse_views

BEYOND = {"amd": "needs a teacher that is run under a mask", "logits": "needs the classifier of its teacher"}


@dataclass(frozen=True)
class Stage:
    """One step of a chain: what is stored of which teacher, and what is trained from it."""

    number: int
    """From 1."""
    recipe: Recipe
    folder: Path
    teacher: str
    """Its name in the store."""
    source: str
    """Model spec; from the second stage on, the folder of the stage before."""
    taps: tuple[str, ...]
    """What of the teacher is stored."""


def distill_chain(
    data: str | None = None,
    *,
    store: str | Path,
    out: str | Path,
    teacher: str,
    recipes: Sequence[str | Path | Recipe],
    overrides: Mapping[str, Any] | None = None,
    stage_overrides: Mapping[int, Mapping[str, Any]] | None = None,
    views: str | ViewSpec | None = None,
    num_views: int = 1,
    view_seed: int = 0,
    encoding: str | None = None,
    fidelity: float | None = None,
    precision: str = "auto",
    device: str = "auto",
    batch: int = 32,
    threads: int | None = None,
    rows_per_shard: int = 256,
    max_failures: int | None = None,
    quiet: bool = True,
    **engine: Any,
) -> dict[str, Any]:
    """Distill one student after the other, each from the one before; the same call again goes on where it stopped.

    Parameters
    ----------
    data
        data-set spec; may be left out when the store exists and the data has not moved.
    out
        folder of the runs: stage 2 with recipe ``tinymim-s`` is ``out/2-tinymim-s``, and that is also the name under
        which the store holds it as the teacher of stage 3 (the student itself, where a recipe averages one too).
    teacher
        ``NAME=SPEC`` or ``SPEC`` of the first stage's teacher.
    recipes
        one per stage. ``objective.teacher`` is set by the chain.
    overrides, stage_overrides
        dotted recipe fields to change in all stages, and in single ones (from 1), which go before.
    views, num_views, view_seed, encoding, fidelity, precision, batch, rows_per_shard, max_failures
        as for extraction; the same for all stages, and so is ``engine``: its engine, workers, scheduler ...

    Returns
    -------
    dict
        what is also in ``out/chain.json``: for each stage its folder, teacher, taps, bytes, steps, seconds and loss.

    Raises
    ------
    UsageError
        before any work, naming the stage whose recipe, student or teacher does not fit.
    """
    for setting, value in (("num_views", num_views), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{setting} {value} must be at least 1")
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(
            f"a chain runs in one process, but there are {world}; run its stages one by one: 'hdcache extract', then "
            "'torchrun -m hdcache distill', with the last run's folder as the next teacher"
        )
    folder, store_path = Path(out).expanduser(), Path(store).expanduser()
    dataset = open_dataset(data).card if data is not None else Store.open(store_path).card.dataset
    precision = choose_precision(precision, choose_device(device))
    own, spec = split_name(teacher)
    first = load_teacher(spec, name=own, precision=precision, batch=batch)
    classes = len(dataset.classes)
    stages = plan_stages(folder, first, spec, recipes, overrides or {}, stage_overrides or {}, classes)
    if (store_path / "zarr.json").is_file():
        drawn = Store.open(store_path).card.views
    else:
        drawn = views if isinstance(views, ViewSpec) else parse_views(views or default_views(dataset), view_seed)
    for stage in stages:
        check_varied(stage.recipe, drawn, "with another --store give --views")
        for tap in stage.taps:
            request(tap, encoding, fidelity)
        if stage.recipe.batch_size > dataset.count:
            raise UsageError(
                f"{_title(stage)}: batch_size {stage.recipe.batch_size} is more than the {dataset.count:,} images; "
                "choose a smaller batch_size"
            )
    check_leftovers(store_path, stages, num_views)
    del first  # extraction loads it again, on the device
    began, done = time.perf_counter(), []
    for stage in stages:
        if not quiet:
            sys.stderr.write(f"{_title(stage)} of {len(stages)}: {stage.teacher} -> {stage.folder}\n")
        summary = extract(
            data, store=store_path, teachers=[f"{stage.teacher}={stage.source}"], taps=stage.taps, views=views,
            num_views=num_views, view_seed=view_seed, encoding=encoding, fidelity=fidelity, precision=precision,
            device=device, batch=batch, threads=threads, rows_per_shard=rows_per_shard, max_failures=max_failures,
            quiet=quiet, **engine,
        )  # fmt: skip
        result = distill(
            stage.recipe, out=stage.folder, store=store_path, data=data, num_views=num_views, device=device,
            threads=threads, quiet=quiet,
        )  # fmt: skip
        facts = summary.teachers[stage.teacher]
        done.append(
            {"stage": stage.number, "recipe": stage.recipe.name, "out": str(stage.folder), "teacher": stage.teacher}
            | {"source": stage.source, "taps": list(stage.taps), "failed": summary.failed}
            | {key: facts[key] for key in ("rows", "rows_written", "bytes")}
            | {"seconds_extract": facts["seconds"], "seconds_distill": result["seconds"]}
            | {key: result[key] for key in ("steps", "samples_per_second", "loss", "last_trained")}
            | {"preferred": result.get("preferred", result["out"])}
        )
    found = {"out": str(folder), "store": str(store_path), "seconds": round(time.perf_counter() - began, 1)}
    durable_write(folder / "chain.json", json.dumps(found | {"stages": done}, indent=1).encode())
    return found | {"stages": done}


def plan_stages(
    out: Path,
    first: Teacher,
    source: str,
    recipes: Sequence[str | Path | Recipe],
    overrides: Mapping[str, Any],
    stage_overrides: Mapping[int, Mapping[str, Any]],
    num_classes: int = 0,
) -> list[Stage]:
    """The stages, each tried on an untrained copy of the network that will be its teacher.

    Raises
    ------
    UsageError
        naming the stage and what of it cannot be meant.
    """
    if not recipes:
        raise UsageError("a chain needs at least one recipe; say --recipe NAME once for each stage, in order")
    beyond = sorted(number for number in stage_overrides if not 1 <= number <= len(recipes))
    if beyond:
        raise UsageError(f"--set-stage {beyond[0]}: the chain has stages 1 to {len(recipes)}")
    stages: list[Stage] = []
    teacher, reach = first, _reach(first.backbone.last_trained)
    for number, recipe in enumerate(recipes, 1):
        title = f"stage {number} ({recipe.name if isinstance(recipe, Recipe) else recipe})"
        try:
            plan = _for_teacher(recipe, {**overrides, **stage_overrides.get(number, {})}, teacher.name)
            student = build_student(plan.student, plan.seed)
            with commands_of(None):  # no command adds a teacher to a chain
                taps = _needed_taps(plan, student, teacher, reach, num_classes)
            name = check_name(f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', plan.name)}", "stage")
            if name == first.name:
                raise UsageError(
                    f"the first teacher has this stage's name {name!r}; give it another: --teacher NAME=MODEL"
                )
            stages.append(Stage(number, plan, out / name, teacher.name, source, taps))
            teacher, reach = _as_teacher(plan, student, teacher, name)
        except UsageError as error:
            raise UsageError(f"{title}: {error}") from None
        source = str(stages[-1].folder)
    return stages


def check_leftovers(store: Path, stages: Sequence[Stage], num_views: int) -> None:
    """Refuse folders and teachers of other chains that a later stage would only find after the stages before it.

    Raises
    ------
    UsageError
        for a file where a run's folder would be.
    StoreMismatch
        for a run of another recipe or number of views, or a stored teacher that this chain has yet to train.
    """
    known = Store.open(store).teachers() if (store / "zarr.json").is_file() else []
    finished = True
    for stage in stages:
        if stage.folder.exists() and not stage.folder.is_dir():
            raise UsageError(f"{_title(stage)}: {stage.folder} is a file; give --out another folder")
        if stage.teacher in known and not finished:
            raise StoreMismatch(
                f"{_title(stage)}: {store} already holds a teacher {stage.teacher!r}, but {stage.source} is not trained "
                "yet, so it is another chain's; give another --store"
            )
        path = stage.folder / "recipe.json"
        if path.is_file():
            asked = stage.recipe.model_dump(mode="json", exclude=FREE_FIELDS)
            before = json.loads(path.read_text(encoding="utf-8"))
            lines = differences(asked, {key: value for key, value in before.items() if key not in FREE_FIELDS})
            if lines:
                changed = "; ".join(line.replace("the store has", "the run there has") for line in lines)
                raise StoreMismatch(
                    f"{_title(stage)}: {stage.folder} holds a run of other settings ({changed}); "
                    "give another --out, or the settings it has"
                )
        seen = saved_facts(stage.folder).get("num_views", num_views)
        if seen != num_views:
            raise StoreMismatch(
                f"{_title(stage)}: {stage.folder} holds a run of {seen} views, asked was --num-views {num_views}; "
                f"give another --out and --store, or --num-views {seen}"
            )
        finished = (stage.folder / "run.json").is_file()


def format_chain(result: Mapping[str, Any]) -> str:
    """One line per stage, and what to do with the last student."""
    rows = [("stage", "teacher", "stored", "bytes", "extracted in", "steps", "trained in", "loss", "student")]
    for stage in result["stages"]:
        loss = "none" if stage["loss"] is None else f"{stage['loss']:.4f}"
        rows.append(
            (
                f"{stage['stage']} {stage['recipe']}", stage["teacher"], ", ".join(stage["taps"]), size(stage["bytes"]),
                duration(stage["seconds_extract"]), f"{stage['steps']:,}", duration(stage["seconds_distill"]), loss,
                stage["out"],
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = sum(len(stage["failed"]) for stage in result["stages"])
    if failed:
        lines.append(f"{counted(failed, 'samples')} failed in extraction (see --json); the same command tries again")
    last = result["stages"][-1]
    lines.append(f"score it: hdcache knn-eval {last['preferred']} --train DATA --test DATA")
    return "\n".join(lines)


def _for_teacher(recipe: str | Path | Recipe, changes: Mapping[str, Any], teacher: str) -> Recipe:
    """The recipe with ``changes``, reading the teacher of that name."""
    plan = resolve(recipe, changes)
    kind, named = plan.objective.kind, getattr(plan.objective, "teacher", None)
    why = BEYOND.get(kind) or ("" if reads_teachers(plan) else "learns from no teacher in this recipe")
    if "teacher" not in type(plan.objective).model_fields:
        why = "has no single teacher to read"
    if why:
        raise UsageError(f"a chain cannot use objective {kind!r}, which {why}; run the stages one by one")
    if named not in (None, teacher):
        raise UsageError(f"objective.teacher is {named!r}, but this stage's teacher is {teacher!r}; set it to null")
    return resolve(recipe, {**changes, "objective.teacher": teacher})


def _needed_taps(
    plan: Recipe, student: nn.Module, teacher: Teacher, reach: tuple[int, int], num_classes: int
) -> tuple[str, ...]:
    """What has to be stored of ``teacher``; builds the stage's loss, so that every misfit with ``student`` is found."""
    cards = {teacher.name: teacher.card}
    targets = plan.objective.wants(cards)[teacher.name]
    taps = tuple(sorted({sources(parse_tap(target, teacher.card.depth))[0] for target in targets}))
    for tap in taps:
        check_readable(teacher.backbone.model, parse_tap(tap))
        if _depth_of(tap) > reach:
            known = [name for name in ("teacher_block", "teacher_blocks", "feature") if hasattr(plan.objective, name)]
            fields = ", ".join(f"objective.{name}" for name in known)
            raise UsageError(
                f"it reads {tap} of teacher {teacher.name!r}, whose training ended at {teacher.backbone.last_trained}; "
                + (
                    f"choose a block or feature that was trained ({fields})"
                    if known
                    else "let the stage before train its whole student, with objective.strategy=feature for instance"
                )
            )
    generator = torch.Generator().manual_seed(draws.integer_seed(plan.seed, "heads"))
    # The loss knows which of its fields do not fit; what it does not look at, such as norms, is refused after it.
    plan.objective.build(student, cards, num_classes, generator)
    LiveTargets(teacher, targets, taps)
    return taps


def _as_teacher(plan: Recipe, student: nn.Module, before: Teacher, name: str) -> tuple[Teacher, tuple[int, int]]:
    """The still untrained ``student`` as the next stage's teacher, and how deep training will have reached."""
    depth = num_blocks(student)
    last = plan.objective.last_trained(depth)
    named, given = plan.student.architecture, dict(plan.student.arguments)
    backbone = Backbone(student, named, given, student_input(student), "untrained", name, "unknown", last)
    reach = max([_reach(last, plus=0), *map(_depth_of, plan.objective.student_taps(depth))])
    return Teacher(name, card_of(backbone, before.card.precision), backbone, before.batch, before.device), reach


def _depth_of(tap: str) -> tuple[int, int]:
    """Where a tap lies: block, then place within it; what follows the last block lies deepest."""
    parsed = parse_tap(tap)
    order = {"attn_in": 1, "qkv": 2, "rel": 2, "attn_out": 3, "mid": 4, "mlp_out": 5, "out": 6}
    return (parsed.block, order[parsed.what]) if parsed.block else (sys.maxsize, 0)


def _reach(last_trained: str, plus: int = 1) -> tuple[int, int]:
    """How deep a network may be read whose training ended at ``last_trained``.

    ``plus`` 1: up to the QKV of the block after it, which relation distillation trains.
    """
    block, place = _depth_of(last_trained)
    return (block + 1, 2) if plus and last_trained.endswith(".out") else (block, place)


def _title(stage: Stage) -> str:
    return f"stage {stage.number} ({stage.recipe.name})"

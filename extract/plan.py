"""What an extraction will cost, told by a small one of the same kind: the story of ``hdcache plan``.

    what the store still lacks x what a trial (:mod:`hdcache.extract.trial`) measured -> bytes, objects, hours, break-even

Nothing is written to the store itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hdcache.datasets import open_dataset
from hdcache.errors import InputNotFound, OutOfSpace, UsageError
from hdcache.extract.budget import budget_share, with_budget
from hdcache.extract.capacity import check_manifest, check_memory, free_at, rows_left, samples_left, scratch_beside
from hdcache.extract.opening import Asked, check_teacher, new_views, pixel_bytes, reopened, shard_size
from hdcache.extract.packing import bytes_per_sample
from hdcache.extract.summary import shares, shares_text
from hdcache.extract.trial import Trial, named, sample_of, try_out
from hdcache.progress import counted, duration, size
from hdcache.resources import available_cores
from hdcache.schema import StoreCard, TapCard, TeacherRecord, ViewSpec
from hdcache.shards import chunk_rows
from hdcache.shrinking import parse_pixels, shrunk
from hdcache.store import Store
from hdcache.teachers import choose_device, split_name


@dataclass
class TeacherPlan:
    """What one teacher will cost."""

    rows: int
    """Rows of all views, less those that the store has."""
    taps: dict[str, dict[str, Any]]
    """Tap -> its encoding, bytes a row, bytes in all, certificate, and ``others``: encoding -> bytes in all."""
    bytes: int
    objects: int
    """Files that the rows will be in."""
    rows_per_second: tuple[float, float]
    """Slowest and fastest that the probe's shards were, at least 10 % apart from their mean."""
    seconds: tuple[float, float]
    """Fastest and slowest, calibration included."""
    shares: dict[str, float]
    """Stage -> share of the probe's time, as seen from the threads that drive the teacher."""
    bottleneck: str
    forward_seconds_per_epoch: float
    """What running this teacher costs an epoch of training (``--online``)."""
    read_seconds_per_epoch: float
    """What reading and decoding its rows costs an epoch, in one thread and with nothing else to do."""
    pays_after: float | None
    """Epochs, over all students, after which storing was cheaper than running the teacher; None: never."""


@dataclass
class Plan:
    """What an extraction will cost."""

    store: str
    samples: int
    num_views: int
    free: int
    """Bytes free where the store will be."""
    pixels: int = 0
    """Bytes of the samples themselves, where they are still to be kept (``--pixels``)."""
    teachers: dict[str, TeacherPlan] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all teachers, and of the samples."""
        return self.pixels + sum(found.bytes for found in self.teachers.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.bytes <= self.free

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes, "fits": self.fits}


def plan(
    data: str | None = None,
    *,
    store: str | Path,
    teachers: Sequence[str],
    taps: Sequence[str] = (),
    views: str | ViewSpec | None = None,
    num_views: int = 1,
    view_seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    rows_per_shard: int = 256,
    quiet: bool = True,
    max_failures: int | None = None,
    budget: str | int | None = None,
    pixels: str | int | None = None,
    **asked: Any,
) -> Plan:
    """Probe ``hdcache extract`` with these arguments (:func:`hdcache.extract.run.extract`) and say what it will cost.

    Raises
    ------
    HdcacheError
        what the extraction itself would refuse: data, teachers, taps or views that do not fit each other.
    """
    if num_views < 1:
        raise UsageError(f"num_views {num_views} must be at least 1")
    share = budget_share(budget, asked.get("fidelity"), len(teachers))
    path, where = Path(store).expanduser(), choose_device(device)
    known = Asked(tuple(taps), **asked)
    cores = available_cores() if threads is None else threads
    there = Store.open(path) if (path / "zarr.json").is_file() else None
    begun = there if there is not None and there.begun else None
    if there is None and data is None:
        raise InputNotFound(
            f"{path}: no store there yet; name the data set too: 'hdcache plan DATA --store {path} ...'"
        )
    if there is not None and (begun is not None or data is None):
        dataset, drawn = reopened(there, data, views, view_seed, pixels), there.card.views
    else:
        dataset = shrunk(open_dataset(data or ""), parse_pixels(pixels))
        drawn = new_views(dataset, there, views, view_seed)
    sample = sample_of(dataset, drawn.seed, known.batch)
    count = dataset.card.count
    found = Plan(str(path), count, num_views, free_at(path))
    if pixels is not None:
        left = samples_left(begun) if begun is not None else count
        found.pixels = round(left * bytes_per_sample(dataset)) if left else 0
    for spec in teachers:
        name = split_name(spec)[0]
        record = begun.teacher(name) if begun is not None and name in begun.teachers() else None
        teacher, requests = known.prepare(spec, drawn, where, path if begun is not None else None)
        requests = known.as_recorded(requests, record)
        if share is not None:
            requests = with_budget(requests, share, count * num_views)
        if begun is not None and record is not None:
            check_teacher(begun, teacher, requests, record)
        rows = rows_left(begun, name, num_views) if begun is not None else count * num_views
        if record is not None and not rows:
            found.teachers[name] = _nothing_left(record)
            continue
        shard = begun.card.rows_per_shard if begun else shard_size(count, rows_per_shard, pixel_bytes(teacher))
        card = begun.card if begun else StoreCard(
            dataset=dataset.card, views=drawn, rows_per_shard=shard, rows_per_chunk=chunk_rows(shard)
        )  # fmt: skip
        # On the disk of the store, which is the one that has to keep up.
        with tempfile.TemporaryDirectory(prefix=".hdcache-plan-", dir=scratch_beside(path)) as folder:
            trial = try_out(sample, Path(folder) / "probe", teacher, requests, drawn, shard, card.rows_per_chunk, cores)
        check_memory(card, name, teacher.card, trial.record.taps.values(), 1)
        check_manifest(card, name, trial.record.taps)
        found.teachers[name] = priced(trial, rows, count, shard, calibrated=record)
    return found


def priced(trial: Trial, rows: int, count: int, shard: int, calibrated: TeacherRecord | None = None) -> TeacherPlan:
    """What ``rows`` rows in shards of ``shard`` cost, and an epoch of ``count`` samples without them.

    The bytes of a row are the trial's, those of ``calibrated`` where the teacher is in the store already.
    """
    cards = (calibrated or trial.record).taps
    slow, fast = trial.rates
    start = 0.0 if calibrated is not None else trial.calibration
    # Beside the taps' arrays the mask's and the digests of pixels.
    arrays = sum(len(card.arrays) for card in cards.values()) + (trial.record.card.mask is not None) + 1
    views = -(-rows // count)
    # A shard's arrays and receipt, the view's geometry and its receipt; and what a view has once.
    objects = -(-rows * -(-count // shard) // count) * (arrays + 4) + views * (arrays + 8)
    taps = {
        tap: _tap(card, rows) | {"others": {name: round(rows * per) for name, per in trial.others.get(tap, {}).items()}}
        for tap, card in cards.items()
    }
    forward, reading = (count * seconds / max(1, trial.rows) for seconds in (trial.timing.forward, trial.reading))
    extraction = start + rows / ((slow + fast) / 2)
    return TeacherPlan(
        rows=rows,
        taps=taps,
        bytes=sum(found["bytes"] for found in taps.values()),
        objects=objects,
        rows_per_second=(round(slow, 1), round(fast, 1)),
        seconds=(round(start + rows / fast, 1), round(start + rows / slow, 1)),
        shares=shares(trial.timing.stages()),
        bottleneck=trial.timing.bottleneck(),
        forward_seconds_per_epoch=round(forward, 1),
        read_seconds_per_epoch=round(reading, 1),
        pays_after=round(extraction / (forward - reading), 1) if forward > reading else None,
    )


def _tap(card: TapCard, rows: int) -> dict[str, Any]:
    return {
        "encoding": card.encoding,
        "fidelity": card.fidelity,
        "bytes_per_row": round(card.bytes_per_row, 1),
        "bytes": round(rows * card.bytes_per_row),
        "certificate": card.certificate.model_dump(mode="json"),
        "others": {},
    }


def _nothing_left(record: TeacherRecord) -> TeacherPlan:
    taps = {tap: _tap(card, 0) for tap, card in record.taps.items()}
    return TeacherPlan(0, taps, 0, 0, (0.0, 0.0), (0.0, 0.0), {}, "nothing left to do", 0.0, 0.0, None)


def format_plan(found: Plan) -> str:
    """The plan as text."""
    lines = [f"{found.store}: {counted(found.samples, 'samples')} x {counted(found.num_views, 'views')}"]
    for name, part in found.teachers.items():
        if not part.rows:
            lines.append(f"  {name}: every row is in the store")
            continue
        for tap, facts in part.taps.items():
            others = ", ".join(f"{other} {size(count)}" for other, count in facts["others"].items())
            lines.append(
                f"  {name} {tap}: {named(facts['encoding'], facts['fidelity'])}, {size(facts['bytes_per_row'])} a row, "
                f"{size(facts['bytes'])}" + (f" ({others})" if others else "")
            )
        slow, fast = part.rows_per_second
        lines.append(
            f"  {name}: {part.rows:,} rows, {size(part.bytes)} in {counted(part.objects, 'objects')}; "
            f"{duration(part.seconds[0])} to {duration(part.seconds[1])} at {slow:,.0f} to {fast:,.0f} rows/s ({shares_text(part.shares)})"
        )
        lines.append(f"  {name}: {_advice(part)}")
    lines += [f"  the samples themselves: {size(found.pixels)}"] * bool(found.pixels)
    room = f"{size(found.free)} are free there"
    lines.append(
        f"{size(found.bytes)} in all; {room}" if found.fits else f"{size(found.bytes)} in all do NOT fit: {room}"
    )
    return "\n".join(lines)


def _advice(part: TeacherPlan) -> str:
    costs = (
        f"the teacher's forward costs {duration(part.forward_seconds_per_epoch)} an epoch, reading its rows "
        f"{duration(part.read_seconds_per_epoch)} in one thread"
    )
    if part.pays_after is None:
        return f"{costs}; the store never pays: train with --online"
    return f"{costs}; the store pays after {part.pays_after:g} epochs, all students together"


def check_room(found: Plan) -> None:
    """:class:`OutOfSpace` where the plan does not fit."""
    if not found.fits:
        raise OutOfSpace(
            f"{found.store}: about {size(found.bytes)} are needed, {size(found.free)} are free; "
            "free space, store fewer taps or views, or ask for a coarser --fidelity"
        )

"""``hdcache verify --live``: the teacher runs again on some stored rows, and its features are compared with what is stored.

Checksums say that bytes are those that were written; this says that they are what they should be: the right rows, decoded right.
What may differ, and by how much: :mod:`hdcache.extract.agreement`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.datasets import Dataset
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.extract.agreement import Sample, chance_to_find, codes_apart, judged, percent
from hdcache.extract.checked_rows import RowPlace, asked_teachers, check_asked, draw_rows, images_of, open_rows
from hdcache.extract.rows import shard_rows
from hdcache.progress import Progress, counted
from hdcache.reader import TeacherReader
from hdcache.resources import available_cores
from hdcache.soft_labels import probabilities
from hdcache.store import ABOUT, Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, batches, choose_device, reload_teacher

LEAST = 8
"""Rows of a sample: the spread of fewer says nothing."""
FAULTY = 0.05
"""Share of faulty rows for which the chance to find one is said."""
PREFIX = " prefix"
"""Behind the name of a tap: its class and register tokens, which are compared by themselves."""


def audit(
    store: Store,
    rows: int,
    *,
    teachers: Sequence[str] = (),
    min_cosine: float | None = None,
    data: Dataset | str | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run teachers again on ``rows`` stored rows of each, drawn from ``seed``, and compare.

    Parameters
    ----------
    teachers
        ``NAME``, or ``NAME=MODEL`` where its weights have moved; by default all.
    min_cosine
        smallest cosine to allow in any tap, in place of what the certificates say of it; other bounds stay.
    data
        the data set, if it has moved and the store does not keep its samples.

    Returns
    -------
    dict
        ``teachers``: name -> ``rows``, ``of`` (rows that it could be), ``finds`` (``faulty`` rows -> ``probability`` that at
        least one of them was among them), ``views``, ``shards``, ``taps`` (per tap ``cosine``: min, p1, median, mean over
        vectors; ``relative_error``: all, and median, p99, max of rows; ``certificate``; ``codes``: shares of those ``equal``,
        ``one_apart``, ``further_apart``; ``moved``: mean and max of rows; ``scale``: ``factor`` of live on stored values, ``least``,
        ``largest``, ``standard_error``; ``shifted_channels``; ``limits``; ``good``). ``faults``: one line each.

    Raises
    ------
    UsageError
        for a sample too small, a cosine, a device or threads that are none.
    InputNotFound
        when images or weights are not where they were.
    StoreMismatch
        when the images, or the network's weights and settings, are not those that the store was made with; fields that differ.
    """
    where = check_audit(store, rows, min_cosine, device)
    opened = check_asked(store, rows, teachers, data, threads)
    asked = asked_teachers(store, teachers)
    dataset = images_of(store, data if isinstance(data, str) else None) if opened is None else opened
    found: dict[str, Any] = {"seed": seed, "teachers": {}, "faults": []}
    for name, spec in asked.items():
        reader = TeacherReader(store, name)
        teacher = live_teacher(reader, spec, where)
        manifests = {view: reader.manifest(view) for view in store.views(name)}
        places = draw_rows(store, manifests, rows, seed, name, "live")
        with (
            ThreadPoolExecutor(threads or available_cores(), "audit") as pool,
            Progress(f"run {name} again", len(places), "rows", quiet=quiet) as bar,
        ):
            samples, faults = _measure(reader, teacher, dataset, places, pool, bar)
        taps: dict[str, Any] = {}
        for kind, sample in samples.items():
            card, prefix = reader.record.taps[kind.removesuffix(PREFIX)], kind.endswith(PREFIX)
            taps[kind], what, few = judged(
                sample,
                card,
                reader.record.card.precision,
                prefix=prefix,
                min_cosine=min_cosine,
                named=partial(_named, reader),
            )
            if what:
                advice = _again(reader) if few else _elsewhere(reader)
                if min_cosine is not None and taps[kind]["cosine"]["min"] < min_cosine and "cosine" in what:
                    advice = f"the birth certificate says {card.certificate.cosine_min:.6g}: allow that, or {_other_name(reader)}"
                faults.append(f"teacher {name}, tap {kind}: {what}; {advice}")
        size = store.card.rows_per_shard
        found["teachers"][name] = {
            "rows": len(places),
            **_share(len(places), sum(store.card.dataset.count - len(each.failed) for each in manifests.values())),
            "views": sorted({place.view for place in places}),
            "shards": len({(place.view, place.row // size) for place in places}),
            "taps": taps,
        }
        found["faults"] += faults
    return found


def check_audit(store: Store, rows: int, min_cosine: float | None, device: str) -> torch.device:
    """The device; :class:`UsageError` for settings of :func:`audit` alone that cannot be meant."""
    if rows < min(LEAST, store.card.dataset.count):
        raise UsageError(
            f"--live {rows}: the spread of fewer than {LEAST} rows says nothing; ask for {LEAST} or more, 256 say"
        )
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise UsageError(f"min_cosine {min_cosine} must lie between -1 and 1")
    return choose_device(device)


def live_teacher(reader: TeacherReader, spec: str | None, device: torch.device) -> Teacher:
    """The network whose rows a store holds; refused where it is another one, with the fields that differ."""
    source = spec or reader.record.source
    if not source:
        raise InputNotFound(
            f"{reader.store.teacher_path(reader.name) / ABOUT}: does not say where the weights of teacher {reader.name} are; "
            f"name them: --teacher {reader.name}=MODEL"
        )
    try:
        return reload_teacher(reader.record, source, device)
    except (InputNotFound, UsageError) as error:
        if spec is not None and isinstance(error, UsageError):
            raise
        raise InputNotFound(
            f"teacher {reader.name}: {error}; if its weights have moved, name them: --teacher {reader.name}=MODEL"
        ) from None


def _measure(
    reader: TeacherReader, teacher: Teacher, dataset: Dataset, places: Sequence[RowPlace], pool: ThreadPoolExecutor,
    bar: Progress,
) -> tuple[dict[str, Sample], list[str]]:  # fmt: skip
    samples: dict[str, Sample] = {}
    faults: list[str] = []
    for view, batch in _batches(places, teacher.batch):
        rows = open_rows(reader.store, dataset, teacher.card.preprocessing, batch, pool)
        if bad := next((row for row in rows if row.pixels is None), None):
            raise StoreMismatch(f"{reader.store.path}: {bad.reason}; name the original data: --data DATA")
        ids = [reader.store.ids[row.sample] for row in rows]
        visible = teacher.visible(ids, view)
        if visible is not None:
            stored = np.concatenate([reader.unpacked(reader.packed_masks(view, n, n + 1)) for _, n in batch])
            if wrong := np.flatnonzero((stored != visible).any(1)).tolist():
                faults.append(
                    f"teacher {reader.name}: the mask of {_named(reader, batch[wrong[0]])} is not the one that is drawn for it; "
                    + _again(reader)
                )
        pixels = torch.from_numpy(np.stack([row.pixels for row in rows if row.pixels is not None]))
        live = teacher.forward(pixels, list(reader.record.taps), visible)
        for tap, exact in live.items():
            for kind, step, (now, copy, again), apart in _compared(reader, tap, exact, batch):
                sample = samples.setdefault(kind, Sample())
                for i, place in enumerate(batch):
                    sample.add(place, now[i], copy[i], again[i], apart[i], step)
        bar.advance(len(batch))
    return samples, faults


def _batches(places: Sequence[RowPlace], size: int) -> Iterator[tuple[int, Sequence[RowPlace]]]:
    """Rows of one view at a time, which masks are drawn for."""
    for view in sorted({place.view for place in places}):
        own = [place for place in places if place.view == view]
        for span in batches(len(own), size):
            yield view, own[span]


def _compared(
    reader: TeacherReader, tap: str, exact: Tokens | Tensor, batch: Sequence[RowPlace]
) -> Iterator[tuple[str, float | None, list[Tensor], NDArray[np.int64]]]:
    """What :meth:`Sample.add` takes, of all rows of a batch: of the tap itself, and of its class tokens.

    The step; live, stored, and live by way of the encoding, float64 [rows, vectors, channels] each; distances of codes [rows, codes].
    """
    encoder, card = reader.encoders[tap], reader.record.taps[tap]
    pieces = [reader.rows(place.view, tap, place.row, place.row + 1) for place in batch]
    stored = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    codes, _ = encoder.encode(exact)
    copy, again = (
        encoder.decode({name: torch.from_numpy(part) for name, part in parts.items()}) for parts in (stored, codes)
    )
    apart = {name: codes_apart(part, codes[name], card, name).reshape(len(batch), -1) for name, part in stored.items()}
    prefix = apart.pop("prefix", None)
    step = float(encoder.constants["step"][0]) if card.encoding == "klt" else None
    vectors = probabilities if card.encoding == "topk" else _double
    values = [[value.patches, value.prefix] if isinstance(value, Tokens) else [value] for value in (exact, copy, again)]
    parts = [[_by_vector(vectors(value)) for value in each] for each in zip(*values, strict=True)]
    yield tap, step, parts[0], np.concatenate([*apart.values()], axis=1)
    if prefix is not None:
        yield tap + PREFIX, None, parts[1], prefix


def _double(value: Tensor) -> Tensor:
    return value.cpu().double()


def _by_vector(value: Tensor) -> Tensor:
    """[rows, ..., channels] as [rows, vectors, channels]."""
    return value.reshape(len(value), -1, value.shape[-1])


def _share(looked: int, rows: int) -> dict[str, Any]:
    faulty = max(1, round(FAULTY * rows))
    return {"of": rows, "finds": {"faulty": faulty, "probability": chance_to_find(looked, rows, faulty)}}


def _named(reader: TeacherReader, place: RowPlace) -> str:
    size = reader.store.card.rows_per_shard
    sample = shard_rows(reader.store, place.view, place.row // size)[place.row % size][0]
    return f"row {place.row} of view {place.view} ({reader.store.ids[sample]})"


def _again(reader: TeacherReader) -> str:
    return "these rows were exchanged or damaged before they were sealed: copy the store again, or " + _other_name(
        reader
    )


def _other_name(reader: TeacherReader) -> str:
    return f"extract the teacher under another name: --teacher {reader.store.free_name(reader.name)}=..."


def _elsewhere(reader: TeacherReader) -> str:
    about = reader.store.teacher_path(reader.name) / ABOUT
    return (
        "this machine or these versions compute or decode otherwise than those that wrote the store: try those "
        f"({reader.store.path / ABOUT}, {about}), or {_other_name(reader)}"
    )


def format_audit(found: Mapping[str, Any]) -> list[str]:
    """A line for each tap, beside its birth certificate; then what is wrong."""
    lines = []
    for name, facts in found["teachers"].items():
        lines.append(
            f"teacher {name} run again on {facts['rows']:,} of {counted(facts['of'], 'rows')}, from {counted(facts['shards'], 'shards')} of "
            f"{counted(len(facts['views']), 'views')}; a fault of {counted(facts['finds']['faulty'], 'rows')} is found with "
            f"{percent(facts['finds']['probability'])} probability:"
        )
        for tap, seen in facts["taps"].items():
            cosine, error, stated = seen["cosine"], seen["relative_error"], seen["certificate"]
            beside = (
                f" (certificate: error {100 * stated['relative_error']:.3g} %, cosine min {stated['cosine_min']:.5f}, mean {stated['cosine_mean']:.5f})"
                if stated is not None
                else ""
            )
            codes, scale = seen["codes"], seen["scale"]
            times = f", values {scale['factor']:.6f} times the stored" if scale is not None else ""
            lines.append(
                f"  {tap}: {seen['encoding']}, {'as it should be' if seen['good'] else 'NOT what the teacher gives'}; "
                f"{percent(codes['equal'])} of codes equal, {percent(codes['one_apart'])} one apart{times}; relative error "
                f"{100 * error['all']:.3g} %, of rows median {100 * error['median']:.3g} %, 99th percentile {100 * error['p99']:.3g} %, largest "
                f"{100 * error['max']:.3g} %; cosine min {cosine['min']:.5f}, 1st percentile {cosine['p1']:.5f}, median {cosine['median']:.5f}, "
                f"mean {cosine['mean']:.5f}{beside}"
            )
    return lines + list(found["faults"])

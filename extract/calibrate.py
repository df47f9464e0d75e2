"""Fit a teacher's encodings on its own features and write the record that every later row follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hdcache.arrays import durable_write, group_metadata, write_constant
from hdcache.datasets import Dataset
from hdcache.encodings import Encoder, fit
from hdcache.errors import InputNotFound, UsageError
from hdcache.extract.engine import decode_row, finite_rows, shard_rows
from hdcache.relations import relation_kl
from hdcache.schema import About, ArrayCard, StoredObject, TapRequest, TeacherRecord
from hdcache.store import ABOUT, Store
from hdcache.taps import Tokens, attention_of, parse_tap, relation_of_qkv
from hdcache.teachers import Teacher

MIN_ROWS, MAX_ROWS, HELDOUT_ROWS, RELATION_ROWS = 128, 512, 64, 16


def calibrate(
    store: Store, dataset: Dataset, teacher: Teacher, requests: Sequence[TapRequest], *, threads: int, source: str
) -> tuple[TeacherRecord, dict[str, Encoder]]:
    """Run the teacher over a few rows of view 0, fit each tap's encoding and measure it on rows held out.

    The rows are the first readable ones in the view's own (random) order, so the result is a function of the
    store, the teacher and the requests alone. Nothing is written.

    Raises
    ------
    InputNotFound
        when no image at all can be read.
    UsageError
        when the teacher's features are not finite.
    """
    taps = [request.tap for request in requests]
    rows = _calibration_rows(store, teacher)
    pixels = _pixels(store, dataset, teacher, rows, threads)
    features = teacher.forward(pixels, taps)
    finite = finite_rows(features)
    if not finite.any():
        raise UsageError(
            f"teacher {teacher.name}: features are not finite in {teacher.card.precision}; "
            + ("use --precision fp32" if teacher.card.precision == "bf16" else "check the checkpoint for NaN or inf")
        )
    count = int(finite.sum())
    held = max(1, min(HELDOUT_ROWS, count // 5)) if count > 1 else 1
    encoders: dict[str, Encoder] = {}
    for request in requests:
        value = _cut(features[request.tap], finite)
        first = slice(0, count - held if count > 1 else 1)
        encoder = fit(request, _cut(value, first), _cut(value, slice(count - held, count)))
        encoders[request.tap] = _with_relation_error(
            encoder, teacher, _cut(value, slice(max(0, count - min(held, RELATION_ROWS)), count))
        )
    arrays, attention = teacher.weights_for(taps)
    record = TeacherRecord(
        name=teacher.name,
        card=teacher.card,
        taps={tap: encoder.card for tap, encoder in encoders.items()},
        requests=tuple(requests),
        dataset=store.card.dataset.fingerprint,
        views=store.card.views,
        weights={name: ArrayCard(shape=value.shape, dtype="float32") for name, value in arrays.items()},
        attention=attention,
        batch=teacher.batch,
        source=source,
        licence=teacher.backbone.licence,
    )
    return record, encoders


def write_record(
    store: Store, teacher: Teacher, record: TeacherRecord, encoders: Mapping[str, Encoder]
) -> TeacherRecord:
    """Write constants, weights and, last, the teacher's record; returns it with its objects listed."""
    folder = store.teacher_path(record.name)
    objects: dict[str, StoredObject] = {}
    for tap, encoder in encoders.items():
        for name, value in encoder.constants.items():
            objects |= write_constant(folder, f"encodings/{tap}/{name}", value)
    for name, value in teacher.weights_for(list(record.taps))[0].items():
        objects |= write_constant(folder, f"weights/{name}", value)
    groups = {key.rsplit("/", n)[0] for key in objects for n in range(2, key.count("/") + 1)} | {"views"}
    for group in sorted(groups):
        objects[f"{group}/zarr.json"] = durable_write(folder / group / "zarr.json", group_metadata({}))
    record = record.model_copy(update={"objects": dict(sorted(objects.items()))})
    durable_write(folder / ABOUT, About(source=record.source).canonical())
    durable_write(folder / "zarr.json", group_metadata(record.model_dump(mode="json") | {"source": ""}))
    return record


def _calibration_rows(store: Store, teacher: Teacher) -> int:
    tokens = max(1, teacher.card.grid[0] * teacher.card.grid[1])
    wanted = -(-40 * teacher.card.width // tokens) + HELDOUT_ROWS
    return min(store.card.dataset.count, MAX_ROWS, max(MIN_ROWS, wanted))


def _pixels(store: Store, dataset: Dataset, teacher: Teacher, wanted: int, threads: int) -> Tensor:
    found: list[Tensor] = []
    reason = ""
    with ThreadPoolExecutor(threads, "calibrate") as pool:
        for shard in range(-(-store.card.dataset.count // store.card.rows_per_shard)):
            rows = shard_rows(store, 0, shard)
            for start in range(0, len(rows), 4 * threads):
                part = rows[start : start + 4 * threads]
                for row in pool.map(
                    lambda entry: decode_row(store, dataset, teacher.card.preprocessing, 0, *entry), part
                ):
                    found += [torch.from_numpy(row.pixels)] if row.pixels is not None else []
                    reason = reason or row.reason
                if len(found) >= wanted:
                    return torch.stack(found[:wanted])
    if not found:
        raise InputNotFound(
            f"{dataset.card.spec}: none of {store.card.dataset.count} images could be read; the first: {reason}"
        )
    return torch.stack(found)


def _cut(value: Tokens | Tensor, rows: Tensor | slice) -> Tokens | Tensor:
    return value[rows] if isinstance(value, Tensor) else Tokens(value.prefix[rows], value.patches[rows])


def _with_relation_error(encoder: Encoder, teacher: Teacher, heldout: Tokens | Tensor) -> Encoder:
    """Add to an ``attn_in`` tap's certificate what its error does to the relations that will be derived from it."""
    tap = parse_tap(encoder.card.tap)
    if tap.what != "attn_in" or not isinstance(heldout, Tokens):
        return encoder
    attention = attention_of(teacher.backbone.model, tap.block)
    parts, _ = encoder.encode(heldout)
    rebuilt = encoder.decode(
        {name: torch.from_numpy(value).to(heldout.patches.device) for name, value in parts.items()}
    )
    assert isinstance(rebuilt, Tokens)  # noqa: S101  # a token tap decodes to tokens
    measured: dict[str, float] = {}
    with torch.inference_mode():
        for kind in ("qk", "vv"):
            exact, copy = (
                relation_of_qkv(attention, attention.qkv(value.sequence()), kind) for value in (heldout, rebuilt)
            )
            measured[f"kl_{kind}"] = max(0.0, float(relation_kl(exact, copy.clamp_min(1e-30).log())))
    certificate = encoder.card.certificate.model_copy(update=measured)
    return Encoder(encoder.card.model_copy(update={"certificate": certificate}), encoder.constants)

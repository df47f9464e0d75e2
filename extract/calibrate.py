"""Fit a teacher's encodings on its own features and write the record that every later row follows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.arrays import constant_objects, group_metadata, write_constant
from hdcache.datasets import Dataset
from hdcache.durable import durable_unlink, durable_write
from hdcache.encodings import Encoder, fit, rounded
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.extract.budget import fit_within_budget
from hdcache.extract.lanes import finite_rows
from hdcache.extract.rows import decode_row, shard_rows
from hdcache.ledgers import RECEIPTS
from hdcache.masks import visible_count
from hdcache.relations import relation_kl
from hdcache.schema import ArrayCard, StoredObject, TapRequest, TeacherCard, TeacherRecord
from hdcache.store import ABOUT, About, Store
from hdcache.taps import Tokens, attention_of, parse_tap, relation_of_qkv
from hdcache.teachers import Teacher, batches

MIN_ROWS, MAX_ROWS, HELDOUT_ROWS, RELATION_ROWS = 128, 512, 64, 16


def calibrate(
    store: Store, dataset: Dataset, teacher: Teacher, requests: Sequence[TapRequest], *, threads: int, source: str,
    settled: TeacherRecord | None = None,
) -> tuple[TeacherRecord, dict[str, Encoder]]:  # fmt: skip
    """Run the teacher over a few rows of view 0, fit each tap's encoding and measure it on rows held out.

    The rows are the first readable ones in the view's own (random) order, so the result is a function of the
    store, the teacher and the requests alone. Nothing is written. What ``settled`` chose, fidelities within a budget and
    where a DCT pays, is not chosen again: the same constants follow whatever an earlier version of this code thought smaller.

    Raises
    ------
    InputNotFound
        when no image at all can be read.
    UsageError
        when the teacher's features are not finite.
    """
    taps = [request.tap for request in requests]
    rows = _calibration_rows(store, teacher)
    pixels, ids = pixels_of(store, dataset, teacher, rows, threads)
    features = features_of(teacher, pixels, taps, teacher.visible(ids, 0))
    finite = finite_rows(features)
    if not finite.any():
        raise UsageError(
            f"teacher {teacher.name}: features are not finite in {teacher.card.precision}; "
            + ("use --precision fp32" if teacher.card.precision == "bf16" else "check the checkpoint for NaN or inf")
        )
    count = int(finite.sum())
    held = max(1, min(HELDOUT_ROWS, count // 5)) if count > 1 else 1
    grid = token_grid(teacher.card)
    values = {tap: _cut(features[tap], finite) for tap in taps}
    first, last = slice(0, count - held if count > 1 else 1), slice(count - held, count)
    known = {tap: (_cut(value, first), _cut(value, last)) for tap, value in values.items()}
    precision = teacher.card.precision
    if settled is not None:
        fitted = {
            request.tap: fit(
                request.model_copy(update={"fidelity": settled.taps[request.tap].fidelity, "row_budget": None}),
                *known[request.tap], settled.taps[request.tap].grid, precision=precision, settled=True,
            )
            for request in requests
        }  # fmt: skip
    elif any(request.row_budget is not None for request in requests):
        fitted = fit_within_budget(requests, known, grid, precision)
    else:
        fitted = {request.tap: fit(request, *known[request.tap], grid, precision=precision) for request in requests}
    few = slice(max(0, count - min(held, RELATION_ROWS)), count)
    with teacher.within_memory():
        encoders = {tap: _with_relation_error(fitted[tap], teacher, _cut(values[tap], few)) for tap in taps}
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


def token_grid(card: TeacherCard) -> tuple[int, ...] | None:
    """How a row's patch tokens lie: temporal slots, rows, columns. None for a masked teacher's: they lie anywhere."""
    return None if card.mask is not None else ((card.slots,) if card.slots > 1 else ()) + card.grid


def write_record(
    store: Store, teacher: Teacher, record: TeacherRecord, encoders: Mapping[str, Encoder]
) -> TeacherRecord:
    """Write constants, weights and, last, the teacher's record; returns it with its objects listed.

    Rows that lie there without a record are forgotten: a copy that was cut short left them, perhaps of another teacher.
    """
    folder = store.teacher_path(record.name)
    if not (folder / "zarr.json").is_file():
        for path in sorted(folder.glob(f"views/*/{RECEIPTS}/*.json")):
            durable_unlink(path)
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


def check_unsealed(store: Store, name: str) -> None:
    """:class:`StoreCorrupt` where a teacher that the store has no record of has sealed rows."""
    if views := store.views(name):
        raise StoreCorrupt(
            f"{store.teacher_path(name)}/zarr.json: missing, though view {views[0]} of teacher {name!r} is sealed; bring it back "
            f"with 'hdcache repair {store.path} --from COPY', or give the teacher another name: --teacher "
            f"{store.free_name(name)}=MODEL"
        )


def damaged_constants(store: Store, record: TeacherRecord) -> list[str]:
    """Files of a teacher's encodings and weights that are missing or are not what its record lists."""
    folder = store.teacher_path(record.name)

    def good(path: Path, listed: StoredObject) -> bool:
        if not path.is_file() or path.stat().st_size != listed.size:
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == listed.sha256

    return [key for key, listed in record.objects.items() if not good(folder / key, listed)]


def repair_constants(
    store: Store, dataset: Dataset, teacher: Teacher, record: TeacherRecord, *, threads: int
) -> list[str]:
    """Write damaged constants again, weights from the teacher and encodings fitted anew; returns their keys.

    Raises
    ------
    StoreMismatch
        when what is made now differs from what the record lists; nothing is written then.
    """
    damaged = damaged_constants(store, record)
    if not damaged:
        return []
    values: dict[str, NDArray[Any]] = {}
    values |= {f"weights/{name}": value for name, value in teacher.weights_for(list(record.taps))[0].items()}
    constants = {f"encodings/{tap}/{name}" for tap, card in record.taps.items() for name in card.constants}
    if any(key.rpartition("/")[0] in constants for key in damaged):
        _, encoders = calibrate(store, dataset, teacher, record.requests, threads=threads, source="", settled=record)
        values |= {
            f"encodings/{tap}/{name}": value
            for tap, encoder in encoders.items()
            for name, value in encoder.constants.items()
        }
    made = {f"{key}/{name}": data for key, value in values.items() for name, data in constant_objects(value).items()}
    for key in damaged:
        data = made.setdefault(key, group_metadata({}))
        if hashlib.sha256(data).hexdigest() != record.objects[key].sha256:
            raise StoreMismatch(
                f"{store.teacher_path(record.name) / key}: missing or damaged, and cannot be made again as it was "
                f"(other {dataset.card.noun}, hardware or versions); copy it from a backup, or extract the teacher under a new name: "
                f"--teacher {store.free_name(record.name)}=..."
            )
    for key in damaged:
        durable_write(store.teacher_path(record.name) / key, made[key])
    return damaged


def _calibration_rows(store: Store, teacher: Teacher) -> int:
    card = teacher.card
    cells = card.grid[0] * card.grid[1]
    tokens = max(1, visible_count(card.mask, cells, card.slots) if card.mask is not None else card.tokens)
    wanted = -(-40 * card.width // tokens) + HELDOUT_ROWS
    return min(store.card.dataset.count, MAX_ROWS, max(MIN_ROWS, wanted))


def pixels_of(store: Store, dataset: Dataset, teacher: Teacher, wanted: int, threads: int) -> tuple[Tensor, list[str]]:
    """Pixels uint8 of the first readable rows of view 0 and their sample ids, at most ``wanted``."""
    found: list[Tensor] = []
    ids: list[str] = []
    reason = ""
    with ThreadPoolExecutor(threads, "calibrate") as pool:
        for shard in range(-(-store.card.dataset.count // store.card.rows_per_shard)):
            rows = shard_rows(store, 0, shard)
            for start in range(0, len(rows), 4 * threads):
                part = rows[start : start + 4 * threads]
                for row in pool.map(
                    lambda entry: decode_row(store, dataset, teacher.card.preprocessing, 0, *entry), part
                ):
                    if row.pixels is not None:
                        found.append(torch.from_numpy(row.pixels))
                        ids.append(store.ids[row.sample])
                    reason = reason or row.reason
                if len(found) >= wanted:
                    return torch.stack(found[:wanted]), ids[:wanted]
    if not found:
        raise InputNotFound(
            f"{dataset.card.spec}: none of {store.card.dataset.count} {dataset.card.noun} could be read; the first: {reason}"
        )
    return torch.stack(found), ids


def features_of(
    teacher: Teacher, pixels: Tensor, taps: Sequence[str], visible: NDArray[Any] | None
) -> dict[str, Tokens | Tensor]:
    """Features on the CPU, moved there batch by batch: all rows of all taps at once may not fit on the device."""
    pieces: list[dict[str, Tokens | Tensor]] = []
    for span in batches(len(pixels), teacher.batch):
        found = teacher.forward(pixels[span], taps, None if visible is None else visible[span])
        pieces.append({tap: _to(value, "cpu") for tap, value in found.items()})
    return {tap: _join([piece[tap] for piece in pieces]) for tap in taps}


def _to(value: Tokens | Tensor, device: torch.device | str) -> Tokens | Tensor:
    return value.to(device) if isinstance(value, Tensor) else Tokens(value.prefix.to(device), value.patches.to(device))


def _join(pieces: Sequence[Tokens | Tensor]) -> Tokens | Tensor:
    tokens = [piece for piece in pieces if isinstance(piece, Tokens)]
    if tokens:
        return Tokens(torch.cat([t.prefix for t in tokens]), torch.cat([t.patches for t in tokens]))
    return torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])


def _cut(value: Tokens | Tensor, rows: Tensor | slice) -> Tokens | Tensor:
    return value[rows] if isinstance(value, Tensor) else Tokens(value.prefix[rows], value.patches[rows])


def _with_relation_error(encoder: Encoder, teacher: Teacher, heldout: Tokens | Tensor) -> Encoder:
    """Add what a tap's error means for relations: those it is, or those that will be derived from an ``attn_in``."""
    tap = parse_tap(encoder.card.tap)
    if tap.what not in ("attn_in", "rel"):
        return encoder
    heldout = _to(heldout, teacher.device)
    parts, _ = encoder.encode(heldout)
    rebuilt = encoder.decode({name: torch.from_numpy(value).to(teacher.device) for name, value in parts.items()})
    measured: dict[str, float] = {}
    if isinstance(heldout, Tensor) and isinstance(rebuilt, Tensor):
        measured["kl"] = _divergence(heldout, rebuilt)
    elif isinstance(heldout, Tokens) and isinstance(rebuilt, Tokens):
        attention = attention_of(teacher.backbone.model, tap.block)
        with torch.inference_mode():
            for kind in ("qk", "vv"):
                exact, copy = (
                    relation_of_qkv(attention, attention.qkv(value.sequence()), kind) for value in (heldout, rebuilt)
                )
                measured[f"kl_{kind}"] = _divergence(exact, copy)
    certificate = encoder.card.certificate.model_copy(update=rounded(measured))
    return Encoder(encoder.card.model_copy(update={"certificate": certificate}), encoder.constants)


def _divergence(exact: Tensor, copy: Tensor) -> float:
    """Mean KL of ``copy`` from ``exact``; a probability that was rounded to nothing counts as 1e-30."""
    return max(0.0, float(relation_kl(exact, copy.clamp_min(1e-30).log())))

"""Stores made by hand, of numbers that are the same with every version of everything: no network, no fit, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdcache.arrays import ShardWriter, group_metadata, write_constant
from hdcache.draws import uniform
from hdcache.durable import durable_write
from hdcache.ledgers import Ledger, teacher_ledger, view_ledger
from hdcache.row_arrays import codec_of
from hdcache.schema import (
    ArrayCard,
    Certificate,
    DatasetCard,
    MaskSpec,
    Preprocessing,
    Receipt,
    StoreCard,
    StoredObject,
    TapCard,
    TapRequest,
    TeacherCard,
    TeacherRecord,
    ViewSpec,
)
from hdcache.shards import Codec
from hdcache.store import Store

ROWS, SHARD, CHUNK = 20, 8, 4
IDS = tuple(sorted(f"a/ünï {row:02d}.png" for row in range(ROWS)))
GRID, PREFIX, WIDTH, HEADS = (3, 3), 1, 6, 2
TOKENS = GRID[0] * GRID[1]
Array = NDArray[Any]


def numbers(dtype: str, *shape: int, key: str) -> Array:
    """Most of them small, as codes are; the same for the same ``key`` everywhere: only products and rounding, no pow."""
    drawn = uniform(math.prod(shape), "small store", key)
    drawn = (drawn * drawn * drawn).reshape(shape)
    if np.dtype(dtype).kind == "f":
        return (drawn * 8 - 2).astype(dtype)
    return (drawn * np.iinfo(dtype).max).astype(dtype)


@dataclass
class MadeTap:
    """A tap, its constants and all of its rows."""

    card: TapCard
    constants: dict[str, Array] = field(default_factory=dict)
    parts: dict[str, Array] = field(default_factory=dict)

    @property
    def request(self) -> TapRequest:
        top_k = self.card.arrays["values"].shape[0] if self.card.encoding == "topk" else None
        return TapRequest(tap=self.card.tap, encoding=self.card.encoding, fidelity=self.card.fidelity, top_k=top_k)


def make_tap(tap: str, encoding: str, view: int = 0, *, tokens: int = TOKENS, **more: Any) -> MadeTap:
    """A tap as :mod:`hdcache.encodings` lays it out, of numbers that mean nothing."""
    rows: dict[str, tuple[tuple[int, ...], str]]
    constants: dict[str, tuple[int, ...]] = {}
    shape = (tokens, WIDTH, PREFIX)
    plain = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "sqrt8": "uint8"}.get(encoding, "float16")
    if encoding == "klt":
        wide = more.pop("wide", 0)
        rows = {"wide": ((wide, tokens), "uint16")} if wide else {}
        rows["codes"] = (WIDTH - wide, tokens), "uint8"
        constants = {"basis": (WIDTH, WIDTH), "mean": (WIDTH,), "step": (1,), "gain": (WIDTH,)}
        more = {"fidelity": 0.1, "dead_zone": 0.1, "block_bytes": 1 << 20, "typesize": 2, **more}
    elif encoding == "int8":
        rows, constants = {"codes": ((WIDTH, tokens), "uint8")}, {"scale": (WIDTH,), "offset": (WIDTH,)}
    elif tap == "pooled":
        rows, shape = {"values": ((WIDTH,), plain)}, (0, WIDTH, 0)
    elif encoding == "topk":
        rows, shape = {"values": ((3,), "float16"), "classes": ((3,), "uint16")}, (0, 1000, 0)
    elif encoding == "sqrt8":
        whole = tokens + PREFIX
        rows, shape = {"values": ((HEADS, whole, whole), plain)}, (0, whole, 0)
    else:
        rows = {"values": ((tokens, WIDTH), plain)}
    if shape[2]:
        rows["prefix"] = (PREFIX, WIDTH), plain
    cards: dict[str, Any] = {name: ArrayCard(shape=row, dtype=dtype) for name, (row, dtype) in rows.items()}  # type: ignore[arg-type]
    fixed = {name: numbers("float32", *size, key=f"{tap} {name}") for name, size in constants.items()}
    card = TapCard(
        tap=tap,
        encoding=encoding,  # type: ignore[arg-type]
        tokens=shape[0],
        channels=shape[1],
        prefix_tokens=shape[2],
        arrays=cards,
        constants={name: ArrayCard(shape=value.shape, dtype="float32") for name, value in fixed.items()},
        certificate=Certificate(
            calibration_rows=ROWS,
            heldout_rows=ROWS,
            relative_rmse=0.1,
            cosine_mean=0.99,
            cosine_min=0.9,
            bits_per_value=4.5,
            saturated=3,
        ),
        **more,
    )
    parts = {name: numbers(dtype, ROWS, *row, key=f"{tap} {name} {view}") for name, (row, dtype) in rows.items()}
    if "classes" in parts:
        parts["classes"] %= shape[1]
    return MadeTap(card, fixed, parts)


def store_card(**dataset: Any) -> StoreCard:
    """Of 20 samples in two classes, in shards of 8 and chunks of 4."""
    known: dict[str, Any] = {"spec": "folder:/data", "kind": "folder", "fingerprint": "f" * 64, "count": ROWS}
    data = DatasetCard(**{**known, "classes": ("a", "b"), **dataset})
    return StoreCard(dataset=data, views=ViewSpec(seed=3), rows_per_shard=SHARD, rows_per_chunk=CHUNK)


def write_record(
    store: Store,
    name: str,
    taps: Sequence[MadeTap],
    mask: MaskSpec | None = None,
    weights: Mapping[str, Array] | None = None,
) -> TeacherRecord:
    """Write a teacher's constants and its record, without rows."""
    folder = store.teacher_path(name)
    objects: dict[str, StoredObject] = {}
    for tap in taps:
        for key, constant in tap.constants.items():
            objects |= write_constant(folder, f"encodings/{tap.card.tap}/{key}", constant)
    for key, weight in (weights or {}).items():
        objects |= write_constant(folder, f"weights/{key}", weight)
    card = TeacherCard(
        architecture="vit_tiny_patch16_224",
        weights="0" * 64,
        preprocessing=Preprocessing(size=48),
        patch_size=16,
        grid=GRID,
        prefix_tokens=PREFIX,
        class_token=True,
        width=WIDTH,
        depth=2,
        heads=HEADS,
        mask=mask,
        precision="fp32",
    )
    record = TeacherRecord(
        name=name,
        card=card,
        taps={tap.card.tap: tap.card for tap in taps},
        requests=tuple(tap.request for tap in taps),
        dataset=store.card.dataset.fingerprint,
        views=store.card.views,
        weights={key: ArrayCard(shape=value.shape, dtype="float32") for key, value in (weights or {}).items()},
        objects=objects,
        batch=4,
        source="random",
        licence="none",
    )
    durable_write(folder / "zarr.json", group_metadata(record.model_dump(mode="json")))
    return record


def write_ledger(
    ledger: Ledger,
    arrays: Mapping[str, tuple[ArrayCard, Codec | None, Array]],
    static: Mapping[str, StoredObject] | None = None,
    **seal: Any,
) -> None:
    """Write all shards of some arrays, their receipts and the seal."""
    listed: dict[str, StoredObject] = dict(static or {})
    listed[f"{ledger.key}/zarr.json"] = durable_write(ledger.folder / "zarr.json", group_metadata({}))
    writers = {}
    for key, (card, codec, _) in arrays.items():
        writers[key] = ShardWriter(ROWS, card, CHUNK, SHARD, codec=codec, attributes={})
        listed[f"{ledger.key}/{key}/zarr.json"] = durable_write(
            ledger.folder / key / "zarr.json", writers[key].metadata
        )
    receipts = []
    for shard in range(-(-ROWS // SHARD)):
        span = (shard * SHARD, min(ROWS, (shard + 1) * SHARD))
        objects = {}
        for key, (_, _, value) in arrays.items():
            name = f"{key}/{writers[key].key(shard)}"
            objects[name] = durable_write(ledger.folder / name, writers[key].encode(shard, value[slice(*span)]))
        receipts.append(Receipt(shard=shard, rows=span, objects=objects))
        ledger.record(receipts[-1])
    ledger.seal(receipts, listed, rows=ROWS, **seal)


def write_sealed(root: Path) -> None:
    """The store that most tests of the store's side start from: teacher ``t`` (klt, fp32 and fp16 taps), view 0 sealed."""
    store = Store.create(root, store_card(), IDS, np.arange(ROWS, dtype=np.int64) % 2)
    taps = [make_tap("block1.attn_in", "klt"), make_tap("final", "fp32"), make_tap("pooled", "fp16")]
    record = write_record(store, "t", taps)
    geometry = np.tile(np.array([0, 0, 0, 4, 4, 0, 4, 4], np.int32), (ROWS, 1))
    geometry[:, 0] = np.arange(ROWS)
    digests = np.arange(ROWS * 32, dtype=np.int64).astype(np.uint8).reshape(ROWS, 32)
    views = {
        "geometry": (ArrayCard(shape=(8,), dtype="int32"), None, geometry),
        "source_digest": (ArrayCard(shape=(32,), dtype="uint8"), Codec(), digests),
    }
    write_ledger(view_ledger(store, 0), views, teacher="", identity="", view=0)
    rows = {
        f"{tap.card.tap}/{name}": (tap.card.arrays[name], codec_of(tap.card, name), part)
        for tap in taps
        for name, part in tap.parts.items()
    }
    static = {f"teachers/t/{key}": value for key, value in record.objects.items()}
    ledger = teacher_ledger(store, "t", 0)
    write_ledger(ledger, rows, static, teacher="t", identity=record.identity_digest(), view=0)

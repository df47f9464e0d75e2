"""Rows of features, and a store that holds them without a teacher or images; for benchmarks/loader.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from loader_peers import Rows

from hdcache.arrays import ShardWriter, group_metadata, write_constant
from hdcache.datasets import open_dataset
from hdcache.durable import durable_write
from hdcache.encodings import Encoder, fit, request
from hdcache.extract.writer import tap_writer
from hdcache.ledgers import Ledger, teacher_ledger, view_ledger
from hdcache.order import epoch_order
from hdcache.runs import RUN_ROWS
from hdcache.schema import ArrayCard, Preprocessing, Receipt, StoreCard, StoredObject, TeacherCard, TeacherRecord
from hdcache.shards import chunk_rows
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.views import parse_views

SHAPE = (257, 384)
SHARD, FITTED = 256, 192
DECAY = 0.8
"""Standard deviation of principal component k is k^-DECAY: at 5 % the bound is 2.3 bits a value; DINOv2's last layer has 2.2."""


def feature_rows(folder: Path, count: int, features: Path | None) -> Rows:
    """float16 [count, tokens, width], as a memory map of a file in ``folder``, made once."""
    path = folder / "rows.npy"
    if not path.exists():
        drawn = _drawn(count) if features is None else _given(features, count)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, drawn)
        partial.rename(path)
    found: Rows = np.load(path, mmap_mode="r")
    if len(found) != count:
        raise SystemExit(f"{path} has {len(found)} rows, not {count}; give --out another folder")
    return found


def _drawn(count: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, SHAPE[1] + 1) ** -DECAY
    turn, _ = torch.linalg.qr(torch.randn(SHAPE[1], SHAPE[1], generator=generator))
    turned = (spread / spread.square().mean().sqrt())[:, None] * turn
    pieces = [(torch.randn(1, *SHAPE, generator=generator) @ turned).half().numpy() for _ in range(count)]
    return np.concatenate(pieces)


def _given(path: Path, count: int) -> Rows:
    found = np.load(path) if path.suffix == ".npy" else torch.load(path, weights_only=True).numpy()
    whole = np.concatenate(
        [found.mean(axis=1, keepdims=True, dtype=np.float32).astype(np.float16), found.astype(np.float16)], axis=1
    )
    return whole[np.arange(count) % len(whole)]


def build_store(folder: Path, rows: Rows, fidelity: float | None) -> Path:
    """``folder``/ours/store.hdc with one klt tap ``final`` of teacher ``t``, sealed, and its data set of blank images; made once."""
    root = folder / "ours"
    if (root / "store.hdc/teachers/t/views/0/manifest.json").exists():
        return root
    root.mkdir(exist_ok=True)
    np.savez(root / "data.npz", images=np.zeros((len(rows), 8, 8, 3), np.uint8), labels=np.zeros(len(rows), np.int64))
    data = open_dataset(str(root / "data.npz"))
    views = parse_views("center")
    store = Store.create(
        root / "store.hdc",
        StoreCard(dataset=data.card, views=views, rows_per_shard=SHARD, rows_per_chunk=chunk_rows(SHARD)),
        data.ids,
        data.labels,
    )
    side = round((rows.shape[1] - 1) ** 0.5)
    grid = (side, side) if side**2 == rows.shape[1] - 1 else None
    asked = request("final", "klt", fidelity)
    fitted = min(FITTED, 3 * len(rows) // 4)
    encoder = fit(asked, _tokens(rows[:fitted]), _tokens(rows[fitted : fitted + 64]), grid)
    place = store.teacher_path("t")
    constants: dict[str, StoredObject] = {}
    for name, value in encoder.constants.items():
        constants |= write_constant(place, f"encodings/final/{name}", value)
    card = TeacherCard(
        architecture="none", weights="0" * 64, preprocessing=Preprocessing(size=224), patch_size=14, grid=(side, side),
        prefix_tokens=1, class_token=True, width=rows.shape[2], depth=12, heads=6, precision="fp32",
    )  # fmt: skip
    record = TeacherRecord(
        name="t", card=card, taps={"final": encoder.card}, requests=(asked,), dataset=data.card.fingerprint, views=views,
        objects=constants, batch=1, source="none", licence="none",
    )  # fmt: skip
    durable_write(place / "zarr.json", group_metadata(record.model_dump(mode="json")))
    geometry = np.tile(np.array([0, 0, 0, 8, 8, 0, 8, 8], np.int32), (len(rows), 1))
    geometry[:, 0] = np.arange(len(rows))
    _write(view_ledger(store, 0), {"geometry": geometry, "source_digest": np.zeros((len(rows), 32), np.uint8)}, None)
    _write(teacher_ledger(store, "t", 0), {}, (encoder, rows), record, constants)
    return root


def _tokens(rows: Rows) -> Tokens:
    value = torch.from_numpy(np.array(rows)).float()
    return Tokens(value[:, :1], value[:, 1:])


def _write(
    ledger: Ledger, whole: dict[str, np.ndarray], coded: tuple[Encoder, Rows] | None,
    record: TeacherRecord | None = None, constants: dict[str, StoredObject] | None = None,
) -> None:  # fmt: skip
    """All shards of a ledger, and its seal: arrays as they are, or the codes of rows."""
    if coded is None:
        count = len(next(iter(whole.values())))
        cards = {
            key: ArrayCard.model_validate({"shape": value.shape[1:], "dtype": str(value.dtype)})
            for key, value in whole.items()
        }
        writers = {
            key: ShardWriter(count, card, SHARD, SHARD, codec=None, attributes={}) for key, card in cards.items()
        }
    else:
        tap, count = coded[0].card, len(coded[1])
        writers = {f"final/{name}": tap_writer(tap, name, count, chunk_rows(SHARD), SHARD) for name in tap.arrays}
    static = {f"{ledger.key}/zarr.json": durable_write(ledger.folder / "zarr.json", group_metadata({}))}
    for key, writer in writers.items():
        static[f"{ledger.key}/{key}/zarr.json"] = durable_write(ledger.folder / key / "zarr.json", writer.metadata)
    receipts = []
    for shard in range(-(-count // SHARD)):
        span = (shard * SHARD, min(count, (shard + 1) * SHARD))
        blocks = {key: value[slice(*span)] for key, value in whole.items()}
        if coded is not None:
            blocks = {
                f"final/{name}": part for name, part in coded[0].encode(_tokens(coded[1][slice(*span)]))[0].items()
            }
        objects = {}
        for key, value in blocks.items():
            name = f"{key}/{writers[key].key(shard)}"
            objects[name] = durable_write(ledger.folder / name, writers[key].encode(shard, value))
        receipts.append(Receipt(shard=shard, rows=span, objects=objects))
        ledger.record(receipts[-1])
    static |= {f"teachers/t/{key}": value for key, value in (constants or {}).items()}
    teacher, identity = ("", "") if record is None else (record.name, record.identity_digest())
    ledger.seal(receipts, static, teacher=teacher, identity=identity, view=0, rows=count)


def batch_mates(count: int, batch: int, buffer: int) -> dict[str, float]:
    """Share of the other rows of a row's batch that were stored in its run: of our order, and of a full shuffle."""
    order = epoch_order(np.arange(count), batch, run_rows=RUN_ROWS, buffer_rows=buffer, seed=0, epoch=0)
    pairs = sum(
        n * (n - 1)
        for start in range(0, count, batch)
        for n in Counter((order[start : start + batch] // RUN_ROWS).tolist()).values()
    )
    return {"ours": pairs / (count * (batch - 1)), "full": (RUN_ROWS - 1) / (count - 1)}

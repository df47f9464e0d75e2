"""A small sealed store, made once without any network, and copied for each test that wants to damage it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from hdcache.arrays import ShardWriter, group_metadata, write_constant
from hdcache.durable import durable_write
from hdcache.encodings import compresses, fit, request
from hdcache.integrity import Ledger, teacher_ledger, view_ledger
from hdcache.schema import (
    ArrayCard,
    DatasetCard,
    Preprocessing,
    Receipt,
    StoreCard,
    StoredObject,
    TeacherCard,
    TeacherRecord,
    ViewSpec,
)
from hdcache.shards import Codec
from hdcache.store import Store
from hdcache.taps import Tokens

if TYPE_CHECKING:
    from hdcache.distill.settings import Recipe

# No test asserts how long something takes: on a busy machine that fails what is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROWS, SHARD, CHUNK = 20, 8, 4
IDS = tuple(sorted(f"a/ünï {row:02d}.png" for row in range(ROWS)))


def _write(ledger: Ledger, arrays: dict[str, tuple[ArrayCard, np.ndarray]], **seal: object) -> None:
    static: dict[str, StoredObject] = {
        f"{ledger.key}/zarr.json": durable_write(ledger.folder / "zarr.json", group_metadata({}))
    }
    writers = {}
    for key, (card, _) in arrays.items():
        codec = Codec() if compresses(card.dtype, key.rsplit("/", 1)[-1]) else None
        writers[key] = ShardWriter(ROWS, card, CHUNK, SHARD, codec=codec, attributes={})
        static[f"{ledger.key}/{key}/zarr.json"] = durable_write(
            ledger.folder / key / "zarr.json", writers[key].metadata
        )
    receipts = []
    for shard in range(-(-ROWS // SHARD)):
        span = (shard * SHARD, min(ROWS, (shard + 1) * SHARD))
        objects = {}
        for key, (_, value) in arrays.items():
            name = f"{key}/{writers[key].key(shard)}"
            objects[name] = durable_write(ledger.folder / name, writers[key].encode(shard, value[slice(*span)]))
        receipts.append(Receipt(shard=shard, rows=span, objects=objects))
        ledger.record(receipts[-1])
    ledger.seal(receipts, {**static, **seal.pop("static", {})}, rows=ROWS, **seal)  # type: ignore[arg-type,dict-item]


def _build(root: Path) -> None:
    dataset = DatasetCard(spec="folder:/data", kind="folder", fingerprint="f" * 64, count=ROWS, classes=("a", "b"))
    card = StoreCard(dataset=dataset, views=ViewSpec(seed=3), rows_per_shard=SHARD, rows_per_chunk=CHUNK)
    store = Store.create(root, card, IDS, np.arange(ROWS, dtype=np.int64) % 2)
    noise = torch.Generator().manual_seed(0)
    tokens = Tokens(torch.randn(ROWS, 1, 6, generator=noise), torch.randn(ROWS, 9, 6, generator=noise))
    values = {"block1.attn_in": tokens, "final": tokens, "pooled": tokens.patches.mean(1)}
    encodings = {"block1.attn_in": "klt", "final": "fp32", "pooled": "fp16"}
    encoders = {tap: fit(request(tap, encodings[tap], None), value, value) for tap, value in values.items()}
    folder = store.teacher_path("t")
    objects: dict[str, StoredObject] = {}
    for tap, encoder in encoders.items():
        for name, constant in encoder.constants.items():
            objects |= write_constant(folder, f"encodings/{tap}/{name}", constant)
    teacher = TeacherCard(
        architecture="vit_tiny_patch16_224",
        weights="0" * 64,
        preprocessing=Preprocessing(size=48),
        patch_size=16,
        grid=(3, 3),
        prefix_tokens=1,
        class_token=True,
        width=6,
        depth=2,
        heads=2,
        precision="fp32",
    )
    record = TeacherRecord(
        name="t",
        card=teacher,
        taps={tap: encoder.card for tap, encoder in encoders.items()},
        requests=tuple(request(tap, encodings[tap], None) for tap in values),
        dataset=dataset.fingerprint,
        views=card.views,
        objects=objects,
        batch=4,
        source="random",
        licence="none",
    )
    durable_write(folder / "zarr.json", group_metadata(record.model_dump(mode="json")))
    geometry = np.tile(np.array([0, 0, 0, 4, 4, 0, 4, 4], np.int32), (ROWS, 1))
    geometry[:, 0] = np.arange(ROWS)
    digests = np.arange(ROWS * 32, dtype=np.int64).astype(np.uint8).reshape(ROWS, 32)
    views = {
        "geometry": (ArrayCard(shape=(8,), dtype="int32"), geometry),
        "source_digest": (ArrayCard(shape=(32,), dtype="uint8"), digests),
    }
    _write(view_ledger(store, 0), views, teacher="", identity="", view=0)
    arrays = {}
    for tap, value in values.items():
        parts, _ = encoders[tap].encode(value)
        arrays |= {f"{tap}/{name}": (encoders[tap].card.arrays[name], part) for name, part in parts.items()}
    static = {f"teachers/t/{key}": value for key, value in objects.items()}
    identity = record.identity_digest()
    _write(teacher_ledger(store, "t", 0), arrays, teacher="t", identity=identity, view=0, static=static)


@pytest.fixture(scope="session")
def _sealed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sealed") / "store"
    _build(root)
    return root


@pytest.fixture
def sealed_store(_sealed_store: Path, tmp_path: Path) -> Path:
    """A copy of a store of 20 samples in shards of 8 with teacher ``t`` (klt, fp32 and fp16 taps), view 0 sealed."""
    return shutil.copytree(_sealed_store, tmp_path / "store")


# What the tests of extraction and training share: small data sets, a small teacher and a store that holds it.

TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3"


def paint(count: int, seed: int = 0, side: int = 40) -> np.ndarray:
    """Smooth random pictures: uint8 [count, side, side + 4, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3))
    grid = np.ix_(np.arange(count), np.arange(side) * 4 // side, np.arange(side + 4) * 4 // (side + 4))
    return noise[grid].astype(np.uint8)


@pytest.fixture(scope="session")
def tiny() -> str:
    """The spec of an untrained teacher: 32 pixels, 16 patch tokens and a class token, 3 blocks of width 48."""
    return TINY


@pytest.fixture(scope="session")
def make_npz() -> Callable[..., str]:
    """Writes a labelled .npz of pictures and returns its spec."""

    def make(path: Path, count: int = 40, seed: int = 0, classes: int = 3) -> str:
        np.savez(path, images=paint(count, seed), labels=np.arange(count) % classes)
        return f"npz:{path}"

    return make


@pytest.fixture
def make_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes an image folder of PNGs in two classes, ``a/00.png`` ..., with a listing cache of its own."""
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))

    def make(root: Path, count: int = 20, seed: int = 0) -> Path:
        for number, picture in enumerate(paint(count, seed)):
            path = root / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        return root

    return make


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Reads every file below a folder but locks: relative path -> bytes."""

    def read(root: Path) -> dict[str, bytes]:
        files = [
            path
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix not in (".lock", ".owner", ".lease")
        ]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.Popen[str]]:
    """Starts a Python process on some code; arguments arrive as ``sys.argv[1:]``."""

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        env = {**os.environ, **environment}
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)

    return start


@pytest.fixture(scope="session")
def together(python: Callable[..., subprocess.Popen[str]]) -> Callable[..., list[str]]:
    """Runs code in several processes as torchrun would; each one's output, once all have ended with ``code``."""

    def run(source: str, *arguments: object, world: int = 2, code: int = 0) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        ranks = [python(source, *arguments, RANK=str(n), LOCAL_RANK=str(n), **shared) for n in range(world)]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [code] * world, outputs
        return outputs

    return run


@pytest.fixture
def signals() -> Iterator[None]:
    """hdcache's signal handlers, for one test."""
    from hdcache import stopping

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    stopping.install()
    yield
    stopping._received.clear()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> Path:
    """A store that no test may change: 64 pictures, 2 views, teacher ``t`` with every target of TinyMIM in fp32."""
    from hdcache.extract.run import extract

    root = tmp_path_factory.mktemp("tiny")
    data = make_npz(root / "data.npz", 64)
    taps = ["block3.attn_in", "final", "block3.out"]
    settings = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 16}
    extract(data, store=root / "store", teachers=[f"t={TINY}"], taps=taps, num_views=2, threads=2, **settings)
    return root / "store"


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """TinyMIM's relations for ``tiny_store``, 2 epochs of 4 steps, with jitter and drop path; fields may be changed."""
    from hdcache.distill.recipes import get_recipe

    student = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    fixed = {"student.arguments": student, "student.drop_path": 0.2, "epochs": 2, "batch_size": 16, "warmup_epochs": 1}

    def make(name: str = "tinymim-tiny", **changes: object) -> Recipe:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return get_recipe(name, {**fixed, "log_every": 1, **dotted})

    return make


@st.composite
def _mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with one JSON value replaced or dropped, or with a byte changed."""
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(whole) - 1))
        return whole[:place] + bytes([draw(st.integers(0, 255))]) + whole[place + 1 :]
    value: Any = {"": json.loads(whole)}
    inside, key = value, ""
    while isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 4)):
        inside = inside[key]
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
    if key == "" or draw(st.booleans()):
        other = [None, True, -1, 0, 1, 2, 10**13, 1.5, "", "x", "\ud800", "../x", [], {}, [[]], {"a": 1}, float("nan")]
        inside[key] = draw(st.sampled_from(other))
    else:
        del inside[key]
    return json.dumps(value[""]).encode()


@pytest.fixture(scope="session")
def mutations() -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """A strategy for what a JSON record may have become: one value replaced or dropped, or one byte changed."""
    return _mutations

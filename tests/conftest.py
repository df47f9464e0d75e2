"""A small sealed store, made once and copied for each test that wants to damage it; small data sets and teachers.

What needs torch imports it when it is asked for: the store's tests run without it too (``make lanes``).
"""

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
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from small_store import write_sealed

if TYPE_CHECKING:
    from hdcache.distill.settings import Recipe

# No test asserts how long something takes: on a busy machine that fails what is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def _sealed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sealed") / "store"
    write_sealed(root)
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
    """Reads every file below a folder but locks and what lists them: relative path -> bytes."""

    def read(root: Path) -> dict[str, bytes]:
        files = [
            path
            for path in sorted(root.rglob("*"))
            if path.is_file()
            and not path.name.endswith((".lock", ".owner", ".lease"))
            # Derived: they change with every seal, and tests of their own hold them to what is sealed.
            and path.name not in ("index.json", "croissant.json")
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
    pytest.importorskip("torch", reason="extraction needs torch")
    from hdcache.extract.run import extract

    root = tmp_path_factory.mktemp("tiny")
    data = make_npz(root / "data.npz", 64)
    taps = ["block3.attn_in", "final", "block3.out"]
    settings = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 16}
    extract(data, store=root / "store", teachers=[f"t={TINY}"], taps=taps, num_views=2, threads=2, **settings)
    return root / "store"


@pytest.fixture(scope="session")
def kept_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that no test may change: 20 pictures and a broken one, kept inside, their folder gone.

    Teacher ``all`` has every kind of tap, ``half`` sees half of the 16 patch tokens. The classes are called ``<b>a<`` and ``b``.
    """
    from hdcache.extract.run import extract

    root = tmp_path_factory.mktemp("kept")
    for number, picture in enumerate(paint(20)):
        path = root / "data" / ("<b>a<", "b")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (root / "data" / "b" / "broken.png").write_bytes(b"no image")
    settings = {"precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 8, "threads": 2, "quiet": True}
    for name, spec, taps, mask in (
        ("all", f"{TINY}&num_classes=5", ["block3.attn_in", "final", "block3.rel.vv", "logits", "pooled"], None),
        ("half", TINY, ["block3.attn_in", "final"], "random:0.5"),
    ):
        extract(
            str(root / "data"), store=root / "store", teachers=[f"{name}={spec}"], taps=taps, teacher_mask=mask,
            pixels="source", **settings,
        )  # fmt: skip
    shutil.rmtree(root / "data")
    return root / "store"


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """TinyMIM's relations for ``tiny_store``, 2 epochs of 4 steps, with jitter and drop path; fields may be changed."""
    pytest.importorskip("torch", reason="training needs torch")
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

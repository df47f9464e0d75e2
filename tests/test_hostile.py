"""Stores that mean harm: each is refused by an error of ours, at once and in little memory, by a process that uses all of it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr

import lane_store
from hdcache.arrays import ArrayReader, ShardWriter
from hdcache.durable import durable_write, stored_object
from hdcache.errors import HdcacheError, StoreCorrupt
from hdcache.leases import Owner, lease
from hdcache.records import canonical_json
from hdcache.schema import ArrayCard
from hdcache.store import Store

SECONDS, MEGABYTES = 2.0, 200.0
ROWS = "teachers/plain/views/0"
FINAL = f"{ROWS}/final/values"
SHARD = f"{FINAL}/c.1.0.0"
CODES = f"{ROWS}/block1.attn_in/codes"
CONSTANT = "teachers/plain/encodings/block1.attn_in/basis"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by what Linux says of a process")


def some(values: Iterable[Any], count: int = 1) -> list[Any]:
    """All of them; those after the first few among the slow tests."""
    each = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=[pytest.mark.slow] * (n >= count)) for n, value in enumerate(each)]


class Probe:
    """The process of probe.py."""

    def __init__(self, good: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("probe.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2):
            assert self.ask(good)["errors"] == []

    def ask(self, root: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def refused(self, root: Path, what: str = "") -> str:
        """All messages of a store that must be refused: errors of ours, within the limits, one of which has ``what`` in it."""
        found = self.used(root)
        assert found["errors"], "nobody said anything"
        messages = "\n".join(message for *_, message in found["errors"])
        assert what in messages, messages
        return messages

    def used(self, root: Path) -> dict[str, Any]:
        """What became of a store that may be used or refused, but must do no harm."""
        found = self.ask(root)
        crashes = [error for error in found["errors"] if error[2] not in (3, 5)]
        assert not crashes, crashes
        assert found["seconds"] < SECONDS, found  # of the processor: the machine may be busy
        assert found["megabytes"] < MEGABYTES, found
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good store of all kinds of things."""
    root = tmp_path_factory.mktemp("whole") / "store"
    with lane_store.few_taps(), mock.patch.object(lane_store, "VIEWS", 1):
        lane_store.write(root)
    return root


@pytest.fixture(scope="module")
def probe(whole: Path) -> Iterator[Probe]:
    found = Probe(whole)
    yield found
    found.end()


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "store")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a record, as one does who knows of its check."""
    value = json.loads(path.read_bytes())
    value.pop("check", None)
    value.get("attributes", {}).pop("hdcache_check", None)
    change(value)
    path.write_bytes(canonical_json(value))


def reseal(root: Path) -> None:
    """Make every record of a store agree with what lies there: a store that means harm contradicts itself nowhere."""
    (root / "index.json").unlink(missing_ok=True)

    def agree(folder: Path, objects: dict[str, Any]) -> None:
        for key in objects:
            if (folder / key).is_file():
                objects[key] = stored_object((folder / key).read_bytes()).model_dump()

    edit(root / "samples/receipt.json", lambda record: agree(root / "samples", record["objects"]))
    records = [
        path for path in root.glob("teachers/*/zarr.json") if "hdcache" in json.loads(path.read_bytes())["attributes"]
    ]
    for path in records:
        edit(path, lambda record, path=path: agree(path.parent, record["attributes"]["hdcache"]["objects"]))
    ledgers = [root / "samples/pixels", *root.glob("views/[0-9]"), *root.glob("teachers/*/views/[0-9]")]
    for ledger in ledgers:
        for path in (ledger / "receipts").iterdir():
            edit(path, lambda record, ledger=ledger: agree(ledger, record["objects"]))
        edit(ledger / "manifest.json", lambda record: agree(root, record["objects"]))
    for ledger in root.glob("teachers/*/views/[0-9]"):
        record = json.loads((ledger.parents[1] / "zarr.json").read_bytes())["attributes"]["hdcache"]
        identity = {key: record[key] for key in ("card", "requests", "dataset", "views")}
        digest = hashlib.sha256(canonical_json(identity)).hexdigest()
        edit(ledger / "manifest.json", lambda manifest, digest=digest: manifest.update(identity=digest))


def card(root: Path, change: Callable[[Any], Any]) -> None:
    """Change the record of the store, and everything that rests on it."""
    edit(root / "zarr.json", lambda record: change(record["attributes"]["hdcache"]))
    reseal(root)


def teacher(root: Path, change: Callable[[Any], Any], name: str = "plain") -> None:
    """Change the record of a teacher, and everything that rests on it."""
    edit(root / "teachers" / name / "zarr.json", lambda record: change(record["attributes"]["hdcache"]))
    reseal(root)


def test_a_store_that_was_sealed_again_is_a_good_one(root: Path, probe: Probe) -> None:
    """Nothing of what follows is refused for how it was made."""
    card(root, lambda record: None)
    teacher(root, lambda record: None)
    assert probe.used(root)["errors"] == []


# Keys


@pytest.mark.parametrize(
    "key", some(["../../x", "/etc/hostname", "a//b", "a/../../x", ".", "a/./b", "a\\b", "x\x1b[2Jy", "y" * 600], 2)
)
@pytest.mark.parametrize(
    "where",
    some([
        f"{ROWS}/manifest.json", "views/0/manifest.json", "samples/pixels/manifest.json", f"{ROWS}/receipts/1.json",
        "samples/receipt.json", "teachers/plain/zarr.json", "index.json",
    ]),
)  # fmt: skip
def test_keys_that_lead_elsewhere(where: str, key: str, root: Path, probe: Probe) -> None:
    def change(record: Any) -> None:
        objects = record.get("attributes", {}).get("hdcache", record)["objects"]
        objects[key] = {"size": 1, "sha256": "0" * 64}

    edit(root / where, change)
    messages = probe.refused(root, "unsafe object key")
    assert where in messages
    assert "\x1b" not in messages


def test_a_key_that_is_listed_twice(root: Path, probe: Probe) -> None:
    path = root / ROWS / "manifest.json"
    entry = b'"%s":{"sha256":"%s","size":7},' % (SHARD.encode(), b"0" * 64)
    edit(path, lambda record: None)
    path.write_bytes(path.read_bytes().replace(b'"objects":{', b'"objects":{' + entry))
    probe.refused(root, "manifest.json: not valid JSON")


@pytest.mark.parametrize("name", some(["..", "../../x", "a/b", "", "x\x1b]0;y\x07", "/etc"]))
def test_names_that_lead_elsewhere(name: str, root: Path, probe: Probe) -> None:
    """Taps, arrays and constants are folders."""

    def change(record: Any) -> None:
        record["taps"][name] = {**record["taps"]["final"], "tap": name}
        record["requests"] = [*record["requests"], {**record["requests"][0], "tap": name}]

    teacher(root, change)
    probe.refused(root, "teachers/plain/zarr.json: ")
    teacher(root, lambda record: [record["taps"].pop(name), record["requests"].pop()])
    assert probe.used(root)["errors"] == []
    teacher(
        root,
        lambda record: record["taps"]["final"]["arrays"].update({name: record["taps"]["final"]["arrays"]["prefix"]}),
    )
    probe.refused(root, "arrays and constants are not those of a fp32 tap")


# Links, pipes, sockets, devices

LINKED = [
    "about.json", "index.json", "croissant.json", "zarr.json", "samples/receipt.json", "samples/label/c.0", "samples/label/zarr.json",
    "views/0/manifest.json", "views/0/geometry/c.1.0", "samples/pixels/bytes/1/c.0", "teachers/plain/zarr.json",
    f"{ROWS}/manifest.json", f"{ROWS}/receipts/1.json", f"{CONSTANT}/c.0.0", SHARD, f"{FINAL}/zarr.json",
    "teachers/plain/held.json",
]  # fmt: skip
FOLDERS = [
    "samples",
    "views",
    "views/0",
    "views/0/geometry",
    "teachers",
    "teachers/plain",
    ROWS,
    f"{ROWS}/final",
    FINAL,
    CONSTANT,
]
HARMLESS = ("about.json", "croissant.json", "index.json")
"""What nobody who reads needs."""


@pytest.mark.parametrize("key", some(LINKED, 3))
def test_a_file_that_is_a_link_out_of_the_store(key: str, root: Path, tmp_path: Path, probe: Probe) -> None:
    """Even where the same bytes lie there: what is not in the store may be another's secret, or another thing tomorrow."""
    away = tmp_path / "away"
    away.write_bytes((root / key).read_bytes() if (root / key).exists() else b'{"taps": []}')
    (root / key).unlink(missing_ok=True)
    (root / key).symlink_to(away)
    messages = probe.refused(root)
    assert "link" in messages
    assert str(root / key) in messages


@pytest.mark.parametrize("key", some(FOLDERS, 2))
def test_a_folder_that_is_a_link_out_of_the_store(key: str, root: Path, tmp_path: Path, probe: Probe) -> None:
    """Nothing is read there, and an extraction writes nothing there."""
    shutil.move(root / key, tmp_path / "away")
    (root / key).symlink_to(tmp_path / "away", target_is_directory=True)
    messages = probe.refused(root, "a link that leads out of the store")
    assert str(tmp_path / "away") in messages
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "away").rglob("*")}
    with pytest.raises(HdcacheError, match="a link that leads out of the store"), Store.open(root).lock("plain"):
        pass
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "away").rglob("*")} == before


@pytest.mark.parametrize("name", some([".lock", ".plain.lock", ".plain.owner", "views/.0.lock", f"{ROWS}/.1.lock"]))
def test_nobody_writes_through_a_link(name: str, root: Path, tmp_path: Path) -> None:
    """Locks and notes have names that anybody knows."""
    (tmp_path / "mine").write_text("precious")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(tmp_path / "mine")
    with lane_errors(), Store.open(root).lock("plain"):
        lane_store.write(root.with_name("other"))
    durable_write(root / name, b"x")
    assert (tmp_path / "mine").read_text() == "precious"


def lane_errors() -> Any:
    """Whatever comes of it, it is an error of ours or of the system."""
    from contextlib import suppress

    return suppress(HdcacheError, OSError)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", some([make_pipe, make_socket, make_device, make_folder], 3))
@pytest.mark.parametrize("key", some(LINKED, 3))
def test_what_is_no_file_in_place_of_one(key: str, make: Callable[[Path], None], root: Path, probe: Probe) -> None:
    """Nobody waits for a pipe to be written to, or reads a device to its end."""
    (root / key).unlink(missing_ok=True)
    make(root / key)
    found = probe.used(root)
    assert found["errors"] or key in HARMLESS or key.endswith("held.json")


def test_a_pipe_in_place_of_a_note(root: Path) -> None:
    os.mkfifo(root / ".plain.owner")
    assert Owner.read(root / ".plain.owner") is None
    with Store.open(root).lock("plain"):
        pass
    (root / ".x.lock").symlink_to(root / "zarr.json")
    with pytest.raises(StoreCorrupt, match=r"\.x\.lock: a link in place of a lock; remove it"), lease(root / ".x.lock"):
        pass


# Sizes


@pytest.mark.parametrize("count", some([10**12, 2**63, 10**400, -1, 0, 1.5, "many"]))
def test_numbers_of_rows_that_no_store_has(count: Any, root: Path, probe: Probe) -> None:
    card(root, lambda record: record["dataset"].update(count=count))
    probe.refused(root, "zarr.json: ")


@pytest.mark.parametrize("count", some([2**32, 10**9, 10**6, 21, 19]))
def test_more_rows_or_fewer_than_there_are(count: int, root: Path, probe: Probe) -> None:
    """All records say so, and the metadata of all arrays."""
    for path in root.rglob("zarr.json"):
        meta = json.loads(path.read_bytes())
        if meta["node_type"] == "array" and meta["shape"][0] == 20 and "bytes" not in path.parts:
            meta["shape"][0] = count
            grid = meta["chunk_grid"]["configuration"]["chunk_shape"]
            grid[0] = count if grid[0] == 20 else grid[0]
            path.write_bytes(canonical_json(meta))
    for path in root.rglob("manifest.json"):
        edit(path, lambda record: record.update(rows=count))
    card(root, lambda record: record["dataset"].update(count=count))
    probe.refused(root)


@pytest.mark.parametrize(("shard", "chunk"), some([(10**6, 10**6), (10**6, 1), (8, 1), (20, 20), (1, 1), (10**12, 1)]))
def test_shards_of_other_sizes(shard: int, chunk: int, root: Path, probe: Probe) -> None:
    card(root, lambda record: record.update(rows_per_shard=shard, rows_per_chunk=chunk))
    probe.refused(root) if shard != 8 else probe.used(root)


@pytest.mark.parametrize("shape", some([[10**12, 6], [2**16, 2**16], [2**31], [9, 0], [9, -6], [], [9] * 40]))
def test_rows_of_other_shapes(shape: list[int], root: Path, probe: Probe) -> None:
    def change(record: Any) -> None:
        tap = record["taps"]["final"]
        tap["arrays"]["values"]["shape"] = shape
        tap["tokens"], tap["channels"] = ([*shape, 1, 1])[:2]

    path = root / FINAL / "zarr.json"
    meta = json.loads(path.read_bytes())
    meta["shape"] = [20, *shape]
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [8, *shape]
    meta["codecs"][0]["configuration"]["chunk_shape"][1:] = shape
    path.write_bytes(canonical_json(meta))
    teacher(root, change)
    probe.refused(root)


# Codecs


def codecs_of(root: Path, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the codecs inside of an array's shards, and everything that rests on it."""
    path = root / key / "zarr.json"
    meta = json.loads(path.read_bytes())
    change(meta["codecs"][0]["configuration"])
    path.write_bytes(canonical_json(meta))
    reseal(root)


BLOSC = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "typesize": 1, "blocksize": 0}


@pytest.mark.parametrize(
    "codec",
    some([
        {"name": "pickle"}, {"name": "numcodecs.pickle"}, {"name": "numcodecs.pickle", "configuration": {"protocol": 5}},
        {"name": "numcodecs.json2"}, {"name": "numcodecs.zfpy"}, {"name": "x\x1b[2J"}, {"name": None}, {"name": ["gzip"]}, 7,
        {"name": "gzip", "configuration": {"level": 1}}, {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
        {"name": "transpose", "configuration": {"order": [2, 1, 0]}}, {"name": "vlen-utf8"}, {"name": "cast_value"},
        {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 1, 1], "codecs": [{"name": "bytes"}]}},
    ], 2),
)  # fmt: skip
@pytest.mark.parametrize("key", some([FINAL, CODES]))
def test_codecs_that_no_store_uses(key: str, codec: Any, root: Path, probe: Probe) -> None:
    """In front, behind, or alone."""
    path = root / key / "zarr.json"
    before = path.read_bytes()
    for change in (
        lambda inner: inner.update(codecs=[codec]),
        lambda inner: inner["codecs"].insert(0, codec),
        lambda inner: inner["codecs"].append(codec),
        lambda inner: inner["index_codecs"].append(codec),
    ):
        path.write_bytes(before)
        codecs_of(root, key, change)
        messages = probe.refused(root, f"{key}/zarr.json: ")
        assert "\x1b" not in messages
    path.write_bytes(canonical_json(json.loads(before) | {"codecs": [codec]}))
    reseal(root)
    probe.refused(root, f"{key}/zarr.json: ")


def test_a_pickle_runs_nothing(root: Path, tmp_path: Path, probe: Probe) -> None:
    """In the bytes of a shard as well as in its codecs."""
    touched = tmp_path / "touched"
    attack = b"cos\nsystem\n(S'touch %s'\ntR." % str(touched).encode()
    (root / SHARD).write_bytes(attack)
    codecs_of(root, FINAL, lambda inner: inner.update(codecs=[{"name": "numcodecs.pickle"}]))
    probe.refused(root, "codec 'numcodecs.pickle' is not one of those that stores use")
    assert not touched.exists()


def test_metadata_of_zarr_2(root: Path, probe: Probe) -> None:
    old = {
        "zarr_format": 2,
        "shape": [20, 9, 6],
        "chunks": [8, 9, 6],
        "dtype": "<f4",
        "compressor": None,
        "fill_value": 0,
    }
    old |= {"order": "C", "filters": [{"id": "pickle"}]}
    (root / FINAL / "zarr.json").unlink()
    (root / FINAL / ".zarray").write_bytes(canonical_json(old))
    edit(root / ROWS / "manifest.json", lambda record: record["objects"].pop(f"{FINAL}/zarr.json"))
    probe.refused(root, f"{FINAL}/zarr.json: missing")
    (root / FINAL / "zarr.json").write_bytes(canonical_json({**old, "node_type": "array"}))
    reseal(root)
    probe.refused(root, f"{FINAL}/zarr.json: ")
    for path in root.rglob("zarr.json"):
        path.rename(path.with_name(".zgroup"))
    probe.refused(root, "zarr.json: missing; take it from a copy")
    shutil.rmtree(root / "samples")
    shutil.rmtree(root / "views")
    probe.refused(root, "no store there")


# Chunks


def sealed(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def shard_of(chunks: list[bytes], places: list[tuple[int, int]] | None = None) -> bytes:
    """A shard whose checksums are all right."""
    ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
    index = places or [(end - len(chunk), len(chunk)) for end, chunk in zip(ends, chunks, strict=True)]
    return b"".join(chunks) + sealed(np.array(index, "<u8").tobytes())


def put(root: Path, key: str, data: bytes) -> None:
    (root / key).write_bytes(data)
    reseal(root)


def chunks_of(data: bytes, count: int = 2) -> list[bytes]:
    index = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(-1, 2).tolist()
    return [data[offset : offset + length] for offset, length in index]


PLACES = {
    "outside": [(0, 100), (2**40, 100)],
    "far outside": [(2**64 - 200, 100), (0, 100)],
    "beyond the end": [(0, 2**63), (0, 2**63)],
    "of nothing": [(0, 0), (0, 0)],
    "twice the same": [(0, 220), (0, 220)],
    "overlapping": [(0, 220), (110, 220)],
    "of the index": [(0, 220), (440, 36)],
    "never written": [(2**64 - 1, 2**64 - 1)] * 2,
}


@pytest.mark.parametrize("name", some(PLACES, 6))
@pytest.mark.parametrize("key", some([f"{CODES}/c.1.0.0", f"{FINAL}/c.1.0.0", "views/0/geometry/c.1.0"]))
def test_an_index_that_points_elsewhere(key: str, name: str, root: Path, probe: Probe) -> None:
    count = 1 if "geometry" in key else 2
    data = (root / key).read_bytes()
    length = len(chunks_of(data, count)[0])
    places = [
        (length if offset == 220 else length // 2 if offset == 110 else 2 * length if offset == 440 else offset, length if size == 220 else size)
        for offset, size in PLACES[name][:count]
    ]  # fmt: skip
    if count == 1 and name in ("outside", "twice the same", "overlapping", "of the index"):
        places = [(2**40, 100)]
    put(root, key, shard_of(chunks_of(data, count), places))
    probe.refused(root, str((root / key).parent))


@pytest.mark.parametrize("promised", some([0, 1, 2**20, 2**31 - 1, 2**32 - 1]))
@pytest.mark.parametrize("key", some([f"{CODES}/c.1.0.0", "views/0/geometry/c.1.0"]))
def test_a_chunk_that_promises_more_than_it_is(key: str, promised: int, root: Path, probe: Probe) -> None:
    """By its header, which libraries believe: they would make all of that before they compare."""
    count = 1 if "geometry" in key else 2
    chunks = chunks_of((root / key).read_bytes(), count)
    chunk = chunks[0][:-4]
    chunks[0] = sealed(chunk[:4] + promised.to_bytes(4, "little") + chunk[8:])
    put(root, key, shard_of(chunks))
    probe.refused(root, "a chunk of another size")


@pytest.mark.parametrize("key", some([f"{CODES}/c.1.0.0", "views/0/geometry/c.1.0"]))
def test_a_chunk_that_inflates(key: str, root: Path, probe: Probe) -> None:
    """300 MB of zeros in some kilobytes."""
    packed = numcodecs.Blosc("zstd", 5).encode(np.zeros(300 << 20, np.uint8))
    assert len(packed) < 1 << 20
    chunks = chunks_of((root / key).read_bytes(), 1 if "geometry" in key else 2)
    chunks[0] = sealed(bytes(packed))
    put(root, key, shard_of(chunks))
    probe.refused(root, "a chunk of another size")


def bomb(kind: str) -> bytes:
    """Half a gigabyte of zeros."""
    if kind == "zstd":
        return bytes(numcodecs.Zstd(1).encode(np.zeros(1 << 29, np.uint8)))
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(bytes(1 << 24)) for _ in range(32)), packer.flush()])


@pytest.mark.parametrize("kind", some(["gzip", "zstd"]))
def test_a_bomb_for_the_codecs_of_zarr(kind: str, root: Path, probe: Probe) -> None:
    """Of shards, and of a constant, which is one chunk: they are read through zarr, which would make all of it."""
    configuration = {"level": 1} | ({"checksum": False} if kind == "zstd" else {})
    codec = {"name": kind, "configuration": configuration}
    (root / SHARD).write_bytes(shard_of([bomb(kind)] * 2))
    codecs_of(root, FINAL, lambda inner: inner["codecs"].insert(1, codec))
    probe.refused(root, f"codec '{kind}' is not one of those that stores use")
    path = root / CONSTANT / "zarr.json"
    meta = json.loads(path.read_bytes())
    meta["codecs"].insert(1, codec)
    path.write_bytes(canonical_json(meta))
    put(root, f"{CONSTANT}/c.0.0", bomb(kind))
    probe.refused(root, f"{CONSTANT}/zarr.json: codec '{kind}'")


def test_a_constant_that_is_none(root: Path, probe: Probe) -> None:
    """Of blosc, which is a codec of rows alone; too long; too short."""
    path = root / CONSTANT / "zarr.json"
    before = path.read_bytes()
    meta = json.loads(before)
    meta["codecs"].insert(1, {"name": "blosc", "configuration": BLOSC})
    path.write_bytes(canonical_json(meta))
    put(root, f"{CONSTANT}/c.0.0", sealed(bytes(numcodecs.Blosc("zstd", 5).encode(np.zeros(300 << 20, np.uint8)))))
    probe.refused(root, f"{CONSTANT}/zarr.json: its codecs are not put together as those of a store are")
    path.write_bytes(before)
    for size in (0, 4, 1 << 20):
        put(root, f"{CONSTANT}/c.0.0", sealed(bytes(size)))
        probe.refused(root, f"bytes do not hold {4 * 6 * 6} of values")


# Records


def test_a_manifest_of_ten_million_entries(root: Path, probe: Probe) -> None:
    path = root / ROWS / "manifest.json"
    os.truncate(path, 10**7 * 130)
    probe.refused(root, f"{path}: 1300000000 bytes is too large for a record")


def test_a_manifest_of_two_million_entries(root: Path, probe: Probe) -> None:
    """Large, and small enough to be one."""
    path = root / ROWS / "manifest.json"
    with open(path, "wb") as file:
        file.write(b'{"objects":{')
        for first in range(0, 2 * 10**6, 10**5):
            file.write(b"".join(b'"%06x":{},' % number for number in range(first, first + 10**5)))
        file.write(b'"x":{}}}')
    assert path.stat().st_size < 64 << 20
    probe.refused(root, f"{path}: more than 450,000 entries; not a record of hdcache")
    path.write_bytes(b"[" + b"0," * (30 << 20) + b"0]")
    probe.refused(root, f"{path}: more than 450,000 entries; not a record of hdcache")


RECORDS = ["zarr.json", "samples/receipt.json", "teachers/plain/zarr.json", f"{ROWS}/manifest.json", "views/0/manifest.json", "index.json", f"{ROWS}/receipts/1.json", f"{FINAL}/zarr.json"]  # fmt: skip


@pytest.mark.parametrize("key", some(RECORDS))
@pytest.mark.parametrize(
    "value",
    some([
        b"[" * 10**6, b"[" * 10**5 + b"]" * 10**5, b'{"a":' * 10**5, b"NaN", b"-Infinity", b"1e999", b"9" * 10**6, b'"%s"' % (b"x" * (3 << 20)),
        b"\xff\xfe\x00", b"\x00" * 100, b"", b"null", b"[]", b"{}", b'"\\ud800"', b'"\\u001b[2J"', b"<html>",
    ], 3),
    ids=lambda value: value[:12].decode("latin-1").encode("unicode_escape").decode(),
)  # fmt: skip
def test_records_that_are_something_else(key: str, value: bytes, root: Path, probe: Probe) -> None:
    """Alone, and in the place of a value of a record."""
    path = root / key
    before = path.read_bytes()
    path.write_bytes(value)
    messages = probe.refused(root)
    assert len(messages) < 100_000
    assert "\x1b" not in messages
    inside = b'"shape":' if b'"shape":' in before else b'"format":' if b'"format":' in before else b'"rows":'
    if inside in before:
        path.write_bytes(before.replace(inside, b'"x":1,' + inside + value + b',"y":', 1))
        probe.refused(root)


@pytest.mark.parametrize("key", some(RECORDS[:7]))
def test_strings_that_are_too_long(key: str, root: Path, probe: Probe) -> None:
    """Forty megabytes in a field; a message names it and leaves it out."""

    def change(record: Any) -> None:
        record.get("attributes", {}).get("hdcache", record)["x" * 10**6] = "y" * (40 << 20)

    edit(root / key, change)
    assert len(probe.refused(root, key)) < 100_000


ESCAPE = "\x1b]0;mine\x07\x1b[2J\u202e\r\x9b31m"


def on_terminal(*command: str) -> str:
    """What a command writes to a terminal."""
    mine, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "hdcache", *command], stdout=its, stderr=its, stdin=its)
    os.close(its)
    found = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:
            break
        if not part:
            break
        found += part
    process.wait()
    os.close(mine)
    return found.decode()


def test_no_escape_reaches_a_terminal(root: Path, probe: Probe) -> None:
    """Names, reasons, licences and paths are those of whoever made the store."""
    (root / "about.json").write_bytes(
        canonical_json({"data": f"folder:/{ESCAPE}", "source": "", "written_with": {ESCAPE: ESCAPE}})
    )
    (root / "teachers/plain/about.json").write_bytes(canonical_json({"data": "", "source": ESCAPE, "written_with": {}}))

    def change(record: Any) -> None:
        record["licence"] = record["card"]["architecture"] = ESCAPE

    teacher(root, change)
    for path in [root / ROWS / "manifest.json", *(root / ROWS / "receipts").iterdir()]:
        edit(
            path, lambda record: record.update(failed={row: f"{ESCAPE} {why}" for row, why in record["failed"].items()})
        )
    card(root, lambda record: record["dataset"].update(classes=[ESCAPE, "b"]))
    assert probe.used(root)["errors"] == []
    (root / f"notes {ESCAPE}").write_text("")
    edit(root / "views/0/manifest.json", lambda record: record.update({ESCAPE: ESCAPE}))
    for command in (["info"], ["verify", "-v"], ["gc", "--unlisted", "--dry-run"], ["info", "--json"], ["catalog"]):
        printed = on_terminal(*command, str(root))
        assert len(printed) > 20
        wrong = [c for c in printed.replace("\r\n", "\n") if not c.isprintable() and c != "\n"]
        allowed = ["\x1b"] if command == ["verify", "-v"] else []  # none: progress is a plain line
        assert not set(wrong) - set(allowed), (command, printed)


# Numbers of a store that contradicts itself nowhere


def rows_put(root: Path, key: str, values: np.ndarray[Any, Any]) -> None:
    """Write a sharded array anew as the store's own writer does, and everything that rests on it."""
    writer = ShardWriter(
        20, ArrayCard(shape=values.shape[1:], dtype=values.dtype.name), 8, 8, codec=None, attributes={}  # type: ignore[arg-type]
    )  # fmt: skip
    (root / key / "zarr.json").write_bytes(writer.metadata)
    for shard in range(3):
        (root / key / writer.key(shard)).write_bytes(writer.encode(shard, values[shard * 8 : shard * 8 + 8]))
    reseal(root)


def read(root: Path, key: str) -> np.ndarray[Any, Any]:
    return np.asarray(zarr.open_array(str(root / key), mode="r")[...])


@pytest.mark.parametrize("value", some([-(2**31), -1, 0, 1, 20, 2**31 - 1]))
@pytest.mark.parametrize("column", some(range(8)))
def test_boxes_and_samples(column: int, value: int, root: Path, probe: Probe) -> None:
    """Outside of the image, of no size, of no sample, flipped twice."""
    geometry = read(root, "views/0/geometry").copy()
    row = int(np.flatnonzero(geometry[:, 6])[0])
    same = geometry[row, column] == value
    geometry[row, column] = value
    rows_put(root, "views/0/geometry", geometry)
    found = probe.used(root)
    fits = column == 5 and value in (0, 1)
    inside = column in (1, 2, 3, 4, 6, 7) and not found["errors"]
    unread = column == 6 and value == 0
    if not (same or fits or inside or unread):
        assert any("views/0" in message for *_, message in found["errors"]), found


@pytest.mark.parametrize("value", some([-(2**63), -1, 2**62, 2**63 - 1]))
@pytest.mark.parametrize("place", some([0, 1, 10, 20]))
def test_places_of_ids(place: int, value: int, root: Path, probe: Probe) -> None:
    path = root / "samples/id_offsets/c.0"
    offsets = np.frombuffer(path.read_bytes()[:-4], "<i8").copy()
    offsets[place] = value
    put(root, "samples/id_offsets/c.0", sealed(offsets.tobytes()))
    probe.refused(root, "id offsets do not fit the id bytes")


@pytest.mark.parametrize("value", some([-(2**63), -2, 2, 2**31, 2**63 - 1]))
def test_labels_of_no_class(value: int, root: Path, probe: Probe) -> None:
    path = root / "samples/label/c.0"
    labels = np.frombuffer(path.read_bytes()[:-4], "<i8").copy()
    labels[3] = value
    put(root, "samples/label/c.0", sealed(labels.tobytes()))
    probe.refused(root, "does not fit the store's classes")


@pytest.mark.parametrize("value", some([b"\xff\xff", b"\x00\x00", b"\x01\x00"]))
def test_masks_of_other_sizes(value: bytes, root: Path, probe: Probe) -> None:
    masks = read(root, "teachers/masked/views/0/mask/visible").copy()
    masks[5] = np.frombuffer(value, np.uint8)
    rows_put(root, "teachers/masked/views/0/mask/visible", masks)
    probe.refused(root, "a mask of ")


@pytest.mark.parametrize("value", some([1000, 2**16 - 1]))
def test_classes_that_there_are_none_of(value: int, root: Path, probe: Probe) -> None:
    classes = read(root, f"{ROWS}/logits/classes").copy()
    classes[4, 1] = value
    rows_put(root, f"{ROWS}/logits/classes", classes)
    probe.refused(root, "tap logits holds a class that is none of its 1000")


@pytest.mark.parametrize("value", some([-(2**63), -1, 2**31, 2**62, 2**63 - 1]))
@pytest.mark.parametrize("column", some([0, 1]))
def test_places_of_kept_samples(column: int, value: int, root: Path, probe: Probe) -> None:
    places = read(root, "samples/pixels/index").copy()
    places[9, column] = value
    places[10, column] = (int(places[10, column]) - value + 2**63) % 2**64 - 2**63  # the sum stays what it was
    rows_put(root, "samples/pixels/index", places)
    probe.refused(root, "samples/pixels/index: shard 1 does not fit its bytes")


@pytest.mark.parametrize("row", some([-1, 20, 2**31, 2**63, 10**30]))
def test_failed_rows_that_are_none(row: int, root: Path, probe: Probe) -> None:
    for key in (f"{ROWS}/manifest.json", "views/0/manifest.json"):
        edit(root / key, lambda record: record["failed"].update({str(row): "x"}))
    reseal(root)
    probe.refused(root, "manifest.json: its rows are not the 20 of the store")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the numbers of a record are."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            yield from leaves(inner, (*path, number))
    elif isinstance(value, int | float):
        yield path


HOSTILE_NUMBERS = (0, -1, 2**31, 2**63, 10**12, -(10**30), 1e308, 0.5)


@pytest.mark.parametrize("name", some(["plain", "masked"]))
@pytest.mark.parametrize(
    "part", some(["requests", "card", "views", "final", "block1.attn_in", "logits", "pooled", "batch"])
)
def test_any_number_of_a_teacher(part: str, name: str, root: Path, probe: Probe) -> None:
    """Each number of its record becomes others, all records agreeing: it is refused, or means nothing to who reads."""
    path = root / "teachers" / name / "zarr.json"
    before = path.read_bytes()
    record = json.loads(before)["attributes"]["hdcache"]
    start: tuple[Any, ...] = ("taps", part) if part in record["taps"] else (part,)
    inside = record
    for key in start:
        inside = inside.get(key, {})
    for number, where in enumerate(leaves(inside, start)):
        for value in (HOSTILE_NUMBERS[number % 8], HOSTILE_NUMBERS[(number + 3) % 8]):

            def change(changed: Any, where: tuple[Any, ...] = where, value: float = value) -> None:
                for key in where[:-1]:
                    changed = changed[key]
                changed[where[-1]] = value

            path.write_bytes(before)
            teacher(root, change, name)
            probe.used(root)


def test_zarr_alone_is_not_asked_before(tmp_path: Path) -> None:
    """What this file refuses, it refuses before zarr decodes: an array that only zarr could read is an error by any way."""
    encoding = {"name": "default", "separator": "."}
    zarr.create_array(
        tmp_path / "a", data=np.zeros((20, 3), np.int16), chunks=(8, 3), compressors=None, chunk_key_encoding=encoding  # type: ignore[arg-type]
    )  # fmt: skip
    for way in (None, "zarr"):
        with pytest.raises(StoreCorrupt, match="its codecs are not put together"):
            ArrayReader(tmp_path, "a", (20, 3), "int16", {}, 8, way)

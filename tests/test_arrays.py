"""Arrays: the same bytes for the same values, readable by every Zarr, and never a silently wrong value."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hdcache import durable
from hdcache.arrays import (
    ArrayReader,
    ShardWriter,
    read_pipeline,
    write_constant,
)
from hdcache.chunks import ShardLayout
from hdcache.durable import durable_write
from hdcache.errors import OutOfSpace, StoreCorrupt
from hdcache.schema import ArrayCard, StoredObject
from hdcache.shards import Codec

ROWS, SHARD, CHUNK = 20, 8, 4
CODED = [("int8", True), ("int16", True), ("uint8", True), ("int32", True)]
PLAIN = [(dtype, False) for dtype in ("float32", "float16", "uint16", "uint8", "int64", "int8")]
PIPELINES = ["zarr", "zarrs"]


def numbers(dtype: str, *shape: int, seed: int = 0) -> NDArray[Any]:
    """Every bit pattern of ``dtype``, NaN and infinities included; the codecs move bits, not numbers."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)


class Written:
    """An array of 20 rows in shards of 8 (the last one short) in a folder, with the list of its objects."""

    def __init__(self, root: Path, dtype: str = "int8", codec: bool = True, row: tuple[int, ...] = (3, 5)) -> None:
        self.root, self.folder, self.dtype, self.row = root, root / "a", dtype, row
        self.values = numbers(dtype, ROWS, *row)
        writer = ShardWriter(
            ROWS, ArrayCard(shape=row, dtype=dtype), CHUNK, SHARD, codec=Codec() if codec else None, attributes={"x": 1}
        )  # type: ignore[arg-type]
        self.listed = {"a/zarr.json": durable_write(self.folder / "zarr.json", writer.metadata)}
        self.files: list[Path] = []
        for shard in range(3):
            key = f"a/{writer.key(shard)}"
            block = self.values[shard * SHARD : (shard + 1) * SHARD]
            self.listed[key] = durable_write(root / key, writer.encode(shard, block))
            self.files.append(root / key)

    def reader(self, pipeline: str | None = None, **changes: Any) -> ArrayReader:
        fields: dict[str, Any] = {
            "shape": (ROWS, *self.row), "dtype": self.dtype, "listed": self.listed, "shard": SHARD
        }  # fmt: skip
        return ArrayReader(self.root, "a", **{**fields, **changes}, pipeline=pipeline)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def same(found: Any, expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    assert np.ascontiguousarray(found).tobytes() == expected.tobytes()


# Writing


@pytest.mark.parametrize(("dtype", "codec"), [*CODED, *PLAIN])
def test_bytes_depend_on_values_alone(dtype: str, codec: bool, tmp_path: Path) -> None:
    """Two writers, two orders of shards, one set of files."""
    first = Written(tmp_path / "1", dtype, codec)
    writer = ShardWriter(
        ROWS, ArrayCard(shape=(3, 5), dtype=dtype), CHUNK, SHARD, codec=Codec() if codec else None, attributes={"x": 1}
    )  # type: ignore[arg-type]
    assert writer.metadata == (first.folder / "zarr.json").read_bytes()
    for shard in (2, 0, 1, 2, 0):
        block = first.values[shard * SHARD : (shard + 1) * SHARD]
        assert writer.encode(shard, block.copy()) == first.files[shard].read_bytes()


def test_bytes_that_no_release_may_change(tmp_path: Path) -> None:
    """Shards of format 1, for one coded and one plain array."""
    digests = [
        hashlib.sha256(b"".join(file.read_bytes() for file in Written(tmp_path / name, name, codec).files)).hexdigest()
        for name, codec in (("int8", True), ("float16", False))
    ]
    assert digests == [
        "f8b1bc2583872f7ae17194965ab072d5d66f1fb7de1fc6466f3abc89b511d0fe",
        "2d49b7f5955dbb7bcc2ee98af7bbf60d49bd8044ef88d369e5f92245c2c9a647",
    ]


def test_all_zero_rows_are_stored(tmp_path: Path) -> None:
    """Zeros are legal data: written, listed and read like any other, on both pipelines."""
    writer = ShardWriter(8, ArrayCard(shape=(3,), dtype="int8"), 4, 8, codec=Codec(), attributes={})
    listed = {
        "a/zarr.json": durable_write(tmp_path / "a" / "zarr.json", writer.metadata),
        f"a/{writer.key(0)}": durable_write(
            tmp_path / "a" / writer.key(0), writer.encode(0, np.zeros((8, 3), np.int8))
        ),
    }
    for pipeline in PIPELINES:
        assert not ArrayReader(tmp_path, "a", (8, 3), "int8", listed, 8, pipeline).rows(0, 8).any()


@pytest.mark.parametrize(
    ("shard", "block"),
    [
        (0, np.zeros((7, 3), np.int8)),
        (0, np.zeros((8, 4), np.int8)),
        (0, np.zeros((8, 3), np.int16)),
        (2, np.zeros((8, 3), np.int8)),
    ],
)
def test_only_whole_shards_of_the_right_type_are_encoded(shard: int, block: NDArray[Any]) -> None:
    writer = ShardWriter(ROWS, ArrayCard(shape=(3,), dtype="int8"), CHUNK, SHARD, codec=Codec(), attributes={})
    with pytest.raises(ValueError, match=rf"shard {shard}: got int.*, expected int8"):
        writer.encode(shard, block)


def test_constants_round_trip(tmp_path: Path) -> None:
    for number, value in enumerate([numbers("float32", 4, 6), numbers("uint8", 9), numbers("int64", 3)]):
        listed = write_constant(tmp_path, f"k{number}", value)
        assert set(listed) == {f"k{number}/zarr.json", f"k{number}/c.0" + ".0" * (value.ndim - 1)}
        for pipeline in PIPELINES:
            reader = ArrayReader(tmp_path, f"k{number}", value.shape, str(value.dtype), listed, None, pipeline)
            same(reader.rows(0, len(value)), value)
    with pytest.raises(ValueError, match="k: an empty array cannot be stored"):
        write_constant(tmp_path, "k", np.zeros((0, 3), np.float32))


# Reading


@pytest.mark.parametrize(("dtype", "codec"), [*CODED, *PLAIN])
def test_every_zarr_reads_the_same_values(dtype: str, codec: bool, tmp_path: Path) -> None:
    """Plain zarr, zarrs and tensorstore, short last shard included."""
    tensorstore = pytest.importorskip("tensorstore")
    made = Written(tmp_path, dtype, codec)
    same(zarr.open_array(made.folder, mode="r")[...], made.values)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(made.folder, mode="r")
        same(array[...], made.values)
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{made.folder}/"}}
    same(tensorstore.open(spec, read=True).result().read().result(), made.values)
    for pipeline in PIPELINES:
        same(made.reader(pipeline).rows(0, ROWS), made.values)


def test_the_rust_reader_is_used_where_it_is_installed(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    read_pipeline.cache_clear()
    assert read_pipeline() == "zarrs"
    assert type(written.reader()._array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    read_pipeline.cache_clear()
    monkeypatch.setitem(sys.modules, "zarrs", None)
    assert read_pipeline() == "zarr"
    same(written.reader().rows(0, ROWS), written.values)
    read_pipeline.cache_clear()


@settings(max_examples=40)
@given(span=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted))
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_any_span_of_rows(pipeline: str, span: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / f"spans-{pipeline}"
    made = Written(root)
    same(made.reader(pipeline).rows(*span), made.values[slice(*span)])


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, ROWS + 1), (ROWS + 1, ROWS + 1)])
def test_rows_outside_the_array(span: tuple[int, int], written: Written) -> None:
    with pytest.raises(IndexError, match=f"rows {span[0]} to {span[1]} of {ROWS}"):
        written.reader().rows(*span)


@settings(max_examples=20)
@given(span=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted), data=st.data())
@pytest.mark.parametrize("pipeline", [None, *PIPELINES])
@pytest.mark.parametrize("codec", [True, False])
def test_rows_are_copied_to_where_they_are_wanted(
    codec: bool, pipeline: str | None, span: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Straight from the shards or through zarr: each row in the place that was given for it, no other place touched."""
    root = tmp_path_factory.mktemp("copied")
    made, (start, stop) = Written(root, codec=codec), span
    if start == stop:
        with pytest.raises(IndexError, match=f"rows {start} to {stop} of {ROWS}"):
            made.reader(pipeline).copy_rows(start, stop, [])
        return
    order = data.draw(st.permutations(range(stop - start)))
    wanted = data.draw(st.lists(st.booleans(), min_size=stop - start, max_size=stop - start))
    found = np.full((stop - start, *made.row), 77, made.dtype)
    reader = made.reader(pipeline)
    reader.copy_rows(start, stop, [found[place] if keep else None for place, keep in zip(order, wanted, strict=True)])
    for row, place, keep in zip(range(start, stop), order, wanted, strict=True):
        same(found[place], made.values[row] if keep else np.full(made.row, 77, made.dtype))


@pytest.mark.parametrize("layout", ["not sharded", "blosc twice", "no checksum", "index at the start"])
@pytest.mark.parametrize("pipeline", [None, *PIPELINES])
def test_what_no_version_has_written_is_refused(layout: str, pipeline: str | None, tmp_path: Path) -> None:
    """Zarr would read an array of any codecs, and make of a small file what they say."""
    values = numbers("int16", ROWS, 3)
    made: dict[str, Any] = {"chunks": (CHUNK, 3), "shards": (SHARD, 3), "compressors": [zarr.codecs.Crc32cCodec()]}
    if layout == "not sharded":
        made |= {"chunks": (SHARD, 3), "shards": None}
    elif layout == "no checksum":
        made["compressors"] = None
    elif layout == "index at the start":
        made["shards"] = {"shape": (SHARD, 3), "index_location": "start"}
    else:
        made["compressors"] = [zarr.codecs.BloscCodec(), zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec()]
    encoding = {"name": "default", "separator": "."}
    zarr.create_array(tmp_path / "a", data=values, chunk_key_encoding=encoding, **made)  # type: ignore[arg-type]
    with pytest.raises(
        StoreCorrupt, match=r"zarr\.json: its codecs are not put together as those of a store are; copy"
    ):
        ArrayReader(tmp_path, "a", (ROWS, 3), "int16", {}, SHARD, pipeline)


def test_a_shard_is_proved_once_whatever_the_threads(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, real = [], hashlib.file_digest

    def slow(file: Any, kind: str) -> Any:
        digests.append(os.fstat(file.fileno()).st_ino)
        time.sleep(0.01)
        return real(file, kind)

    reader = written.reader()
    monkeypatch.setattr(hashlib, "file_digest", slow)
    into = [[np.empty(written.row, written.dtype)] for _ in range(ROWS)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: reader.copy_rows(row, row + 1, into[row]), range(ROWS)))
    assert sorted(digests) == sorted(path.stat().st_ino for path in written.files)
    same(np.stack([one[0] for one in into]), written.values)


def remove(path: Path) -> None:
    path.unlink()


def cut(length: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(length * len(data)) if length < 1 else len(data) - 1])

    return damage


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def read(reader: ArrayReader, how: str, start: int, stop: int) -> NDArray[Any]:
    """The rows, by either way of a reader."""
    if how == "rows":
        return reader.rows(start, stop)
    found = np.empty((stop - start, 3, 5), np.int8)
    reader.copy_rows(start, stop, list(found))
    return found


WAYS = [("zarr", "rows"), ("zarrs", "rows"), (None, "copied")]


@pytest.mark.parametrize(("pipeline", "how"), WAYS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"c\.1\.0\.0: missing, expected \d+ bytes; copy the store again"),
        (cut(0), r"c\.1\.0\.0: 0 bytes, expected \d+"),
        (cut(0.3), r"c\.1\.0\.0: \d+ bytes, expected \d+"),
        (cut(0.9), r"c\.1\.0\.0: \d+ bytes, expected \d+"),
        (cut(1), r"c\.1\.0\.0: \d+ bytes, expected \d+"),
        (lengthen, r"c\.1\.0\.0: \d+ bytes, expected \d+"),
    ],
    ids=["missing", "empty", "third", "most", "last byte", "longer"],
)
def test_missing_and_short_objects(
    pipeline: str | None, how: str, damage: Callable[[Path], None], message: str, written: Written
) -> None:
    """The damaged shard is refused by name; its neighbours still read."""
    reader = written.reader(pipeline)
    damage(written.files[1])
    with pytest.raises(StoreCorrupt, match=message):
        read(reader, how, 6, 18)
    same(read(reader, how, 0, 8), written.values[:8])
    same(read(reader, how, 16, 20), written.values[16:])


@pytest.mark.parametrize(("dtype", "codec"), [("int8", True), ("float32", False)])
@pytest.mark.parametrize(("pipeline", "how"), WAYS)
def test_flipped_bits_are_caught_while_reading(
    pipeline: str | None, how: str, dtype: str, codec: bool, tmp_path: Path
) -> None:
    """200 single flipped bits anywhere in a shard that was proved before: an error each time, from its checksums."""
    made = Written(tmp_path, dtype, codec)
    reader, path = made.reader(pipeline), made.files[0]
    reader.rows(0, SHARD)
    data = path.read_bytes()
    for place in np.random.default_rng(1).integers(0, 8 * len(data), 200).tolist():
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(StoreCorrupt, match="rows 0 to 8 cannot be decoded"):
            read(reader, how, 0, SHARD)


@pytest.mark.parametrize(("pipeline", "how"), WAYS)
def test_a_sibling_of_equal_size_is_refused(pipeline: str | None, how: str, tmp_path: Path) -> None:
    """Size and checksums are those of a shard; the sha256 that is compared when it is first read is another's."""
    made = Written(tmp_path, "float32", codec=False)
    made.files[0].write_bytes(made.files[1].read_bytes())
    assert made.listed["a/c.0.0.0"].size == made.files[0].stat().st_size
    reader = made.reader(pipeline)
    with pytest.raises(StoreCorrupt, match=r"c\.0\.0\.0: sha256 .*, expected .*; run 'hdcache verify'"):
        read(reader, how, 0, 8)
    same(reader.rows(8, 16), made.values[8:16])


def test_an_object_that_no_record_lists_is_not_read(written: Written) -> None:
    del written.listed["a/c.1.0.0"]
    reader = written.reader()
    same(reader.rows(0, 8), written.values[:8])
    with pytest.raises(StoreCorrupt, match=r"c\.1\.0\.0: not listed in the manifest; the store was changed"):
        reader.rows(8, 9)


def test_an_object_that_vanishes_while_it_is_read(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr reads zeros from it; the second look does not let them through."""
    reader = written.reader()

    class Vanishing:
        ndim, shape = reader._array.ndim, reader._array.shape

        def __getitem__(self, rows: slice) -> Any:
            written.files[0].unlink()
            return zarr.open_array(written.folder, mode="r")[rows]

    reader._array = Vanishing()
    with pytest.raises(StoreCorrupt, match="missing"):
        reader.rows(0, 8)


def test_an_object_that_cannot_be_read(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = written.reader()

    def denied(path: Path, *_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StoreCorrupt, match=r"c\.0\.0\.0: cannot be read \(Permission denied\)"):
        reader.rows(0, 1)


# Metadata that cannot be trusted


def set_at(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(meta: dict[str, Any]) -> None:
        inside: Any = meta
        for name in path[:-1]:
            inside = inside[int(name)] if isinstance(inside, list) else inside[name]
        inside[path[-1]] = value

    return change


HOSTILE: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (set_at("codecs", value=[{"name": "pickle"}]), "codec 'pickle' is not one of those that stores use"),
    (set_at("codecs", value=[]), "codec None is not"),
    (set_at("codecs", value="bytes"), "codec None is not"),
    (set_at("codecs", value=[{"name": ["bytes"]}]), r"codec \['bytes'\] is not"),
    (set_at("codecs", "0", "configuration", "codecs", value=[{"name": "numcodecs.pickle"}]), "codec 'numcodecs.pickle'"),
    (set_at("codecs", "0", "configuration", value=None), "codecs are not put together"),
    (set_at("codecs", "0", "configuration", value=[1]), "its codecs are not put together"),
    (set_at("codecs", "0", "configuration", "codecs", value=[{"name": "gzip"}]), "codec 'gzip' is not one of"),
    (set_at("codecs", "0", "configuration", "chunk_shape", value=[3, 3, 5]), "as those of a store are"),
    (set_at("shape", value=[10**12, 3, 5]), r"int8\[1000000000000, 3, 5\], but the store's records say int8\[20, 3, 5\]"),
    (set_at("shape", value=7), "but the store's records say"),
    (set_at("zarr_format", value=2), "not the metadata of a Zarr v3 array"),
    (set_at("node_type", value="group"), "not the metadata of a Zarr v3 array"),
    (set_at("data_type", value="int16"), r"int16\[20, 3, 5\], but"),
    (set_at("chunk_grid", value=[]), "do not fit the store's 8 rows per shard"),
    (set_at("chunk_grid", "configuration", value=None), "do not fit the store's 8 rows per shard"),
    (set_at("chunk_grid", "configuration", "chunk_shape", value=[4, 3, 5]), "do not fit the store's 8 rows per shard"),
    (set_at("chunk_key_encoding", value={"name": "default", "configuration": {"separator": "/"}}), "chunks are not named"),
    (set_at("chunk_key_encoding", value={"name": "v2"}), "chunks are not named"),
    (set_at("storage_transformers", value=[{"name": "x"}]), "chunks are not named"),
    (set_at("fill_value", value=[]), "zarr cannot open it"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_hostile_metadata_is_refused_even_where_records_vouch_for_it(
    change: Callable[[dict[str, Any]], None], message: str, written: Written
) -> None:
    path = written.folder / "zarr.json"
    meta = json.loads(path.read_bytes())
    change(meta)
    written.listed["a/zarr.json"] = durable_write(path, json.dumps(meta).encode())
    with pytest.raises(StoreCorrupt, match=message):
        written.reader()


def test_metadata_that_was_altered_is_refused_whatever_it_says(written: Written) -> None:
    """A transpose more, a big-endian number: values would be wrong and checksums right."""
    path = written.folder / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"x": 1', b'"x": 2'))
    with pytest.raises(StoreCorrupt, match=r"zarr\.json: altered since the store was sealed"):
        written.reader()


@pytest.mark.parametrize("listed", [True, False])
def test_metadata_too_large_to_be_any(listed: bool, written: Written) -> None:
    data = json.dumps({"x": "y" * (5 << 20)}).encode()
    durable_write(written.folder / "zarr.json", data)
    with pytest.raises(StoreCorrupt, match=r"zarr\.json: metadata of \d+ bytes"):
        written.reader(**({} if listed else {"listed": {}}))


@settings(max_examples=150)
@given(data=st.data())
def test_any_metadata_reads_right_or_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One value somewhere in the metadata becomes another: the same rows as before, or StoreCorrupt."""
    made = Written(tmp_path_factory.getbasetemp() / "metadata")
    meta = json.loads((made.folder / "zarr.json").read_bytes())
    inside: Any = meta
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if isinstance(inside[key], dict | list) and inside[key] and data.draw(st.booleans()):
            inside = inside[key]
            continue
        break
    inside[key] = data.draw(
        st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["", "x", [], {}, [1], "big"])
    )
    (made.folder / "zarr.json").write_text(json.dumps(meta))
    del made.listed["a/zarr.json"]
    for pipeline in PIPELINES:
        try:
            found = made.reader(pipeline).rows(0, ROWS)
        except StoreCorrupt:
            continue
        same(found, made.values)


def test_wrong_expectations_are_refused(written: Written) -> None:
    for changes in ({"shape": (21, 3, 5)}, {"dtype": "uint8"}, {"shard": 4}, {"shard": None}):
        with pytest.raises(StoreCorrupt, match="store's"):
            written.reader(**changes)


# Durable files


def test_a_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x"
    assert durable_write(path, b"one") == StoredObject(size=3, sha256=hashlib.sha256(b"one").hexdigest())
    durable_write(path, b"two")
    with pytest.raises(FileExistsError):
        durable_write(path, b"three", create_only=True)
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["x"]


def test_a_file_is_synced_before_it_has_its_name_and_its_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut can lose is never what was promised: content, then name, then the names of new folders."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def name(number: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{number}")).split(".partial")[0]

    monkeypatch.setattr(os, "fsync", lambda number: (done.append(f"sync {name(number)}"), sync(number))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    root = tmp_path / "r"
    root.mkdir()
    durable_write(root / "a" / "b" / "x", b"1")
    assert done[:2] == ["sync r", "sync a"]
    assert done[2].startswith("sync .x.")
    assert done[3:] == ["rename", "sync b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "write", "link"])
def test_a_full_disk_leaves_nothing_half_written(
    number: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    if where == "write":

        class Full:
            def __init__(self, path: Path, mode: str) -> None:
                self.file = io.FileIO(path, mode)

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            write = full

        monkeypatch.setattr(durable, "open", Full, raising=False)
    else:
        monkeypatch.setattr(os, where, full)
    (tmp_path / "x").mkdir()
    with pytest.raises(OutOfSpace, match=r"no space left while writing .*y; finished shards are safe: free space"):
        durable_write(tmp_path / "x" / "y", b"data", create_only=where == "link")
    assert list((tmp_path / "x").iterdir()) == []


def test_other_errors_keep_their_name_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        durable_write(tmp_path / "y", b"data")
    assert not isinstance(caught.value, OutOfSpace)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        durable_write(tmp_path / "file" / "y", b"data")


def test_a_real_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        durable_write(mount / "kept", b"x" * 1000)
        with pytest.raises(OutOfSpace, match="no space left while writing"):
            durable_write(mount / "a" / "big", b"x" * (2 << 20))
        assert list((mount / "a").iterdir()) == []
        assert (mount / "kept").read_bytes() == b"x" * 1000
        durable_write(mount / "a" / "small", b"x" * 1000)
    finally:
        subprocess.run(["umount", mount], check=True)


# Forks


def test_a_forked_child_is_told_instead_of_hanging(written: Written) -> None:
    """With the Rust reader a clear RuntimeError, whether the array was opened before the fork or after; plain zarr reads."""
    code = f"""
        import os, sys
        from pathlib import Path
        from hdcache.arrays import ArrayReader
        from hdcache.schema import StoredObject
        listed = {{k: StoredObject(**v) for k, v in { ({k: v.model_dump() for k, v in written.listed.items()})!r}.items()}}
        def make(pipeline):
            return ArrayReader(Path({str(written.root)!r}), "a", (20, 3, 5), "int8", listed, 8, pipeline)
        def told(call):
            try:
                call()
            except RuntimeError as error:
                return "forked after hdcache was imported" in str(error) and "'spawn' or 'forkserver'" in str(error)
        rust, plain = make("zarrs"), make("zarr")
        before = rust.rows(0, 20)
        child = os.fork()
        if child == 0:
            good = told(lambda: rust.rows(0, 20)) and told(lambda: make("zarrs"))
            os._exit(0 if good and (plain.rows(0, 20) == before).all() else 9)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not (rust.rows(0, 20) == before).all())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_rows_that_are_expected_may_be_missing_until_they_are_read(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with them is said once, by the read."""
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: asked.append(length))
    reader = written.reader()
    reader.expect_rows(3, 11)
    assert len(asked) == 3, "rows 3 to 7 of the first shard are in two chunks, 8 to 10 of the second in one"
    written.files[1].write_bytes(b"short")
    written.files[2].unlink()
    reader.expect_rows(8, 20)
    assert len(asked) == 3
    into: list[Any] = [np.empty(written.row, written.dtype)] * 4
    with pytest.raises(StoreCorrupt, match="5 bytes, expected"):
        reader.copy_rows(8, 12, into)
    with pytest.raises(StoreCorrupt, match="missing"):
        reader.copy_rows(16, 20, into)
    if hasattr(os, "mkfifo"):
        os.mkfifo(written.files[2])
        reader.expect_rows(16, 20)  # opening that would wait for ever
    for pipeline in PIPELINES:
        written.reader(pipeline).expect_rows(0, 8)  # zarr reads as it does
    assert len(asked) == 3


def test_a_writer_goes_on_as_an_earlier_version_began(tmp_path: Path) -> None:
    """With its chunks and its metadata to the byte; what describes another array, or nothing, is not followed."""
    values = numbers("uint8", ROWS, 3, 4)
    card = ArrayCard(shape=(3, 4), dtype="uint8")

    plain = Codec()

    def writer(chunk: int = 8, codec: Codec | None = plain, about: str = "x") -> ShardWriter:
        return ShardWriter(ROWS, card, chunk, SHARD, codec=codec, attributes={"about": about})

    path = tmp_path / "zarr.json"
    for chunk, codec in ((2, Codec(64, 2)), (4, Codec(128)), (8, Codec())):
        earlier = writer(chunk, codec)
        path.write_bytes(earlier.metadata.replace(b'"clevel": 1', b'"clevel": 5'))
        found = writer()
        found.follow(path)
        assert found.metadata == path.read_bytes()
        layout = ShardLayout.of(json.loads(found.metadata))
        assert layout is not None
        assert layout.chunk == chunk
        (tmp_path / "shard").write_bytes(found.encode(0, values[:SHARD]))
        with open(tmp_path / "shard", "rb") as file:
            read = [
                block.copy()
                for _, block in layout.read(file.fileno(), path.with_name("shard").stat().st_size, range(8 // chunk))
            ]
        assert np.array_equal(np.concatenate(read), values[:SHARD])
    others = [
        writer(codec=None).metadata,
        writer(about="y").metadata,
        b"",
        b"{}",
        b"[]",
        b"null",
        writer().metadata[:-9],
    ]
    others += [writer().metadata.replace(b'"chunk_shape": [\n', b'"chunk_shape": [0,\n', 1)]
    for other in others:
        path.write_bytes(other)
        found = writer()
        found.follow(path)
        assert found.metadata == writer().metadata
    found.follow(tmp_path / "nothing there")
    assert found.metadata == writer().metadata

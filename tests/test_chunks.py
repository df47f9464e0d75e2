"""Chunks straight from a shard's file: what zarr reads, or an error; foreign layouts are refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hdcache.arrays import ShardWriter
from hdcache.chunks import ShardLayout
from hdcache.schema import ArrayCard
from hdcache.shards import Codec

ROWS, SHARD, CHUNK = 20, 8, 4
KINDS: list[tuple[str, bool | Codec]] = [
    ("uint8", True),
    ("uint8", Codec(0, 2)),
    ("int16", True),
    ("float16", False),
    ("int8", False),
    ("float32", False),
]


def made(
    dtype: str, codec: bool | Codec, row: tuple[int, ...] = (3, 5)
) -> tuple[dict[str, Any], NDArray[Any], list[bytes]]:
    """Metadata, values and shards of an array as stores have them; the last shard is short."""
    values = np.random.default_rng(0).integers(0, 100, (ROWS, *row)).astype(dtype)
    used = codec if isinstance(codec, Codec) else Codec() if codec else None
    writer = ShardWriter(ROWS, ArrayCard(shape=row, dtype=dtype), CHUNK, SHARD, codec=used, attributes={})  # type: ignore[arg-type]
    shards = [writer.encode(number, values[number * SHARD : (number + 1) * SHARD]) for number in range(3)]
    return json.loads(writer.metadata), values, shards


def numbers(start: int, stop: int) -> list[int]:
    return list(range(start // CHUNK, -(-stop // CHUNK)))


def layout_of(metadata: dict[str, Any]) -> ShardLayout:
    found = ShardLayout.of(metadata)
    assert found is not None
    return found


@contextmanager
def opened(folder: Path, data: bytes) -> Iterator[tuple[int, int]]:
    path = folder / "shard"
    path.write_bytes(data)
    with open(path, "rb") as file:
        yield file.fileno(), len(data)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    shard=st.integers(0, 2),
    span=st.lists(st.integers(0, SHARD), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_any_rows_of_a_shard(
    kind: tuple[str, bool], shard: int, span: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The chunks that hold them, whole, in order, and no other."""
    metadata, values, shards = made(*kind)
    mine = values[shard * SHARD : (shard + 1) * SHARD]
    assume(span[1] <= len(mine))
    with opened(tmp_path_factory.mktemp("any"), shards[shard]) as file:
        found = {first: block.copy() for first, block in layout_of(metadata).read(*file, numbers(*span))}
    assert list(found) == [first for first in range(0, SHARD, CHUNK) if first < span[1] and first + CHUNK > span[0]]
    for first, block in found.items():
        assert block.dtype == values.dtype
        assert np.array_equal(block, mine[first : first + CHUNK])


def test_threads_have_memory_of_their_own(tmp_path: Path) -> None:
    metadata, values, shards = made("uint8", codec=True)
    layout = layout_of(metadata)

    def work(turn: int) -> bool:
        start = turn % 2 * CHUNK
        (_, block), *_ = layout.read(*file, [turn % 2])
        return np.array_equal(block, values[start : start + CHUNK])

    with opened(tmp_path, shards[0]) as file, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def work(metadata: dict[str, Any]) -> None:
        for part in path[:-1]:
            metadata = metadata[part]  # type: ignore[index]
        metadata[path[-1]] = to  # type: ignore[index]

    return work


INNER = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    "foreign",
    [
        change(*INNER, "index_location", to="start"),
        change(*INNER, "chunk_shape", to=[4, 1, 5]),
        change(*INNER, "chunk_shape", to=[3, 3, 5]),
        change(*INNER, "codecs", to=[{"name": "bytes"}]),
        change(*INNER, "codecs", to=[{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}, {"name": "crc32c"}]),
        change(*INNER, "codecs", to=[{"name": "transpose", "configuration": {"order": [0, 2, 1]}}, {"name": "bytes"}, {"name": "crc32c"}]),
        change(*INNER, "codecs", 0, to={"name": "bytes", "configuration": {"endian": "big"}}),
        change(*INNER, "index_codecs", to=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
        change(*INNER, "index_codecs", to=[{"name": "bytes", "configuration": {"endian": "little"}}]),
        change("codecs", to=[{"name": "bytes"}, {"name": "crc32c"}]),
    ],
)  # fmt: skip
def test_other_layouts_are_none_of_ours(foreign: Callable[[dict[str, Any]], None]) -> None:
    metadata, _, _ = made("uint8", codec=True)
    assert ShardLayout.of(metadata) is not None
    changed = copy.deepcopy(metadata)
    foreign(changed)
    assert ShardLayout.of(changed) is None


@pytest.mark.parametrize(("dtype", "codec"), KINDS)
def test_every_flipped_bit_and_every_cut_is_an_error(dtype: str, codec: bool, tmp_path: Path) -> None:
    """300 flipped bits and all lengths that miss a little, anywhere in a shard."""
    metadata, _, shards = made(dtype, codec, (3,))
    layout, data = layout_of(metadata), shards[0]
    damaged = [data[:length] for length in (0, 10, len(data) // 2, len(data) - 1)]
    for place in np.random.default_rng(1).integers(0, 8 * len(data), 300).tolist():
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        damaged.append(bytes(broken))
    for wrong in damaged:
        with opened(tmp_path, wrong) as file, pytest.raises(ValueError, match=r"checksum|shorter|outside"):
            list(layout.read(*file, [0, 1]))


def forged(chunk: bytes) -> bytes:
    """A shard of two equal chunks whose checksums are all right."""

    def sealed(data: bytes) -> bytes:
        return data + google_crc32c.value(data).to_bytes(4, "little")

    chunk = sealed(chunk)
    index = np.array([[0, len(chunk)], [len(chunk), len(chunk)]], "<u8")
    return 2 * chunk + sealed(index.tobytes())


@pytest.mark.parametrize("size", [1, 59, 61, 600])
def test_a_chunk_of_another_size_is_an_error(size: int, tmp_path: Path) -> None:
    """It must neither leave rows as they were before nor write past them."""
    metadata, _, _ = made("uint8", codec=True)
    packed = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE).encode(np.zeros(size, np.uint8))
    with opened(tmp_path, forged(packed)) as file, pytest.raises(ValueError, match="a chunk of another size"):
        list(layout_of(metadata).read(*file, [0]))
    plain, _, _ = made("uint8", codec=False)
    with opened(tmp_path, forged(bytes(size))) as file, pytest.raises(ValueError, match="a chunk of another size"):
        list(layout_of(plain).read(*file, [0]))


@pytest.mark.parametrize("length", [0, 3, 15, 16, 40])
@pytest.mark.parametrize("flags", [0x00, 0x02, 0x04, 0x12])
def test_a_chunk_that_says_it_is_longer_is_an_error(length: int, flags: int, tmp_path: Path) -> None:
    """blosc believes its header: of a chunk that was "merely copied" it would read what lies behind it in memory."""
    metadata, _, _ = made("uint8", codec=True)
    size = CHUNK * 15
    header = bytes([2, 1, flags, 1]) + b"".join(n.to_bytes(4, "little") for n in (size, size, 16 + size))
    chunk = (header + bytes(64))[:length]
    message = "another length than its own" if length >= 8 else "a chunk of another size"
    with opened(tmp_path, forged(chunk)) as file, pytest.raises(ValueError, match=f"{message}|outside of the shard"):
        list(layout_of(metadata).read(*file, [0]))


@pytest.mark.parametrize("promised", [0, 59, 61, 2**31 - 1, 2**32 - 1])
def test_what_a_chunk_promises_is_seen_before_it_is_decoded(promised: int, tmp_path: Path) -> None:
    """Whoever decodes it would make all of that first. The bytes of the rows themselves are not looked at."""
    metadata, _, shards = made("uint8", codec=True)
    layout, data = layout_of(metadata), shards[0]
    with opened(tmp_path, data) as file:
        layout.check(*file, [0, 1])
    index = np.frombuffer(data[-36:-4], "<u8").reshape(-1, 2).tolist()
    chunk = data[index[0][0] : sum(index[0]) - 4]
    with opened(tmp_path, forged(chunk)) as file:
        layout.check(*file, [0, 1])
    with (
        opened(tmp_path, forged(chunk[:4] + promised.to_bytes(4, "little") + chunk[8:])) as file,
        pytest.raises(ValueError, match="a chunk of another size"),
    ):
        layout.check(*file, [0, 1])
    with opened(tmp_path, forged(chunk + b"x")) as file, pytest.raises(ValueError, match="another length than its own"):
        layout.check(*file, [1])


@pytest.mark.parametrize("places", [[(0, 60), (0, 60)], [(0, 60), (59, 60)], [(60, 60), (0, 60)], [(0, 60), (90, 40)]])
def test_chunks_that_share_bytes_are_an_error(places: list[tuple[int, int]], tmp_path: Path) -> None:
    """With each other, or with the index."""
    metadata, _, _ = made("uint8", codec=False)
    table = np.array(places, "<u8").tobytes()
    data = bytes(120) + table + google_crc32c.value(table).to_bytes(4, "little")
    with opened(tmp_path, data) as file, pytest.raises(ValueError, match=r"inside of another|outside of the shard"):
        layout_of(metadata).check(*file, [0, 1])


def test_a_chunk_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    """Past the end of the array; zarr would read zeros."""
    metadata, _, shards = made("uint8", codec=True)
    with opened(tmp_path, shards[2]) as file, pytest.raises(ValueError, match="places chunk 1 outside of the shard"):
        list(layout_of(metadata).read(*file, [0, 1]))


def test_an_index_that_points_outside_is_an_error(tmp_path: Path) -> None:
    metadata, _, _ = made("uint8", codec=True)
    index = np.full((2, 2), 2**64 - 1, "<u8").tobytes()
    data = index + google_crc32c.value(index).to_bytes(4, "little")
    with opened(tmp_path, data) as file, pytest.raises(ValueError, match="places chunk 0 outside of the shard"):
        list(layout_of(metadata).read(*file, [0]))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    metadata, _, shards = made("uint8", codec=True)
    with opened(tmp_path, shards[0]) as (file, size):
        os.truncate(tmp_path / "shard", size - 8)
        with pytest.raises(ValueError, match="the file ends early"):
            list(layout_of(metadata).read(file, size, [0]))


def test_chunks_that_are_expected_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of their bytes, and no other chunk's; a damaged index is refused, as when they are read."""
    metadata, _, shards = made("uint8", codec=True)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: asked.append((offset, length)))
    layout = layout_of(metadata)
    with opened(tmp_path, shards[0]) as file:
        layout.expect(*file, [0, 1])
        index = np.frombuffer(shards[0][-16 * 2 - 4 : -4], "<u8").reshape(-1, 2)
        assert asked == [tuple(place) for place in index.tolist()]
    with opened(tmp_path, flipped(shards[0], -6)) as file, pytest.raises(ValueError, match="checksum"):
        layout.expect(*file, [0])


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def test_a_system_that_gives_less_than_it_is_asked_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, values, shards = made("int16", True)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: pread(file, max(1, length // 2), offset))
    with opened(tmp_path, shards[0]) as file:
        found = [block.copy() for _, block in layout_of(metadata).read(*file, [0, 1])]
    assert np.array_equal(np.concatenate(found), values[:SHARD])
    with opened(tmp_path, shards[0]) as (number, size):
        os.truncate(tmp_path / "shard", size - 3)
        with pytest.raises(ValueError, match="ends early"):
            list(layout_of(metadata).read(number, size, [0]))

"""Shards put together here are, to the byte, those that zarr-python writes."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from hdcache.shards import CHUNK_ROWS, LEVEL, Codec, chunk_rows, rows_together, shard_bytes

DTYPES = ("uint8", "int8", "uint16", "int16", "float16", "int32", "float32")


def by_zarr(values: np.ndarray, chunk: int, shard: int, used: Codec | None) -> list[bytes]:
    """Every shard of an array, written by zarr-python."""
    objects: dict[str, Any] = {}
    codec = [] if used is None else [
        BloscCodec(
            cname="zstd", clevel=LEVEL, shuffle="bitshuffle", typesize=used.typesize or values.dtype.itemsize,
            blocksize=used.block_bytes,
        )
    ]  # fmt: skip
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        array = zarr.create_array(
            MemoryStore(objects), shape=values.shape, dtype=values.dtype, chunks=(chunk, *values.shape[1:]),
            shards=(shard, *values.shape[1:]), compressors=[*codec, Crc32cCodec()], fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."}, config={"write_empty_chunks": True},
        )  # fmt: skip
        array[...] = values
    zeros = "".join(".0" for _ in values.shape[1:])
    return [objects[f"c.{number}{zeros}"].to_bytes() for number in range(-(-len(values) // shard))]


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    chunk=st.integers(1, 8),
    count=st.integers(1, 4),
    row=st.sampled_from([(), (3,), (5, 7), (2, 3, 4)]),
    codec=st.sampled_from([None, Codec(), Codec(1 << 20), Codec(1 << 20, 2), Codec(0, 2)]),
    zeros=st.booleans(),
)
def test_bytes_are_those_of_zarr_python(
    dtype: str, rows: int, chunk: int, count: int, row: tuple[int, ...], codec: Codec | None, zeros: bool
) -> None:
    values = np.random.default_rng(rows).integers(0, 1 if zeros else 50, (rows, *row)).astype(dtype)
    blosc, shard = None if codec is None else codec.blosc(values.dtype.itemsize), chunk * count
    found = [shard_bytes(values[start : start + shard], chunk, count, blosc) for start in range(0, rows, shard)]
    assert found == by_zarr(values, chunk, shard, codec)


@pytest.mark.parametrize("codec", [None, numcodecs.Blosc("zstd", LEVEL, numcodecs.Blosc.BITSHUFFLE)])
def test_bytes_do_not_depend_on_threads_or_memory_order(codec: numcodecs.Blosc | None) -> None:
    values = np.random.default_rng(0).integers(0, 9, (32, 64, 48)).astype(np.uint8)
    expected = shard_bytes(values, 8, 4, codec)
    with ThreadPoolExecutor(4) as pool:
        assert shard_bytes(values, 8, 4, codec, pool.map) == expected
    assert shard_bytes(np.asfortranarray(values), 8, 4, codec) == expected
    assert shard_bytes(values.astype(">u2"), 8, 4, codec) == shard_bytes(values.astype("<u2"), 8, 4, codec)


@given(shard=st.integers(1, 4096), row_bytes=st.integers(0, 1 << 24))
def test_chunks_divide_shards_and_runs(shard: int, row_bytes: int) -> None:
    """A run of an epoch then never decodes a part of a chunk; chunks of 8, as older stores have them, stay as they are."""
    chunk = chunk_rows(shard)
    assert shard % chunk == 0
    assert rows_together(min(chunk, 8), row_bytes, None) == min(chunk, 8)
    if shard % 8 == 0:
        rows = rows_together(chunk, row_bytes, Codec())
        assert chunk % rows == CHUNK_ROWS % chunk == 0
        assert rows == 8 or rows * row_bytes <= 8 << 20
        assert rows == chunk == math.gcd(shard, CHUNK_ROWS) or 2 * rows * row_bytes > 8 << 20
        assert rows_together(chunk, row_bytes, None) == 8

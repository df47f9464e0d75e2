"""Shards put together here are, to the byte, those that zarr-python writes."""

from __future__ import annotations

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

from hdcache.shards import LEVEL, shard_bytes

DTYPES = ("uint8", "int8", "uint16", "int16", "float16", "int32", "float32")


def by_zarr(values: np.ndarray, chunk: int, shard: int, block_bytes: int | None) -> list[bytes]:
    """Every shard of an array, written by zarr-python; ``block_bytes`` None: no codec."""
    objects: dict[str, Any] = {}
    size = values.dtype.itemsize
    codec = [] if block_bytes is None else [
        BloscCodec(cname="zstd", clevel=LEVEL, shuffle="bitshuffle", typesize=size, blocksize=block_bytes)
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


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    chunk=st.integers(1, 8),
    count=st.integers(1, 4),
    row=st.sampled_from([(), (3,), (5, 7), (2, 3, 4)]),
    block_bytes=st.sampled_from([None, 0, 1 << 20]),
    zeros=st.booleans(),
)
def test_bytes_are_those_of_zarr_python(
    dtype: str, rows: int, chunk: int, count: int, row: tuple[int, ...], block_bytes: int | None, zeros: bool
) -> None:
    values = np.random.default_rng(rows).integers(0, 1 if zeros else 50, (rows, *row)).astype(dtype)
    codec = None if block_bytes is None else numcodecs.Blosc("zstd", LEVEL, numcodecs.Blosc.BITSHUFFLE, block_bytes)
    shard = chunk * count
    found = [shard_bytes(values[start : start + shard], chunk, count, codec) for start in range(0, rows, shard)]
    assert found == by_zarr(values, chunk, shard, block_bytes)


@pytest.mark.parametrize("codec", [None, numcodecs.Blosc("zstd", LEVEL, numcodecs.Blosc.BITSHUFFLE)])
def test_bytes_do_not_depend_on_threads_or_memory_order(codec: numcodecs.Blosc | None) -> None:
    values = np.random.default_rng(0).integers(0, 9, (32, 64, 48)).astype(np.uint8)
    expected = shard_bytes(values, 8, 4, codec)
    with ThreadPoolExecutor(4) as pool:
        assert shard_bytes(values, 8, 4, codec, pool.map) == expected
    assert shard_bytes(np.asfortranarray(values), 8, 4, codec) == expected
    assert shard_bytes(values.astype(">u2"), 8, 4, codec) == shard_bytes(values.astype("<u2"), 8, 4, codec)

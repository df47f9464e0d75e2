"""What a row is made of, and what compresses it."""

from __future__ import annotations

import numpy as np
import pytest

from hdcache.row_arrays import codec_of, compresses, mask_array, row_bytes
from hdcache.schema import ITEM_BYTES, ArrayCard
from hdcache.shards import Codec
from hdcache.store import Store
from small_store import IDS, make_tap, store_card, write_record


def test_what_is_worth_a_codec() -> None:
    """Integer codes are; floats and the prefix are stored raw."""
    assert [compresses(dtype, "codes") for dtype in ("int8", "int16", "uint8", "uint16", "float16", "float32")] == [
        True, True, True, False, False, False
    ]  # fmt: skip
    assert not compresses("uint8", "prefix")


def test_the_codec_is_the_one_of_the_record() -> None:
    """Two bytes at a time are for narrow codes alone: wide ones are two bytes already."""
    tap = make_tap("final", "klt", wide=2, block_bytes=1 << 16, typesize=2).card
    assert {name: codec_of(tap, name) for name in tap.arrays} == {
        "codes": Codec(1 << 16, 2), "wide": Codec(1 << 16, 0), "prefix": None
    }  # fmt: skip
    assert codec_of(make_tap("final", "fp16").card, "values") is None


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_bytes_of_a_row_are_those_of_its_array(dtype: str) -> None:
    for shape in ((), (7,), (3, 5), (2, 3, 4)):
        card = ArrayCard(shape=shape, dtype=dtype)  # type: ignore[arg-type]
        assert row_bytes(card) == np.zeros(shape, dtype).nbytes


def test_a_mask_has_one_bit_for_each_token(tmp_path: object) -> None:
    store = Store.create(f"{tmp_path}/s", store_card(), IDS, np.zeros(len(IDS), np.int64))
    card = write_record(store, "t", [make_tap("final", "fp32")]).card
    for grid, size in (((3, 3), 2), ((4, 4), 2), ((1, 1), 1), ((14, 14), 25)):
        assert mask_array(card.model_copy(update={"grid": grid})) == ArrayCard(shape=(size,), dtype="uint8")

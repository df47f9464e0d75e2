"""Files for other libraries, read back by them: safetensors, tarfile, Pillow."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from hdcache.errors import UsageError
from hdcache.sharing import layouts
from hdcache.sharing.layouts import card_of, png, safetensors_parts, safetensors_size, tar_parts, tar_size

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
VALUES = st.sampled_from(["float16", "float32", "uint8", "int32", "int64"]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"))))
def test_safetensors_reads_what_was_written(values: dict[str, Any], metadata: dict[str, str]) -> None:
    """Names, shapes, bits and metadata come back; the size is known before; the order of the names is no matter."""
    data = b"".join(safetensors_parts(values, metadata))
    assert len(data) == safetensors_size({name: card_of(value) for name, value in values.items()}, metadata)
    assert data == b"".join(safetensors_parts(dict(reversed(values.items())), metadata))
    found = safetensors.numpy.load(data)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert found[name].tobytes() == value.tobytes()


def test_metadata_is_read_from_a_file_and_arrays_begin_where_their_numbers_may(tmp_path: Any) -> None:
    values = {"odd": np.arange(3, dtype=np.uint8), "wide": np.arange(2, dtype=np.int64)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(safetensors_parts(values, {"ids": '["ünï"]'})))
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"ids": '["ünï"]'}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.read_bytes()[8 + header :] == values["wide"].tobytes() + values["odd"].tobytes()


def test_bits_of_bfloat16_are_read_as_such() -> None:
    value = torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16)
    data = b"".join(safetensors_parts({"x": value.view(torch.int16).numpy().view(np.uint16)}, {}))
    assert torch.equal(safetensors.torch.load(data)["x"], value)


def test_an_array_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"x": np.arange(100, dtype=np.int32).reshape(4, 25).T}
    whole = b"".join(safetensors_parts(values, {}))
    monkeypatch.setattr(layouts, "PIECE", 64)
    parts = list(safetensors_parts(values, {}))
    assert (b"".join(parts), max(map(len, parts[1:]))) == (whole, 64)
    assert np.array_equal(safetensors.numpy.load(whole)["x"], values["x"])


def test_a_header_that_no_reader_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "HEADER_LIMIT", 99)
    with pytest.raises(
        UsageError, match=r"a header of 112 bytes, mostly ids, is more than the 99 of safetensors; choose"
    ):
        safetensors_size({}, {"ids": "x" * 80})


@given(st.lists(st.tuples(st.text("ab.@-_09", min_size=1, max_size=130), st.binary(max_size=1200)), max_size=6))
def test_tarfile_reads_what_was_written(members: list[tuple[str, bytes]]) -> None:
    """Names of any length, contents and their order; the size is known before; no time and no owner."""
    data = b"".join(tar_parts(members))
    assert len(data) == tar_size((name, len(content)) for name, content in members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.getmembers()
        assert [member.name for member in found] == [name for name, _ in members]
        assert [tar.extractfile(member).read() for member in found] == [content for _, content in members]  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in found} <= {
            (0, 0, 0, "", 0o644)
        }


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), pixels)

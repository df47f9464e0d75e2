"""Decoding: every rule at the top of hdcache/pixels.py, and every way in which an image can be bad."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from hdcache.errors import UnreadableImage, UsageError
from hdcache.pixels import decode, digest


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(source: Any) -> np.ndarray:
    image = decode(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    image = Image.fromarray(noise(9, 7, 3))
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(image, form, **options)), np.asarray(image))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(8, 16, 3)), form, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image = decode(data)
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert image.size == ((8, 16) if orientation >= 5 else (16, 8))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_flattened_over_white(mode: str) -> None:
    colour = (10, 20, 30, 0) if mode == "RGBA" else (10, 0)
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), (*colour[:-1], 255))
    clear, solid = pixels(encode(image))[0]
    assert tuple(clear) == (255, 255, 255)
    assert tuple(solid) == ((10, 20, 30) if mode == "RGBA" else (10, 10, 10))


def test_half_transparent_black_over_white_is_mid_grey() -> None:
    assert pixels(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(form: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encode(image, form, transparency=0))[0].tolist() == [[255, 255, 255], [0, 100, 0]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9))])
def test_a_transparent_colour_becomes_white(mode: str, colour: Any) -> None:
    assert pixels(encode(Image.new(mode, (1, 1), colour), transparency=colour)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "form"), [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LAB", "TIFF")]
)
def test_other_modes_go_through_convert(mode: str, form: str) -> None:
    data = encode(Image.new(mode, (8, 8)), form)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    assert pixels(encode(Image.fromarray(values), form))[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_16_bit_transparent_value_becomes_white() -> None:
    values = np.array([[300, 30000]], dtype=np.uint16)
    assert pixels(encode(Image.fromarray(values), transparency=300))[0, :, 0].tolist() == [255, 117]


def test_32_bit_integers_within_16_bits_are_scaled_and_others_refused() -> None:
    assert pixels(encode(Image.fromarray(np.array([[65535, 0]], np.int32)), "TIFF"))[0, :, 0].tolist() == [255, 0]
    with pytest.raises(UnreadableImage, match=r"span -1..70000, outside 0..65535"):
        decode(encode(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"))


def test_floating_point_is_refused() -> None:
    with pytest.raises(UnreadableImage, match="floating-point pixels"):
        decode(encode(Image.new("F", (2, 2)), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
def test_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_bytes_are_refused(form: str, share: float) -> None:
    data = encode(Image.fromarray(noise(64, 64, 3)), form)
    with pytest.raises(UnreadableImage):
        decode(data[: int(len(data) * share)])


@settings(max_examples=60)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"])
)
def test_any_bytes_decode_or_are_unreadable(tail: bytes, magic: bytes) -> None:
    try:
        assert decode(magic + tail).mode == "RGB"
    except UnreadableImage as error:
        reason = str(error)
    else:
        reason = ""
    assert "0x" not in reason
    assert len(reason) < 300


def test_empty_bytes_unknown_formats_and_corrupt_metadata() -> None:
    with pytest.raises(UnreadableImage, match="empty"):
        decode(b"")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        decode(b"<svg></svg>")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    broken = encode(Image.new("RGB", (3, 2)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(broken).size == (3, 2)


def test_pixel_limit_is_pillows_error_limit_and_its_warning_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for form in ("PNG", "TIFF", "GIF"):
        assert decode(encode(Image.new("L", (15, 10)), form)).size == (15, 10)
        with pytest.raises(UnreadableImage, match="too many pixels"):
            decode(encode(Image.new("L", (21, 10)), form))
    before = list(warnings.filters)
    decode(encode(Image.new("L", (15, 10))))
    assert warnings.filters == before


def test_a_process_that_allows_truncated_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES is set"):
        decode(encode(Image.new("L", (2, 2))))


def test_memory_errors_are_not_a_property_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode(b"x")


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    array.setflags(write=False)
    result = pixels(array)
    assert result.shape == (3, 5, 3)
    if shape[2:] == (4,):
        array = np.concatenate([array[..., :3], np.full((3, 5, 1), 255, np.uint8)], axis=2)
        result = pixels(array)
    np.testing.assert_array_equal(result, np.broadcast_to(array.reshape(3, 5, -1)[..., :3], (3, 5, 3)))


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_bad_arrays_are_refused(array: Any) -> None:
    with pytest.raises(UnreadableImage, match="expected uint8"):
        decode(array)


def test_decoding_is_the_same_in_many_threads() -> None:
    datas = [encode(Image.fromarray(noise(40, 30 + i, 3)), "JPEG") for i in range(8)]
    serial = [decode(data).tobytes() for data in datas]
    with ThreadPoolExecutor(8) as pool:
        assert [image.tobytes() for image in pool.map(decode, datas * 4)] == serial * 4


def test_digest_knows_bytes_shape_and_not_memory_layout() -> None:
    array = noise(4, 6)
    assert len(digest(b"x")) == 32
    assert digest(array) == digest(np.asfortranarray(array))
    assert len({digest(array), digest(array.reshape(6, 4)), digest(array.tobytes()), digest(array[:, ::-1])}) == 4

"""From the raw bytes or array of one sample to RGB pixels, by one stated set of rules.

- EXIF orientation is applied; metadata that cannot be parsed counts as upright, since the pixels are intact.
- Alpha in any form (RGBA, LA, PA, a transparent colour or palette entry) is flattened over white.
- 16-bit greyscale becomes 8-bit by ``round(value / 257)``; 16-bit colour keeps its high byte (Pillow).
- Palette, 1-bit, greyscale, CMYK, YCCK and Lab go through Pillow's ``convert("RGB")``; ICC profiles are ignored.
- Of several frames or pages the first is taken.
- Nothing is guessed: truncated, corrupt or oversized input raises :class:`UnreadableImage`. Damage that keeps a
  JPEG's stream decodable cannot be noticed.

Decoding keeps no state and can run in any number of threads. Files whose pixels were decoded by different
builds of libjpeg may differ by a grey level; Pillow's version is part of a store's ``written_with``.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from hdcache.errors import UnreadableImage, UsageError

Source = bytes | NDArray[np.uint8]
"""One sample as it lies in its data set: encoded image bytes, or uint8 pixels [H, W] or [H, W, 1 | 3 | 4]."""

# A closed list keeps Pillow from handing untrusted bytes to PostScript and other rarely used parsers.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
EXIF_ORIENTATION = 0x0112
PILLOW = r"PIL\."
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Proven(bytes):
    """Encoded bytes that were held to their sha256 when they were read, so that nobody need compute it again."""

    sha256: bytes


def digest(source: Source) -> bytes:
    """sha256 (32 bytes) of encoded bytes, or of an array's dtype, shape and bytes."""
    if isinstance(source, Proven):
        return source.sha256
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    hasher = hashlib.sha256(f"{source.dtype.str} {source.shape}\n".encode())
    hasher.update(np.ascontiguousarray(source).tobytes())
    return hasher.digest()


def decode(source: Source) -> Image.Image:
    """The image in ``source`` as a Pillow image of mode RGB, by the rules at the top of this module.

    Raises :class:`UnreadableImage` with a short reason for anything that is not a whole, sane image, and
    :class:`UsageError` if the process allows truncated images (``ImageFile.LOAD_TRUNCATED_IMAGES``).
    """
    if not isinstance(source, bytes):
        return _from_array(source)
    if not source:
        raise UnreadableImage("the file is empty (0 bytes)")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so broken images would be decoded as if"
            " they were whole; set it to False"
        )
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(source), formats=FORMATS) as image:
            return rgb(image)
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"too many pixels: {_short(error)}") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise nearly every class of exception on bad bytes.
        raise UnreadableImage(f"{type(error).__name__}: {_short(error)}") from None


def rgb(image: Image.Image) -> Image.Image:
    """``image`` upright, without alpha, in mode RGB; :class:`UnreadableImage` if its values have no 8-bit meaning."""
    image.load()
    image = _upright(image)
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels (mode F) have no fixed range; convert the file to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        result = _from_16_bit(image)
    elif image.has_transparency_data:
        result = _over_white(image.convert("RGBA"))
    elif isinstance(image, ImageFile.ImageFile) and image.mode == "RGB":
        result = image  # read from a file for this call alone: no need for the copy that convert() makes
    else:
        result = image.convert("RGB")
    # Whoever applied the orientation left in here would turn the image twice.
    result.info.clear()
    return result


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF block, which fails on metadata that is merely unusual.
    try:
        method = TRANSPOSE.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return image
    return image if method is None else image.transpose(method)


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values: NDArray[Any] = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImage(f"32-bit integer pixels span {low}..{high}, outside 0..65535; convert to 8 or 16 bits")
    grey = ((values + 128) // 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def check_array(source: NDArray[np.uint8]) -> None:
    """:class:`UnreadableImage` for an array that is no image."""
    shape = source.shape
    right = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if source.dtype != np.uint8 or not right or not source.size:
        raise UnreadableImage(f"array {source.dtype} {list(shape)}; expected uint8 [H, W] or [H, W, 1 | 3 | 4]")


def _from_array(source: NDArray[np.uint8]) -> Image.Image:
    check_array(source)
    pixels = np.ascontiguousarray(source[..., 0] if source.shape[2:] == (1,) else source)
    image = Image.fromarray(pixels)
    return _over_white(image) if image.mode == "RGBA" else image.convert("RGB")


def _silence_pillow() -> None:
    # Pillow warns about odd metadata and above MAX_IMAGE_PIXELS (it refuses above twice that). Whether an image is
    # readable must not depend on the process's warning filters, and warnings.catch_warnings is not thread-safe; a
    # filter for warnings from inside Pillow's own modules, added once and left in place, is.
    if not any(entry[0] == "ignore" and getattr(entry[3], "pattern", None) == PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOW)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return re.sub(r"<.*? at 0x[0-9a-f]+>", "<...>", text)[:200]

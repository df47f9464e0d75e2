"""Decoders of images against Pillow, encodings for shrunk images, and samples read from a store against files.

    python benchmarks/decode.py --out DIR [--images DATA] [--quick]

Needs none of the other decoders; those that are installed (torchvision, torchcodec, opencv-python-headless, simplejpeg) are
measured: on their own, and on the whole way that a sample goes, from its bytes to the uint8 planes of a cropped and resized
view, with Pillow's resize for all. Contenders take turns, and the best of several turns counts (of one thread, by the time that it computed). Images are noise with the
spectrum of photographs, or those of --images. "differs" is the largest difference of a decoded level from Pillow's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.datasets import open_dataset, store_dataset
from hdcache.extract.opening import open_or_create
from hdcache.extract.packing import pack
from hdcache.packed import packed_order
from hdcache.pixels import decode, digest
from hdcache.progress import size
from hdcache.samples import OpenedSample
from hdcache.schema import Preprocessing
from hdcache.shrinking import QUALITY

Decoder = Callable[[bytes], Any]
"""From encoded bytes to a Pillow image or uint8 [H, W, 3]."""
VIEW = Preprocessing(size=224)
PACKAGES = ("hdcache", "numpy", "opencv-python-headless", "pillow", "simplejpeg", "torch", "torchcodec", "torchvision")


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose amplitudes fall with the frequency, as those of photographs do."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    light, *colours = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall, s=(height, width)) for _ in range(4)
    )
    channels = np.stack([light / light.std() + 0.4 * colour / colour.std() for colour in colours], -1)
    return Image.fromarray((118 + 55 * channels).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def draft(source: bytes) -> Image.Image:
    """Pillow, letting the JPEG decoder halve the image where it stays large enough: other pixels."""
    image = Image.open(io.BytesIO(source))
    image.draft("RGB", (VIEW.size, VIEW.size))
    return image.convert("RGB")


def decoders(form: str) -> dict[str, Decoder]:
    """Those that are installed, ours first."""
    found: dict[str, Decoder] = {"Pillow (ours)": decode}
    if form == "JPEG":
        found["Pillow, scaled decoding"] = draft
    try:
        import torch
        from torchvision import io as vision

        torch.set_num_threads(1)
        read = {"JPEG": vision.decode_jpeg, "PNG": vision.decode_png}[form]

        def torchvision(source: bytes) -> NDArray[np.uint8]:
            data = torch.frombuffer(bytearray(source), dtype=torch.uint8)
            return np.asarray(read(data, vision.ImageReadMode.RGB).permute(1, 2, 0))

        found["torchvision.io"] = torchvision
        from torchcodec import decoders as codec

        reader = {"JPEG": codec.decode_jpeg, "PNG": codec.decode_png}[form]
        found["torchcodec"] = lambda source: np.asarray(reader(source).permute(1, 2, 0))
    except (ImportError, RuntimeError, AttributeError):
        pass
    try:
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda source: cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_COLOR_RGB)
    except ImportError:
        pass
    try:
        import simplejpeg

        if form == "JPEG":
            found["simplejpeg"] = lambda source: simplejpeg.decode_jpeg(source, "RGB")
    except ImportError:
        pass
    return found


def whole_way(read: Decoder, source: bytes) -> NDArray[np.uint8]:
    """To the planes of a view that is most of the image, flipped."""
    image = read(source)
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    box = (width // 8, height // 16, width * 3 // 4, height * 7 // 8)
    if not isinstance(image, Image.Image):
        # The crop alone becomes a Pillow image.
        left, top, wide, high = box
        image, box = Image.fromarray(image[top : top + high, left : left + wide]), (0, 0, wide, high)
    return OpenedSample((image,), box, True, b"").pixels(VIEW)


def rates(
    work: Mapping[str, Callable[[bytes], Any]], sources: Sequence[bytes], repeats: int, threads: int
) -> dict[str, float]:
    """Best images/s of each contender; with one thread, per second that it computed."""
    clock = time.process_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(work, 0.0)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            for name, do in work.items():
                began = clock()
                list(pool.map(do, sources)) if threads > 1 else [do(source) for source in sources]
                best[name] = max(best[name], len(sources) / (clock() - began))
    return best


def compare_decoders(sources: Sequence[bytes], form: str, repeats: int) -> dict[str, dict[str, float]]:
    """Decoder -> its rates with one thread and two, alone and on the whole way, and how its pixels differ."""
    found = decoders(form)
    whole: dict[str, Callable[[bytes], Any]] = {
        name: (lambda source, read=read: whole_way(read, source)) for name, read in found.items()
    }
    alone = rates(found, sources, repeats, 1)
    ways = {threads: rates(whole, sources, repeats, threads) for threads in (1, 2)}
    result = {}
    for name, read in found.items():
        ours = [np.asarray(decode(source)).astype(int) for source in sources[:32]]
        theirs = [np.asarray(read(source)).astype(int) for source in sources[:32]]
        same = all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
        apart = max(int(abs(one - other).max()) for one, other in zip(ours, theirs, strict=True)) if same else -1
        result[name] = {"decode": alone[name], "view": ways[1][name], "view_2_threads": ways[2][name], "differs": apart}
    return result


def compare_encodings(images: Sequence[Image.Image], repeats: int) -> dict[str, dict[str, float]]:
    """Encoding -> bytes an image, mean error in levels, images/s to encode and to decode."""
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        f"JPEG {QUALITY} 4:4:4 (ours)": ("JPEG", {"quality": QUALITY, "subsampling": 0}),
        f"JPEG {QUALITY} 4:4:4, Huffman tables of its own": ("JPEG", {"quality": QUALITY, "subsampling": 0, "optimize": True}),
        "JPEG 90 4:2:0": ("JPEG", {"quality": 90}),
        "WebP 95": ("WEBP", {"quality": 95}),
        "WebP lossless": ("WEBP", {"lossless": True}),
        "PNG": ("PNG", {}),
    }  # fmt: skip
    result = {}
    for name, (form, options) in forms.items():
        made: list[bytes] = []
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            made = [encoded(image, form, **options) for image in images]
            seconds.append(time.perf_counter() - began)
        error = [
            np.abs(np.asarray(decode(m)).astype(int) - np.asarray(i)).mean() for m, i in zip(made, images, strict=True)
        ]
        result[name] = {
            "bytes": sum(map(len, made)) / len(made),
            "error": float(np.mean(error)),
            "encode": len(images) / min(seconds),
            "decode": rates({name: decode}, made, repeats, 1)[name],
        }
    return result


def forget(folder: Path) -> None:
    """Drop what the system keeps of a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def compare_reading(sources: Sequence[bytes], repeats: int, folder: Path) -> dict[str, dict[str, float]]:
    """Samples/s, with their sha256 but without decoding, of a folder of files and of a store that keeps them, in the order of an epoch."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        for number, source in enumerate(sources):
            path = root / "files" / f"{number % 10}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
        dataset, store = open_or_create(f"folder:{root}/files", root / "store", None, 0, 256)
        began = time.perf_counter()
        pack(store, dataset, threads=2)
        packing = len(sources) / (time.perf_counter() - began)
        order = packed_order(store).reshape(-1, 32 if len(sources) % 32 == 0 else 1)
        order = np.random.default_rng(0).permutation(order).ravel()
        shuffled = np.random.default_rng(1).permutation(order)
        contenders = {"files": open_dataset(f"folder:{root}/files"), "store (ours)": store_dataset(store)}
        best: dict[str, dict[str, float]] = {name: {} for name in contenders}
        for _ in range(repeats):
            for cold in (False, True):
                for name, found in contenders.items():
                    for how, rows in (("runs of 32 rows of view 0", order), ("another view", shuffled)):
                        if cold:
                            forget(root)
                        began = time.perf_counter()
                        with ThreadPoolExecutor(2) as pool:
                            list(pool.map(lambda row, read=found.read: digest(read(dataset.ids[row])), rows))
                        rate = len(rows) / (time.perf_counter() - began)
                        key = f"{'cold' if cold else 'warm'}, {how}"
                        best[name][key] = max(best[name].get(key, 0), rate)
        best["store (ours)"]["made"] = packing
        return best


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="DIR/decode.json gets the figures")
    parser.add_argument("--images", help="data set whose images are used, in place of noise")
    parser.add_argument("--count", type=int, default=200, help="images of each kind")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="48 images, 3 turns")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    count, repeats = (48, 3) if settings.quick else (settings.count, settings.repeats)
    if settings.images:
        data = open_dataset(settings.images)
        images = [decode(data.read(name)) for name in data.ids[:: max(1, len(data.ids) // count)][:count]]
    else:
        images = [photograph(500, 375, seed) for seed in range(count)]
    small = [i.resize((round(i.width * 256 / min(i.size)), round(i.height * 256 / min(i.size))), Image.Resampling.LANCZOS) for i in images]  # fmt: skip
    kinds: dict[str, tuple[str, list[bytes]]] = {
        "JPEG, as it came": ("JPEG", [encoded(image, "JPEG", quality=90) for image in images]),
        "JPEG, shorter side 256": ("JPEG", [encoded(image, "JPEG", quality=QUALITY, subsampling=0) for image in small]),
        "PNG, 64 px": ("PNG", [encoded(image.resize((64, 64)), "PNG") for image in images]),
    }
    figures: dict[str, Any] = {"versions": versions(), "images": settings.images or "noise", "decoders": {}}
    for kind, (form, sources) in kinds.items():
        found = compare_decoders(sources, form, repeats)
        figures["decoders"][kind] = found
        ours = found["Pillow (ours)"]
        table(
            f"{kind}, {size(sum(map(len, sources)) / len(sources))} an image",
            ("decoder", "decode, images/s", "decode, crop, resize", "of ours", "two threads", "of ours", "differs"),
            [
                (
                    name, f"{row['decode']:,.0f}", f"{row['view']:,.0f}", f"{row['view'] / ours['view']:.2f}",
                    f"{row['view_2_threads']:,.0f}", f"{row['view_2_threads'] / ours['view_2_threads']:.2f}",
                    "other size" if row["differs"] < 0 else f"{row['differs']:.0f}",
                )
                for name, row in found.items()
            ],
        )  # fmt: skip
    figures["encodings"] = compare_encodings(small[:16], min(repeats, 2))
    table(
        "Images shrunk to a shorter side of 256",
        ("encoding", "an image", "error, levels of 256", "encode, images/s", "decode, images/s"),
        [
            (name, size(row["bytes"]), f"{row['error']:.2f}", f"{row['encode']:,.0f}", f"{row['decode']:,.0f}")
            for name, row in figures["encodings"].items()
        ],
    )
    figures["reading"] = compare_reading(
        kinds["JPEG, as it came"][1] * (2 if settings.quick else 8), repeats, settings.out
    )
    ways = list(figures["reading"]["files"])
    table(
        "Reading the bytes of samples and their sha256, two threads, samples/s",
        ("from", *ways),
        [(name, *(f"{row[way]:,.0f}" for way in ways)) for name, row in figures["reading"].items()],
    )
    print(f"\nKeeping them in a store: {figures['reading']['store (ours)']['made']:,.0f} samples/s")
    (settings.out / "decode.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

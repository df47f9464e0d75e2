"""Bytes of a teacher's features in every encoding, at what error, beside other layouts and beside the rate-distortion bound.

    python benchmarks/size.py --train images/train --out DIR \\
        --teacher 'dino=timm:vit_small_patch14_dinov2?checkpoint=FILE&img_size=224' --tap block9.attn_in --tap final

    python benchmarks/size.py --quick --out DIR     # random pictures and an untrained teacher: what no figure should be taken from

Encodings are fitted on the first --calibration images (in a seeded order) and everything is measured on --images others: bytes
as the store's own writer makes them (chunks, shards, codec, checksums), errors over all rows, relations rebuilt from
``attn_in`` against exact ones. One forward pass serves all lines. Prints one table and writes DIR/size.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from hdcache import draws
from hdcache.datasets import open_dataset
from hdcache.encodings import Encoder, fit, request
from hdcache.extract.writer import tap_writer
from hdcache.progress import Progress
from hdcache.relations import relation_kl
from hdcache.resources import available_cores
from hdcache.samples import open_sample
from hdcache.shards import chunk_rows
from hdcache.taps import Tokens, attention_of, parse_tap, relation_of_qkv
from hdcache.teachers import Teacher, load_teacher
from hdcache.views import parse_views

SHARD, RELATION_ROWS = 256, 8
ENCODINGS: list[tuple[str, float | None]] = [("fp16", None), ("bf16", None), ("int8", None)]
ENCODINGS += [("klt", fidelity) for fidelity in (0.01, 0.03, 0.05, 0.1, 0.2, 0.4)]


class Line:
    """One tap in one encoding: what is written and what comes back."""

    def __init__(self, tap: str, encoder: Encoder, rows: int) -> None:
        self.tap, self.encoder, self.card = tap, encoder, encoder.card
        self.writers = {
            name: tap_writer(self.card, name, rows, chunk_rows(SHARD), SHARD)
            for name in self.card.arrays
        }  # fmt: skip
        self.bytes = self.patch_bytes = 0
        self.error = 0.0
        self.cosines: list[Tensor] = []
        self.divergence: dict[str, list[float]] = {"qk": [], "vv": []}

    def add(self, shard: int, value: Tokens, teacher: Teacher) -> None:
        """Write a shard's rows and measure what a reader would get."""
        parts, _ = self.encoder.encode(value)
        for name, block in parts.items():
            written = len(self.writers[name].encode(shard, np.ascontiguousarray(block)))
            self.bytes += written
            self.patch_bytes += written if name != "prefix" else 0
        copy = self.encoder.decode({name: torch.from_numpy(np.array(block)) for name, block in parts.items()})
        assert isinstance(copy, Tokens)
        self.error += float((copy.patches.double() - value.patches.double()).square().sum())
        self.cosines.append(torch.cosine_similarity(copy.patches, value.patches, dim=-1).flatten())
        if parse_tap(self.tap).what == "attn_in":
            attention = attention_of(teacher.backbone.model, parse_tap(self.tap).block)
            for kind, found in self.divergence.items():
                exact, rebuilt = (
                    relation_of_qkv(attention, attention.qkv(Tokens(v.prefix[:RELATION_ROWS], v.patches[:RELATION_ROWS]).sequence()), kind)
                    for v in (value, copy)
                )  # fmt: skip
                found.append(float(relation_kl(exact, rebuilt.clamp_min(1e-30).log())))


def peers(value: Tokens) -> dict[str, float]:
    """Bytes a row of the same tokens in half precision, as other layouts keep them."""
    rows = [value.sequence()[row].half().contiguous() for row in range(len(value.patches))]

    def one_pt(row: Tensor) -> int:
        file = io.BytesIO()
        torch.save(row.clone(), file)
        return file.tell()

    def compressed(row: Tensor) -> int:
        return len(numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE).encode(row.numpy()))

    def tar() -> int:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number, row in enumerate(rows):
                data = save({"embedding": row})
                entry = tarfile.TarInfo(f"{number:08d}.safetensors")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return file.tell()

    mean: Callable[[Callable[[Tensor], int]], float] = lambda each: sum(map(each, rows)) / len(rows)  # noqa: E731
    return {
        "fp16, raw": mean(lambda row: row.numel() * 2),
        "fp16, zstd": mean(compressed),
        "one .pt a sample, fp16": mean(one_pt),
        "tar of safetensors, fp16": tar() / len(rows),
    }


def pixels(settings: argparse.Namespace, teacher: Teacher) -> Callable[[int, int], NDArray[np.uint8]]:
    """Rows of the data set in a seeded order, as the teacher sees them."""
    data, views = open_dataset(settings.train), parse_views(settings.views)
    order = draws.permutation(len(data.ids), "size", 0)
    pool = ThreadPoolExecutor(available_cores())

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        wanted = [data.ids[int(row)] for row in order[start:stop]]
        return np.stack(
            list(pool.map(lambda i: open_sample(data, i, views, 0).pixels(teacher.card.preprocessing), wanted))
        )

    if settings.calibration + settings.images > len(order):
        raise SystemExit(f"{len(order)} images, but {settings.calibration} + {settings.images} are asked for")
    return read


@torch.inference_mode()
def features(teacher: Teacher, images: NDArray[np.uint8], taps: list[str]) -> dict[str, Tokens]:
    """Every tap of so many images, on the CPU."""
    pieces: list[Any] = [
        teacher.forward(torch.from_numpy(images[i : i + teacher.batch]), taps)
        for i in range(0, len(images), teacher.batch)
    ]
    return {
        tap: Tokens(
            *(torch.cat([getattr(piece[tap], part) for piece in pieces]).cpu() for part in ("prefix", "patches"))
        )
        for tap in taps
    }


def report(line: Line, count: int, raw: float, spread: float, matrices: float) -> dict[str, Any]:
    """One line of the table, as numbers."""
    card = line.card
    values = count * card.tokens * card.channels
    rmse = (line.error / spread) ** 0.5
    cosines = torch.cat(line.cosines)
    found: dict[str, Any] = {
        "tap": line.tap,
        "encoding": card.encoding + (f" {100 * card.fidelity:g} %" if card.fidelity else ""),
        "bytes_per_row": line.bytes / count,
        "bits_per_value": 8 * line.patch_bytes / values,
        "smaller_than_fp16": raw * count / line.bytes,
        "relative_rmse": rmse,
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "bound_bits": card.certificate.bound_bits,
        "dct": card.grid is not None,
    }
    if line.divergence["qk"]:
        found |= {f"kl_{kind}": sum(values) / len(values) for kind, values in line.divergence.items()}
        found["smaller_than_matrices"] = matrices * count / line.bytes
    return found


def small(settings: argparse.Namespace) -> None:
    """Settings of the quick form, and the pictures that it needs."""
    folder = settings.out / "images"
    folder.mkdir()
    for number in range(320):
        coarse = (draws.uniform(4 * 4 * 3, "size", number) * 256).astype(np.uint8).reshape(4, 4, 3)
        Image.fromarray(coarse).resize((64, 64)).save(folder / f"{number:03d}.png")
    settings.train, settings.calibration, settings.images, settings.precision = str(folder), 128, 192, "fp32"
    settings.teacher = "a=random:vit_tiny_patch16_224?img_size=64&patch_size=8&depth=4&embed_dim=96&num_heads=3"
    settings.tap = ["block3.attn_in", "final"]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("tap", "encoding", "KB a row", "bits a value", "bound", "smaller than fp16", "rel. RMSE", "cosine (smallest)", "KL QK", "KL VV", "smaller than QK+VV fp16")  # fmt: skip
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        bound = f"{line['bound_bits']:.2f}" if line.get("bound_bits") is not None else ""
        cells = [line["tap"], line["encoding"], f"{line['bytes_per_row'] / 1e3:.1f}"]
        if "relative_rmse" in line:
            cells += [
                f"{line['bits_per_value']:.2f}" + (" (DCT)" if line["dct"] else ""),
                bound,
                f"{line['smaller_than_fp16']:.1f}",
            ]
            cells += [f"{100 * line['relative_rmse']:.2f} %", f"{line['cosine_mean']:.4f} ({line['cosine_min']:.3f})"]
            cells += (
                [f"{line['kl_qk']:.5f}", f"{line['kl_vv']:.5f}", f"{line['smaller_than_matrices']:.0f}"]
                if "kl_qk" in line
                else [""] * 3
            )
        else:
            cells += ["", "", f"{line['smaller_than_fp16']:.2f}", "", "", "", "", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train")
    parser.add_argument("--teacher", help="NAME=SPEC")
    parser.add_argument("--tap", action="append")
    parser.add_argument("--views", default="resize")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="random pictures, an untrained teacher")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.quick:
        small(settings)
    elif not (settings.train and settings.teacher and settings.tap):
        parser.error("give --train, --teacher and --tap, or --quick")
    teacher = load_teacher(settings.teacher, precision=settings.precision)
    read, card = pixels(settings, teacher), teacher.card
    known = features(teacher, read(0, settings.calibration), settings.tap)
    apart, lines = settings.calibration - settings.calibration // 8, []
    for tap in settings.tap:
        value = known[tap]
        first, held = (
            Tokens(value.prefix[rows], value.patches[rows]) for rows in (slice(0, apart), slice(apart, None))
        )
        lines += [
            Line(
                tap,
                fit(request(tap, kind, fidelity), first, held, card.grid, precision=card.precision),
                settings.images,
            )
            for kind, fidelity in ENCODINGS
        ]
    sums = {tap: torch.zeros(known[tap].patches.shape[-1], dtype=torch.float64) for tap in settings.tap}
    squares = dict.fromkeys(settings.tap, 0.0)
    found: list[dict[str, Any]] = []
    with Progress("measure", settings.images, "images", quiet=False) as bar:
        for shard, start in enumerate(range(0, settings.images, SHARD)):
            stop = min(start + SHARD, settings.images)
            current = features(teacher, read(settings.calibration + start, settings.calibration + stop), settings.tap)
            for tap, value in current.items():
                sums[tap] += value.patches.double().sum((0, 1))
                squares[tap] += float(value.patches.double().square().sum())
                if not shard:
                    found += [{"tap": tap, "encoding": name, "bytes_per_row": size, "smaller_than_fp16": 2 * value.sequence()[0].numel() / size} for name, size in peers(value).items()]  # fmt: skip
            for line in lines:
                line.add(shard, current[line.tap], teacher)
            bar.advance(stop - start)
    tokens = card.grid[0] * card.grid[1]
    matrices = 2 * 2 * card.heads * (tokens + card.prefix_tokens) ** 2
    for line in lines:
        spread = squares[line.tap] - float(sums[line.tap].square().sum()) / (settings.images * tokens)
        raw = 2.0 * (tokens + card.prefix_tokens) * line.card.channels
        found.append(report(line, settings.images, raw, spread, matrices))
    found.sort(key=lambda line: settings.tap.index(line["tap"]))
    (settings.out / "size.json").write_text(
        json.dumps({"settings": {k: str(v) for k, v in vars(settings).items()}, "lines": found}, indent=1)
    )
    print(table(found))


if __name__ == "__main__":
    main()

"""Float tensors <-> stored integers. Each encoding states its error, measured on rows it was not fitted on.

======  =====================================================================================================
fp32    as computed; the encoding of the cached-equals-live proof
fp16    half precision, bf16: its upper 16 bits, rounded to nearest even
int8    one scale and offset per channel
klt     rotate patch tokens by the eigenvectors of their covariance and round with one step (:mod:`hdcache.klt`),
        channel-major so that the codec sees runs
sqrt8   relations only: round(255 sqrt(probability)) as uint8
topk    logits only: the k largest log-probabilities in half precision, and their classes
======  =====================================================================================================

Byte layout of a row: token taps have ``codes`` uint8 [K - W, N] and ``wide`` uint16 [W, N] (klt), ``codes`` uint8
[D, N] (int8), or ``values`` [N, D] (floats), and ``prefix`` [P, D] apart; vectors ``values`` [D]; relations
``values`` [H, T, T]; soft labels ``values`` and ``classes`` [k]. bf16 is stored as uint16 bits because Zarr's core has no such type.

Legend: R rows, P prefix tokens, N patch tokens, D width, K kept components, W leading components that need int16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache import klt
from hdcache.klt_decoding import Blocks, by_token, positions, unfold
from hdcache.plain_encodings import Parts as Parts
from hdcache.plain_encodings import Stored, decode_plain, encode_plain
from hdcache.row_arrays import codec_of, compresses
from hdcache.schema import ArrayCard, Certificate, TapCard, TapRequest
from hdcache.shards import CHUNK_ROWS, Codec, rows_together
from hdcache.soft_labels import (
    DEFAULT_TOP_K,
    decode_soft_labels,
    divergence,
    encode_soft_labels,
    probabilities,
    soft_label_arrays,
)
from hdcache.tap_requests import DEFAULT_FIDELITY
from hdcache.tap_requests import request as request
from hdcache.taps import Coded, Tokens

DIGITS = 6
"""Of every measured number that a store records."""
MEASURED_ROWS = 8
"""Rows that are measured together; :data:`~hdcache.shards.CHUNK_ROWS` are compressed together, as a store does."""
PASS_VALUES = 1 << 21
"""Values that a CPU encodes together: so many that the fixed cost of a product does not show, and no whole batch of large ones."""


@dataclass(frozen=True)
class Encoder:
    """A fitted encoding of one tap."""

    card: TapCard
    constants: Mapping[str, NDArray[np.generic]]
    _held: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def encode(self, value: Tokens | Tensor) -> tuple[Parts, int]:
        """Stored arrays of R rows, each [R, ...], and how many values were clipped to their integer range."""
        stored, clipped = self.stored(value)
        return self.parts({name: part.contiguous().cpu() for name, part in stored.items()}), int(clipped)

    def parts(self, stored: Mapping[str, Tensor]) -> Parts:
        """What :meth:`stored` made, contiguous and on the CPU by now, as arrays of the stored types: the same memory."""
        return {name: part.numpy().view(self.card.arrays[name].dtype) for name, part in stored.items()}

    def stored(self, value: Tokens | Tensor) -> tuple[Stored, Tensor]:
        """As :meth:`encode`, on the device of ``value`` and (all but topk) without waiting for it; see :meth:`parts`."""
        card = self.card
        if card.encoding == "topk":
            assert isinstance(value, Tensor)  # noqa: S101  # programmer invariant: logits are a vector
            labels, lost = encode_soft_labels(value, card.arrays["values"].shape[0])
            return {name: torch.from_numpy(part) for name, part in labels.items()}, torch.tensor(lost)
        if isinstance(value, Tensor):
            return encode_plain(value, card.encoding)
        kind = card.encoding if card.encoding in ("fp32", "bf16") else "fp16"
        found: Stored = {}
        clipped = torch.zeros((), dtype=torch.int64)
        if card.prefix_tokens:
            prefix, clipped = encode_plain(value.prefix, kind)
            found["prefix"] = prefix["values"]
        if card.encoding in ("klt", "int8"):
            patches, more = self._integers(value.patches)
        else:
            patches, more = encode_plain(value.patches, card.encoding)
        return found | patches, clipped + more

    def _integers(self, patches: Tensor) -> tuple[Stored, Tensor]:
        # What lies between the steps stays small; a GPU has enough to do with all rows at once.
        size = len(patches) if patches.device.type != "cpu" else max(1, PASS_VALUES // max(1, patches[:1].numel()))
        pieces = [self._whole(patches[start : start + size]) for start in range(0, max(1, len(patches)), size)]
        return (
            {name: torch.cat([part[name][0] for part in pieces]) for name in pieces[0]},
            torch.stack([count for part in pieces for _, count in part.values()]).sum(),
        )

    def _whole(self, patches: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        constants = self._on(patches.device, torch.float32)
        arrays = self.card.arrays
        if self.card.encoding == "int8":
            z = ((patches.float() - constants["offset"]) / constants["scale"]).round_().transpose(1, 2)
        else:
            z = klt.before_cut(self._components(patches, constants), self.card.dead_zone)
        wide = arrays["wide"].shape[0] if "wide" in arrays else 0
        parts = {"wide": z[:, :wide], "codes": z[:, wide:]}
        return {name: klt.folded(part, arrays[name].dtype) for name, part in parts.items() if name in arrays}

    def _components(self, patches: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        if self.card.code_precision == "fp32":
            return klt.components(patches, constants, self.card.grid)
        half = self._on(patches.device, torch.bfloat16)
        return klt.coarse_components(patches, constants["mean"], half["rotation"], self._positions(half))

    def _positions(self, constants: Mapping[str, Tensor]) -> list[Tensor]:
        return [constants[f"positions{axis}"] for axis in range(len(positions(self.card.grid or ())))]

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tokens | Tensor:
        """Rows of stored arrays (on any device) back to ``dtype``; the inverse of :meth:`encode` up to its stated error."""
        found = self.coded(parts, dtype)
        return found.tokens() if isinstance(found, Coded) else found

    def coded(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tokens | Tensor | Coded:
        """As :meth:`decode`, but klt short of its last step."""
        card = self.card
        if card.encoding == "topk":
            return decode_soft_labels(parts["values"], parts["classes"], card.channels, dtype)
        if card.prefix_tokens == 0 and card.tokens == 0:
            return decode_plain(parts["values"], card.encoding, dtype)
        first = next(iter(parts.values()))
        if card.prefix_tokens:
            prefix = decode_plain(parts["prefix"], "bf16" if card.encoding == "bf16" else "fp32", dtype)
        else:
            prefix = torch.empty(first.shape[0], 0, card.channels, dtype=dtype, device=first.device)
        if card.encoding not in ("klt", "int8"):
            return Tokens(prefix, decode_plain(parts["values"], card.encoding, dtype))
        stored = [parts[name] for name in ("wide", "codes") if name in card.arrays]
        constants = self._on(first.device, dtype)
        if card.encoding == "int8":
            codes = by_token([unfold(part) for part in stored], dtype)
            return Tokens(prefix, torch.addcmul(constants["offset"], codes, constants["scale"]))
        return Coded(prefix, Blocks(stored, self._positions(constants), dtype), constants["inverse"], constants["mean"])

    def _on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The constants, copied once: megabytes per tap, and each copy waits for what is queued on the device."""
        if (device, dtype) not in self._held:
            with torch.inference_mode(False):  # an inference tensor could not be used in training later
                on = {name: torch.from_numpy(np.array(c, np.float32)).to(device) for name, c in self.constants.items()}
                if "basis" in on:
                    # Step and gain ride on the small basis, not on every code.
                    on["inverse"] = (on["basis"] * (on["step"] * on.get("gain", 1))).T
                    if self.card.code_precision == "bf16" and dtype == torch.bfloat16:
                        on["rotation"] = on["basis"] / on["step"]
                    back = positions(self.card.grid or ())
                    on |= {f"positions{axis}": matrix.to(device) for axis, matrix in enumerate(back)}
                self._held[device, dtype] = {name: value.to(dtype) for name, value in on.items()}
        return self._held[device, dtype]


def _beyond(z: Tensor, limit: int) -> int:
    """Values that an integer of ``limit`` cannot hold; NaN is one of them."""
    return int((~(z.abs() <= limit)).sum())


def fit(
    asked: TapRequest,
    calibration: Tokens | Tensor,
    heldout: Tokens | Tensor,
    grid: tuple[int, ...] | None = None,
    prepared: klt.Prepared | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    *,
    settled: bool = False,
) -> Encoder:
    """Choose the encoding's constants on ``calibration`` rows and measure its error on ``heldout`` rows.

    Both are float32 rows of the tap, [R, ...]; at least one row each. ``grid`` is how a row's patch tokens lie (temporal
    slots, rows, columns), where all of them are there. The result depends on nothing else: ``prepared`` is what
    :func:`hdcache.klt.prepare` makes of ``calibration``, for several fits of the same rows. ``precision`` is what the rows
    were computed in: coarse klt codes are made in the same. ``settled``: ``grid`` is what an earlier fit of these rows chose.
    """
    kind, found = asked.encoding, None
    if isinstance(calibration, Tensor):
        if kind == "topk":
            arrays = soft_label_arrays(int(calibration.shape[-1]), asked.top_k or DEFAULT_TOP_K)
        else:
            dtype: Any = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "sqrt8": "uint8"}[kind]
            arrays = {"values": ArrayCard(shape=tuple(calibration.shape[1:]), dtype=dtype)}
        shape = (0, int(calibration.shape[-1]), 0)
        constants: dict[str, NDArray[np.generic]] = {}
    else:
        tokens, channels = int(calibration.patches.shape[1]), int(calibration.patches.shape[2])
        shape = (tokens, channels, int(calibration.prefix.shape[1]))
        if kind == "klt":
            found = klt.fit_klt(
                asked.tap, calibration.patches, asked.fidelity or DEFAULT_FIDELITY, grid, prepared, settled=settled
            )
            arrays, constants = _klt_arrays(found, tokens), dict(found.constants)
        else:
            arrays, constants = _fit_tokens(kind, calibration.patches, tokens, channels)
        if shape[2]:
            half: Any = {"fp32": "float32", "bf16": "uint16"}.get(kind, "float16")
            arrays["prefix"] = ArrayCard(shape=(shape[2], channels), dtype=half)
    constant_cards = {name: ArrayCard(shape=value.shape, dtype="float32") for name, value in constants.items()}
    blank = Certificate(
        calibration_rows=_rows(calibration),
        heldout_rows=_rows(heldout),
        relative_rmse=0,
        cosine_mean=1,
        cosine_min=1,
        bits_per_value=0,
    )
    card = TapCard(
        tap=asked.tap,
        encoding=kind,
        fidelity=asked.fidelity,
        tokens=shape[0],
        channels=shape[1],
        prefix_tokens=shape[2],
        arrays=arrays,
        constants=constant_cards,
        grid=found.grid if found else None,
        dead_zone=klt.DEAD_ZONE if found else 0.0,
        block_bytes=klt.BLOCK_BYTES if any(compresses(a.dtype, name) for name, a in arrays.items()) else 0,
        typesize=2 if found and found.typesize else 0,
        code_precision="bf16"
        if found and precision == "bf16" and (asked.fidelity or DEFAULT_FIDELITY) >= klt.COARSE
        else "fp32",
        certificate=blank,
    )
    draft = Encoder(card, constants)
    measured = blank.model_copy(update=rounded(_measure(draft, heldout)))
    if found:
        least = klt.bound(found.eigenvalues, measured.relative_rmse)
        measured = measured.model_copy(update=rounded({"bound_bits": least}) if math.isfinite(least) else {})
    return Encoder(card.model_copy(update={"certificate": measured}), constants)


def rounded(measured: Mapping[str, float | int]) -> dict[str, float | int]:
    """To :data:`DIGITS` digits: the last bits of a sum depend on how many threads made it, and a certificate is hashed."""
    return {name: value if isinstance(value, int) else float(f"{value:.{DIGITS}g}") for name, value in measured.items()}


def _rows(value: Tokens | Tensor) -> int:
    return int(value.shape[0] if isinstance(value, Tensor) else value.patches.shape[0])


def _klt_arrays(found: klt.Fitted, tokens: int) -> dict[str, ArrayCard]:
    kept, wide = found.constants["basis"].shape[1], found.wide
    arrays = {"wide": ArrayCard(shape=(wide, tokens), dtype=klt.WIDE)} if wide else {}
    return arrays | ({"codes": ArrayCard(shape=(kept - wide, tokens), dtype=klt.NARROW)} if wide < kept else {})


def _fit_tokens(
    kind: str, patches: Tensor, tokens: int, channels: int
) -> tuple[dict[str, ArrayCard], dict[str, NDArray[np.generic]]]:
    if kind != "int8":
        dtype: Any = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}[kind]
        return {"values": ArrayCard(shape=(tokens, channels), dtype=dtype)}, {}
    x = patches.reshape(-1, channels).cpu().to(torch.float64).numpy()  # in this order: MPS has no float64
    low, high = x.min(axis=0), x.max(axis=0)
    scale = np.maximum((high - low) / 2 * 1.05, 1e-12) / klt.LIMITS[klt.NARROW]
    return (
        {"codes": ArrayCard(shape=(channels, tokens), dtype=klt.NARROW)},
        {"scale": scale.astype(np.float32), "offset": ((high + low) / 2).astype(np.float32)},
    )


def _measure(encoder: Encoder, heldout: Tokens | Tensor) -> dict[str, float | int]:
    """Errors over all tokens of ``heldout``, a few rows at a time: relation matrices are large in float64.

    Soft labels are compared as distributions: their logits may differ by any constant.
    """
    soft = encoder.card.encoding == "topk"
    vectors = probabilities if soft else _vectors
    whole = heldout if isinstance(heldout, Tensor) else heldout.patches
    runs = [slice(start, start + MEASURED_ROWS) for start in range(0, len(whole), MEASURED_ROWS)]
    total = torch.zeros(whole.shape[-1], dtype=torch.float64)
    for run in runs:
        total += vectors(whole[run]).sum(dim=0)
    mean = total * whole.shape[-1] / max(1, whole.numel())
    spread = error = kl = 0.0
    saturated = 0
    cosines = []
    kept: dict[str, list[NDArray[np.generic]]] = {}
    stored = 0
    for run in runs:
        part = heldout[run] if isinstance(heldout, Tensor) else Tokens(heldout.prefix[run], heldout.patches[run])
        codes, clipped = encoder.encode(part)
        rebuilt = encoder.decode({name: torch.from_numpy(np.array(value)) for name, value in codes.items()})
        exact, copy = vectors(whole[run]), vectors(rebuilt if isinstance(rebuilt, Tensor) else rebuilt.patches)
        spread += float(((exact - mean) ** 2).sum())
        error += float(((exact - copy) ** 2).sum())
        kl += float(divergence(exact, copy).sum()) if soft else 0.0
        saturated += clipped
        for name in codes.keys() - {"prefix"}:
            if codec_of(encoder.card, name) is None:
                stored += codes[name].nbytes
            else:
                kept.setdefault(name, []).append(codes[name])
        lengths = exact.norm(dim=-1)
        cosine = (exact * copy).sum(-1) / (lengths * copy.norm(dim=-1)).clamp_min(1e-300)
        cosines.append(cosine[lengths > 0])
    cosine = torch.cat(cosines)
    stored += sum(_compressed(encoder.card, name, found) for name, found in kept.items())
    return {
        "relative_rmse": math.sqrt(error / spread) if spread > 0 else float(error > 0),
        "cosine_mean": float(cosine.mean()) if len(cosine) else 1.0,
        "cosine_min": float(cosine.min()) if len(cosine) else 1.0,
        "bits_per_value": 8 * stored / whole.numel(),
        "saturated": saturated,
    } | ({"kl": kl / len(whole)} if soft else {})


def _vectors(value: Tensor) -> Tensor:
    return value.cpu().double().flatten(0, -2)


def _compressed(card: TapCard, name: str, parts: Sequence[NDArray[np.generic]]) -> int:
    """Bytes of rows that come in parts of :data:`MEASURED_ROWS`, in the chunks that a store has."""
    codec = codec_of(card, name) or Codec()
    together = rows_together(CHUNK_ROWS, parts[0][:1].nbytes, codec) // MEASURED_ROWS
    runs = (np.concatenate(parts[start : start + together]) for start in range(0, len(parts), together))
    return sum(len(klt.compressed(run, *codec)) for run in runs)

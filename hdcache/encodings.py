"""Float tensors <-> stored integers. Each encoding states its error, measured on rows it was not fitted on.

======  =====================================================================================================
fp32    as computed; the encoding of the cached-equals-live proof
fp16    half precision, bf16: its upper 16 bits, rounded to nearest even
int8    one scale and offset per channel
klt     centre, rotate by the eigenvectors of the patch tokens' covariance (Karhunen-Loeve transform), round
        with ONE step for all components (reverse water-filling), channel-major so that the codec sees runs
sqrt8   relations only: round(255 sqrt(probability)) as uint8
topk    logits only: the k largest log-probabilities in half precision, and their classes
======  =====================================================================================================

Byte layout of a row: token taps have ``codes`` int8 [K - W, N] and ``wide`` int16 [W, N] (klt), ``codes`` int8
[D, N] (int8), or ``values`` [N, D] (floats), and ``prefix`` [P, D] apart; vectors ``values`` [D]; relations
``values`` [H, T, T]; soft labels ``values`` and ``classes`` [k]. bf16 is stored as uint16 bits because Zarr's core has no such type.

Legend: R rows, P prefix tokens, N patch tokens, D width, K kept components, W leading components that need int16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.errors import UsageError
from hdcache.plain_encodings import Parts as Parts
from hdcache.plain_encodings import bits, decode_plain, encode_plain, to_half
from hdcache.schema import ArrayCard, Certificate, TapCard, TapRequest
from hdcache.soft_labels import (
    DEFAULT_TOP_K,
    decode_soft_labels,
    divergence,
    encode_soft_labels,
    probabilities,
    soft_label_arrays,
)
from hdcache.tap_requests import request as request
from hdcache.taps import Tokens

# A component is stored as int16 when calibration comes within a factor two of int8's range.
NARROW_LIMIT, WIDE_LIMIT, MARGIN = 127, 32767, 63
FIT_TOKENS = 65536
TOKENS_PER_CHANNEL = 20
# Rows that are measured, and compressed, together.
CODEC_ROWS = 8


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
        card = self.card
        if card.encoding == "topk":
            assert isinstance(value, Tensor)  # noqa: S101  # programmer invariant: logits are a vector
            return encode_soft_labels(value, card.arrays["values"].shape[0])
        if isinstance(value, Tensor):
            return encode_plain(value, card.encoding)
        prefix, lost = to_half(value.prefix) if card.encoding not in ("fp32", "bf16") else (value.prefix, 0)
        parts: Parts = {}
        if card.prefix_tokens:
            parts["prefix"] = (
                bits(prefix)
                if card.encoding == "bf16"
                else prefix.float().cpu().numpy().astype(card.arrays["prefix"].dtype, copy=False)
            )
        if card.encoding in ("klt", "int8"):
            codes, clipped = self._integers(value.patches)
            return parts | codes, lost + clipped
        plain, clipped = encode_plain(value.patches, card.encoding)
        return parts | plain, lost + clipped

    def _integers(self, patches: Tensor) -> tuple[Parts, int]:
        x = patches.float()
        constants = self._on(x.device, torch.float32)
        if self.card.encoding == "int8":
            z = ((x - constants["offset"]) / constants["scale"]).round().transpose(1, 2)
            clipped = _beyond(z, NARROW_LIMIT)
            return {"codes": z.clamp(-NARROW_LIMIT, NARROW_LIMIT).to(torch.int8).contiguous().cpu().numpy()}, clipped
        z = (((x - constants["mean"]) @ constants["basis"]) / constants["step"]).round().transpose(1, 2)
        wide = self.card.arrays["wide"].shape[0] if "wide" in self.card.arrays else 0
        clipped = _beyond(z[:, :wide], WIDE_LIMIT) + _beyond(z[:, wide:], NARROW_LIMIT)
        parts: Parts = {}
        if wide:
            parts["wide"] = z[:, :wide].clamp(-WIDE_LIMIT, WIDE_LIMIT).to(torch.int16).contiguous().cpu().numpy()
        if wide < z.shape[1]:
            parts["codes"] = z[:, wide:].clamp(-NARROW_LIMIT, NARROW_LIMIT).to(torch.int8).contiguous().cpu().numpy()
        return parts, clipped

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tokens | Tensor:
        """Rows of stored arrays (on any device) back to ``dtype``; the inverse of :meth:`encode` up to its stated error."""
        card = self.card
        if card.encoding == "topk":
            return decode_soft_labels(parts["values"], parts["classes"], card.channels, dtype)
        if card.prefix_tokens == 0 and card.tokens == 0:
            return decode_plain(parts["values"], card.encoding, dtype)
        if card.encoding in ("klt", "int8"):
            patches = self._from_integers(parts, dtype)
        else:
            patches = decode_plain(parts["values"], card.encoding, dtype)
        if card.prefix_tokens:
            prefix = decode_plain(parts["prefix"], "bf16" if card.encoding == "bf16" else "fp32", dtype)
        else:
            prefix = patches.new_empty(patches.shape[0], 0, patches.shape[2])
        return Tokens(prefix, patches)

    def _from_integers(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        stored = [parts[name].to(dtype) for name in ("wide", "codes") if name in self.card.arrays]
        z = (torch.cat(stored, dim=1) if len(stored) > 1 else stored[0]).transpose(1, 2)
        constants = self._on(z.device, dtype)
        if self.card.encoding == "int8":
            return z * constants["scale"] + constants["offset"]
        return z @ constants["inverse"] + constants["mean"]

    def _on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The constants, copied once: megabytes per tap, and each copy waits for what is queued on the device."""
        if (device, dtype) not in self._held:
            with torch.inference_mode(False):  # an inference tensor could not be used in training later
                on = {name: torch.from_numpy(np.array(c, np.float32)).to(device) for name, c in self.constants.items()}
                if "basis" in on:
                    # The step rides on the small basis, not on every code.
                    on["inverse"] = (on["basis"] * on["step"]).T
                self._held[device, dtype] = {name: value.to(dtype) for name, value in on.items()}
        return self._held[device, dtype]


def _beyond(z: Tensor, limit: int) -> int:
    """Values that an integer of ``limit`` cannot hold; NaN is one of them."""
    return int((~(z.abs() <= limit)).sum())


def fit(asked: TapRequest, calibration: Tokens | Tensor, heldout: Tokens | Tensor) -> Encoder:
    """Choose the encoding's constants on ``calibration`` rows and measure its error on ``heldout`` rows.

    Both are float32 rows of the tap, [R, ...]; at least one row each. The result depends on nothing else.
    """
    kind = asked.encoding
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
        arrays, constants = _fit_tokens(asked, calibration.patches, tokens, channels)
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
        certificate=blank,
    )
    draft = Encoder(card, constants)
    measured = blank.model_copy(update=_measure(draft, heldout))
    return Encoder(card.model_copy(update={"certificate": measured}), constants)


def _rows(value: Tokens | Tensor) -> int:
    return int(value.shape[0] if isinstance(value, Tensor) else value.patches.shape[0])


def _fit_tokens(
    asked: TapRequest, patches: Tensor, tokens: int, channels: int
) -> tuple[dict[str, ArrayCard], dict[str, NDArray[np.generic]]]:
    if asked.encoding not in ("klt", "int8"):
        dtype: Any = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}[asked.encoding]
        return {"values": ArrayCard(shape=(tokens, channels), dtype=dtype)}, {}
    flat = patches.reshape(-1, channels)
    if flat.shape[0] > FIT_TOKENS:
        # Evenly spread over rows and positions; the stride is odd to the grid, so all positions are met.
        flat = flat[torch.linspace(0, flat.shape[0] - 1, FIT_TOKENS, dtype=torch.float64).long()]
    x = flat.cpu().to(torch.float64).numpy()  # in this order: MPS has no float64
    if asked.encoding == "int8":
        low, high = x.min(axis=0), x.max(axis=0)
        scale = np.maximum((high - low) / 2 * 1.05, 1e-12) / NARROW_LIMIT
        return (
            {"codes": ArrayCard(shape=(channels, tokens), dtype="int8")},
            {"scale": scale.astype(np.float32), "offset": ((high + low) / 2).astype(np.float32)},
        )
    mean = x.mean(axis=0)
    x -= mean
    _, vectors = np.linalg.eigh(x.T @ x / len(x))
    vectors = vectors[:, ::-1]
    z = x @ vectors
    # Features that do not vary beyond float32's own rounding get any step.
    varies = float((z * z).mean(axis=0).sum()) > 1e-12 * float(mean @ mean)
    step = _find_step(z, asked.fidelity or 0.05) if varies else 1.0
    peak = np.abs(np.round(z / step)).max(axis=0)
    if peak.max() > WIDE_LIMIT / 2:
        raise UsageError(
            f"tap {asked.tap}: fidelity {asked.fidelity:g} needs more than 16 bits for its largest component; "
            "ask for a coarser fidelity, or encoding fp16 or fp32"
        )
    # A component is dropped only where calibration saw enough tokens to know that it is always zero.
    kept = channels
    if len(x) >= TOKENS_PER_CHANNEL * channels and (peak > 0).any():
        kept = int(np.flatnonzero(peak > 0)[-1]) + 1
    wide = int(np.flatnonzero(peak[:kept] > MARGIN)[-1]) + 1 if (peak[:kept] > MARGIN).any() else 0
    arrays: dict[str, ArrayCard] = {}
    if wide:
        arrays["wide"] = ArrayCard(shape=(wide, tokens), dtype="int16")
    if wide < kept:
        arrays["codes"] = ArrayCard(shape=(kept - wide, tokens), dtype="int8")
    constants: dict[str, NDArray[np.generic]] = {
        "basis": np.ascontiguousarray(vectors[:, :kept], dtype=np.float32),
        "mean": mean.astype(np.float32),
        "step": np.array([step], np.float32),
    }
    return arrays, constants


def _find_step(z: NDArray[np.float64], fidelity: float) -> float:
    """The step whose rounding error is ``fidelity`` of the spread of ``z``: bisection on the logarithm."""
    if len(z) > 16384:
        part = z[:: len(z) // 16384]
        # Where a few tokens hold all the energy, a part of them says nothing about the rest.
        z = part if float((part * part).mean()) > 0.5 * float((z * z).mean()) else z
    energy = float((z * z).sum())
    low, high = math.log(1e-6 * math.sqrt(energy / z.size)), math.log(20 * float(np.abs(z).max()))
    for _ in range(30):
        middle = (low + high) / 2
        step = math.exp(middle)
        error = z - step * np.round(z / step)
        if float((error * error).sum()) > fidelity**2 * energy:
            high = middle
        else:
            low = middle
    return float(np.float32(max(math.exp(low), float(np.finfo(np.float32).tiny))))


def _measure(encoder: Encoder, heldout: Tokens | Tensor) -> dict[str, float | int]:
    """Errors over all tokens of ``heldout``, a few rows at a time: relation matrices are large in float64.

    Soft labels are compared as distributions: their logits may differ by any constant.
    """
    soft = encoder.card.encoding == "topk"
    vectors = probabilities if soft else _vectors
    whole = heldout if isinstance(heldout, Tensor) else heldout.patches
    runs = [slice(start, start + CODEC_ROWS) for start in range(0, len(whole), CODEC_ROWS)]
    total = torch.zeros(whole.shape[-1], dtype=torch.float64)
    for run in runs:
        total += vectors(whole[run]).sum(dim=0)
    mean = total * whole.shape[-1] / max(1, whole.numel())
    spread = error = kl = 0.0
    saturated = stored = 0
    cosines = []
    for run in runs:
        part = heldout[run] if isinstance(heldout, Tensor) else Tokens(heldout.prefix[run], heldout.patches[run])
        codes, clipped = encoder.encode(part)
        rebuilt = encoder.decode({name: torch.from_numpy(np.array(value)) for name, value in codes.items()})
        exact, copy = vectors(whole[run]), vectors(rebuilt if isinstance(rebuilt, Tensor) else rebuilt.patches)
        spread += float(((exact - mean) ** 2).sum())
        error += float(((exact - copy) ** 2).sum())
        kl += float(divergence(exact, copy).sum()) if soft else 0.0
        saturated += clipped
        stored += sum(_compressed(name, value) for name, value in codes.items() if name != "prefix")
        lengths = exact.norm(dim=-1)
        cosine = (exact * copy).sum(-1) / (lengths * copy.norm(dim=-1)).clamp_min(1e-300)
        cosines.append(cosine[lengths > 0])
    cosine = torch.cat(cosines)
    return {
        "relative_rmse": math.sqrt(error / spread) if spread > 0 else float(error > 0),
        "cosine_mean": float(cosine.mean()) if len(cosine) else 1.0,
        "cosine_min": float(cosine.min()) if len(cosine) else 1.0,
        "bits_per_value": 8 * stored / whole.numel(),
        "saturated": saturated,
    } | ({"kl": kl / len(whole)} if soft else {})


def _vectors(value: Tensor) -> Tensor:
    return value.cpu().double().flatten(0, -2)


def _compressed(name: str, value: NDArray[np.generic]) -> int:
    if not compresses(str(value.dtype), name):
        return value.nbytes
    codec = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
    return len(codec.encode(np.ascontiguousarray(value)))


def compresses(dtype: str, name: str) -> bool:
    """Whether a per-row array is worth a codec: integer codes are, float mantissas are nearly noise."""
    return dtype in ("int8", "int16", "uint8") and name != "prefix"

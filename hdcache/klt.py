"""The klt encoding of patch tokens: rotate, perhaps transform over the token grid, round, rescale on the way back.

Tokens are centred and rotated by the eigenvectors of their covariance (Karhunen-Loeve transform). Where neighbouring
tokens are alike enough for it to pay, an orthonormal DCT-II over the token grid follows. All components are then rounded
with ONE step, which spreads the error as reverse water-filling does (Cover and Thomas, Elements of Information Theory,
section 10.3.3). Rounding has a dead zone, and decoding multiplies each component by the gain that makes its squared error
least: together they save bits at coarse steps and cost none at fine ones.

Legend: R rows, N patch tokens, D channels, K kept components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.errors import UsageError
from hdcache.shards import CHUNK_ROWS, Codec

# A component is stored as int16 when calibration comes within a factor two of int8's range.
NARROW: Final = "uint8"
WIDE: Final = "uint16"
MARGIN = 63
LIMITS = {"uint8": 127, "int8": 127, "uint16": 32767, "int16": 32767}
FIT_TOKENS = 65536
STEP_TOKENS = 16384
ENOUGH_TOKENS = 256
TOKENS_PER_CHANNEL = 20
DEAD_ZONE = 0.1
"""How much later than half a step a value is rounded up, in steps."""
PAYS = 0.97
"""What a DCT must make of the bytes to be worth its arithmetic and its wider integers."""
COARSE = 0.05
"""Relative error from which on the arithmetic of a teacher in bfloat16 is good enough to encode in, too."""
IDLE = 0.01
"""Share of the squared error that dropping the last components may add."""
BLOCK_BYTES = 1 << 20
"""What the codec compresses together; its own choice is smaller and costs up to 3 % more bytes."""


@dataclass(frozen=True)
class Fitted:
    """What :func:`fit_klt` found."""

    constants: dict[str, NDArray[np.float32]]
    """``basis`` [D, K], ``mean`` [D], ``step`` [1], ``gain`` [K]."""
    wide: int
    """Leading components that need int16."""
    grid: tuple[int, ...] | None
    """Token grid of the DCT; None: no DCT."""
    eigenvalues: NDArray[np.float64]
    """Variances of all D components, descending."""
    typesize: int = 0
    """Bytes of narrow codes that the codec takes together; 0: one."""


@lru_cache(maxsize=32)
def dct_matrix(count: int) -> Tensor:
    """Orthonormal DCT-II, float32 [count, count]: frequencies by positions."""
    k, i = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(count, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * i + 1) * k / (2 * count)) * math.sqrt(2 / count)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def integers(z: Tensor, dtype: str) -> NDArray[np.generic]:
    """Whole numbers as stored, on the CPU: see :func:`folded`."""
    found: NDArray[np.generic] = folded(z, dtype)[0].contiguous().cpu().numpy().view(dtype)
    return found


def folded(z: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """``z`` cut off behind the point, as stored (int8 or int16 with the bits of ``dtype``), and how many were clipped: int64 [].

    Both are on ``z``'s device, which is not waited for. What is beyond the range is clipped, NaN becomes 0.

    Unsigned: 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4 ... A small number of either sign then has zeros in its high bits,
    which is what the codec's bit planes need: the signed integers of earlier stores take 15 to 29 % more bytes.
    """
    limit, wide = LIMITS[dtype], dtype.endswith("16")
    kind = torch.int16 if wide else torch.int8
    # On a CPU two looks cost less than what they save; NaN fails both.
    if z.device.type == "cpu" and z.numel() and bool(z.amin() > -limit - 1) and bool(z.amax() < limit + 1):
        whole, clipped = z.to(kind), torch.zeros((), dtype=torch.int64)
    else:
        z = z.trunc()
        clipped = (~(z.abs() <= limit)).sum()
        whole = z.nan_to_num(0, limit, -limit).clamp(-limit, limit).to(kind)
    if dtype.startswith("u"):
        sign = whole >> (15 if wide else 7)
        whole = (whole << 1).bitwise_xor_(sign)
    return whole, clipped


def over_grid(z: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply one matrix [n, n] along each axis of the token grid of ``z`` [R, K, N]; the shape stays."""
    found = z.reshape(*z.shape[:2], *(len(matrix) for matrix in matrices))
    for axis, matrix in enumerate(matrices):
        found = torch.movedim(torch.movedim(found, 2 + axis, -1) @ matrix.T, -1, 2 + axis)
    return found.flatten(2)


def components(patches: Tensor, constants: Mapping[str, Tensor], grid: tuple[int, ...] | None) -> Tensor:
    """Patch tokens [R, N, D] in steps: float32 [R, K, N], by token or by frequency."""
    # The product itself turns tokens into columns: copying them there later costs more.
    z = torch.matmul(constants["basis"].T, (patches.float() - constants["mean"]).transpose(1, 2))
    z = z.div_(constants["step"])
    return z if grid is None else over_grid(z, [dct_matrix(n).to(z.device) for n in grid])


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and bool(check()) for check in checks)


def coarse_components(patches: Tensor, mean: Tensor, rotation: Tensor, back: Sequence[Tensor]) -> Tensor:
    """As :func:`components`, by products of bfloat16: several times as fast where the hardware has them.

    ``mean`` is float32 [D], ``rotation`` bfloat16 [D, K], the basis over the step; ``back`` are the bfloat16 matrices that take
    the DCT back (:func:`hdcache.klt_decoding.positions`), which is orthonormal. Each product rounds to 8 bits, which adds
    noise of about 0.2 % of the spread: next to nothing where steps make an error of :data:`COARSE` or more.
    """
    centred = (patches.float() - mean).to(rotation.dtype)
    if patches.device.type == "cpu" and not multiplies_bf16():
        # Elsewhere torch may take fifty times as long over them as over those of single precision, which of the same factors
        # are the same but for the order of sums.
        centred, rotation, back = centred.float(), rotation.float(), [matrix.float() for matrix in back]
    z = (
        torch.mm(centred.flatten(0, 1), rotation)
        .to(torch.bfloat16)
        .to(centred.dtype)
        .view(*centred.shape[:2], rotation.shape[1])
        .transpose(1, 2)
    )
    if len(back) == 1:
        # The product itself turns tokens into columns.
        z = torch.bmm(z, back[0].expand(len(z), -1, -1))
    elif back:
        z = over_grid(z, [matrix.T for matrix in back])
    return z.to(torch.bfloat16).float()


def rounded(z: Tensor, dead_zone: float) -> Tensor:
    """Whole numbers, half a step and ``dead_zone`` more being rounded up; NaN stays."""
    return before_cut(z.clone(), dead_zone).trunc_()


def before_cut(z: Tensor, dead_zone: float) -> Tensor:
    """``z``, changed in place to what is :func:`rounded` when it is cut off behind the point."""
    return z.round_() if dead_zone == 0 else z.add_(z.sign(), alpha=0.5 - dead_zone)


def bound(eigenvalues: NDArray[np.float64], relative_rmse: float) -> float:
    """Bits a value below which no code of single Gaussian tokens has this error (reverse water-filling).

    ``eigenvalues`` [D] are the variances of the tokens' components. A code that uses what neighbouring tokens share may
    lie below it.
    """
    target = relative_rmse**2 * float(eigenvalues.mean())
    low, high = 0.0, float(eigenvalues.max(initial=0.0))
    if not 0 < target < float(eigenvalues.mean()):
        return math.inf if target == 0 and high > 0 else 0.0
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(eigenvalues, level).mean() < target else (low, level)
    above = eigenvalues[eigenvalues > high]
    return float(0.5 * np.log2(above / high).sum() / len(eigenvalues))


@dataclass(frozen=True)
class Prepared:
    """What a fit needs of its rows, whatever the fidelity."""

    constants: dict[str, Tensor]
    """``mean`` [D], ``basis`` [D, D], ``step`` 1."""
    eigenvalues: NDArray[np.float64]
    varies: bool
    """Whether tokens differ at all."""
    samples: list[tuple[tuple[int, ...] | None, Tensor]]
    """A grid to transform over, or None, and the components [R, D, N] of some rows."""


def prepare(patches: Tensor, grid: tuple[int, ...] | None) -> Prepared:
    """Principal axes of patch tokens float32 [R, N, D], and components of the rows that a step is chosen on."""
    rows, tokens, channels = patches.shape
    apart = rows // 5 if rows // 5 * tokens >= ENOUGH_TOKENS else 0
    mean, eigenvalues, vectors = _principal(patches[: rows - apart].reshape(-1, channels))
    varies = float(eigenvalues.sum()) > 1e-12 * float(mean @ mean)
    basis = {"mean": torch.from_numpy(mean).float(), "basis": torch.from_numpy(vectors).float(), "step": torch.ones(1)}
    sample = patches[rows - apart :] if apart else patches
    sample = sample[: max(1, STEP_TOKENS // tokens)].cpu()
    # Where a few tokens hold all the energy, a part of them says nothing about the rest.
    if varies and float(sample.double().var(dim=(0, 1), correction=0).sum()) < 0.5 * float(eigenvalues.sum()):
        sample = patches.cpu()
    # As earlier versions had it in memory: sums in another order would give other constants in the last digit, and those
    # of a store could not be made again where they are lost.
    plain = components(sample, basis, None).transpose(1, 2).contiguous().transpose(1, 2)
    samples: list[tuple[tuple[int, ...] | None, Tensor]] = [(None, plain)]
    samples += [] if grid is None else [(grid, components(sample, basis, grid))]
    return Prepared(basis, eigenvalues, varies, samples)


def fit_klt(
    tap: str, patches: Tensor, fidelity: float, grid: tuple[int, ...] | None, prepared: Prepared | None = None,
    *, settled: bool = False,
) -> Fitted:  # fmt: skip
    """Choose basis, step and gain for patch tokens float32 [R, N, D], so that rows not seen have error ``fidelity``.

    The basis is of the first four fifths of the rows, step and gain of the last fifth: on its own rows a basis looks
    better than it is (so they are where these are few). With ``grid`` (its product is N) a DCT over it is used where its codes are
    smaller, or, where that is ``settled``, in any case. ``prepared`` is what :func:`prepare` made of the same rows, for fits of several fidelities.

    Raises
    ------
    UsageError
        where the largest component would need more than 16 bits.
    """
    rows, tokens, channels = patches.shape
    ready = prepare(patches, grid) if prepared is None else prepared
    basis = ready.constants
    best: tuple[int, int, tuple[int, ...] | None, float, Tensor, int] | None = None
    for candidate, z in ready.samples[-1:] if settled else ready.samples:
        step, gain, kept = _search(z, fidelity) if ready.varies else (1.0, torch.ones(channels), channels)
        found, typesize = _size(rounded(z[:, :kept] / step, DEAD_ZONE))
        if best is None or found < PAYS * best[0]:
            best = found, typesize, candidate, step, gain, kept
    assert best is not None  # noqa: S101  # programmer invariant: None is always a candidate
    _, typesize, chosen, step, gain, kept = best
    # A component is dropped only where calibration saw enough tokens to know that it is idle.
    if patches.shape[0] * tokens < TOKENS_PER_CHANNEL * channels:
        kept = channels
    constants = basis | {"basis": basis["basis"][:, :kept].contiguous(), "step": torch.tensor([step])}
    peak = torch.zeros(kept)
    size = max(1, STEP_TOKENS // tokens)
    for start in range(0, rows, size):
        codes = rounded(components(patches[start : start + size].cpu(), constants, chosen), DEAD_ZONE)
        peak = torch.maximum(peak, codes.abs().amax(dim=(0, 2)))
    if float(peak.max()) > LIMITS[WIDE] / 2:
        raise UsageError(
            f"tap {tap}: fidelity {fidelity:g} needs more than 16 bits for its largest component; "
            "ask for a coarser fidelity, or encoding fp16 or fp32"
        )
    large = (peak > MARGIN).nonzero()
    named = constants | {"gain": gain[:kept]}
    return Fitted(
        {name: value.numpy().astype(np.float32) for name, value in named.items()},
        int(large.max()) + 1 if len(large) else 0,
        chosen,
        ready.eigenvalues,
        typesize,
    )


def _principal(flat: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean, variances (descending) and eigenvectors [D, D] of tokens [T, D]."""
    if flat.shape[0] > FIT_TOKENS:
        # Evenly spread over rows and positions; the stride is odd to the grid, so all positions are met.
        flat = flat[torch.linspace(0, flat.shape[0] - 1, FIT_TOKENS, dtype=torch.float64).long()]
    x = flat.cpu().to(torch.float64).numpy()  # in this order: MPS has no float64
    mean = x.mean(axis=0)
    x -= mean
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return mean, np.maximum(values[::-1], 0), vectors[:, ::-1].copy()


def _search(z: Tensor, fidelity: float) -> tuple[float, Tensor, int]:
    """The step for components [R, K, N] whose error is ``fidelity`` of their spread; gains [K]; how many to keep.

    The step is bracketed by doubling and then bisected on its logarithm, to half a percent.
    """
    # A DCT moves the mean of a component into its first frequency, so the spread is measured before: it is orthonormal.
    spread = float(z.double().square().sum())
    target = fidelity**2 * spread
    low = fidelity * math.sqrt(12 * spread / z.numel()) / 2
    while _errors(z, 2 * low)[0].sum() <= target:
        low *= 2
    high = 2 * low
    for _ in range(7):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _errors(z, middle)[0].sum() <= target else (low, middle)
    step = float(np.float32(max(low, float(np.finfo(np.float32).tiny))))
    errors, gain, energy = _errors(z, step)
    added = (energy - errors).flip(0).cumsum(0).flip(0)  # what dropping a component and all after it would add
    needed = (added > IDLE * errors.sum()).nonzero()
    return step, gain, int(needed.max()) + 1 if len(needed) else 1


def _errors(z: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of each component at this step, its best gain, and its energy: each [K]; errors in float64."""
    scaled = z / step
    q = rounded(scaled, DEAD_ZONE)
    qq, zq, zz = ((a * b).sum(2).double().sum(0) for a, b in ((q, q), (scaled, q), (scaled, scaled)))
    gain = torch.where(qq > 0, zq / qq.clamp_min(1), 1.0).clamp(0.5, 2)
    return (zz - 2 * gain * zq + gain * gain * qq) * step**2, gain.float(), zz * step**2


def _size(codes: Tensor) -> tuple[int, int]:
    """Compressed bytes, about as a store will have them, and the ``typesize`` that makes them so few.

    Where neighbours are alike, bit planes of every second code are shorter to tell, and quicker; elsewhere they are longer.
    """
    large = codes.abs().amax(dim=(0, 2)) > MARGIN if codes.numel() else torch.zeros(codes.shape[1], dtype=torch.bool)
    wide = int(large.nonzero().max()) + 1 if large.any() else 0
    parts = integers(codes[:, :wide], WIDE), integers(codes[:, wide:], NARROW)
    first, *narrow = (
        sum(len(compressed(run, BLOCK_BYTES, typesize)) for run in chunks(part))
        for part, typesize in ((parts[0], 0), (parts[1], 0), (parts[1], 2))
    )
    return first + min(narrow), 2 if narrow[1] < narrow[0] else 0


def chunks(rows: NDArray[np.generic], size: int = CHUNK_ROWS) -> Iterator[NDArray[np.generic]]:
    """Rows that a store compresses together."""
    for start in range(0, len(rows) if rows[:1].size else 0, size):
        yield rows[start : start + size]


def compressed(block: NDArray[np.generic], block_bytes: int = BLOCK_BYTES, typesize: int = 0) -> bytes:
    """One chunk as a store's codec writes it."""
    return bytes(Codec(block_bytes, typesize).blosc(block.itemsize).encode(np.ascontiguousarray(block)))

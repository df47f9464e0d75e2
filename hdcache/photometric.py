"""Photometric augmentation whose choices are functions of (seed, sample id, epoch, view): fresh in every epoch.

The operations are torchvision's, in the order of SimCLR and BYOL: colour jitter (brightness, contrast, saturation,
hue, in a random order), grayscale, Gaussian blur, solarization. They work on a batch of float images in [0, 1], where
torchvision and Pillow round to 8 bits in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from hdcache import draws
from hdcache.records import Record

# Columns of the numbers that decide one image; the first four are those of the plain jitter.
_ORDER, _HUE, _JITTER, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(3, 10)
NUMBERS = 10
TRUNCATE = 4
"""Where the blur's Gaussian is cut off, in standard deviations (of the largest one)."""


class Photometric(Record):
    """Augmentation of a student's colours, fresh in every epoch."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    brightness: float = Field(default=0.4, ge=0, le=1)
    """Half range of the brightness factor (TinyMIM A6: 0.4; SDSSL: 0.4)."""
    contrast: float = Field(default=0.4, ge=0, le=1)
    """Half range of the contrast factor (TinyMIM A6: 0.4; SDSSL: 0.4)."""
    saturation: float = Field(default=0.4, ge=0, le=1)
    """Half range of the saturation factor (TinyMIM A6: 0.4; SDSSL: 0.2)."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Half range of the turn of the colour circle, in turns (SDSSL: 0.1)."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Probability of the four above together (TinyMIM A6: 1; SDSSL: 0.8)."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Probability that colours turn into grey (SDSSL: 0.2)."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of a Gaussian blur (SDSSL: 1.0 for the first view, 0.1 for the second)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the network's input and not scaled with it;
    a uniform draw (SDSSL: 0.1 to 2 at 224 pixels). Lower it in proportion for smaller inputs."""
    solarize: float = Field(default=0.0, ge=0, le=1)
    """Probability that the upper half of the brightness range is inverted (SDSSL: 0.2 for the second view)."""

    @model_validator(mode="after")
    def _sigmas_are_ordered(self) -> Self:
        low, high = self.blur_sigma
        if not 0 < low <= high < math.inf:
            raise ValueError(f"blur_sigma [{low}, {high}] must be two numbers above 0, the smaller first")
        return self


def draw_photometric(spec: Photometric, seed: int, ids: Sequence[str], epoch: int, slot: int = 0) -> Tensor:
    """Numbers float64 in [0, 1), [B, 10], that decide the augmentation of one view: keyed by (seed, id, epoch, slot)."""
    purpose = "jitter" if slot == 0 else f"jitter {slot}"
    return torch.from_numpy(draws.uniform_rows(NUMBERS, [(seed, name, epoch, purpose) for name in ids]))


def apply_photometric(images: Tensor, numbers: Tensor, spec: Photometric) -> Tensor:
    """Augment ``images`` (float [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]); returns a new tensor in [0, 1].

    ``numbers`` [B, 10] on the CPU are those of :func:`draw_photometric`. All frames of a clip are changed alike.
    """
    # The frames of a clip are one tall image, for all but the blur.
    out = (images.flatten(2, -2) if images.ndim == 5 else images).clone()
    spread = torch.tensor([spec.brightness, spec.contrast, spec.saturation], dtype=torch.float64)
    factors = (1 + (2 * numbers[:, :3] - 1) * spread).clamp_min(0)
    operations = 3
    if spec.hue:
        operations = 4
        factors = torch.cat([factors, (2 * numbers[:, _HUE : _HUE + 1] - 1) * spec.hue], dim=1)
    orders = list(itertools.permutations(range(operations)))
    drawn = (numbers[:, _ORDER] * len(orders)).long()
    for order, (places, strengths) in zip(
        orders, _grouped(drawn, numbers[:, _JITTER] < spec.probability, factors, len(orders), out.device), strict=True
    ):
        if len(places):
            part = out[places]
            for operation in order:
                part = _blend(part, strengths[:, operation], operation)
            out[places] = part
    low, high = spec.blur_sigma
    frames = images.shape[2] if images.ndim == 5 else 1
    steps: list[tuple[float, int, Callable[[Tensor, Tensor], Tensor]]] = [
        (spec.grayscale, _GREY, lambda x, _: _grey(x).expand_as(x)),
        (spec.blur, _BLUR, lambda x, row: _blurred(x, low + row[:, _SIGMA] * (high - low), high, frames)),
        # A pixel that 8 bits would round to 128 or more, as Pillow inverts.
        (spec.solarize, _SOLARIZE, lambda x, _: torch.where(x >= 0.5, 1 - x, x)),
    ]
    for probability, column, change in steps:
        rows = (numbers[:, column] < probability).nonzero().squeeze(1)
        if len(rows):
            places = rows.to(out.device)
            out[places] = change(out[places], numbers[rows])
    return out.view_as(images)


def _grouped(
    orders: Tensor, chosen: Tensor, factors: Tensor, count: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """For each order the places and factors [rows, operations, 1, 1, 1] of the chosen images that have it."""
    # Images of one order lie together in this list, so that it goes to the device in one copy; the others come last.
    ranked = torch.where(chosen, orders, count)
    places = ranked.argsort(stable=True)
    strengths = factors[places].to(torch.float32).to(device)[:, :, None, None, None]
    counts = ranked.bincount(minlength=count + 1).tolist()
    groups = zip(torch.split(places.to(device), counts), torch.split(strengths, counts), strict=True)
    return list(groups)[:count]


@lru_cache(maxsize=16)
def _grey_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, because a copy to a device waits for all work that is queued there."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor([0.2989, 0.587, 0.114], dtype=dtype, device=device).view(1, 3, 1, 1)


def _grey(x: Tensor) -> Tensor:
    return (x * _grey_weights(x.device, x.dtype)).sum(dim=1, keepdim=True)


def _blend(x: Tensor, factor: Tensor, operation: int) -> Tensor:
    if operation == 0:
        return (x * factor).clamp(0, 1)
    if operation == 3:
        return _turned(x, factor)
    grey = _grey(x)
    if operation == 1:
        grey = grey.mean(dim=(2, 3), keepdim=True)
    return (grey + (x - grey) * factor).clamp(0, 1)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """``x`` [B, 3, H, W] with its hue moved by ``turns`` [B, 1, 1, 1] of the colour circle; value and chroma stay."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    # A grey pixel has no hue, and chroma 0 makes any hue grey again.
    unit = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / unit,
        torch.where(value == green, (blue - red) / unit + 2, (red - green) / unit + 4),
    )
    sixths = hue + 6 * turns.squeeze(1)
    channels = []
    for shift in (5, 3, 1):
        k = (sixths + shift) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1).clamp(0, 1)


@lru_cache(maxsize=16)
def _sources(length: int, radius: int, device: torch.device) -> Tensor:
    """One-hot [2 radius + 1, length * length]: from which pixel an offset reads; the edge goes on for ever."""
    with torch.inference_mode(False):
        offsets, places = torch.arange(-radius, radius + 1), torch.arange(length)
        sources = (places + offsets[:, None]).clamp(0, length - 1)
        return torch.nn.functional.one_hot(sources, length).flatten(1).to(torch.float32).to(device)


def _blurred(x: Tensor, sigmas: Tensor, largest: float, frames: int) -> Tensor:
    """``x`` [B, 3, F H, W] after a Gaussian blur with one of ``sigmas`` (pixels, float64 [B]) for each image."""
    offsets = torch.arange(-math.ceil(TRUNCATE * largest), math.ceil(TRUNCATE * largest) + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sigmas[:, None]) ** 2).exp()
    weights = (weights / weights.sum(1, keepdim=True)).to(torch.float32).to(x.device)
    rows, columns = x.shape[2] // frames, x.shape[3]
    # Two small matrix products for each image: a batch of one convolution each would be slower.
    across, down = (
        (weights @ _sources(n, len(offsets) // 2, x.device)).view(-1, n, n).to(x.dtype) for n in (columns, rows)
    )
    wide = x.reshape(len(x), -1, columns) @ across.mT
    planes = wide.reshape(len(x), 3 * frames, rows, columns)
    return (down.unsqueeze(1) @ planes).view_as(x).clamp(0, 1)

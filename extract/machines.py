"""Whether two machines write the same rows: the versions that decide bytes, and the features of a fixed batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache import draws
from hdcache.errors import StoreMismatch
from hdcache.extract.opening import decoders
from hdcache.records import Record
from hdcache.rendering import input_shape
from hdcache.teachers import Teacher

IMAGES = 4
"""Rows of the fixed batch; the network runs a whole one anyway."""
KEPT = 16
"""Features of each tap that travel, to tell last bits from another network."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Relative RMSE of those features between machines: beyond, it is no matter of rounding."""


class Fingerprint(Record):
    """What one machine makes of the fixed batch."""

    sha256: str
    """Of all features."""
    values: dict[str, tuple[float, ...]]
    """:data:`KEPT` features of each tap, spread over the whole."""


def fingerprint(teacher: Teacher, taps: Sequence[str]) -> Fingerprint:
    """Run the teacher on the same noise as every other machine."""
    shape = (IMAGES, *input_shape(teacher.card.preprocessing))
    noise = draws.uniform(int(np.prod(shape)), "fixed batch") * 256
    pixels = torch.from_numpy(noise.astype(np.uint8).reshape(shape))
    visible = teacher.visible([f"noise {number}" for number in range(IMAGES)], 0)
    found = teacher.forward(pixels, list(taps), visible)
    hasher, values = hashlib.sha256(), {}
    for tap in sorted(found):
        value = found[tap]
        parts = [value] if isinstance(value, Tensor) else [value.prefix, value.patches]
        flat: NDArray[np.float32] = torch.cat([part.flatten() for part in parts]).float().cpu().numpy()
        hasher.update(flat.tobytes())
        kept = flat[np.linspace(0, len(flat) - 1, KEPT).astype(np.int64)]
        values[tap] = tuple(float(number) for number in np.nan_to_num(kept))
    return Fingerprint(sha256=hasher.hexdigest(), values=values)


def difference(here: Fingerprint, there: Fingerprint) -> float:
    """Relative RMSE of the worst tap; 0.0 where every bit of every feature is the same."""
    if here.sha256 == there.sha256:
        return 0.0
    worst = np.finfo(np.float32).eps.item()
    for tap, values in there.values.items():
        exact, other = np.array(values), np.array(here.values[tap])
        scale = float(np.sqrt((exact**2).mean())) or 1.0
        worst = max(worst, float(np.sqrt(((exact - other) ** 2).mean())) / scale)
    return worst


def versions(kind: str) -> dict[str, str]:
    """The packages that decide what is stored of data of this kind, and their versions here (``none``: not installed)."""
    found = {}
    for name in (*decoders(kind), "torch", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def check_versions(expected: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    """Rows of one store come from one set of versions.

    Raises
    ------
    StoreMismatch
        naming the first package whose version differs.
    """
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            raise StoreMismatch(
                f"{where} has {name} {found.get(name, 'none')}, this command {wanted}: their rows could differ; install "
                f"{name} {wanted} there and start the worker again"
            )


def check_difference(found: float, precision: str, where: str) -> None:
    """Other hardware may round the last bits otherwise, and no more.

    Raises
    ------
    StoreMismatch
        when the same network gives other features there.
    """
    if not found <= TOLERANCE[precision]:
        raise StoreMismatch(
            f"{where}: the teacher gives other features there (relative difference {found:.2g} in {precision}); that is "
            "no rounding: check the device with 'hdcache doctor', and take this worker away"
        )

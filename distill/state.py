"""The saved state of a run: one safetensors file, written whole, from which the run goes on to the bit.

Every random choice is a function of (seed, sample id, epoch), so weights, optimizer moments and the position
(epoch, next batch, step) are all there is to save.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hdcache.errors import OutOfSpace, StoreMismatch
from hdcache.records import differences

STATE_FILE = "state.safetensors"


@dataclass
class Position:
    """Where a run stands."""

    epoch: int = 0
    batch: int = 0
    """Next batch of ``epoch``."""
    step: int = 0
    """Optimizer steps taken."""
    seconds: float = 0.0
    """Training seconds so far, over all sessions."""
    logged: dict[str, float] = field(default_factory=dict)
    """Sums of the loss's parts since the last log line."""
    counted: int = 0
    """Steps in these sums."""
    beside: list[str] = field(default_factory=list)
    """Recipes of the students that learnt from the same batches, in any session."""


def save_state(
    folder: Path,
    position: Position,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    about: dict[str, Any],
) -> None:
    """Write the state; ``names`` are the optimizer's parameters in its own order, ``about`` is what must match on resume."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}/{key}": value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value.detach().cpu().contiguous()
    metadata = {"position": json.dumps(vars(position)), "about": json.dumps(about, sort_keys=True)}
    path = folder / STATE_FILE
    # Buffers shared between modules would be refused by safetensors; a copy of each tensor is small beside training.
    partial = path.with_suffix(".partial")
    try:
        save_file({key: value.clone() for key, value in tensors.items()}, partial, metadata=metadata)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                f"{path}: cannot be written ({error}); the state saved before is kept: free space and run the same command again"
            ) from None
        raise


def saved_facts(folder: Path) -> dict[str, Any]:
    """The ``about`` of the state in ``folder``; empty where there is none that can be read."""
    return _metadata(folder, "about")


def saved_position(folder: Path) -> Position:
    """Where the run in ``folder`` stands; at its beginning where there is no state that can be read."""
    try:
        return Position(**_metadata(folder, "position"))
    except TypeError:
        return Position()


def _metadata(folder: Path, key: str) -> dict[str, Any]:
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()[key])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}
    return found


def load_state(
    folder: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    about: dict[str, Any],
) -> Position | None:
    """Restore a saved state; None where there is none.

    Raises
    ------
    StoreMismatch
        when the state was written by a run with other settings or targets, naming the fields.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            saved = json.loads(metadata["about"])
            lines = differences(json.loads(json.dumps(about)), saved)
            if lines:
                raise StoreMismatch(
                    f"{path} belongs to a run with other settings ({'; '.join(lines[:6]).replace('the store has', 'it has')}); repeat them, or give --out another folder"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            position = Position(**json.loads(metadata["position"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreMismatch(f"{path}: not a readable state ({error}); delete it to start again") from None
    for prefix, module in modules.items():
        module.load_state_dict(
            {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"optimizer/{kind}/{name}")
            if value is not None:
                optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    return position

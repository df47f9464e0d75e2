"""The folder that a run leaves behind: a student that timm itself can load, and what else there is to know of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from hdcache.checkpoints import is_head
from hdcache.errors import InputNotFound
from hdcache.schema import Preprocessing
from hdcache.video_vit import without_unset

WEIGHTS_FILE, CONFIG_FILE = "student.safetensors", "config.json"


@dataclass(frozen=True)
class StudentConfig:
    """What ``config.json`` says."""

    architecture: str
    arguments: dict[str, Any]
    """Of :func:`hdcache.backbones.create_vit`, but for ``num_classes``."""
    classes: int
    """Of its classifier; 0 where it has none."""
    preprocessing: Preprocessing
    last_trained: str
    pool_trained: str


def save_student(
    folder: Path,
    model: nn.Module,
    architecture: str,
    arguments: Mapping[str, Any],
    preprocessing: Preprocessing,
    last_trained: str,
    about: Mapping[str, Any],
    classifier: nn.Linear | None = None,
) -> None:
    """Write ``student.safetensors`` (exactly timm's keys) and ``config.json`` (timm's format).

    ``timm.create_model(architecture, num_classes=num_classes, checkpoint_path="student.safetensors", **model_args)``
    loads it, with what ``config.json`` says of them, unless it is a network of clips: ``model_args`` then holds
    ``frames`` and ``tubelet``, which :func:`hdcache.backbones.load_backbone` alone understands.

    Parameters
    ----------
    about
        facts to keep; ``pool_trained`` (mean or cls) is what ``classifier`` reads.
    classifier
        the linear layer [classes, D] that was trained on pooled ``final``; None: the student has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in model.state_dict().items() if not is_head(key)}
    pooling: dict[str, Any] = {}
    if classifier is not None:
        pooling = _pooling(model, "avg" if about.get("pool_trained") == "mean" else "token")
        # A norm or a pool that stood before timm's head took no part in training.
        spare = ("fc_norm.", "attn_pool.") if pooling else ()
        state = {key: value for key, value in state.items() if not key.startswith(spare)}
        state |= {f"head.{key}": value for key, value in classifier.state_dict().items()}
    classes = 0 if classifier is None else classifier.out_features
    embed: Any = model.patch_embed
    clips = {"frames": embed.frames, "tubelet": embed.tubelet} if hasattr(embed, "tubelet") else {}
    given = {key: value for key, value in without_unset(arguments).items() if key != "num_classes"}
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": int(model.num_features),  # type: ignore[arg-type]  # nn.Module's attributes are untyped
        "model_args": given | clips | pooling,
        "pretrained_cfg": {
            "input_size": [3, preprocessing.size, preprocessing.size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "crop_pct": 0.875,
            "num_classes": classes,
        },
        "hdcache": {"preprocessing": preprocessing.model_dump(mode="json"), "last_trained": last_trained, **about},
    }
    weights = folder / WEIGHTS_FILE
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in state.items()}
    save_file(tensors, f"{weights}.partial", metadata={"format": "pt"})  # two entries would come in random order
    os.replace(f"{weights}.partial", weights)
    partial = folder / f"{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config, indent=1, sort_keys=True))
    os.replace(partial, folder / CONFIG_FILE)


def _pooling(model: nn.Module, wanted: str) -> dict[str, Any]:
    """Arguments of timm with which its head reads pooled ``final``, ``token`` or ``avg``; none where it does already."""
    network: Any = model
    prefix = getattr(network, "pool_include_prefix", False)
    if network.global_pool == wanted and isinstance(network.fc_norm, nn.Identity) and not prefix:
        return {}
    found: dict[str, Any] = {"global_pool": wanted, "fc_norm": False}
    if prefix:
        found["pool_include_prefix"] = False
    if isinstance(network.norm, nn.Identity):  # timm's own choice where it norms what is pooled
        found["final_norm"] = False
    return found


def read_config(folder: Path) -> StudentConfig:
    """What ``config.json`` in ``folder`` says; :class:`InputNotFound` where it is no student's."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        about = config["hdcache"]
        return StudentConfig(
            architecture=str(config["architecture"]),
            arguments=dict(config["model_args"]),
            classes=int(config.get("num_classes", 0)),
            preprocessing=Preprocessing.model_validate(about["preprocessing"]),
            last_trained=str(about["last_trained"]),
            pool_trained=str(about.get("pool_trained", "cls")),  # old folders lack it
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputNotFound(f"{path}: not a student that hdcache wrote ({error!r})") from None

"""Read a checkpoint from a file as a state dict, without its wrappers, and load it strictly."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from hdcache.errors import InputNotFound, UsageError

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
# A classifier that stands beside all else under a name of its own (mmaction2).
_CLASSIFIER = "cls_head."
# How the transformers library names the layers of ViT and VideoMAE.
_TRANSFORMERS = re.compile(r"(^|\.)encoder\.layer\.\d+\.")
# What VideoMAE and AMD train beside the encoder (released code, modeling_pretrain.py).
_PRETRAINING = ("decoder.", "encoder_to_decoder.", "mask_token", "generators.", "encoder.projection_heads.")


def first_line(error: Exception) -> str:
    """What went wrong, short enough to stand inside another message."""
    text = str(error).strip() or type(error).__name__
    return (text if not isinstance(error, LookupError) else f"no {text}").splitlines()[0][:160]


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by parameter name, from a .safetensors file or a pickle of tensors and plain values.

    Released training scripts (MAE's, VideoMAE's) save their command line beside the weights: an ``argparse.Namespace``
    is read too, which holds plain values as well.

    Raises
    ------
    InputNotFound
        when the file is missing or damaged.
    UsageError
        when it holds anything else than a state dict.
    """
    if not path.is_file():
        raise InputNotFound(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # weights_only refuses pickles that hold more than tensors with an UnpicklingError that names the first.
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(
                f"{path}: refused, it holds more than tensors ({found[1]}), which could run code; "
                "where you trust it, load it and save its state_dict alone as .safetensors"
            ) from None
        raise InputNotFound(f"{path}: not a readable checkpoint ({first_line(error)}); fetch it again") from None
    return unwrapped(state, str(path))


def unwrapped(state: Any, where: str) -> dict[str, Tensor]:
    """The state dict inside what a training script saved, without prefixes that all names share."""
    for _ in range(2):  # {"model": {"state_dict": ...}}
        inner = [state[key] for key in _WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{where}: expected a mapping from parameter names to tensors; save the state_dict alone")
    state = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIER)}
    while state and (common := [p for p in _PREFIXES if all(key.startswith(p) for key in state)]):
        state = {key[len(common[0]) :]: value for key, value in state.items()}
    return dict(state)


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load ``state`` into ``model``; any missing, unexpected or misshapen key is refused with the list.

    A classifier or attention pool in ``state`` that ``model`` has no place for is left out.
    """
    model.load_state_dict(fitted(model, state, where), strict=False)


def fitted(model: nn.Module, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """What :func:`load_strictly` loads, or its refusal; ``model`` stays as it is."""
    own = model.state_dict()
    fits = {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in state.items()}
    if not fits and is_video(own):
        converted = state = from_videomae(state, own)
    else:
        try:
            # Older spellings of keys, and position embeddings for another input size.
            converted = state if fits else dict(checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
            converted = state
    # The pool of a checkpoint that is read without it (SigLIP) stands after the last tap, as a classifier does.
    spare = ("head.", "head_dist.", *(() if getattr(model, "attn_pool", None) else ("attn_pool.",)))
    converted = {key: value for key, value in converted.items() if key in own or not key.startswith(spare)}
    missing = sorted(key for key in own if key not in converted)
    unexpected = sorted(key for key in converted if key not in own)
    shapes = sorted(
        f"{key} {tuple(state.get(key, converted[key]).shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in converted and converted[key].shape != own[key].shape
    )
    if missing or unexpected or shapes:
        parts = [
            f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
            if keys
        ]
        raise UsageError(f"{where} does not fit {type(model).__name__} ({'; '.join(parts)}); {_advice(state, own)}")
    return converted


def _advice(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What to do about a checkpoint that does not fit."""
    if any(_TRANSFORMERS.search(key) for key in state):
        return "it is laid out as the transformers library does, which is not read; take the weights that the authors released"
    embed = [value for key, value in state.items() if key.endswith("patch_embed.proj.weight")]
    if embed and embed[0].ndim == 5 and not is_video(own):
        return "it is a network of clips; say ?frames=16, the number of frames it was trained with, after its name"
    if embed and embed[0].ndim == 4 and is_video(own):
        return "it is a network of still images; leave frames out"
    return "give the architecture and options that the checkpoint was made with"


def is_video(own: Mapping[str, Tensor]) -> bool:
    """Whether a state dict belongs to a network of clips: its patch embedding has a temporal axis."""
    return "patch_embed.proj.weight" in own and own["patch_embed.proj.weight"].ndim == 5


def from_videomae(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VideoMAE's keys as timm's: the encoder alone, with whole QKV biases; other keys stay as they are.

    Pre-training checkpoints hold ``encoder.*`` beside a decoder, fine-tuned ones the bare names. Positions are fixed and
    not stored: they are taken from ``own``, the network's state.
    """
    kept = {key: value for key, value in state.items() if not key.startswith(_PRETRAINING)}
    found = whole_qkv_bias({key.removeprefix("encoder."): value for key, value in kept.items()})
    if "pos_embed" not in found and any(key.startswith("encoder.") or key.endswith(".q_bias") for key in kept):
        found["pos_embed"] = own["pos_embed"]
    return found


def whole_qkv_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each pair ``q_bias``, ``v_bias`` as one ``qkv.bias``, in which keys have a bias of zero.

    VideoMAE's attention (released code, modeling_finetune.py) gives keys none; softmax would not feel it.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        stem = key[: -len("q_bias")]
        if key.endswith("q_bias") and f"{stem}v_bias" in state:
            found[f"{stem}qkv.bias"] = torch.cat([value, torch.zeros_like(value), state[f"{stem}v_bias"]])
        elif not (key.endswith("v_bias") and f"{stem}q_bias" in state):
            found[key] = value
    return found


def is_head(key: str) -> bool:
    """Whether a parameter belongs to a classifier."""
    return key.startswith(("head.", "head_dist."))

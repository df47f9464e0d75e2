"""Build a timm ViT from a spec, and load its weights strictly.

Specs, the same on the command line and in Python:

``vit_large_patch16_224.mae`` or ``timm:NAME``      hub weights (needs a network, or a filled hub cache)
``timm:NAME?checkpoint=FILE&img_size=112``          weights from a local .safetensors or .pth file
``random:NAME?seed=0&img_size=32&depth=4``          untrained
``path/to/run``                                     a student folder that ``hdcache distill`` wrote

Further options after ``?`` are keyword arguments of ``timm.create_model``; ``frames=16`` (with ``tubelet=2``) makes a
network of clips of it (:mod:`hdcache.video_vit`), whose checkpoint may be VideoMAE's.
"""

from __future__ import annotations

import hashlib
import json
import math
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_pretrained
from torch import Tensor, nn

from hdcache.checkpoints import first_line, fitted, load_strictly, read_state, unwrapped
from hdcache.errors import InputNotFound, UsageError, nearest, next_to
from hdcache.schema import Preprocessing
from hdcache.student_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from hdcache.taps import num_blocks
from hdcache.video_vit import fix_video_positions, video_arguments, without_unset


@dataclass(frozen=True)
class Backbone:
    """A frozen network with all that is needed to feed it and to name it."""

    model: nn.Module
    """timm VisionTransformer in eval mode, without gradients."""
    architecture: str
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    weights: str
    """sha256 over names, shapes and fp32 bytes of the backbone (and of the classifier, where it was kept)."""
    source: str
    licence: str
    last_trained: str
    """Tap name of the deepest layer that training reached: ``final``, or ``block11.out`` where an objective
    leaves the last block's tail at its initial values (relation distillation does)."""
    pool_trained: str = "cls"
    """How its tokens are pooled by default: ``mean`` where training never reached its class token, else ``cls``."""


def load_backbone(spec: str, *, img_size: int | None = None, classifier: bool = False) -> Backbone:
    """Load the network that ``spec`` names; see the module's docstring for the grammar.

    Parameters
    ----------
    img_size
        input side in pixels, when not the model's own; position embeddings are resampled.
    classifier
        keep the classification head (needed for the tap ``logits``).

    Raises
    ------
    InputNotFound
        when a file is missing or the hub cannot be reached.
    UsageError
        for an unknown model or option, an unsupported network, or a checkpoint whose keys do not fit.
    """
    folder = Path(spec).expanduser()
    if "?" not in spec and (folder / CONFIG_FILE).is_file():
        return _load_student(folder, img_size, classifier)
    kind, name, options = parse_spec(spec)
    if img_size is not None:
        options["img_size"] = img_size
    checkpoint = options.pop("checkpoint", None)
    seed = options.pop("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise UsageError(f"model spec {spec!r}: seed {seed!r} must be an integer from 0 to 2^63 - 1")
    if not classifier:
        options["num_classes"] = 0
    hub = kind == "timm" and checkpoint is None
    if checkpoint is not None:
        state = read_state(Path(str(checkpoint)).expanduser())
        if classifier:
            head = state.get("head.weight")
            options["num_classes"] = 0 if head is None else int(head.shape[0])
        if "frames" in options and "fc_norm.weight" in state:
            options.setdefault("fc_norm", True)  # VideoMAE's fine-tuned networks pool before their last norm
        model = create_vit(name, options, seed=seed)
        load_strictly(model, state, str(checkpoint))
    else:
        model = create_vit(name, options, pretrained=hub, seed=seed)
    config = getattr(model, "pretrained_cfg", {}) or {}
    return _freeze(model, name, options, spec, str(config.get("license") or "unknown"), "final")


def parse_spec(spec: str) -> tuple[str, str, dict[str, Any]]:
    """``(kind, timm name, options)`` of a spec; numbers and booleans in options are parsed."""
    head, _, query = spec.partition("?")
    kind, _, name = head.partition(":") if ":" in head else ("timm", "", head)
    if kind not in ("timm", "random"):
        raise UsageError(
            f"unknown model spec {spec!r}: expected timm:NAME, random:NAME, a timm name or a student folder"
        )
    if "/" in name or name.endswith((".safetensors", ".pth", ".pt")):
        raise InputNotFound(
            f"{name}: no student folder there (no {CONFIG_FILE}); for a bare checkpoint say timm:NAME?checkpoint={name}"
        )
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        close = nearest(architecture, timm.list_models("vit*"))
        hint = close if close.startswith("did") else "timm.list_models('vit*') lists what can be tapped"
        raise UsageError(f"unknown model {name!r}; {hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(f"unknown weights {name!r}; {nearest(tag, tags) if tags else 'timm has none'}")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, sign, value = pair.partition("=")
        if not sign or not key or key in options:
            raise UsageError(f"model spec {spec!r}: options after '?' must be key=value joined by '&', each key once")
        options[key] = _scalar(unquote(value))
    return kind, name, options


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def create_vit(
    architecture: str, arguments: Mapping[str, Any], *, pretrained: bool = False, seed: int = 0, group: str = ""
) -> nn.Module:
    """``timm.create_model``, with initial weights that depend on ``seed`` alone and the global generator untouched.

    With ``frames`` among the arguments, a network of clips (:func:`hdcache.video_vit.video_arguments`). ``group`` is what
    the user writes before the name of an argument (``student.arguments.``).
    """
    if arguments.get("in_chans", 3) != 3:
        raise UsageError(f"{architecture}: in_chans {arguments['in_chans']}; images have 3 channels, leave it out")
    options = without_unset(arguments)
    if clips := not {"frames", "tubelet"}.isdisjoint(options):
        options = video_arguments(architecture, options)
    if clips and pretrained:
        raise UsageError(
            f"{architecture} with frames={arguments.get('frames')}: timm has no weights of video networks; "
            f"give timm:{architecture}?checkpoint=FILE&frames={arguments.get('frames')} (VideoMAE's are read), or random:"
        )
    try:
        with torch.random.fork_rng(devices=[]), _hub_in_reach() if pretrained else nullcontext():
            torch.default_generator.manual_seed(seed)  # the CPU's alone, the one that fork_rng restores
            model: nn.Module = timm.create_model(architecture, **options)
            if pretrained:
                _check_hub_weights(model, architecture)
                # timm itself loads them: for some networks it resamples positions in a way of their own.
                model = timm.create_model(architecture, pretrained=True, **options)
    except UsageError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise InputNotFound(
                f"weights of {architecture} could not be fetched ({first_line(error)}); "
                f"with no network give timm:{architecture}?checkpoint=FILE"
            ) from None
        heads = _undivided(architecture, arguments, group)
        raise UsageError(heads or f"{architecture} with {dict(arguments)}: {first_line(error)}") from None
    if not num_blocks(model):
        raise UsageError(f"{architecture} with {dict(arguments)}: depth must be at least 1")
    if clips:
        fix_video_positions(model)
    return model


def _undivided(architecture: str, arguments: Mapping[str, Any], group: str) -> str | None:
    """What to say where the width of a network is not a multiple of its heads; None: something else is wrong."""
    if {"embed_dim", "num_heads"}.isdisjoint(arguments) or not timm.is_model(architecture):
        return None
    with torch.device("meta"):
        own: Any = timm.create_model(architecture)
    heads = [part.num_heads for part in own.modules() if hasattr(part, "num_heads")]
    wanted = {"embed_dim": getattr(own, "embed_dim", None), "num_heads": heads[0] if heads else None}
    width, count = (arguments.get(name, default) for name, default in wanted.items())
    if type(width) is not int or type(count) is not int or width < 1 or (count > 0 and width % count == 0):
        return None
    # Fixed positions need a multiple of 4.
    step = math.lcm(4, max(1, count))
    widths = f"{group}embed_dim={next_to(width, lambda number: number % step == 0, width + step)}"
    counts = f"{group}num_heads={next_to(count, lambda number: width % number == 0, width)}"
    fixes = [counts] if count < 1 else [widths] if width % 4 else [counts, widths]
    return f"{architecture}: num_heads {count} does not divide embed_dim {width}; set {', or '.join(fixes)}"


def _check_hub_weights(model: nn.Module, architecture: str) -> None:
    """Refuse weights whose keys are not those of ``model``: timm drops or leaves out any once the classifier differs."""
    checked = False

    def check(state: dict[str, Tensor], _: nn.Module) -> dict[str, Any]:
        nonlocal checked
        where = f"checkpoint of {architecture}"
        fitted(model, unwrapped(state, where), where)
        checked = True
        return model.state_dict()  # so that nothing is changed yet

    load_pretrained(model, filter_fn=check)
    if not checked:
        raise UsageError(
            f"weights of {architecture} come in a format whose keys cannot be checked; "
            f"save them as .safetensors and give timm:{architecture}?checkpoint=FILE"
        )


@contextmanager
def _hub_in_reach() -> Iterator[None]:
    """Where the hub does not answer, let its client look into its cache only, instead of retrying for a minute."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()  # noqa: S310  # proxies are honoured
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        # A certificate that only the hub's own client knows is no reason to stay away.
        constants.HF_HUB_OFFLINE = not isinstance(getattr(error, "reason", None), ssl.SSLError)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _freeze(
    model: nn.Module,
    architecture: str,
    arguments: dict[str, Any],
    source: str,
    licence: str,
    last_trained: str,
    preprocessing: Preprocessing | None = None,
) -> Backbone:
    model.eval().requires_grad_(False)
    if preprocessing is None:
        data = resolve_model_data_config(model)
        height, width = model.patch_embed.img_size  # type: ignore[union-attr, misc]  # nn.Module's attributes are untyped
        if height != width:
            raise UsageError(
                f"{source}: input of {height}x{width} pixels; only square inputs are supported, give img_size=N"
            )
        frames = getattr(model.patch_embed, "frames", None)
        preprocessing = (
            Preprocessing(
                size=height, mean=data["mean"], std=data["std"], interpolation=data.get("interpolation") or "bicubic"
            )
            if frames is None
            else clip_preprocessing(height, frames)
        )
    return Backbone(
        model, architecture, dict(arguments), preprocessing, weights_digest(model), source, licence, last_trained
    )


def clip_preprocessing(size: int, frames: int) -> Preprocessing:
    """The input of a network of clips: ImageNet's mean and std, bilinear (VideoMAE's released code, datasets.py)."""
    return Preprocessing(size=size, frames=frames, interpolation="bilinear")


def weights_digest(model: nn.Module) -> str:
    """sha256 over the sorted names, shapes and fp32 bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8, or float in [0, 1], [B, 3, ..., H, W] -> float32 of that shape: scaled to [0, 1], then (x - mean) / std."""
    channels = (1, -1, *[1] * (pixels.ndim - 2))
    mean = _per_channel(tuple(preprocessing.mean), pixels.device).view(channels)
    std = _per_channel(tuple(preprocessing.std), pixels.device).view(channels)
    unit = pixels if pixels.is_floating_point() else pixels.to(torch.float32) / 255
    return (unit - mean) / std


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, because a copy to a device waits for all work that is queued there."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, dtype=torch.float32, device=device)


def _load_student(folder: Path, img_size: int | None, classifier: bool) -> Backbone:
    config = read_config(folder)
    weights, preprocessing = folder / WEIGHTS_FILE, config.preprocessing
    arguments = config.arguments | {"num_classes": config.classes if classifier else 0}
    state = read_state(weights)
    if img_size is not None and img_size != preprocessing.size:
        arguments["img_size"] = img_size
        preprocessing = preprocessing.model_copy(update={"size": img_size})
    model = create_vit(config.architecture, arguments)
    load_strictly(model, state, str(weights))
    found = _freeze(model, config.architecture, arguments, str(folder), "unknown", config.last_trained, preprocessing)
    return replace(found, pool_trained=config.pool_trained)

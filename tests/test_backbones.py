from __future__ import annotations

import io
import json
import ssl
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hdcache import backbones
from hdcache.backbones import create_vit, load_backbone, normalize, parse_spec, weights_digest
from hdcache.errors import InputNotFound, UsageError
from hdcache.schema import Preprocessing

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
OPTIONS = "&".join(f"{key}={value}" for key, value in SMALL.items())


def vit(seed: int = 0, **arguments: Any) -> Any:
    return create_vit(ARCHITECTURE, SMALL | {"num_classes": 0} | arguments, seed=seed).eval()


def pictures(side: int = 16) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def features(model: Any, side: int = 16) -> Tensor:
    with torch.no_grad():
        return model.forward_features(pictures(side))  # type: ignore[no-any-return]


# Specs


@given(
    kind=st.sampled_from(["timm", "random"]),
    options=st.dictionaries(
        st.text("abcdefghij_", min_size=1, max_size=8),
        st.integers() | st.booleans() | st.text(max_size=12).filter(lambda text: not _is_json(text)),
        max_size=4,
    ),
)
def test_options_come_back_as_written(kind: str, options: dict[str, Any]) -> None:
    """Numbers and booleans are parsed, anything else stays text; '%', '&' and '#' survive when percent-encoded."""
    words = {True: "true", False: "false"}
    query = "&".join(
        f"{key}={words[value] if isinstance(value, bool) else quote(str(value), safe='')}"
        for key, value in options.items()
    )
    assert parse_spec(f"{kind}:{ARCHITECTURE}" + (f"?{query}" if query else "")) == (kind, ARCHITECTURE, options)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_path_in_an_option_is_taken_as_it_is() -> None:
    """A plus sign or an equals sign in a file name means itself."""
    assert parse_spec(f"{ARCHITECTURE}?checkpoint=/a/b+c=d.pth")[2] == {"checkpoint": "/a/b+c=d.pth"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jax:vit", "unknown model spec 'jax:vit': expected timm:NAME, random:NAME, a timm name or a student folder"),
        ("random:vit_tiny_patch16_223", "unknown model 'vit_tiny_patch16_223'; did you mean 'vit_tiny_patch16_224'"),
        ("random:zzz", r"unknown model 'zzz'; timm.list_models\('vit\*'\) lists what can be tapped"),
        (f"{ARCHITECTURE}.augreg", f"unknown weights '{ARCHITECTURE}.augreg'; did you mean 'augreg_in21k'"),
        (f"{ARCHITECTURE}.zzz", "unknown weights .*; choose from: augreg_in21k, augreg_in21k_ft_in1k"),
        (f"random:{ARCHITECTURE}?depth", "options after '\\?' must be key=value joined by '&', each key once"),
        (f"random:{ARCHITECTURE}?depth=1&depth=2", "must be key=value joined by '&', each key once"),
        (f"random:{ARCHITECTURE}?seed=x", "seed 'x' must be an integer from 0 to"),
        (f"random:{ARCHITECTURE}?seed=-1", "seed -1 must be an integer from 0 to"),
        (f"random:{ARCHITECTURE}?heads=3", "unexpected keyword argument 'heads'"),
        (
            f"random:{ARCHITECTURE}?num_heads=5",
            r"^vit_tiny_patch16_224: num_heads 5 does not divide embed_dim 192; set num_heads=4 or 6, or embed_dim=180 or 200$",
        ),
        (f"random:{ARCHITECTURE}?num_heads=0", "num_heads 0 does not divide embed_dim 192; set num_heads=1$"),
        (f"random:{ARCHITECTURE}?embed_dim=50", "num_heads 3 does not divide embed_dim 50; set embed_dim=48 or 60$"),
        (
            f"random:{ARCHITECTURE}?embed_dim=48&num_heads=96",
            "96 does not divide embed_dim 48; set num_heads=48, or embed",
        ),
        (f"random:{ARCHITECTURE}?depth=0", "depth must be at least 1"),
        (f"random:{ARCHITECTURE}?embed_dim=-3", "with {'embed_dim': -3.*negative dimension"),
        (f"random:{ARCHITECTURE}?act_layer=zzz", "with {'act_layer': 'zzz'.*: no 'zzz'"),
        (f"random:{ARCHITECTURE}?in_chans=1", "in_chans 1; images have 3 channels, leave it out"),
        (
            f"random:{ARCHITECTURE}?img_size=[16,32]",
            "input of 16x32 pixels; only square inputs are supported, give img",
        ),
        ("random:swin_tiny_patch4_window7_224", "SwinTransformer is not a plain timm VisionTransformer"),
        ("random:resnet18", "ResNet is not a plain timm VisionTransformer"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["runs/none", "./weights.pth", "timm:/a/b.safetensors"])
def test_a_path_without_a_student_says_how_to_name_a_checkpoint(spec: str) -> None:
    with pytest.raises(
        InputNotFound, match=r"no student folder there \(no config.json\); .* say timm:NAME\?checkpoint="
    ):
        load_backbone(spec)


# Untrained networks


def test_random_weights_are_a_function_of_the_seed() -> None:
    """Equal seeds, equal weights; torch's global generator neither matters nor moves."""
    torch.manual_seed(1)
    first = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}&seed=7")
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    again = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}&seed=7")
    other = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}")
    assert first.weights == again.weights == weights_digest(vit(7))
    assert first.weights != other.weights == weights_digest(vit(0))
    assert first.arguments == SMALL | {"num_classes": 0}


def test_a_backbone_is_frozen_and_knows_its_input() -> None:
    found = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}", img_size=24)
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert found.preprocessing == Preprocessing(size=24, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (found.architecture, found.arguments["img_size"], found.last_trained) == (ARCHITECTURE, 24, "final")


def test_frames_make_a_network_of_clips() -> None:
    found = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}&frames=6&tubelet=3")
    assert found.preprocessing == Preprocessing(size=16, frames=6, interpolation="bilinear")
    assert found.arguments == SMALL | {"frames": 6, "tubelet": 3, "num_classes": 0}
    assert found.model(torch.zeros(1, 3, 6, 16, 16)).shape == (1, 24)
    again = load_backbone(f"random:{ARCHITECTURE}?{OPTIONS}&frames=6&tubelet=3")
    assert found.weights == again.weights


# The hub


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A hub that no connection reaches; counts the attempts."""
    tried: Counter[str] = Counter()

    def refuse(url: Any, **_: Any) -> Any:
        tried[str(url)] += 1
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


def test_an_unreachable_hub_is_one_line_at_once(
    unreachable: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One attempt, no retries, nothing on the terminal but the error; and the hub's settings are as before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        InputNotFound, match=rf"weights of {ARCHITECTURE}\S* could not be fetched .*\?checkpoint=FILE"
    ) as caught:
        load_backbone(f"{ARCHITECTURE}.augreg_in21k")
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    assert list(unreachable.values()) == [1]
    assert capfd.readouterr() == ("", "")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("answer", ["http-error", "certificate", "fine"])
def test_a_hub_that_answers_is_left_to_its_own_client(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal by the server, or a certificate that only the hub's client knows, does not mean "no network"."""

    def respond(*_: Any, **__: Any) -> Any:
        if answer == "http-error":
            raise urllib.error.HTTPError("https://hub", 403, "no", None, io.BytesIO())  # type: ignore[arg-type]
        if answer == "certificate":
            raise urllib.error.URLError(ssl.SSLCertVerificationError("own authority"))
        return io.BytesIO()

    def create(*_: Any, **__: Any) -> nn.Module:
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        return model

    seen: list[bool] = []
    model: nn.Module = vit()
    monkeypatch.setattr("urllib.request.urlopen", respond)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(backbones, "load_pretrained", lambda model, filter_fn: filter_fn(model.state_dict(), model))
    create_vit(ARCHITECTURE, {}, pretrained=True)
    assert seen == [False, False]


@pytest.fixture
def on_the_hub(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The network whose weights a hub that is always in reach gives out."""
    model: nn.Module = create_vit(ARCHITECTURE, {"num_classes": 21843}, seed=5).eval()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(model.state_dict()))
    return model


@pytest.mark.parametrize("options", ["", "?img_size=112"])
def test_hub_weights_are_loaded_as_timm_does(on_the_hub: nn.Module, options: str) -> None:
    found = load_backbone(f"{ARCHITECTURE}.augreg_in21k{options}")
    more = {"img_size": 112} if options else {}
    timms = timm.create_model(f"{ARCHITECTURE}.augreg_in21k", pretrained=True, num_classes=0, **more)
    assert found.weights == weights_digest(timms)
    assert torch.equal(found.model.blocks[3].mlp.fc1.weight, on_the_hub.blocks[3].mlp.fc1.weight)  # type: ignore[union-attr, index]


def test_the_hub_s_classifier_is_kept_where_it_is_asked_for(on_the_hub: nn.Module) -> None:
    found = load_backbone(f"{ARCHITECTURE}.augreg_in21k", classifier=True)
    assert found.weights == weights_digest(on_the_hub)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("depth=14", r"missing: blocks\.12\.attn\.proj\.bias, .* and 19 more\)"),
        ("depth=10", r"unexpected: blocks\.10\.attn\.proj\.bias, .* and 19 more\)"),
        ("qk_norm=true", r"missing: blocks\.0\.attn\.k_norm\.bias, "),
        ("embed_dim=96", r"wrong shape: .*blocks\.0\.attn\.proj\.bias \(192,\) for \(96,\)"),
    ],
)
def test_hub_weights_of_another_network_are_refused(on_the_hub: nn.Module, options: str, message: str) -> None:
    """timm is not strict once the classifier is left out; we are, with the list."""
    with pytest.raises(UsageError, match=rf"checkpoint of {ARCHITECTURE}\.augreg_in21k does not fit .*{message}"):
        load_backbone(f"{ARCHITECTURE}.augreg_in21k?{options}")


def test_a_classifier_of_another_size_is_refused(on_the_hub: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"wrong shape: head\.bias \(21843,\) for \(10,\)"):
        load_backbone(f"{ARCHITECTURE}.augreg_in21k?num_classes=10", classifier=True)


def test_hub_weights_whose_keys_are_not_seen_are_refused(
    on_the_hub: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm reads some formats past the filter that shows us the keys."""
    monkeypatch.setattr(backbones, "load_pretrained", lambda *_, **__: None)
    with pytest.raises(UsageError, match=r"keys cannot be checked; .*\?checkpoint=FILE"):
        load_backbone(f"{ARCHITECTURE}.augreg_in21k")


# Digest and pixels


def test_the_digest_depends_on_the_weights_alone() -> None:
    """Memory layout, width of the floats and order of registration do not matter; one weight does."""
    model = vit(5)
    digest = weights_digest(model)
    assert weights_digest(vit(5).double()) == digest
    assert weights_digest(vit(5).to(memory_format=torch.channels_last)) == digest
    for name in list(model._modules)[::-1]:
        model._modules[name] = model._modules.pop(name)
    assert weights_digest(model) == digest
    with torch.no_grad():
        model.blocks[1].norm2.bias[3] += 1e-6
    assert weights_digest(model) != digest


def test_normalize_is_the_same_for_bytes_and_floats() -> None:
    how = Preprocessing(size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4)
    found = normalize(pixels, how)
    assert torch.equal(found, normalize(pixels.float() / 255, how))
    assert found[1, 2, 3, 3].item() == pytest.approx((95 / 255 - 0.3) / 1.0)
    assert found[0, 1, 0, 0].item() == pytest.approx((16 / 255 - 0.2) / 0.25)


def test_normalize_keeps_its_constants() -> None:
    """Made in inference mode or not, they serve training afterwards; equal settings share them."""
    how = Preprocessing(size=4, mean=(0.11, 0.22, 0.33))
    with torch.inference_mode():
        normalize(torch.zeros(1, 3, 4, 4), how)
    before = backbones._per_channel.cache_info()
    image = torch.zeros(1, 3, 4, 4, requires_grad=True)
    normalize(image, how.model_copy(update={"size": 8})).sum().backward()
    assert image.grad is not None
    after = backbones._per_channel.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 2)

"""Checkpoints: files of many shapes, read without running code, loaded to the last key or refused with the list."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from hdcache.backbones import create_vit, load_backbone, weights_digest
from hdcache.checkpoints import fitted, load_strictly, whole_qkv_bias
from hdcache.errors import InputNotFound, UsageError
from hdcache.video_vit import sinusoid_positions

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
OPTIONS = "&".join(f"{key}={value}" for key, value in SMALL.items())


def vit(seed: int = 0, **arguments: Any) -> Any:
    return create_vit(ARCHITECTURE, SMALL | {"num_classes": 0} | arguments, seed=seed).eval()


def features(model: Any, side: int = 16) -> Tensor:
    pictures = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.forward_features(pictures)  # type: ignore[no-any-return]


def load(path: Path, more: str = "", **keywords: Any) -> Any:
    return load_backbone(f"timm:{ARCHITECTURE}?{OPTIONS}{more}&checkpoint={path}", **keywords)


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_checkpoint_is_loaded_exactly(tmp_path: Path, suffix: str) -> None:
    model = vit(3)
    found = load(write(tmp_path / f"w+x{suffix}", model.state_dict()))
    assert found.weights == weights_digest(model)
    assert torch.equal(features(found.model), features(model))


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("model_ema",), ("model", "state_dict")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod.", "backbone."])
def test_wrapped_and_prefixed_checkpoints_are_unwrapped(tmp_path: Path, wrappers: tuple[str, ...], prefix: str) -> None:
    state: Any = {prefix + key: value for key, value in vit(3).state_dict().items()}
    for wrapper in reversed(wrappers):
        state = {wrapper: state, "epoch": 3, "optimizer": {}}
    assert load(write(tmp_path / "w.pth", state)).weights == weights_digest(vit(3))


def test_averaged_weights_win_over_the_others(tmp_path: Path) -> None:
    state = {"state_dict": vit(1).state_dict(), "state_dict_ema": vit(2).state_dict()}
    assert load(write(tmp_path / "w.pth", state)).weights == weights_digest(vit(2))


def _missing(state: dict[str, Tensor]) -> None:
    for key in [key for key in state if key.startswith("blocks.1.")]:
        del state[key]


def _unexpected(state: dict[str, Tensor]) -> None:
    state["blocks.0.extra"] = torch.zeros(1)


def _misshapen(state: dict[str, Tensor]) -> None:
    state["norm.weight"] = torch.zeros(25)


def _positions(state: dict[str, Tensor]) -> None:
    state["pos_embed"] = torch.zeros(1, 8, 24)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, r"missing: blocks.1.attn.proj.bias, .* and 7 more\); give the architecture and options"),
        (_unexpected, r"does not fit VisionTransformer \(unexpected: blocks.0.extra\)"),
        (_misshapen, r"\(wrong shape: norm.weight \(25,\) for \(24,\)\)"),
        (_positions, r"\(wrong shape: pos_embed \(1, 8, 24\) for \(1, 17, 24\)\)"),
    ],
)
def test_keys_that_do_not_fit_are_listed(tmp_path: Path, spoil: Any, message: str) -> None:
    state = dict(vit().state_dict())
    spoil(state)
    path = write(tmp_path / "w.safetensors", state)
    with pytest.raises(UsageError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_classifier_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Its size comes from the checkpoint; a checkpoint without one never gets a random one."""
    path = write(tmp_path / "w.pth", vit(3, num_classes=7).state_dict())
    assert load(path).model.num_classes == 0
    assert torch.equal(features(load(path).model), features(vit(3, num_classes=7)))
    kept = load(path, classifier=True)
    assert kept.model.head.weight.shape == (7, 24)
    assert kept.model.num_classes == 7
    without = load(write(tmp_path / "b.pth", vit(3).state_dict()), classifier=True)
    assert without.model.num_classes == 0


def test_half_a_classifier_is_refused(tmp_path: Path) -> None:
    state = vit(3, num_classes=7).state_dict()
    del state["head.bias"]
    with pytest.raises(UsageError, match=r"missing: head.bias"):
        load(write(tmp_path / "w.pth", state), classifier=True)


def test_the_digest_sees_a_classifier_that_is_kept(tmp_path: Path) -> None:
    """Logits of two heads on one backbone are different values, so the two networks have different digests."""
    digests = set()
    for number in range(2):
        state = vit(3, num_classes=7).state_dict()
        state["head.bias"] = torch.full((7,), float(number))
        path = write(tmp_path / f"{number}.pth", state)
        digests |= {load(path).weights, load(path, classifier=True).weights}
    assert len(digests) == 3


def test_position_embeddings_are_resampled_for_another_size(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", vit(3).state_dict())
    found = load(path, img_size=24)
    twin = vit(3)
    twin.set_input_size(img_size=(24, 24))
    assert found.preprocessing.size == 24
    torch.testing.assert_close(features(found.model, 24), features(twin, 24))


class Anything:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({"args": argparse.Namespace(lr=Anything())}, ".*Anything"),
        ({"args": Anything()}, ".*Anything"),
        ({"args": argparse.Namespace(out=Path("x"))}, r"pathlib.*Path"),
    ],
)
def test_a_pickle_that_holds_objects_is_refused_and_named(tmp_path: Path, made: Any, found: str) -> None:
    path = write(tmp_path / "w.pth", made | {"model": vit().state_dict()})
    with pytest.raises(
        UsageError, match=rf"w.pth: refused, it holds more than tensors \({found}\).* save its state_dict"
    ):
        load(path)


def test_the_command_line_of_a_released_script_is_read_beside_the_weights(tmp_path: Path) -> None:
    """MAE's and VideoMAE's save their argparse.Namespace; what it stands for here is nobody else's business."""
    beside = {"args": argparse.Namespace(lr=1e-3, name="x"), "optimizer": {"state": {}}, "epoch": 3}
    path = write(tmp_path / "w.pth", {"model": vit(3).state_dict()} | beside)
    assert load(path).weights == weights_digest(vit(3))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_classifier_of_another_name_and_a_whole_prefix_are_dropped(tmp_path: Path) -> None:
    inner = {f"backbone.{key}": value for key, value in vit(3).state_dict().items()}
    state = inner | {"cls_head.fc.weight": torch.zeros(5, 24)}
    for prefix in ("", "model."):
        saved = {"state_dict": {prefix + key: value for key, value in state.items()}}
        if prefix:
            saved["state_dict"] = {key: v for key, v in saved["state_dict"].items() if "cls_head" not in key}
        assert load(write(tmp_path / "w.pth", saved)).weights == weights_digest(vit(3))


@pytest.mark.parametrize("wrap", ["", "vit.", "videomae."])
def test_the_layout_of_transformers_is_refused_by_name(tmp_path: Path, wrap: str) -> None:
    state = {
        f"{wrap}encoder.layer.0.attention.attention.query.weight": torch.zeros(24, 24),
        "classifier.bias": torch.zeros(2),
    }
    with pytest.raises(UsageError, match="as the transformers library does, which is not read; take the weights that"):
        load(write(tmp_path / "w.pth", state))


@pytest.mark.parametrize("state", [[1], {"a": 1}, {"epoch": 3, "weights": {"deep": {"er": torch.zeros(1)}}}])
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(UsageError, match="expected a mapping from parameter names to tensors"):
        load(write(tmp_path / "w.pth", state))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 300, 5000])
def test_a_truncated_checkpoint_is_not_readable(tmp_path: Path, suffix: str, keep: int) -> None:
    path = write(tmp_path / f"w{suffix}", vit().state_dict())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputNotFound, match=r"not a readable checkpoint \(.+\); fetch it again") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"hello world this is not", b"\x80\x02xxx"])
def test_a_file_of_something_else_is_not_readable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputNotFound, match=r"w\.pth: not a readable checkpoint"):
        load(tmp_path / "w.pth")


def test_a_missing_checkpoint_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"none\.pth: no such checkpoint"):
        load(tmp_path / "none.pth")


def test_an_attention_pool_that_the_network_lacks_is_left_out() -> None:
    """As a classifier is: it stands after the last tap. A network that has one needs it."""
    pooled = vit(3, global_pool="map")
    plain = vit(4, global_pool="avg", fc_norm=False)
    load_strictly(plain, pooled.state_dict(), "w")
    assert torch.equal(features(plain), features(pooled))
    with pytest.raises(UsageError, match=r"w does not fit VisionTransformer \(missing: attn_pool\."):
        load_strictly(pooled, plain.state_dict(), "w")


def test_fitting_changes_nothing() -> None:
    model, state = vit(1), vit(2).state_dict()
    before = weights_digest(model)
    found = fitted(model, state, "w")
    assert weights_digest(model) == before
    assert found.keys() == state.keys()


# VideoMAE


CLIPS = SMALL | {"frames": 4}
CLIP_OPTIONS = f"{OPTIONS}&frames=4"


def videomae(seed: int, prefix: str = "encoder.") -> dict[str, Tensor]:
    """Weights under the names of the released code: a Q and a V bias, no K bias, no positions."""
    noise = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, value in create_vit(ARCHITECTURE, CLIPS | {"num_classes": 0}, seed=seed).state_dict().items():
        drawn = torch.randn(value.shape, generator=noise) * 0.2
        if key.endswith("qkv.bias"):
            stem = f"{prefix}{key.removesuffix('qkv.bias')}"
            state |= {f"{stem}q_bias": drawn[:24], f"{stem}v_bias": drawn[-24:]}
        elif key != "pos_embed":
            state[f"{prefix}{key}"] = drawn
    return state


def pretraining(seed: int) -> dict[str, Tensor]:
    """What VideoMAE and AMD train beside the encoder."""
    spare = ("mask_token", "encoder_to_decoder.weight", "decoder.blocks.0.attn.q_bias", "decoder.head.bias")
    amd = ("encoder.projection_heads.0.weight", "generators.0.blocks.0.norm1.weight")
    return videomae(seed) | {name: torch.zeros(3) for name in (*spare, *amd)}


def load_clips(path: Path, more: str = "", **keywords: Any) -> Any:
    return load_backbone(f"timm:{ARCHITECTURE}?{CLIP_OPTIONS}{more}&checkpoint={path}", **keywords)


def videomae_blocks(state: dict[str, Tensor], x: Tensor, heads: int = 3) -> Tensor:
    """The released encoder's blocks, written out: attention with cat(q_bias, 0, v_bias), then an MLP."""
    functional = torch.nn.functional
    for number in range(2):
        own = {
            key.removeprefix(f"encoder.blocks.{number}."): value
            for key, value in state.items()
            if key.startswith(f"encoder.blocks.{number}.")
        }
        normed = functional.layer_norm(x, (24,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        bias = torch.cat([own["attn.q_bias"], torch.zeros(24), own["attn.v_bias"]])
        qkv = functional.linear(normed, own["attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q * (24 // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
        x = x + functional.linear(mixed, own["attn.proj.weight"], own["attn.proj.bias"])
        normed = functional.layer_norm(x, (24,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        inner = functional.gelu(functional.linear(normed, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + functional.linear(inner, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return x


def clips() -> Tensor:
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrappers", [(), ("model",), ("module",)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_videomae_checkpoints_agree_with_the_released_attention(
    tmp_path: Path, wrappers: tuple[str, ...], prefix: str
) -> None:
    state = pretraining(3)
    saved: Any = {prefix + key: value for key, value in state.items()}
    for wrapper in wrappers:
        saved = {wrapper: saved, "epoch": 3}
    model = load_clips(write(tmp_path / "w.pth", saved)).model
    functional = torch.nn.functional
    with torch.no_grad():
        x = functional.conv3d(
            clips(), state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"], stride=(2, 4, 4)
        )
        x = x.flatten(2).transpose(1, 2) + sinusoid_positions(32, 24)
        x = videomae_blocks(state, x)
        x = functional.layer_norm(x, (24,), state["encoder.norm.weight"], state["encoder.norm.bias"], 1e-6)
        torch.testing.assert_close(model.forward_features(clips()), x, atol=1e-5, rtol=1e-4)


def test_fine_tuned_videomae_checkpoints_have_bare_names(tmp_path: Path) -> None:
    bare = videomae(3, "")
    assert (
        load_clips(write(tmp_path / "a.pth", bare)).weights
        == load_clips(write(tmp_path / "b.pth", pretraining(3))).weights
    )
    # Its own way of pooling: the mean, then the norm; and its classifier, where asked for.
    pooled = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: v for key, v in bare.items()}
    pooled |= {"head.weight": torch.ones(7, 24), "head.bias": torch.zeros(7)}
    path = write(tmp_path / "c.pth", {"module": pooled})
    found = load_clips(path, classifier=True)
    assert (found.arguments["fc_norm"], found.model.num_classes) == (True, 7)
    assert torch.equal(found.model.fc_norm.weight, bare["norm.weight"])
    assert load_clips(path).model.num_classes == 0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_whole_qkv_bias(blocks: int, width: int, seed: int) -> None:
    """Queries and values keep their bias, keys get none; a bias without its partner stays as it is."""
    noise = torch.Generator().manual_seed(seed)
    state = {
        f"blocks.{n}.attn.{part}_bias": torch.randn(width, generator=noise) for n in range(blocks) for part in "qv"
    }
    state |= {"lone.q_bias": torch.ones(1), "other.v_bias": torch.ones(1), "q_bias": torch.ones(2)}
    found = whole_qkv_bias(state)
    for number in range(blocks):
        q, k, v = found.pop(f"blocks.{number}.attn.qkv.bias").split(width)  # type: ignore[no-untyped-call]
        assert torch.equal(q, state[f"blocks.{number}.attn.q_bias"])
        assert torch.equal(v, state[f"blocks.{number}.attn.v_bias"])
        assert not k.any()
    assert found.keys() == {"lone.q_bias", "other.v_bias", "q_bias"}


def test_a_bias_of_the_keys_would_change_nothing() -> None:
    """Why a bias of zero loses nothing: softmax over keys does not feel what is the same for all of them."""
    model = create_vit(ARCHITECTURE, CLIPS | {"num_classes": 0}).eval()
    with torch.no_grad():
        before = model(clips())
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn.qkv.bias[24:48] += 3.0  # type: ignore[union-attr, index]
        torch.testing.assert_close(model(clips()), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.blocks.1.extra": torch.zeros(1)}, r"\(unexpected: blocks\.1\.extra\)"),
        ({"encoder.blocks.0.attn.v_bias": None}, r"missing: blocks\.0\.attn\.qkv\.bias; unexpected: blocks\.0\.attn\.q_bias"),
        ({"encoder.norm.weight": None}, r"missing: norm\.weight\)"),
        ({"encoder.patch_embed.proj.weight": torch.zeros(24, 3, 4, 4)}, r"wrong shape: patch_embed\.proj\.weight"),
        ({"stray": torch.zeros(1)}, r"unexpected: stray\)"),
    ],
)  # fmt: skip
def test_videomae_checkpoints_are_strict_otherwise(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {key: value for key, value in (pretraining(3) | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        load_clips(write(tmp_path / "w.pth", state))


def test_positions_of_a_whole_checkpoint_must_be_there(tmp_path: Path) -> None:
    """VideoMAE stores none; a file with timm's own names does, and they may have been learnt."""
    state = create_vit(ARCHITECTURE, CLIPS | {"num_classes": 0}).state_dict()
    del state["pos_embed"]
    with pytest.raises(UsageError, match=r"\(missing: pos_embed\)"):
        load_clips(write(tmp_path / "w.pth", state))


def test_images_in_place_of_clips_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", vit(3).state_dict())
    message = r"unexpected: cls_token; wrong shape: patch_embed\.proj\.weight.*of still images; leave frames out"
    with pytest.raises(UsageError, match=message):
        load_clips(path)


@pytest.mark.parametrize("make", [lambda: pretraining(3), lambda: videomae(3, "")])
def test_clips_in_place_of_images_name_the_option(tmp_path: Path, make: Any) -> None:
    with pytest.raises(UsageError, match=r"it is a network of clips; say \?frames=16, the number of frames"):
        load(write(tmp_path / "w.pth", {"model": make()}))


def test_stored_positions_of_another_size_are_refused(tmp_path: Path) -> None:
    """The position of a token is its index in the flattened grid, so that it cannot be resampled."""
    state = create_vit(ARCHITECTURE, CLIPS | {"num_classes": 0, "img_size": 24}).state_dict()
    with pytest.raises(UsageError, match=r"wrong shape: pos_embed \(1, 72, 24\) for \(1, 32, 24\)"):
        load_clips(write(tmp_path / "w.pth", state))

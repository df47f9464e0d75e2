"""Networks of clips: tubelet tokens, VideoMAE's positions, and what timm's arguments cannot mean for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hdcache.backbones import create_vit
from hdcache.errors import UsageError
from hdcache.taps import Tokens, embed_tokens, forward_taps
from hdcache.video_vit import TubeletEmbed, sinusoid_positions, video_arguments

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0, "frames": 6}


def vit(**arguments: Any) -> Any:
    return create_vit("vit_tiny_patch16_224", SMALL | arguments).eval()


def clips(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 6, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_layout() -> None:
    model = vit()
    embed = model.patch_embed
    assert isinstance(embed, TubeletEmbed)
    assert (embed.patch_size, embed.img_size, embed.grid_size) == ((4, 4), (16, 16), (4, 4))
    assert (embed.frames, embed.tubelet, embed.slots, embed.num_patches) == (6, 2, 3, 48)
    assert (model.num_prefix_tokens, model.has_class_token, model.cls_token) == (0, False, None)
    assert model.norm.eps == 1e-6
    assert vit(tubelet=3).patch_embed.slots == 2


@given(st.integers(0, 47))
def test_a_token_is_its_tubelet(token: int) -> None:
    """Changing the pixels of one tubelet changes one token."""
    model, clip = vit(), clips()
    slot, cell = divmod(token, 16)
    row, column = divmod(cell, 4)
    changed = clip.clone()
    changed[:, :, 2 * slot : 2 * slot + 2, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    with torch.no_grad():
        moved = (model.patch_embed(clip) - model.patch_embed(changed)).abs().amax((0, 2)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [token]


@given(st.integers(1, 40), st.integers(1, 33))
def test_positions_agree_with_videomae_s_loop(tokens: int, width: int) -> None:
    """get_sinusoid_encoding_table, channel by channel."""
    table = np.array(
        [[at / np.power(10000, 2 * (channel // 2) / width) for channel in range(width)] for at in range(tokens)]
    )
    table[:, 0::2], table[:, 1::2] = np.sin(table[:, 0::2]), np.cos(table[:, 1::2])
    np.testing.assert_allclose(sinusoid_positions(tokens, width).numpy(), table, atol=1e-6)


def test_positions_are_fixed_and_on_the_flattened_index() -> None:
    model = vit()
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], sinusoid_positions(48, 24))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "pos_embed")


def test_taps_of_a_part_of_the_tokens() -> None:
    """Positions are added before tokens are chosen, and hidden tokens take no part in attention."""
    model, clip = vit(), clips()
    keep = torch.tensor([[0, 7, 20, 47], [3, 4, 5, 40]])
    with torch.no_grad():
        whole, part = embed_tokens(model, clip), embed_tokens(model, clip, keep)
        for row in range(2):
            assert torch.equal(part[row], whole[row, keep[row]])
        found = forward_taps(model, clip, ("block1.out", "block2.attn_in", "final", "pooled"), keep=keep)
        by_hand = part
        for block in model.blocks:
            by_hand = block(by_hand)
    assert isinstance(found["final"], Tokens)
    assert found["final"].prefix.shape == (2, 0, 24)
    torch.testing.assert_close(found["final"].patches, model.norm(by_hand))
    torch.testing.assert_close(found["pooled"], model.norm(by_hand).mean(1))


def test_whole_clips_agree_with_timm_s_own_forward() -> None:
    model, clip = vit(), clips()
    with torch.no_grad():
        final = forward_taps(model, clip, ("final",))["final"]
        assert isinstance(final, Tokens)
        torch.testing.assert_close(final.patches, model.forward_features(clip))


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = vit().state_dict()
    torch.manual_seed(2)
    again = vit().state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("shape", [(2, 3, 8, 16, 16), (2, 3, 6, 16, 24), (2, 3, 16, 16)])
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"reads clips of 6x16x16 \(frames x height x width\), found .*; build it with"
    ):
        vit()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tubelet": 2}, "tubelet 2 is given without frames; add frames=16, or leave it out"),
        ({"frames": 0}, "frames 0 must be a whole number, at least 1"),
        ({"frames": True}, "frames True must be a whole number"),
        ({"frames": "16"}, "frames '16' must be a whole number"),
        ({"frames": 4, "tubelet": 1.5}, "tubelet 1.5 must be a whole number"),
        ({"frames": 5, "tubelet": 2}, "frames 5 is not a multiple of tubelet 2; choose a multiple"),
        ({"frames": 4, "class_token": True}, r"a network of clips \(frames=4\) has no class_token; leave it out"),
        ({"frames": 4, "reg_tokens": 4}, "has no reg_tokens"),
        ({"frames": 4, "dynamic_img_size": True}, "has no dynamic_img_size"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        video_arguments("vit", arguments)
    with pytest.raises(UsageError, match=message):
        create_vit("vit_tiny_patch16_224", arguments)


def test_no_frames_is_a_network_of_images() -> None:
    assert not hasattr(vit(frames=None).patch_embed, "tubelet")


def test_timm_has_no_weights_of_clips() -> None:
    with pytest.raises(UsageError, match=r"no weights of video networks; give timm:vit_tiny_patch16_224\?checkpoint="):
        create_vit("vit_tiny_patch16_224", {"frames": 4}, pretrained=True)

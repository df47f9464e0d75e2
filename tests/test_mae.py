from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hdcache.backbones import create_vit
from hdcache.distill.decoder import PixelDecoder, patch_pixels
from hdcache.distill.mae import MAE, num_visible, visible_patches
from hdcache.errors import UsageError
from hdcache.taps import Tokens, embed_tokens

SMALL = MAE(decoder_width=16, decoder_depth=1, decoder_heads=2)


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def batch_of(epoch: int = 0) -> Any:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(images=images, ids=["a", "b", "c"], epoch=epoch)


def build(objective: MAE, student: nn.Module) -> PixelDecoder:
    return objective.build(student, {}, 0, torch.Generator().manual_seed(0))


CLIPS = {"frames": 4, "class_token": False, "global_pool": "avg"}


def clips_of(epoch: int = 0) -> Any:
    batch = batch_of(epoch)
    batch.images = torch.randn(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return batch


def forward(objective: MAE, student: nn.Module, decoder: nn.Module, batch: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    taps = objective.forward(student, batch, decoder, seed)
    prediction, hidden = taps["prediction"], taps["hidden"]
    assert isinstance(prediction, Tensor)
    assert isinstance(hidden, Tensor)
    return prediction, hidden


# The mask


@pytest.mark.parametrize(("total", "visible"), [(196, 49), (64, 16), (49, 12), (4, 1)])
def test_three_quarters_are_hidden(total: int, visible: int) -> None:
    assert num_visible(total, 0.75) == visible


@pytest.mark.parametrize(("total", "ratio"), [(3, 0.75), (1, 0.5)])
def test_a_mask_that_leaves_nothing_is_refused(total: int, ratio: float) -> None:
    with pytest.raises(UsageError, match=f"mask_ratio {ratio} of {total} patches leaves 0 visible; need 1 to"):
        num_visible(total, ratio)


@given(st.integers(4, 60), st.floats(0.1, 0.75), st.integers(0, 5))
def test_visible_patches_are_distinct_ascending_and_exact_in_number(total: int, ratio: float, epoch: int) -> None:
    chosen = visible_patches(["a", "b"], epoch, 0, total, ratio)
    assert chosen.shape == (2, num_visible(total, ratio))
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < total


def test_mask_is_a_function_of_seed_id_and_epoch() -> None:
    first = visible_patches(["a", "b"], 3, 7, 64, 0.75)
    assert torch.equal(visible_patches(["b", "a"], 3, 7, 64, 0.75), first.flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(visible_patches(["a", "b"], 4, 7, 64, 0.75), first)
    assert not torch.equal(visible_patches(["a", "b"], 3, 8, 64, 0.75), first)


def test_every_patch_is_shown_equally_often() -> None:
    chosen = visible_patches([str(i) for i in range(2000)], 0, 0, 16, 0.75)
    shares = torch.bincount(chosen.flatten(), minlength=16) / 2000
    assert (shares - 0.25).abs().max() < 0.05


def test_clips_are_masked_in_tubes() -> None:
    """The same cells in every slot; hidden cells are rounded down, as VideoMAE's generator does."""
    objective = SMALL.model_copy(update={"mask_ratio": 0.9})
    student = vit(**CLIPS)
    decoder = build(objective, student)
    hidden = forward(objective, student, decoder, clips_of())[1].reshape(3, 2, 16)
    assert hidden.sum(2).tolist() == [[14, 14]] * 3
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    again, later, other = (
        forward(objective, student, decoder, clips_of(epoch), seed)[1].reshape(3, 2, 16)
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(again, hidden)
    assert not torch.equal(later, hidden)
    assert not torch.equal(other, hidden)


def test_random_masks_of_clips_differ_between_slots() -> None:
    objective, student = SMALL.model_copy(update={"mask": "random"}), vit(**CLIPS)
    hidden = forward(objective, student, build(objective, student), clips_of())[1]
    assert hidden.sum(1).tolist() == [24] * 3
    assert not torch.equal(hidden[:, :16], hidden[:, 16:])


# The network


def test_clips() -> None:
    """VideoMAE's decoder: no bias in its embedding, 1-D positions, channel-wise targets; gradient everywhere."""
    student, batch = vit(**CLIPS), clips_of()
    decoder = build(SMALL, student)
    assert decoder.embed.bias is None
    assert decoder.targets.kind == "channel"
    taps = SMALL.forward(student, batch, decoder, 0)
    prediction = taps["prediction"]
    assert isinstance(prediction, Tensor)
    assert prediction.shape == (3, 32, 96)
    SMALL.loss(batch, taps, decoder)["pixels"].backward()  # type: ignore[no-untyped-call]
    for module in (student, decoder):
        missing = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
        assert not missing


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_shapes(prefix: dict[str, Any]) -> None:
    student = vit(**prefix)
    prediction, hidden = forward(SMALL, student, build(SMALL, student), batch_of())
    assert prediction.shape == (3, 16, 48)
    assert hidden.shape == (3, 16)
    assert hidden.sum(1).tolist() == [12, 12, 12]


def test_student_sees_visible_pixels_only() -> None:
    student, batch = vit(), batch_of()
    decoder = build(SMALL, student)
    prediction, hidden = forward(SMALL, student, decoder, batch)
    pixels = patch_pixels(batch.images, 4)
    changed = torch.where(hidden.unsqueeze(-1), 9.0, pixels).reshape(3, 4, 4, 4, 4, 3)
    batch.images = changed.permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 16, 16)
    torch.testing.assert_close(forward(SMALL, student, decoder, batch)[0], prediction)


def test_visible_tokens_keep_their_positions() -> None:
    student, batch = vit(), batch_of()
    keep = visible_patches(batch.ids, 0, 0, 16, 0.75)
    whole, part = embed_tokens(student, batch.images), embed_tokens(student, batch.images, keep)
    for image in range(3):
        assert torch.equal(part[image, 1:], whole[image, 1 + keep[image]])


def test_decoder_puts_the_mask_token_where_nothing_was_seen() -> None:
    decoder = build(SMALL, vit())
    decoder.blocks = nn.Sequential()
    visible = torch.tensor([[1, 5, 9, 14]])
    out = decoder(Tokens(torch.zeros(1, 1, 24), torch.ones(1, 4, 24)), visible)
    empty = decoder.mask_token + decoder.get_buffer("positions")
    expected = decoder.predict(decoder.norm(empty))
    unseen = [i for i in range(16) if i not in visible]
    torch.testing.assert_close(out[:, unseen], expected[:, unseen])
    assert not torch.allclose(out[:, visible[0]], expected[:, visible[0]])


# The loss


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_reads_hidden_patches_only(norm_pix: bool) -> None:
    objective, batch = SMALL.model_copy(update={"norm_pix": norm_pix}), batch_of()
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, ::4] = True
    prediction = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(2))
    total = 0.0
    for image in range(3):
        for patch in range(0, 16, 4):
            row, column = divmod(patch, 4)
            cut = batch.images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            values = cut.permute(1, 2, 0).flatten()
            if norm_pix:
                values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            total += float(((prediction[image, patch] - values) ** 2).mean()) / 12
    taps = {"prediction": prediction, "hidden": hidden}
    decoder = build(objective, vit())
    loss = objective.loss(batch, taps, decoder)["pixels"]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    prediction[~hidden] = 1e6
    assert objective.loss(batch, taps, decoder)["pixels"] == loss


def test_gradient_reaches_student_and_decoder() -> None:
    student = vit()
    decoder, batch = build(SMALL, student), batch_of()
    taps = SMALL.forward(student, batch, decoder, 0)
    SMALL.loss(batch, taps, decoder)["pixels"].backward()  # type: ignore[no-untyped-call]
    for module in (student, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert decoder.mask_token.grad is not None
    assert decoder.mask_token.grad.abs().sum() > 0


# What cannot be meant


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (
            MAE(decoder_width=16, decoder_heads=3),
            {},
            "decoder_heads 3 does not divide objective.decoder_width 16; choose",
        ),
        (SMALL, {"patch_size": (4, 8)}, "needs square patches, but the student's are 4x8 pixels"),
        (
            SMALL.model_copy(update={"mask": "tube"}),
            {},
            r"mask 'tube' .* the student reads still images; set it to null",
        ),
        (MAE(mask_ratio=0.02), {"frames": 4}, "0.02 of 16 cells hides 0 and leaves 16 visible"),
        (MAE(mask_ratio=0.97), {}, "mask_ratio 0.97 of 16 patches leaves 0 visible"),
    ],
)
def test_build_refuses_what_does_not_fit(objective: MAE, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(objective, vit(**arguments))

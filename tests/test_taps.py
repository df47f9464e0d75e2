from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, RmsNorm
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from timm.models.vision_transformer import VisionTransformer as ViT
from torch import Tensor

from hdcache.errors import UsageError
from hdcache.relations import relation, split_heads
from hdcache.taps import (
    Tokens,
    attention_of,
    embed_tokens,
    forward_taps,
    gather_patches,
    num_blocks,
)

DEPTH = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-layernorm": {"qk_norm": True},
    "qk-rmsnorm": {"qk_norm": True, "norm_layer": RmsNorm},
    "layer-scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 4},
    "registers-without-positions": {"reg_tokens": 4, "no_embed_class": True},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "clip": {"pre_norm": True, "norm_layer": LayerNorm},
    "one-head": {"num_heads": 1},
    "scaled-attention-norm": {"scale_attn_norm": True},
    "map-pooling": {"global_pool": "map"},
    "no-final-norm": {"final_norm": False},
    "no-qkv-bias": {"qkv_bias": False},
    "dynamic-size": {"dynamic_img_size": True},
    "no-positions": {"pos_embed": "none"},
}


def vit(seed: int = 0, **arguments: Any) -> Any:
    """A tiny ViT whose every parameter differs from its initial 0 or 1, so that no part of it is idle."""
    small: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": DEPTH, "num_heads": 4}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ViT(**(small | {"num_classes": 5} | arguments)).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def pictures(count: int = 2, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sequence(value: Tokens | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else value.sequence()


def hooked(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What hooks on timm's own modules see during timm's own forward, with attention spelled out."""
    seen: dict[str, Tensor] = {}
    handles = []
    for number, block in enumerate(model.blocks, 1):
        attention = block.attn
        attention.fused_attn = False

        def keep(name: str, what: int) -> Any:
            return lambda _module, args, out: seen.__setitem__(name, args[0] if what == 0 else out)

        handles += [
            attention.qkv.register_forward_hook(keep(f"block{number}.attn_in", 0)),
            attention.qkv.register_forward_hook(keep(f"block{number}.qkv", 1)),
            attention.attn_drop.register_forward_hook(keep(f"block{number}.rel.qk", 0)),
            block.drop_path1.register_forward_hook(keep(f"block{number}.attn_out", 0)),
            block.norm2.register_forward_hook(keep(f"block{number}.mid", 0)),
            block.drop_path2.register_forward_hook(keep(f"block{number}.mlp_out", 0)),
        ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


def gated(model: Any) -> Any:
    """``model`` with timm's gated attention in every block."""
    for block in model.blocks:
        block.attn = Attention(24, num_heads=4, qkv_bias=True, gated=True).eval()
    return model


def narrow(model: Any) -> Any:
    """``model`` whose heads are 5 wide instead of 24 / 4."""
    for block in model.blocks:
        block.attn = Attention(24, num_heads=4, attn_head_dim=5, qkv_bias=True, qk_norm=True, norm_layer=LayerNorm)
    return model.eval()


# Equal to timm


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_equal_timm_s_own_forwards(variant: str) -> None:
    """Residual streams, final tokens, pooled features and logits are bit for bit those of timm."""
    model, images = vit(**VARIANTS[variant]), pictures()
    names = [*(f"block{n}.out" for n in range(1, DEPTH + 1)), "final", "pooled", "logits"]
    found = forward_taps(model, images, names)
    prefix = model.num_prefix_tokens
    final, outputs = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    for number, output in enumerate(outputs, 1):
        tokens = found[f"block{number}.out"]
        assert isinstance(tokens, Tokens)
        patches, head = output if prefix else (output, output[:, :0])
        assert torch.equal(tokens.patches, patches)
        assert torch.equal(tokens.prefix, head)
    assert torch.equal(sequence(found["final"]), final)
    assert torch.equal(sequence(found["final"]), model.forward_features(images))
    assert torch.equal(sequence(found["pooled"]), model.forward_head(final, pre_logits=True))
    assert torch.equal(sequence(found["logits"]), model(images))
    assert found["final"].prefix.shape[1] == prefix  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS, "gated", "narrow-heads"])
def test_attention_taps_equal_what_hooks_see(variant: str) -> None:
    """The QKV layer's input and output, the softmax inside timm's unfused attention, and what the block then adds."""
    model = vit(**VARIANTS.get(variant, {}))
    model = {"gated": gated, "narrow-heads": narrow}.get(variant, lambda same: same)(model)
    images = pictures()
    seen = hooked(model, images)
    found = forward_taps(model, images, list(seen))
    for name, value in seen.items():
        torch.testing.assert_close(sequence(found[name]), value, rtol=1e-5, atol=1e-6)
        if not name.endswith("qk"):
            assert torch.equal(sequence(found[name]), value)


@torch.no_grad()
def test_distilled_deit_has_two_prefix_tokens() -> None:
    """A subclass with a second class token is tapped like any other; its logits are the mean of both heads."""
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    model: Any = timm.create_model("deit_tiny_distilled_patch16_224", **small).eval()
    found = forward_taps(model, pictures(), ["block2.out", "final", "logits"])
    assert found["final"].prefix.shape == (2, 2, 24)  # type: ignore[union-attr]
    assert torch.equal(sequence(found["final"]), model.forward_features(pictures()))
    assert torch.equal(sequence(found["logits"]), model(pictures()))


@torch.no_grad()
def test_dynamic_models_take_other_sizes() -> None:
    model = vit(dynamic_img_size=True)
    for side in (8, 16, 24):
        images = pictures(side=side)
        found = forward_taps(model, images, ["final"])["final"]
        assert torch.equal(sequence(found), model.forward_features(images))
        assert found.patches.shape[1] == (side // 4) ** 2  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qk", "vv", "qq", "kk"])
@pytest.mark.parametrize("heads", [None, 4, 2, 8])
def test_relations_are_those_of_the_qkv_tap(kind: str, heads: int | None) -> None:
    """With any head count the relation is the softmaxed product of the QKV tap's columns."""
    name = f"block2.rel.{kind}" + (f"@{heads}" if heads else "")
    found = forward_taps(vit(), pictures(), [name, "block2.qkv"])
    parts = dict(zip("qkv", split_heads(sequence(found["block2.qkv"]), heads or 4), strict=True))
    assert torch.equal(sequence(found[name]), relation(parts[kind[0]], parts[kind[1]]))
    assert sequence(found[name]).shape == (2, heads or 4, 17, 17)


@torch.no_grad()
def test_only_values_can_be_cut_into_other_heads_under_a_qk_norm() -> None:
    """Q/K norms belong to the block's own heads: other heads are refused, but values have no norm."""
    model = vit(qk_norm=True)
    with pytest.raises(UsageError, match="relations with 2 heads: the block normalises Q and K for its own 4 heads"):
        forward_taps(model, pictures(), ["block1.rel.qk@2"])
    found = forward_taps(model, pictures(), ["block1.rel.vv@2", "block1.qkv", "block1.rel.qk@4", "block1.rel.qk"])
    _, _, v = split_heads(sequence(found["block1.qkv"]), 2)
    assert torch.equal(sequence(found["block1.rel.vv@2"]), relation(v, v))
    assert torch.equal(sequence(found["block1.rel.qk@4"]), sequence(found["block1.rel.qk"]))


# Nothing more than asked


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("names", "blocks", "norm"),
    [
        (["block1.out"], 1, 0),
        (["block2.attn_in"], 1, 0),
        (["block2.qkv", "block1.out"], 1, 0),
        (["block2.rel.vv"], 1, 0),
        (["block2.rel.qk", "block2.out"], 2, 0),
        (["block1.attn_in"], 0, 0),
        (["block2.attn_out"], 1, 0),
        (["block2.mlp_out", "block2.mid"], 1, 0),
        (["final"], 3, 1),
        (["block1.out", "pooled"], 3, 1),
        ([], 0, 0),
    ],
)
def test_nothing_after_the_last_tap_runs(names: list[str], blocks: int, norm: int, grad: bool) -> None:
    """Blocks and norms beyond the last tap are never called, and get no gradient."""
    model, called = vit(), []
    for number, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    model.norm.register_forward_hook(lambda *_: called.append(0))
    with torch.set_grad_enabled(grad):
        found = forward_taps(model, pictures(), names)
    assert list(found) == names
    assert called == [*range(1, blocks + 1), *[0] * norm]
    if grad and names:
        sum(sequence(value).square().sum() for value in found.values()).backward()  # type: ignore[union-attr]
        touched = {
            int(n.split(".")[1]) + 1 for n, p in model.named_parameters() if "blocks" in n and p.grad is not None
        }
        inner = {int(n[5]) for n in names if n.startswith("block") and not n.endswith(".out")}
        assert touched == {*range(1, blocks + 1)} | inner


@pytest.mark.parametrize(("names", "mlps"), [(["attn_out"], 0), (["mid"], 0), (["mlp_out"], 1), (["mid", "out"], 1)])
def test_a_branch_tap_runs_the_mlp_only_where_it_is_needed(names: list[str], mlps: int) -> None:
    model, called = vit(), []
    model.blocks[0].mlp.register_forward_hook(lambda *_: called.append(1))
    forward_taps(model, pictures(), [f"block1.{name}" for name in names])
    assert len(called) == mlps


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "layer-scale"])
def test_branch_taps_change_nothing_that_follows(variant: str) -> None:
    """The branches add up to the block's output, and a block that is read inside gives what timm's gives, bit for bit."""
    model, images = vit(**VARIANTS[variant]), pictures()
    names = ["block1.out", "block2.attn_out", "block2.mid", "block2.mlp_out", "block2.out", "final"]
    found = {name: sequence(value) for name, value in forward_taps(model, images, names).items()}
    assert torch.equal(found["block1.out"] + found["block2.attn_out"], found["block2.mid"])
    assert torch.equal(found["block2.mid"] + found["block2.mlp_out"], found["block2.out"])
    assert torch.equal(found["final"], model.forward_features(images))


def test_gradients_are_those_of_timm() -> None:
    """A student trained through taps gets the gradients of timm's forward, in training mode too."""
    grads = []
    for tapped in (True, False):
        model, images = vit().train(), pictures()
        out = sequence(forward_taps(model, images, ["final"])["final"]) if tapped else model.forward_features(images)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], msg=name)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "registers", "no-class-token", "clip", "dynamic-size"])
def test_keep_runs_on_those_tokens_alone(variant: str) -> None:
    """Keeping some patch tokens equals timm's blocks on exactly the prefix and those tokens, positions included."""
    model, images = vit(**VARIANTS[variant]), pictures()
    prefix = model.num_prefix_tokens
    keep = torch.tensor([[0, 3, 9], [2, 7, 15]])
    found = forward_taps(model, images, ["block2.out", "final"], keep=keep)
    x = model._pos_embed(model.patch_embed(images))
    x = torch.stack([torch.cat([row[:prefix], row[prefix:][chosen]]) for row, chosen in zip(x, keep, strict=True)])
    x = model.norm_pre(x)
    for block in model.blocks[:2]:
        x = block(x)
    assert torch.equal(sequence(found["block2.out"]), x)
    assert found["final"].patches.shape == (2, 3, 24)  # type: ignore[union-attr]


@torch.no_grad()
def test_keeping_every_token_changes_nothing() -> None:
    model, images = vit(reg_tokens=1), pictures()
    assert torch.equal(
        embed_tokens(model, images, torch.arange(16).expand(2, -1)),
        embed_tokens(model, images),
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "registers", "no-class-token", "clip"])
def test_dropped_tokens_are_not_gone_on_with(variant: str) -> None:
    """After block 1 three patch tokens are left, after block 2 all of them stay; a block's own output is whole."""
    model, images = vit(**VARIANTS[variant]), pictures()
    prefix = model.num_prefix_tokens
    positions = torch.tensor([[0, 3, 9], [2, 7, 15]])
    asked: list[tuple[int, tuple[int, ...]]] = []

    def drop(block: int, tokens: Tokens) -> Tensor | None:
        asked.append((block, tuple(tokens.patches.shape[:2])))
        return positions if block == 1 else None

    names = ["block1.out", "block2.attn_in", "block2.rel.qk", "block3.out", "final"]
    found = forward_taps(model, images, names, drop=drop)
    assert asked == [(1, (2, 16)), (2, (2, 3)), (3, (2, 3))]
    whole = forward_taps(model, images, ["block1.out"])["block1.out"]
    assert torch.equal(sequence(found["block1.out"]), sequence(whole))
    x = sequence(whole)
    x = torch.stack([torch.cat([row[:prefix], row[prefix:][kept]]) for row, kept in zip(x, positions, strict=True)])
    assert torch.equal(sequence(found["block2.attn_in"]), model.blocks[1].norm1(x))
    assert found["block2.rel.qk"].shape[-2:] == (prefix + 3, prefix + 3)  # type: ignore[union-attr]
    for block in model.blocks[1:]:
        x = block(x)
    assert torch.equal(sequence(found["block3.out"]), x)
    assert torch.equal(sequence(found["final"]), model.norm(x))


@torch.no_grad()
def test_dropping_composes_with_a_mask_and_with_itself() -> None:
    """Positions are among the tokens that are left, so stages nest."""
    model, images = vit(), pictures()
    keep = torch.tensor([[0, 3, 9, 11], [2, 7, 8, 15]])
    stages = {1: torch.tensor([[0, 2, 3], [1, 2, 3]]), 2: torch.tensor([[1], [0]])}
    found = forward_taps(model, images, ["final"], keep, lambda block, tokens: stages.get(block))
    x = embed_tokens(model, images, torch.gather(keep, 1, stages[1]))
    assert x.shape == (2, 4, 24)
    assert found["final"].patches.shape == (2, 1, 24)  # type: ignore[union-attr]
    left = torch.gather(torch.gather(keep, 1, stages[1]), 1, stages[2])
    assert left.tolist() == [[9], [7]]
    assert torch.equal(gather_patches(x, stages[2], 1)[:, 1:], embed_tokens(model, images, left)[:, 1:])


@torch.no_grad()
def test_nothing_is_dropped_after_the_last_tap() -> None:
    """Its taps hold what the block ran on, and a scorer that reads nothing further is not called."""
    called: list[int] = []
    forward_taps(vit(), pictures(), ["block2.out"], drop=lambda block, tokens: called.append(block))
    assert called == [1]


# Names


def test_a_block_beyond_the_depth_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tap 'block4.out': the network has 3 blocks, block1 to block3"):
        forward_taps(vit(), pictures(), ["block4.out"])


def test_logits_need_a_classifier() -> None:
    with pytest.raises(UsageError, match=r"tap 'logits': the network has no classifier \(num_classes is 0\)"):
        forward_taps(vit(num_classes=0), pictures(), ["logits"])


# Networks whose attention cannot be read


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "resnet18", "vit_small_patch16_dinov3"]
)
def test_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=f"{type(model).__name__} is not a plain timm VisionTransformer; windowed"):
        num_blocks(model)


class OwnAttention(Attention):
    """May do anything."""


class OwnBlock(Block):
    """May do anything."""


@torch.no_grad()
@pytest.mark.parametrize("tap", ["attn_out", "mid", "mlp_out"])
def test_branches_need_a_plain_block_but_not_a_plain_attention(tap: str) -> None:
    """Blocks that add otherwise are refused; a plain block around an attention of its own is read."""
    with pytest.raises(UsageError, match=r"block1 is a ParallelScalingBlock.*one after the other; tap block1\.out"):
        forward_taps(vit(block_fn=ParallelScalingBlock), pictures(), [f"block1.{tap}"])
    model = vit(attn_layer=OwnAttention)
    found = forward_taps(model, pictures(), [f"block1.{tap}", "final"])
    assert torch.equal(sequence(found["final"]), model.forward_features(pictures()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_fn": ParallelScalingBlock}, "block1 is a ParallelScalingBlock: its attention need not read norm1"),
        ({"block_fn": ParallelThingsBlock}, "block1 is a ParallelThingsBlock: .*; tap block1.out instead"),
        ({"block_fn": ResPostBlock}, "block1 is a ResPostBlock"),
        ({"block_fn": OwnBlock}, "block1 is a OwnBlock"),
        ({"attn_layer": OwnAttention}, "block1 has OwnAttention, whose queries and keys need not be"),
        ({"attn_layer": "diff", "num_heads": 2}, "block1 has DiffAttention.*; tap block1.out instead"),
    ],
)
@pytest.mark.parametrize("tap", ["attn_in", "qkv", "rel.qk", "rel.vv"])
def test_other_attention_is_refused_but_its_output_is_not(arguments: dict[str, Any], message: str, tap: str) -> None:
    """What cannot be read as plain attention is named with what can be tapped instead, and that tap works."""
    model = vit(**arguments)
    with pytest.raises(UsageError, match=message):
        forward_taps(model, pictures(), [f"block1.{tap}"])
    out = forward_taps(model, pictures(), ["block1.out", "final"])
    assert torch.equal(sequence(out["final"]), model.forward_features(pictures()))


def test_attention_of_is_the_block_s_own() -> None:
    model = vit()
    assert attention_of(model, 2) is model.blocks[1].attn


def test_tokens_know_their_sequence() -> None:
    """Prefix before patches; without a prefix the patches themselves, not a copy."""
    patches = torch.randn(2, 3, 4)
    assert Tokens(patches[:, :0], patches).sequence() is patches
    both = Tokens(patches[:, :1], patches[:, 1:])
    assert torch.equal(both.sequence(), patches)

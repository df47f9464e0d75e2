from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hdcache.backbones import create_vit
from hdcache.distill.tinymim import TinyMIM, TinyMIMHeads
from hdcache.errors import UsageError
from hdcache.schema import Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps
from hdcache.targets import default_block

CARD = TeacherCard(
    architecture="vit_tiny_patch16_224",
    weights="0",
    preprocessing=Preprocessing(size=16),
    patch_size=4,
    grid=(4, 4),
    prefix_tokens=1,
    class_token=True,
    width=32,
    depth=4,
    heads=4,
    precision="fp32",
)


def vit(seed: int = 0, **arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments, seed=seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(objective: TinyMIM, student: nn.Module, card: TeacherCard = CARD) -> TinyMIMHeads:
    return objective.build(student, {"mae": card}, 0, torch.Generator().manual_seed(0))


def loss_between(objective: TinyMIM, student: nn.Module, teacher: nn.Module, card: TeacherCard) -> dict[str, Tensor]:
    """The loss of ``student`` against what ``teacher`` gives for the same images."""
    heads = build(objective, student, card)
    images = normal(2, 3, 16, 16)
    with torch.no_grad():
        targets = forward_taps(teacher, images, heads.targets)
    batch: Any = SimpleNamespace(images=images, targets={"mae": targets})
    return objective.loss(batch, objective.forward(student, batch, heads, seed=0), heads)


# Which targets and taps


@pytest.mark.parametrize(("depth", "block"), [(4, 4), (12, 12), (24, 18), (32, 24), (40, 30)])
def test_default_teacher_block_is_the_paper_s(depth: int, block: int) -> None:
    assert default_block(depth) == block


def test_mae_large_is_read_at_block_18() -> None:
    card = CARD.model_copy(update={"depth": 24})
    assert TinyMIM().wants({"mae": card}) == {"mae": ("block18.rel.qk", "block18.rel.vv")}


@pytest.mark.parametrize(
    ("objective", "target", "tap", "last"),
    [
        (TinyMIM(relations=("kk",), heads=8, teacher_block=2), "block2.rel.kk@8", "block12.qkv", "block11.out"),
        (TinyMIM(relations=("qq",), student_block=9), "block4.rel.qq", "block9.qkv", "block8.out"),
        (TinyMIM(strategy="feature"), "block4.out", "final", "final"),
        (TinyMIM(strategy="feature", feature="final", student_block=7), "final", "block7.out", "block7.out"),
        (TinyMIM(strategy="feature", feature="qkv", teacher_block=3), "block3.qkv", "final", "final"),
        (TinyMIM(strategy="class-token"), "final", "final", "final"),
        (TinyMIM(strategy="class-token", teacher_block=2), "block2.out", "final", "final"),
    ],
)
def test_names_of_targets_and_taps(objective: TinyMIM, target: str, tap: str, last: str) -> None:
    assert objective.wants({"mae": CARD}) == {"mae": (target,)}
    assert objective.student_taps(12) == (tap,)
    assert objective.last_trained(12) == last


# The relation loss


def test_relation_loss_is_zero_at_identity() -> None:
    card = CARD.model_copy(update={"width": 24, "depth": 3, "heads": 3})
    losses = loss_between(TinyMIM(relations=("qk", "vv", "qq", "kk")), vit(), vit(), card)
    assert all(abs(value.item()) < 1e-5 for value in losses.values())


@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_relation_loss_agrees_with_a_slow_loop(tokens: Any) -> None:
    student, teacher = vit(), vit(1, embed_dim=32, depth=4, num_heads=4)
    losses = loss_between(TinyMIM(tokens=tokens), student, teacher, CARD)
    images, first = normal(2, 3, 16, 16), 0 if tokens == "all" else 1
    with torch.no_grad():
        t = forward_taps(teacher, images, ("block4.qkv",))["block4.qkv"]
        s = forward_taps(student, images, ("block3.qkv",))["block3.qkv"]
    assert isinstance(t, Tokens)
    assert isinstance(s, Tokens)
    for kind, (rows, columns) in {"qk": (0, 1), "vv": (2, 2)}.items():
        total, count = 0.0, 0
        for image in range(2):
            for head in range(4):
                maps = []
                for sequence, width in ((t.sequence(), 32), (s.sequence(), 24)):
                    K = width // 4
                    cut = [sequence[image, first:, p * width + head * K :][:, :K] for p in (rows, columns)]
                    maps.append((cut[0] @ cut[1].T / math.sqrt(K)).softmax(-1))
                total += float((maps[0] * (maps[0] / maps[1]).log()).sum())
                count += len(maps[0])
        assert losses[kind].item() == pytest.approx(total / count, rel=1e-4)


def test_patches_only_admits_another_number_of_prefix_tokens() -> None:
    teacher = vit(1, embed_dim=32, depth=4, num_heads=4, reg_tokens=4)
    card = CARD.model_copy(update={"prefix_tokens": 5})
    losses = loss_between(TinyMIM(tokens="patches"), vit(), teacher, card)
    assert all(torch.isfinite(value) for value in losses.values())


def test_student_takes_the_teacher_s_heads_without_parameters() -> None:
    student = vit()
    assert build(TinyMIM(), student).targets == ("block4.rel.qk", "block4.rel.vv")
    assert not list(build(TinyMIM(), student).parameters())


# The feature and class-token losses


def test_feature_loss_is_zero_when_the_projection_gives_the_whitened_target() -> None:
    objective = TinyMIM(strategy="feature", feature="final")
    heads = build(objective, vit())
    target = Tokens(normal(2, 1, 32), normal(2, 16, 32, seed=1))
    whitened = layer_norm(target.sequence(), (32,), eps=1e-6)
    heads.project = nn.Identity()  # type: ignore[assignment]
    batch: Any = SimpleNamespace(targets={"mae": {"final": target}})
    taps = {"final": Tokens(whitened[:, :1], whitened[:, 1:])}
    assert objective.loss(batch, taps, heads)["feature"] == 0


@pytest.mark.parametrize(("error", "expected"), [(1.0, 1 / 4), (2.0, 1.0), (5.0, 4.0)])
def test_smooth_l1_is_quadratic_up_to_beta_2_then_linear(error: float, expected: float) -> None:
    objective = TinyMIM(strategy="feature", feature="final")
    heads = build(objective, vit())
    heads.project = nn.Identity()  # type: ignore[assignment]
    target = Tokens(normal(1, 1, 32), normal(1, 16, 32, seed=1))
    off = layer_norm(target.sequence(), (32,), eps=1e-6) + error
    batch: Any = SimpleNamespace(targets={"mae": {"final": target}})
    loss = objective.loss(batch, {"final": Tokens(off[:, :1], off[:, 1:])}, heads)["feature"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_feature_loss_leaves_prefix_tokens_out_when_asked() -> None:
    objective = TinyMIM(strategy="feature", feature="final", tokens="patches")
    heads = build(objective, vit())
    losses = []
    for prefix in (normal(1, 1, 32), normal(1, 1, 32, seed=9)):
        batch: Any = SimpleNamespace(targets={"mae": {"final": Tokens(prefix, normal(1, 16, 32, seed=1))}})
        losses.append(objective.loss(batch, {"final": Tokens(normal(1, 1, 24), normal(1, 16, 24))}, heads)["feature"])
    assert losses[0] == losses[1]


def test_qkv_features_are_projected_to_three_widths() -> None:
    project = build(TinyMIM(strategy="feature", feature="qkv"), vit()).project
    assert project is not None
    assert project.weight.shape == (96, 24)


def test_class_token_loss_is_the_kl_of_softmaxed_class_tokens() -> None:
    objective = TinyMIM(strategy="class-token", temperature=2.0)
    heads = build(objective, vit())
    assert heads.project is not None
    target, student = Tokens(normal(2, 1, 32), normal(2, 16, 32)), Tokens(normal(2, 1, 24), normal(2, 16, 24))
    batch: Any = SimpleNamespace(targets={"mae": {"final": target}})
    t = (target.prefix[:, 0] / 2).softmax(-1)
    p = (heads.project(student.prefix[:, 0]) / 2).softmax(-1)
    expected = (t * (t / p).log()).sum(-1).mean()
    torch.testing.assert_close(objective.loss(batch, {"final": student}, heads)["class_token"], expected)


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ("qk", "qk")}, "names a kind twice"),
        ({"relations": ()}, "at least 1 item"),
        ({"relations": ("qv",)}, "'qk', 'vv', 'qq' or 'kk'"),
        ({"feature": "out"}, "feature is set, but strategy 'relation' reads none; set it to null"),
        ({"strategy": "feature", "heads": 4}, "heads is set, but strategy 'feature' has no heads; set heads to null"),
        ({"student_block": 1}, "student_block 1 would train no block at all; relations need student_block 2 or later"),
        ({"strategy": "feature", "feature": "final", "teacher_block": 2}, "teacher_block is set, but feature 'final'"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TinyMIM(**settings)


@pytest.mark.parametrize(
    ("objective", "cards", "message"),
    [
        (TinyMIM(), {}, r"needs exactly one teacher, but there are 0 \(none\); set objective.teacher=NAME"),
        (TinyMIM(), {"b": CARD, "a": CARD}, r"there are 2 \(a, b\); set objective.teacher=NAME"),
        (TinyMIM(teacher="maee"), {"mae": CARD}, "no teacher 'maee'; did you mean 'mae'"),
        (TinyMIM(teacher_block=5), {"mae": CARD}, "teacher_block is 5, but teacher 'mae' has 4 blocks; choose 1 to 4"),
    ],
)
def test_teacher_that_is_not_there(objective: TinyMIM, cards: dict[str, TeacherCard], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective.wants(cards)


def test_student_block_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="student_block is 9, but the student has 3 blocks; choose 2 to 3, or null"):
        TinyMIM(student_block=9).student_taps(3)


@pytest.mark.parametrize(
    ("objective", "arguments", "changes", "message"),
    [
        (
            TinyMIM(),
            {},
            {"grid": (8, 8)},
            "student has 4x4 patch . 1 prefix tokens and teacher 'mae' 8x8 patch .*set student.arguments.img_size=32",
        ),
        (TinyMIM(), {}, {"grid": (8, 4)}, r"img_size=\[32, 16\]"),
        (TinyMIM(), {}, {"prefix_tokens": 5}, "4x4 patch . 5 prefix tokens; set objective.tokens=patches"),
        (TinyMIM(strategy="feature"), {}, {"grid": (8, 8)}, "strategy 'feature' compares token with token"),
        (
            TinyMIM(heads=5),
            {},
            {},
            "5 heads do not divide the width 32 of teacher 'mae'; set objective.heads to a divisor",
        ),
        (TinyMIM(), {"embed_dim": 30}, {}, "4 heads do not divide the width 30 of the student"),
        (TinyMIM(), {"qk_norm": True}, {}, "block3 of the student normalises Q and K per head.*qk_norm=false"),
        (TinyMIM(strategy="class-token"), {}, {"class_token": False}, "needs a class token, which teacher 'mae' lacks"),
        (
            TinyMIM(strategy="class-token"),
            {"class_token": False, "global_pool": "avg"},
            {},
            "which the student lacks; use strategy 'feature' or 'relation'",
        ),
    ],
)
def test_student_and_teacher_that_do_not_fit(
    objective: TinyMIM, arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(objective, vit(**arguments), CARD.model_copy(update=changes))

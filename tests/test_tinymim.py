from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss

from hdcache.backbones import create_vit
from hdcache.distill.mae import MAE
from hdcache.distill.recipes import get_recipe
from hdcache.distill.tinymim import TinyMIM, TinyMIMHeads, restricted
from hdcache.errors import UsageError
from hdcache.relations import relation, split_heads
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps, gather_patches
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
    batch: Any = SimpleNamespace(images=images, ids=["a", "b"], epoch=0, targets={"mae": targets})
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


# Ablations


DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
HALF = MAE(mask_ratio=0.5, **DECODER)
ABLATIONS: dict[str, TinyMIM] = {
    "qq-kk-vv": TinyMIM(relations=("qq", "kk", "vv")),
    "scores": TinyMIM(softmax=False),
    "scores-of-patches": TinyMIM(softmax=False, tokens="patches", heads=2, relations=("vv", "qk", "kk")),
    "masked": TinyMIM(masked_input=0.5),
    "masked-patches": TinyMIM(masked_input=0.5, tokens="patches"),
    "masked-scores": TinyMIM(masked_input=0.5, softmax=False),
    "masked-features": TinyMIM(masked_input=0.5, strategy="feature", feature="qkv"),
    "masked-reconstruction": TinyMIM(masked_input=0.5, reconstruction=HALF),
    "feature-reconstruction": TinyMIM(strategy="feature", masked_input=0.5, reconstruction=HALF),
    "class-token-reconstruction": TinyMIM(strategy="class-token", masked_input=0.5, reconstruction=HALF),
    **{
        f"feature-{tensor}": TinyMIM(strategy="feature", feature=tensor, teacher_block=2)
        for tensor in ("out", "attn_in", "qkv", "attn_out", "mid", "mlp_out")
    },
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_the_student(name: str) -> None:
    """Its parts are those it promises, each reaches the student alone, and steps along the gradient lower their sum."""
    objective, student = ABLATIONS[name], vit()
    teacher = vit(1, embed_dim=32, depth=4, num_heads=4)
    heads = build(objective, student)
    images = normal(2, 3, 16, 16)
    with torch.no_grad():
        targets = forward_taps(teacher, images, heads.targets)
    batch: Any = SimpleNamespace(images=images, ids=["a", "b"], epoch=3, targets={"mae": targets})
    trained = [*student.parameters(), *heads.parameters()]
    optimizer = torch.optim.Adam([p for p in trained if p.requires_grad], lr=3e-3)
    sums = []
    for _ in range(4):
        losses = objective.loss(batch, objective.forward(student, batch, heads, seed=0), heads)
        assert tuple(losses) == objective.parts()
        for value in losses.values():
            assert value.shape == ()
            (grad,) = torch.autograd.grad(value, student.blocks[0].attn.qkv.weight, retain_graph=True)  # type: ignore[index, union-attr]
            assert grad.abs().sum() > 0
        loss = sum(losses.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.append(loss.item())
    assert sums[-1] < sums[0]
    assert all(p.grad is None for p in teacher.parameters())


@given(
    seed=st.integers(0, 99),
    prefix=st.integers(0, 3),
    keep=st.booleans(),
    kind=st.sampled_from(["qk", "vv"]),
    data=st.data(),
)
def test_a_masked_relation_is_the_softmax_over_visible_keys(
    seed: int, prefix: int, keep: bool, kind: str, data: st.DataObject
) -> None:
    """Cutting a finished relation down equals cutting the teacher's QKV down before the softmax."""
    count = 9
    shown = [sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=4, max_size=4))) for _ in range(2)]
    visible = torch.tensor(shown)
    qkv = 3 * normal(2, prefix + count, 24, seed=seed)
    parts = dict(zip("qkv", split_heads(qkv, 2), strict=True))
    found = restricted(relation(parts[kind[0]], parts[kind[1]]), prefix, keep, visible)
    few = gather_patches(qkv, visible, prefix)
    parts = dict(zip("qkv", split_heads(few if keep else few[:, prefix:], 2), strict=True))
    torch.testing.assert_close(found, relation(parts[kind[0]], parts[kind[1]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softmax", [True, False])
def test_masked_loss_is_the_loss_between_visible_tokens(softmax: bool) -> None:
    """The student runs on the visible patches; the teacher's QKV, which saw all, is compared at those tokens only."""
    student, teacher = vit(), vit(1, embed_dim=32, depth=4, num_heads=4)
    objective = TinyMIM(masked_input=0.75, softmax=softmax)
    losses = loss_between(objective, student, teacher, CARD)
    images = normal(2, 3, 16, 16)
    batch: Any = SimpleNamespace(images=images, ids=["a", "b"], epoch=0)
    visible = objective.forward(student, batch, build(objective, student), seed=0)["visible"]
    assert isinstance(visible, Tensor)
    assert visible.shape == (2, 4)
    with torch.no_grad():
        s = forward_taps(student, images, ("block3.qkv",), keep=visible)["block3.qkv"]
        t = forward_taps(teacher, images, ("block4.qkv",))["block4.qkv"]
    assert isinstance(s, Tokens)
    assert isinstance(t, Tokens)
    cut_s, cut_t = split_heads(s.sequence(), 4), split_heads(gather_patches(t.sequence(), visible, 1), 4)
    for kind, (rows, columns) in {"qk": (0, 1), "vv": (2, 2)}.items():
        scores_s = cut_s[rows] @ cut_s[columns].mT / math.sqrt(6)
        scores_t = cut_t[rows] @ cut_t[columns].mT / math.sqrt(8)
        p, q = scores_t.softmax(-1), scores_s.softmax(-1)
        expected = (p * (p / q).log()).sum(-1).mean() if softmax else mse_loss(scores_s, scores_t)
        torch.testing.assert_close(losses[kind], expected, rtol=1e-4, atol=1e-6)


def test_clips_are_masked_in_tubes() -> None:
    """Students of clips see the same cells in every temporal slot, as MAE's clip decoder expects."""
    objective = TinyMIM(masked_input=0.5, reconstruction=HALF)
    student, teacher = vit(frames=4), vit(1, frames=4, embed_dim=32, depth=4, num_heads=4)
    card = CARD.model_copy(update={"slots": 2, "prefix_tokens": 0, "class_token": False})
    heads, clips = build(objective, student, card), normal(2, 3, 4, 16, 16)
    with torch.no_grad():
        targets = {"mae": forward_taps(teacher, clips, heads.targets)}
    batch: Any = SimpleNamespace(images=clips, ids=["a", "b"], epoch=0, targets=targets)
    taps = objective.forward(student, batch, heads, seed=0)
    visible = taps["visible"]
    assert isinstance(visible, Tensor)
    assert torch.equal(visible[:, :8] + 16, visible[:, 8:])
    assert all(torch.isfinite(value) for value in objective.loss(batch, taps, heads).values())


def test_what_is_hidden_changes_with_the_epoch_and_the_sample_alone() -> None:
    objective, student = TinyMIM(masked_input=0.75), vit()
    heads = build(objective, student)

    def drawn(ids: list[str], epoch: int) -> list[list[int]]:
        batch: Any = SimpleNamespace(images=normal(2, 3, 16, 16), ids=ids, epoch=epoch)
        visible = objective.forward(student, batch, heads, seed=0)["visible"]
        assert isinstance(visible, Tensor)
        return visible.tolist()  # type: ignore[no-any-return]

    assert drawn(["a", "b"], 0) == drawn(["b", "a"], 0)[::-1]
    assert drawn(["a", "b"], 0) != drawn(["a", "b"], 1)


def test_reconstruction_is_mae_s_on_the_same_visible_patches() -> None:
    """Part ``pixels`` is what MAE itself computes from the student's tokens and the same mask."""
    objective, student = TinyMIM(masked_input=0.5, reconstruction=HALF), vit()
    heads = build(objective, student)
    assert heads.decoder is not None
    assert objective.last_trained(3) == "final", "the decoder trains the whole student"
    batch: Any = SimpleNamespace(images=normal(2, 3, 16, 16), ids=["a", "b"], epoch=0)
    taps = objective.forward(student, batch, heads, seed=0)
    visible, hidden = taps["visible"], taps["hidden"]
    assert isinstance(visible, Tensor)
    assert isinstance(hidden, Tensor)
    assert not hidden.gather(1, visible).any()
    assert hidden.sum(1).tolist() == [8, 8]
    seen = forward_taps(student, batch.images, ("final",), keep=visible)["final"]
    alone = HALF.loss(batch, {"prediction": heads.decoder(seen, visible), "hidden": hidden}, heads.decoder)
    relations = {"mae": dict.fromkeys(heads.targets, torch.full((2, 4, 17, 17), 1 / 17))}
    found = objective.loss(SimpleNamespace(images=batch.images, targets=relations), taps, heads)  # type: ignore[arg-type]
    torch.testing.assert_close(found["pixels"], alone["pixels"])


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        (TinyMIM(softmax=False, relations=("qq",), heads=8), "block4.qkv"),
        (TinyMIM(strategy="feature", feature="attn_out"), "block4.attn_out"),
        (TinyMIM(strategy="feature", feature="mid", teacher_block=3), "block3.mid"),
        (TinyMIM(strategy="class-token", feature="mlp_out"), "block4.mlp_out"),
    ],
)
def test_targets_of_ablations(objective: TinyMIM, target: str) -> None:
    assert objective.wants({"mae": CARD}) == {"mae": (target,)}


def test_a_recipe_turns_ablations_on_field_by_field() -> None:
    changes = {"objective.masked_input": "0.75", "objective.reconstruction.decoder_depth": "2", "weights.pixels": "0.5"}
    recipe = get_recipe("tinymim-b", changes)
    assert isinstance(recipe.objective, TinyMIM)
    assert recipe.objective.reconstruction == MAE(decoder_depth=2)
    assert recipe.loss_weights() == {"qk": 1, "vv": 1, "pixels": 0.5}
    with pytest.raises(
        UsageError, match=r"unknown field 'objective\.reconstruction\.decoder_dept'; did you mean 'decoder_depth'"
    ):
        get_recipe("tinymim-b", {"objective.reconstruction.decoder_dept": 2})


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ("qk", "qk")}, "names a kind twice"),
        ({"relations": ()}, "at least 1 item"),
        ({"relations": ("qv",)}, "'qk', 'vv', 'qq' or 'kk'"),
        ({"feature": "out"}, "strategy 'relation' does not read feature, .*add --set objective.feature=null"),
        (
            {"strategy": "feature", "heads": 4},
            "strategy 'feature' does not read heads, which is not at its default; for that add --set objective.heads=null",
        ),
        ({"student_block": 1}, "student_block 1 would train no block at all; relations need student_block 2 or later"),
        ({"strategy": "feature", "feature": "final", "teacher_block": 2}, "teacher_block is set, but feature 'final'"),
        (
            {"strategy": "feature", "softmax": False},
            "strategy 'feature' does not read softmax, .*--set objective.softmax=true",
        ),
        ({"beta": 1.0}, "strategy 'relation' does not read beta, .*--set objective.beta=2.0"),
        ({"temperature": 2.0}, "strategy 'relation' does not read temperature, .*objective.temperature=1.0"),
        (
            {"strategy": "feature", "relations": ["vv"]},
            r"""does not read relations, .*--set 'objective.relations=\["qk", "vv"\]'""",
        ),
        ({"strategy": "feature", "temperature": 2.0}, "strategy 'feature' does not read temperature"),
        ({"strategy": "class-token", "beta": 1.0}, "strategy 'class-token' does not read beta"),
        (
            {"strategy": "class-token", "tokens": "patches"},
            "strategy 'class-token' does not read tokens, .*--set objective.tokens=all",
        ),
        ({"reconstruction": MAE()}, r"hides 0\.75 of the patches, but masked_input is None; .* set masked_input and"),
        ({"reconstruction": MAE(), "masked_input": 0.5}, r"but masked_input is 0\.5; one forward serves both"),
        (
            {"reconstruction": MAE(mask="tube"), "masked_input": 0.75},
            "reconstruction.mask is set, but masked_input draws the mask; set it to null",
        ),
        ({"masked_input": 1.0}, "less than 1"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TinyMIM(**settings)


@pytest.mark.parametrize(
    ("objective", "cards", "message"),
    [
        (
            TinyMIM(),
            {},
            r"objective.teacher not given, and there is no teacher; add one \(without --tap: .*\): hdcache extract --store STORE --teacher NAME=MODEL$",
        ),
        (
            TinyMIM(teacher="b"),
            {"mae": CARD, "sup": CARD},
            r"^objective.teacher: no teacher 'b'; choose from: mae, sup; or add it "
            r"\(without --tap: the block that is read by default\): hdcache extract --store STORE --teacher b=MODEL$",
        ),
        (TinyMIM(teacher="b", teacher_block=9), {"mae": CARD}, "--teacher b=MODEL --tap block9.attn_in$"),
        (TinyMIM(teacher="b", strategy="class-token"), {"mae": CARD}, "--teacher b=MODEL --tap final$"),
        (
            TinyMIM(teacher="b", strategy="feature"),
            {"mae": CARD},
            r"add it \(N: its last block\): .*--teacher b=MODEL --tap blockN.out$",
        ),
        (TinyMIM(), {"b": CARD, "a": CARD}, r"there are 2 \(a, b\); set objective.teacher=NAME"),
        (TinyMIM(teacher="maee"), {"mae": CARD}, "no teacher 'maee'; did you mean 'mae'"),
        (
            TinyMIM(),
            {"mae": CARD.model_copy(update={"mask": MaskSpec(kind="tube", ratio=0.75)})},
            r"teacher 'mae' saw only the tokens that its mask tube:0\.75 left.*store it without --teacher-mask: "
            r"set objective.teacher=mae-2 and add it: hdcache extract .* --tap block4.attn_in$",
        ),
        (
            TinyMIM(softmax=False),
            {"mae": CARD.model_copy(update={"qk_norm": True})},
            r"teacher 'mae' normalises queries and keys.*set objective\.softmax=true, or objective\.relations=\[vv\]",
        ),
        (TinyMIM(softmax=False, teacher_block=5), {"mae": CARD}, "teacher_block is 5, but teacher 'mae' has 4 blocks"),
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
        (
            TinyMIM(),
            {},
            {"slots": 8},
            "has 4x4 patch .* but teacher 'mae' 8 slots of 4x4.*both need clips of the same number of frames",
        ),
        (
            TinyMIM(masked_input=0.01),
            {},
            {},
            r"objective\.masked_input 0\.01 of 16 cells hides 0 and leaves 16 visible",
        ),
        (
            TinyMIM(masked_input=0.5, reconstruction=MAE(mask_ratio=0.5, decoder_heads=3)),
            {},
            {},
            r"objective\.reconstruction\.decoder_heads 3",
        ),
        (
            TinyMIM(strategy="feature"),
            {},
            {"grid": (8, 8)},
            "tokens are compared one by one, .*--img-size 16 --tap block4.out$",
        ),
        (
            TinyMIM(heads=5),
            {},
            {},
            "5 heads do not divide the width 32 of teacher 'mae'; set objective.heads=null for the teacher's own 4, or "
            "objective.heads to a divisor of 32 and 24$",
        ),
        (
            TinyMIM(),
            {"embed_dim": 30},
            {},
            "4 heads do not divide the width 30 of the student; set objective.heads to a div",
        ),
        (
            TinyMIM(),
            {"depth": 1},
            {},
            "relations of block 1 alone would train no block of the student; give it at least 2",
        ),
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

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from hdcache.backbones import create_vit
from hdcache.batch import Batch
from hdcache.distill import teacher_fit
from hdcache.distill.hybrid import Hybrid, HybridHeads
from hdcache.distill.redundancy import lowest_ascending, redundancy
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, UsageError
from hdcache.relations import relation_logits
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps

MAE = TeacherCard(
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
CLIP = MAE.model_copy(update={"width": 40, "heads": 5, "depth": 5, "patch_size": 2})
CARDS = {"mae": MAE, "clip": CLIP}
NAMED: dict[str, Any] = {"relation_teacher": "mae", "feature_teacher": "clip"}
EVERY: dict[str, Any] = {"relation_blocks": (2, 3), "student_blocks": (2, 4), "relations": ("qk", "vv", "qq", "kk")}


def vit(seed: int = 0, **arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments, seed=seed)


TEACHERS = {
    "mae": vit(1, embed_dim=32, num_heads=4),
    "clip": vit(2, img_size=8, patch_size=2, embed_dim=40, num_heads=5, depth=5),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(objective: Hybrid, student: nn.Module, cards: dict[str, TeacherCard] | None = None) -> HybridHeads:
    return objective.build(student, cards or CARDS, 0, torch.Generator().manual_seed(0))


def batch_of(objective: Hybrid, seed: int = 0, epoch: int = 0) -> Batch:
    """A batch whose targets both teachers really give for the same pictures."""
    images, targets = normal(3, 3, 16, 16, seed=seed), {}
    for name, names in objective.wants(CARDS).items():
        seen = images if name == "mae" else nn.functional.avg_pool2d(images, 2)
        with torch.no_grad():
            targets[name] = forward_taps(TEACHERS[name], seen, names)
    labels = torch.zeros(3, dtype=torch.int64)
    return Batch(images, ["a", "b", "c"], labels, targets, epoch=epoch, view=0, index=0)


def kept_of(objective: Hybrid, student: nn.Module, batch: Batch, name: str, seed: int = 0) -> Tensor:
    kept = objective.forward(student, batch, build(objective, student), seed)[f"{name}.kept"]
    assert isinstance(kept, Tensor)
    return kept


def losses_of(objective: Hybrid, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
    heads = build(objective, student)
    return objective.loss(batch, objective.forward(student, batch, heads, 0), heads)


def tokens_of(value: object) -> Tokens:
    assert isinstance(value, Tokens)
    return value


# Which targets and taps


@pytest.mark.parametrize(("depth", "block"), [(1, 1), (2, 2), (3, 2), (4, 3), (12, 9), (24, 18), (32, 24)])
def test_the_default_block_is_at_three_quarters_of_the_depth(depth: int, block: int) -> None:
    assert teacher_fit.three_quarters(depth) == block


@pytest.mark.parametrize(
    ("changes", "wanted", "taps", "last"),
    [
        ({}, {"mae": ("block3.qkv",), "clip": ("final",)}, ("block9.qkv", "final"), "final"),
        ({"use": ("relation",)}, {"mae": ("block3.qkv", "block3.attn_in")}, ("block9.qkv",), "block8.out"),
        ({"use": ("relation",), "keep_ratio": None}, {"mae": ("block3.qkv",)}, ("block9.qkv",), "block8.out"),
        ({"use": ("relation",), "scorer": "random"}, {"mae": ("block3.qkv",)}, ("block9.qkv",), "block8.out"),
        (
            {"use": ("relation",), "scorer_target": "feature"},
            {"mae": ("block3.qkv",), "clip": ("final",)},
            ("block9.qkv",),
            "block8.out",
        ),
        ({"use": ("feature",)}, {"clip": ("final",)}, ("final",), "final"),
        (
            {"use": ("feature",), "scorer_target": "relation", "feature": "block4.out"},
            {"clip": ("block4.out",), "mae": ("block3.attn_in",)},
            ("final",),
            "final",
        ),
        (
            {"relation_blocks": (2, 4, 4), "student_blocks": (6, 12, 6), "scorer_target": "relation"},
            {"mae": ("block2.qkv", "block4.qkv", "block2.attn_in"), "clip": ("final",)},
            ("block6.qkv", "block12.qkv", "final"),
            "final",
        ),
        ({"feature_teacher": "mae"}, {"mae": ("block3.qkv", "final")}, ("block9.qkv", "final"), "final"),
    ],
)
def test_names_of_targets_and_taps(
    changes: dict[str, Any], wanted: dict[str, tuple[str, ...]], taps: tuple[str, ...], last: str
) -> None:
    objective = Hybrid(**NAMED | changes)
    assert objective.wants(CARDS) == wanted
    assert objective.student_taps(12) == taps
    assert objective.last_trained(12) == last
    assert objective.parts() == changes.get("use", ("relation", "feature"))


def test_the_only_teacher_needs_no_name() -> None:
    assert Hybrid(use=("feature",)).wants({"clip": CLIP}) == {"clip": ("final",)}
    assert Hybrid(use=("relation",), keep_ratio=None).wants({"mae": MAE}) == {"mae": ("block3.qkv",)}


def test_weights_of_a_recipe_are_alpha_and_beta() -> None:
    facts = {"student": {"architecture": "vit_tiny_patch16_224"}, "epochs": 1, "batch_size": 4, "lr": 1e-3}
    recipe = Recipe.model_validate(facts | {"name": "x", "objective": {"kind": "hybrid"}, "weights": {"relation": 2}})
    assert recipe.loss_weights() == {"relation": 2.0, "feature": 1.0}


# The loss


@pytest.mark.parametrize("scores", ["scaled", "raw", "softmax"])
@pytest.mark.parametrize("which", ["all", "patches"])
def test_losses_agree_with_a_slow_loop(scores: Any, which: Any) -> None:
    objective = Hybrid(
        **NAMED | EVERY,
        scores=scores,
        heads=2,
        relation_tokens=which,
        feature_tokens=which,
        feature_beta=0.5,
        relation_beta=0.1,
    )
    student, batch = vit(), batch_of(objective)
    heads = build(objective, student)
    taps = objective.forward(student, batch, heads, 0)
    losses = objective.loss(batch, taps, heads)

    def sequence(value: object, kept: Any, image: int) -> Tensor:
        tokens = tokens_of(value)
        patches = tokens.patches[image] if kept is None else tokens.patches[image, kept[image]]
        return patches if which == "patches" else torch.cat([tokens.prefix[image], patches])

    def score(rows: Tensor, columns: Tensor) -> Tensor:
        product = rows @ columns.T
        if scores == "raw":
            return product
        product = product / math.sqrt(rows.shape[1])
        return product if scores == "scaled" else product.softmax(-1)

    distances, features = [], []
    for theirs, own in ((2, 2), (3, 4)):
        for first, second in ((0, 1), (2, 2), (0, 0), (1, 1)):
            errors = []
            for image in range(3):
                t = sequence(batch.targets["mae"][f"block{theirs}.qkv"], taps.get(f"block{own}.qkv.kept"), image)
                s = sequence(taps[f"block{own}.qkv"], None, image)
                for head in range(2):
                    cut = [
                        [x[:, p * width + head * K :][:, :K] for p in (first, second)]
                        for x, width, K in ((t, 32, 16), (s, 24, 12))
                    ]
                    errors.append(smooth_l1_loss(score(*cut[1]), score(*cut[0]), beta=0.1))
            distances.append(torch.stack(errors).mean())
    torch.testing.assert_close(losses["relation"], torch.stack(distances).mean(), rtol=1e-4, atol=1e-6)
    assert heads.project is not None
    for image in range(3):
        target = layer_norm(sequence(batch.targets["clip"]["final"], taps["final.kept"], image), (40,), eps=1e-6)
        features.append(smooth_l1_loss(heads.project(sequence(taps["final"], None, image)), target, beta=0.5))
    torch.testing.assert_close(losses["feature"], torch.stack(features).mean())


def test_without_dropping_softmaxed_relations_are_those_of_tinymim() -> None:
    objective = Hybrid(**NAMED, keep_ratio=None, scores="softmax", relations=("vv",), relation_beta=1e-6)
    student, batch = vit(), batch_of(objective)
    with torch.no_grad():
        target = forward_taps(TEACHERS["mae"], batch.images, ("block3.rel.vv",))["block3.rel.vv"]
        own = forward_taps(student, batch.images, ("block3.rel.vv@4",))["block3.rel.vv@4"]
    assert isinstance(target, Tensor)
    assert isinstance(own, Tensor)
    # With so small a beta the distance is the mean of the absolute differences.
    torch.testing.assert_close(
        losses_of(objective, student, batch)["relation"], (target - own).abs().mean(), rtol=1e-4, atol=1e-6
    )


def test_restricting_comes_before_the_softmax() -> None:
    """The target is the relation that the kept tokens have alone, not the rows and columns of the whole one."""
    objective = Hybrid(**NAMED, scores="softmax", stages=(1,), relation_tokens="patches", relation_beta=1e-6)
    student, batch = vit(), batch_of(objective)
    heads = build(objective, student)
    taps = objective.forward(student, batch, heads, 0)
    kept, qkv = taps["block3.qkv.kept"], tokens_of(batch.targets["mae"]["block3.qkv"]).patches
    assert isinstance(kept, Tensor)
    few = torch.stack([qkv[image, kept[image]] for image in range(3)])
    own = tokens_of(taps["block3.qkv"]).patches

    def relations(x: Tensor) -> Tensor:
        q, k, _ = x.reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        found: Tensor = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return found

    alone, whole = relations(few), relations(qkv)
    after = torch.stack([whole[image][:, kept[image]][:, :, kept[image]] for image in range(3)])
    loss = objective.loss(batch, taps, heads)["relation"]
    torch.testing.assert_close(loss, (alone - relations(own)).abs().mean(), rtol=1e-4, atol=1e-6)
    assert abs(loss - (after - relations(own)).abs().mean()) > 1e-3


@pytest.mark.parametrize("keep_ratio", [None, 0.5])
def test_loss_is_zero_when_the_student_is_the_teacher(keep_ratio: float | None) -> None:
    card = MAE.model_copy(update={"width": 24, "heads": 3})
    blocks: dict[str, Any] = {"relation_blocks": (2, 4), "student_blocks": (2, 4)}
    scorer: dict[str, Any] = {} if keep_ratio is None else {"scorer": "random"}
    objective = Hybrid(
        relation_teacher="mae", feature_teacher="mae", feature_norm="none", keep_ratio=keep_ratio, **blocks, **scorer
    )
    student = vit()
    heads = build(objective, student, {"mae": card})
    heads.project = nn.Identity()
    images = normal(2, 3, 16, 16)
    batch = Batch(images, ["a", "b"], torch.zeros(2), {}, epoch=0, view=0, index=0)
    taps = objective.forward(student, batch, heads, 0)
    whole = Hybrid(**objective.model_dump() | {"keep_ratio": None}).forward(student, batch, heads, 0)
    targets = {name: tokens_of(value) for name, value in whole.items()}
    for name, value in targets.items():
        # What the teacher has at the kept places is what the student has there; elsewhere it may be anything.
        if f"{name}.kept" in taps:
            kept = taps[f"{name}.kept"]
            assert isinstance(kept, Tensor)
            same = value.patches.clone() + 1
            for image in range(2):
                same[image, kept[image]] = tokens_of(taps[name]).patches[image]
            targets[name] = Tokens(tokens_of(taps[name]).prefix, same)
    batch = Batch(images, ["a", "b"], torch.zeros(2), {"mae": dict(targets)}, epoch=0, view=0, index=0)
    losses = objective.loss(batch, taps, heads)
    assert losses["feature"] == 0
    assert losses["relation"] == 0


def test_parts_are_those_of_the_halves_alone() -> None:
    """A half trained alone has the loss that it has beside the other, on the same survivors."""
    both = Hybrid(**NAMED)
    student, batch = vit(), batch_of(both)
    losses = losses_of(both, student, batch)
    for part in both.use:
        alone = Hybrid(**NAMED, use=(part,), scorer_target="feature")
        assert losses_of(alone, student, batch_of(alone)) == {part: losses[part]}


def test_sum_is_the_mean_times_blocks_and_kinds() -> None:
    mean, total = (Hybrid(**NAMED | EVERY, combine=combine) for combine in ("mean", "sum"))
    student, batch = vit(), batch_of(mean)
    found = [losses_of(objective, student, batch)["relation"] for objective in (mean, total)]
    torch.testing.assert_close(found[1], 8 * found[0])


def test_no_gradient_reaches_a_target_and_all_reaches_the_student() -> None:
    objective = Hybrid(**NAMED)
    student, batch = vit(), batch_of(objective)
    leaves = []
    for targets in batch.targets.values():
        for name, value in targets.items():
            asking = Tokens(
                *(part.clone().requires_grad_() for part in (tokens_of(value).prefix, tokens_of(value).patches))
            )
            leaves += [asking.prefix, asking.patches]
            targets[name] = asking
    heads = build(objective, student)
    losses = objective.loss(batch, objective.forward(student, batch, heads, 0), heads)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(leaf.grad is None for leaf in leaves)
    assert all(parameter.grad is not None for parameter in (*student.parameters(), *heads.parameters()))


def test_what_a_teacher_holds_at_dropped_tokens_does_not_count() -> None:
    objective = Hybrid(**NAMED, scorer="random", stages=(1, 2))
    student, batch = vit(), batch_of(objective)
    before = losses_of(objective, student, batch)
    for teacher, name, tap in (("mae", "block3.qkv", "block3.qkv"), ("clip", "final", "final")):
        value, kept = tokens_of(batch.targets[teacher][name]), kept_of(objective, student, batch, tap)
        dropped = torch.ones(3, 16).scatter(1, kept, 0.0).unsqueeze(-1)
        assert dropped.sum() == 3 * 12
        batch.targets[teacher][name] = Tokens(value.prefix, value.patches + 100 * dropped)
    assert losses_of(objective, student, batch) == before


def test_no_relation_of_a_dropped_token_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def noted(x: Tensor, y: Tensor, scale: float | None = None) -> Tensor:
        shapes.append((x.shape[2], y.shape[2]))
        return relation_logits(x, y, scale)

    monkeypatch.setattr("hdcache.distill.hybrid.relation_logits", noted)
    objective = Hybrid(**NAMED)
    losses_of(objective, vit(), batch_of(objective))
    assert shapes == [(5, 5), (5, 5)], "block 3 of 4 runs on a class token and 16 -> 8 -> 4 patches"


# What is dropped


def test_a_teacher_s_scores_do_not_depend_on_the_student() -> None:
    pairs: dict[Any, tuple[str, str]] = {"feature": ("clip", "final"), "relation": ("mae", "block3.attn_in")}
    for target, tap in pairs.items():
        objective = Hybrid(**NAMED, scorer_target=target, stages=(1,))
        batch = batch_of(objective)
        first, other = (kept_of(objective, vit(seed), batch, "final") for seed in (0, 9))
        assert torch.equal(first, other)
        scored = tokens_of(batch.targets[tap[0]][tap[1]]).patches
        assert torch.equal(first, lowest_ascending(redundancy(scored), 0.5))


def test_a_student_s_scores_do() -> None:
    objective = Hybrid(**NAMED, scorer="student")
    batch = batch_of(objective)
    assert not torch.equal(*(kept_of(objective, vit(seed), batch, "final") for seed in (0, 9)))


def test_random_drops_change_with_epoch_and_seed_alone() -> None:
    objective = Hybrid(**NAMED, scorer="random")
    student = vit()
    first = kept_of(objective, student, batch_of(objective), "final")
    assert torch.equal(kept_of(objective, vit(9), batch_of(objective, seed=5), "final"), first)
    assert not torch.equal(kept_of(objective, student, batch_of(objective, epoch=1), "final"), first)
    assert not torch.equal(kept_of(objective, student, batch_of(objective), "final", seed=1), first)


def test_counts_of_a_base_student_at_224_pixels() -> None:
    student = vit(img_size=224, patch_size=16, embed_dim=12, depth=12)
    blocks = tuple(range(2, 13))
    objective = Hybrid(**NAMED, relation_blocks=(2,) * 11, student_blocks=blocks, scorer="random", heads=4)
    cards = {name: card.model_copy(update={"grid": (14, 14)}) for name, card in CARDS.items()}
    batch = Batch(normal(1, 3, 224, 224), ["a"], torch.zeros(1), {}, epoch=0, view=0, index=0)
    taps = objective.forward(student, batch, build(objective, student, cards), 0)
    counts = [tokens_of(taps[f"block{block}.qkv"]).patches.shape[1] for block in blocks]
    assert counts == [98] * 4 + [49] * 4 + [24] * 3
    assert tokens_of(taps["final"]).patches.shape[1] == 24


@settings(max_examples=15)
@given(st.floats(0.3, 0.9), st.sampled_from(["teacher", "student", "random"]), st.integers(0, 3))
def test_survivors_are_ascending_and_nested(ratio: float, scorer: Any, seed: int) -> None:
    objective = Hybrid(**NAMED | EVERY, keep_ratio=ratio, scorer=scorer, stages=(1, 3))
    taps = objective.forward(vit(), (batch := batch_of(objective, seed)), build(objective, vit()), seed)
    early, late, last = (taps[f"{name}.kept"] for name in ("block2.qkv", "block4.qkv", "final"))
    assert isinstance(early, Tensor)
    assert isinstance(late, Tensor)
    assert torch.equal(late, last)  # type: ignore[arg-type]
    assert (early.diff(dim=1) > 0).all()
    assert (late.diff(dim=1) > 0).all()
    assert late.shape == (len(batch.ids), int(int(16 * ratio) * ratio))
    assert all(set(few) <= set(many) for few, many in zip(late.tolist(), early.tolist(), strict=True))


# What cannot be meant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use": ()}, "at least 1 item"),
        ({"use": ("relation", "relation")}, r"use \['relation', 'relation'\] names one twice"),
        ({"relations": ("qk", "qk")}, r"relations \['qk', 'qk'\] names one twice"),
        ({"relation_blocks": (2, 3)}, "relation_blocks is set, but student_blocks is null; name 2 of the student's"),
        ({"student_blocks": (2, 3)}, r"student_blocks names 2 and relation_blocks 1 \(null: 1\); they are pairs"),
        ({"relation_blocks": (0,), "student_blocks": (1,)}, "count blocks from 1"),
        ({"stages": (0,)}, "count blocks from 1"),
        ({"stages": (1, 3, 1)}, r"stages \[1, 3, 1\] names one twice"),
        ({"keep_ratio": None, "stages": (1,)}, "keep_ratio null does not read stages"),
        ({"keep_ratio": 1.0}, "less than 1"),
        (
            {"scorer": "random", "scorer_target": "feature"},
            "scorer_target is set, but no teacher scores; set it to null",
        ),
        ({"keep_ratio": None, "scorer_target": "feature"}, "scorer_target is set, but no teacher scores"),
        ({"feature": "pooled"}, "'pooled' gives no tokens; choose final, blockN.out, blockN.attn_in or blockN.qkv"),
        ({"feature": "block2.rel.qk"}, "gives no tokens"),
        ({"feature": "fnal"}, "unknown tap 'fnal'; taps are"),
        ({"scores": "cosine"}, "'scaled', 'raw' or 'softmax'"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Hybrid(**changes)


@pytest.mark.parametrize(
    ("objective", "cards", "message"),
    [
        (
            Hybrid(),
            CARDS,
            "objective.relation_teacher and objective.feature_teacher not given, .* teachers are clip, mae",
        ),
        (
            Hybrid(**NAMED, relation_blocks=(5,), student_blocks=(2,)),
            CARDS,
            "relation_blocks names block 5, but the rel",
        ),
        (
            Hybrid(**NAMED, feature="block6.out"),
            CARDS,
            "feature names block 6, but the feature teacher has 5 blocks; ch",
        ),
        (
            Hybrid(feature_teacher="clp", relation_teacher="mae"),
            CARDS,
            "feature_teacher: no teacher 'clp'; did you mean",
        ),
        (
            Hybrid(feature_teacher="supervised", relation_teacher="mae"),
            CARDS,
            r"objective.feature_teacher: no teacher 'supervised'; choose from: clip, mae; or add it: "
            r"hdcache extract --store STORE --teacher supervised=MODEL --tap final$",
        ),
        (
            Hybrid(feature_teacher="clip", relation_teacher="l"),
            CARDS,
            r"add it \(N: three quarters of its blocks\): .*--teacher l=MODEL --tap blockN.attn_in$",
        ),
        (
            Hybrid(feature_teacher="clip", relation_teacher="l", relation_blocks=(2, 3), student_blocks=(1, 2)),
            CARDS,
            "--teacher l=MODEL --tap block2.attn_in --tap block3.attn_in$",
        ),
        (
            Hybrid(**NAMED),
            CARDS | {"mae": MAE.model_copy(update={"mask": MaskSpec(kind="random", ratio=0.75)})},
            r"its mask random:0.75 left, .*set objective.relation_teacher=mae-2 and add it: .*--teacher mae-2=MODEL --tap block3.attn_in$",
        ),
        (
            Hybrid(**NAMED),
            CARDS | {"mae": MAE.model_copy(update={"qk_norm": True})},
            r"'mae' normalises Q and K per head, after the stored QKV; set objective.relations=\[\"vv\"\]",
        ),
    ],
)
def test_teachers_that_cannot_be_used(objective: Hybrid, cards: dict[str, TeacherCard], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective.wants(cards)


def test_values_under_a_qk_norm_can_be_used() -> None:
    cards = CARDS | {"mae": MAE.model_copy(update={"qk_norm": True})}
    assert build(Hybrid(**NAMED, relations=("vv",)), vit(qk_norm=True), cards).num_heads == 4
    assert Hybrid(**NAMED, use=("feature",)).wants(cards) == {"clip": ("final",)}


@pytest.mark.parametrize(
    ("changes", "depth", "message"),
    [
        (
            {"student_blocks": (13,)},
            12,
            "student_blocks names block 13, but the student has 12 blocks; choose from 1 to 12",
        ),
        ({"student_blocks": (1,), "use": ("relation",)}, 12, "relations of block 1 alone would train no block"),
        (
            {"use": ("relation",)},
            1,
            "relations of block 1 alone would train no block of the student; give it at least 2",
        ),
    ],
)
def test_student_blocks_that_cannot_be_meant(changes: dict[str, Any], depth: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Hybrid(**NAMED | changes).student_taps(depth)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {},
            {"img_size": 24},
            "student has 6x6 patch . 1 prefix tokens and teacher 'mae' 4x4 .*student.arguments.img_size=16",
        ),
        (
            {"heads": 5},
            {},
            "5 heads do not divide the width 32 of teacher 'mae'; set objective.heads=null for the teacher's own 4",
        ),
        ({}, {"embed_dim": 30}, "4 heads do not divide the width 30 of the student; set objective.heads to a divisor"),
        ({}, {"qk_norm": True}, "block3 of the student normalises Q and K per head"),
        (
            {},
            {"reg_tokens": 2},
            "objective.relation_tokens 'all' .*student has 4x4 patch . 3 .*set objective.relation_tokens",
        ),
        ({"relation_tokens": "patches"}, {"reg_tokens": 2}, "teacher 'clip' 4x4 patch . 1 .*feature_tokens=patches"),
        ({"keep_ratio": 0.2}, {}, "keep_ratio 0.2 leaves no patch token after block 2: 16 -> 3 -> 0"),
        ({"stages": (5,)}, {}, "stages names block 5, but the student has 4 blocks"),
        ({"stages": (3,), "use": ("relation",)}, {}, r"stages \[3\] drop nothing: block 3 is the last that is read"),
        ({"stages": (1, 4), "use": ("relation",)}, {}, r"stages \[4\] drop nothing: block 3 is the last that is read"),
    ],
)
def test_student_and_teachers_that_do_not_fit(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(Hybrid(**NAMED | changes), vit(**arguments))


# From a store of two teachers


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str], tiny: str) -> Path:
    """A store of 32 pictures with a teacher for relations and one of another width and patch size for features."""
    from hdcache.extract.run import extract

    root = tmp_path_factory.mktemp("hybrid")
    data = make_npz(root / "data.npz", 32)
    fixed: dict[str, Any] = {
        "encoding": "fp32",
        "precision": "fp32",
        "device": "cpu",
        "batch": 8,
        "rows_per_shard": 16,
        "threads": 2,
    }
    clip = "random:vit_tiny_patch16_224?img_size=16&patch_size=4&depth=2&embed_dim=36&num_heads=2&seed=3"
    for teacher, tap in ((f"mae={tiny}", "block2.attn_in"), (f"clip={clip}", "final")):
        extract(data, store=root / "store", teachers=[teacher], taps=[tap], num_views=2, **fixed)
    return root / "store"


def recipe(small_recipe: Callable[..., Recipe], **changes: Any) -> Recipe:
    """10 steps of Hybrid Distill."""
    return small_recipe(objective={"kind": "hybrid"} | NAMED | changes, epochs=5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"scorer": "student"}, {"scorer": "random"}, {"keep_ratio": None, "feature_norm": "none", "scores": "raw"}],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_a_store_trains_as_the_teachers_themselves_do(
    two_teachers: Path, tmp_path: Path, small_recipe: Callable[..., Recipe], changes: dict[str, Any]
) -> None:
    from hdcache.distill.run import distill

    plan = recipe(small_recipe, **changes)
    runs = [
        distill(plan, out=tmp_path / name, store=two_teachers, device="cpu", threads=2, online=online)
        for name, online in (("stored", False), ("live", True))
    ]
    assert runs[0]["loss"] == runs[1]["loss"]
    assert runs[0]["targets"] == {"mae": ["block2.qkv"], "clip": ["final"]}
    assert runs[0]["last_trained"] == "final"
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("stored", "live")]
    assert weights[0] == weights[1]


RANK = """
import sys
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
recipe, out, store = sys.argv[1:]
distill(Recipe.model_validate_json(recipe), out=out, store=store, device="cpu", threads=1)
"""


def test_two_processes_have_the_losses_of_one(
    two_teachers: Path, tmp_path: Path, small_recipe: Callable[..., Recipe], together: Callable[..., list[str]]
) -> None:
    from hdcache.distill.run import distill

    plan = recipe(small_recipe)
    distill(plan, out=tmp_path / "one", store=two_teachers, device="cpu", threads=1)
    together(RANK, plan.model_dump_json(), tmp_path / "two", two_teachers)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 10
    for part in ("loss", "relation", "feature"):
        assert [line[part] for line in two] == pytest.approx([line[part] for line in one], rel=1e-5)


def test_a_target_that_is_missing_names_one_command(
    two_teachers: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    from hdcache.distill.run import distill

    plan = recipe(small_recipe, relation_blocks=(3,), student_blocks=(2,))
    command = (
        r"hdcache extract --store .*store --num-views 2 --teacher 'mae-2=random:vit_tiny\S+' --tap block3.attn_in$"
    )
    with pytest.raises(
        InputNotFound, match=rf"; set objective\.relation_teacher=mae-2, and store it under that name too: {command}"
    ):
        distill(plan, out=tmp_path / "a", store=two_teachers, device="cpu")
    with pytest.raises(UsageError, match="feature_teacher not given, and nothing says which teacher is meant"):
        distill(
            recipe(small_recipe, relation_teacher=None, feature_teacher=None), out=tmp_path / "a", store=two_teachers
        )
    assert not (tmp_path / "a").exists()

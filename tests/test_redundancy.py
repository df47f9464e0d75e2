from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hdcache.backbones import create_vit
from hdcache.distill.redundancy import (
    Dropping,
    Score,
    check_stages,
    default_stages,
    lowest,
    lowest_ascending,
    own_score,
    random_score,
    redundancy,
    survivors,
    target_score,
)
from hdcache.errors import UsageError
from hdcache.taps import Tokens, embed_tokens, forward_taps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


# The score


def test_score_agrees_with_a_slow_loop() -> None:
    tokens = normal(2, 7, 5)
    scores = redundancy(tokens)
    for image in range(2):
        unit = [token / token.square().sum().sqrt() for token in tokens[image]]
        mean = sum(unit, torch.zeros(5)) / 7
        for position in range(7):
            assert scores[image, position].item() == pytest.approx(float(mean @ unit[position]), abs=1e-6)


def test_the_odd_token_out_is_the_least_redundant() -> None:
    tokens = torch.ones(1, 6, 4) + 0.01 * normal(1, 6, 4)
    tokens[0, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert lowest(redundancy(tokens), 0.2).tolist() == [[4]]


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_length_of_a_token_does_not_count(seed: int, factor: float) -> None:
    tokens = normal(2, 9, 4, seed=seed)
    longer = tokens.clone()
    longer[:, 3] *= factor
    torch.testing.assert_close(redundancy(longer), redundancy(tokens), rtol=1e-4, atol=1e-5)


def test_score_is_float32_without_gradient_and_finite_for_empty_tokens() -> None:
    tokens = normal(2, 9, 4).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = redundancy(tokens)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, redundancy(tokens.float()), rtol=0, atol=1e-6)
    assert torch.isfinite(redundancy(torch.zeros(1, 3, 4))).all()


# Which are kept


@given(st.integers(1, 40), st.floats(0.05, 0.95), st.integers(0, 20))
def test_kept_are_the_smallest_and_ascending(total: int, ratio: float, seed: int) -> None:
    scores = normal(2, total, seed=seed)
    kept, ascending = lowest(scores, ratio), lowest_ascending(scores, ratio)
    count = int(total * ratio)
    assert kept.shape == ascending.shape == (2, count)
    assert torch.equal(scores.gather(1, kept), scores.sort(dim=1).values[:, :count])
    assert (ascending.diff(dim=1) > 0).all()
    assert torch.equal(kept.sort(dim=1).values, ascending)


def test_equal_scores_fall_to_the_lower_position() -> None:
    assert lowest(torch.zeros(1, 6), 0.5).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("depth", "stages"),
    [(12, (1, 5, 9)), (24, (1, 9, 17)), (4, (1, 2, 3)), (3, (1, 2, 3)), (2, (1, 2)), (1, (1,))],
)
def test_default_stages_are_those_of_index_0_a_third_and_two_thirds(depth: int, stages: tuple[int, ...]) -> None:
    assert default_stages(depth) == stages


def test_counts_of_the_released_code() -> None:
    assert survivors(196, 0.5, 3) == [196, 98, 49, 24]
    assert survivors(147, 0.5, 3) == [147, 73, 36, 18]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (16, 0.5, (1, 13), 12, 13),
            "objective.stages names block 13, but the student has 12 blocks; choose from 1 to 12",
        ),
        (
            (16, 0.5, (9,), 12, 9),
            r"objective.stages \[9\] drop nothing: block 9 is the last that is read; choose blocks",
        ),
        (
            (16, 0.2, None, 12, 13),
            "keep_ratio 0.2 leaves no patch token after block 5: 16 -> 3 -> 0; raise it, name fewer objective.stages",
        ),
        ((3, 0.3, (2,), 12, 13), "keep_ratio 0.3 leaves no patch token after block 2: 3 -> 0"),
    ],
)
def test_stages_that_cannot_be_meant(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_stages(*arguments)


def test_only_the_stages_before_the_last_block_that_is_read_count() -> None:
    with pytest.raises(UsageError, match="after block 9: 4 -> 2 -> 1 -> 0"):
        check_stages(4, 0.5, None, 12, 13)
    check_stages(4, 0.5, None, 12, 9)


# Dropping in a forward


SCORES: dict[str, Score] = {
    "own": own_score,
    "target": target_score(normal(3, 16, 8)),
    "random": random_score(["a", "b", "c"], 0, 0, 16),
}


@pytest.mark.parametrize("name", SCORES)
def test_survivors_are_ascending_and_nested(name: str) -> None:
    dropping = Dropping((1, 3, 5), 0.5, SCORES[name])
    taps = [f"block{block}.out" for block in range(1, 7)]
    found = forward_taps(vit(), normal(3, 3, 16, 16), [*taps, "final"], drop=dropping.drop)
    assert [found[tap].patches.shape[1] for tap in taps] == [16, 8, 8, 4, 4, 2]  # type: ignore[union-attr]
    assert all(found[tap].prefix.shape[1] == 1 for tap in taps)  # type: ignore[union-attr]
    assert dropping.before(1) is None
    before = set(range(16))
    for block, count in ((2, 8), (3, 8), (4, 4), (5, 4), (6, 2), (7, 2)):
        kept = dropping.before(block)
        assert kept is not None
        assert kept.shape == (3, count)
        assert (kept.diff(dim=1) > 0).all()
        assert set(kept[0].tolist()) <= before
        before = set(kept[0].tolist())


def test_indices_are_those_of_the_tokens_that_are_left() -> None:
    """In a network whose blocks do nothing, what comes out is what went in at the survivors."""
    student: Any = vit()
    student.blocks = nn.Sequential(*(nn.Identity() for _ in range(6)))
    student.norm = nn.Identity()
    images = normal(3, 3, 16, 16)
    dropping = Dropping((1, 3, 5), 0.7, SCORES["random"])
    left = forward_taps(student, images, ["final"], drop=dropping.drop)["final"]
    kept = dropping.before(7)
    assert isinstance(left, Tokens)
    assert kept is not None
    whole = embed_tokens(student, images)
    for image in range(3):
        assert torch.equal(left.patches[image], whole[image, 1 + kept[image]])
    assert torch.equal(left.prefix, whole[:, :1])


def test_a_teacher_s_survivors_are_scored_among_themselves() -> None:
    target = normal(2, 16, 8)
    dropping = Dropping((1, 2), 0.5, target_score(target))
    forward_taps(vit(), normal(2, 3, 16, 16), ["final"], drop=dropping.drop)
    for image in range(2):
        first = lowest(redundancy(target[image : image + 1]), 0.5)[0].sort().values
        again = lowest(redundancy(target[image : image + 1, first]), 0.5)[0].sort().values
        kept = dropping.before(3)
        assert kept is not None
        assert kept[image].tolist() == first[again].tolist()


def test_the_student_s_tokens_are_a_block_s_output() -> None:
    student, images = vit(), normal(2, 3, 16, 16)
    dropping = Dropping((2,), 0.5, own_score)
    forward_taps(student, images, ["final"], drop=dropping.drop)
    whole = forward_taps(student, images, ["block2.out"])["block2.out"]
    assert isinstance(whole, Tokens)
    kept = dropping.before(3)
    assert kept is not None
    assert torch.equal(kept, lowest_ascending(redundancy(whole.patches), 0.5))


def test_random_drops_are_a_function_of_seed_id_and_epoch() -> None:
    def kept(ids: list[str], epoch: int, seed: int) -> Tensor:
        dropping = Dropping((1, 2), 0.5, random_score(ids, epoch, seed, 64))
        forward_taps(vit(img_size=32), normal(len(ids), 3, 32, 32), ["final"], drop=dropping.drop)
        found = dropping.before(6)
        assert found is not None
        return found

    first = kept(["a", "b"], 3, 7)
    assert torch.equal(kept(["b", "a"], 3, 7), first.flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(kept(["a", "b"], 4, 7), first)
    assert not torch.equal(kept(["a", "b"], 3, 8), first)


def test_random_drops_keep_every_token_equally_often() -> None:
    noise = random_score([str(i) for i in range(2000)], 0, 0, 16)(Tokens(normal(1, 0, 4), normal(1, 16, 4)), None)
    shares = torch.bincount(lowest(noise, 0.25).flatten(), minlength=16) / 2000
    assert (shares - 0.25).abs().max() < 0.05

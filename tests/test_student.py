"""The student: weights from a seed, fixed positions, and drop paths that are functions of (seed, id, epoch)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hdcache.distill.decoder import sincos_positions
from hdcache.distill.settings import StudentSpec
from hdcache.distill.student import KeyedDropPath, build_student, set_drop_paths, student_input
from hdcache.errors import UsageError
from hdcache.video_vit import sinusoid_positions

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}


def spec(**changes: Any) -> StudentSpec:
    return StudentSpec(architecture="vit_tiny_patch16_224", **{"arguments": ARGUMENTS} | changes)


def paths(model: Any) -> list[list[float]]:
    """The drop rates of both branches of every block; an Identity counts as 0."""
    return [[getattr(path, "rate", 0.0) for path in (b.drop_path1, b.drop_path2)] for b in model.blocks]


@pytest.mark.parametrize("init", ["mae", "timm"])
def test_weights_are_a_function_of_the_seed(init: str) -> None:
    first, again, other = (build_student(spec(init=init), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    build_student(spec(drop_path=0.1), 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mae_initialisation() -> None:
    model: Any = build_student(spec(arguments=ARGUMENTS | {"embed_dim": 96}), 0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
            assert not layer.bias.any()
        if isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()
    projection = model.patch_embed.proj.weight
    bound = math.sqrt(6 / (96 + 3 * 8 * 8))
    assert 0.95 * bound < float(projection.detach().abs().max()) <= bound
    assert 0.014 < float(model.cls_token.detach().std()) < 0.026


@pytest.mark.parametrize(
    ("changes", "prefix"), [({}, 1), ({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)]
)
def test_positions_are_fixed_sines_and_cosines(changes: dict[str, Any], prefix: int) -> None:
    model: Any = build_student(spec(arguments=ARGUMENTS | changes), 0)
    assert not model.pos_embed.requires_grad
    assert not model.pos_embed[0, :prefix].any()
    assert torch.equal(model.pos_embed[0, prefix:], sincos_positions(24, (4, 4)))
    assert build_student(spec(sincos_positions=False), 0).pos_embed.requires_grad


def test_positions_need_something_to_fix() -> None:
    with pytest.raises(UsageError, match=r"has no position embedding; set student.sincos_positions=false"):
        build_student(spec(arguments=ARGUMENTS | {"pos_embed": "none"}), 0)


@pytest.mark.parametrize(
    ("arguments", "message", "fixes"),
    [
        (
            {"embed_dim": 30},
            r"^student\.arguments\.embed_dim 30 is not a multiple of 4, which fixed positions need; "
            r"set student\.arguments\.embed_dim=24 or 36, or student\.sincos_positions=false$",
            [{"embed_dim": 24}, {"embed_dim": 36}],
        ),
        (
            {"num_heads": 5, "embed_dim": 48},
            r"num_heads 5 does not divide embed_dim 48; set student\.arguments\.num_heads=4 or 6, or "
            r"student\.arguments\.embed_dim=40 or 60$",
            [{"num_heads": 4}, {"num_heads": 6}, {"embed_dim": 40}, {"embed_dim": 60}],
        ),
        ({"embed_dim": 50}, r"set student\.arguments\.embed_dim=48 or 60$", [{"embed_dim": 48}, {"embed_dim": 60}]),
    ],
)
def test_every_width_and_head_count_that_a_message_names_works(
    arguments: dict[str, Any], message: str, fixes: list[dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match=message):
        build_student(spec(arguments=ARGUMENTS | arguments), 0)
    for fix in fixes:
        build_student(spec(arguments=ARGUMENTS | arguments | fix), 0)
    if "num_heads" not in arguments and arguments["embed_dim"] == 30:
        build_student(spec(arguments=ARGUMENTS | arguments, sincos_positions=False), 0)


def test_drop_path_schedules() -> None:
    assert paths(build_student(spec(drop_path=0.3), 0)) == [[pytest.approx(0.1 * block)] * 2 for block in range(4)]
    constant = spec(drop_path=0.3, drop_path_schedule="constant")
    assert paths(build_student(constant, 0)) == [[0.3, 0.3]] * 4
    last = spec(drop_path=0.3, drop_path_schedule="constant", drop_path_last_block=False)
    assert paths(build_student(last, 0)) == [[0.3, 0.3]] * 3 + [[0.0, 0.0]]
    assert paths(build_student(spec(), 0)) == [[0.0, 0.0]] * 4


def kept(model: torch.nn.Module, ids: list[str], seed: int, epoch: int) -> torch.Tensor:
    set_drop_paths(model, ids, seed, epoch)
    return torch.stack([m.keep for m in model.modules() if isinstance(m, KeyedDropPath) and m.keep is not None])


def test_drop_paths_are_functions_of_seed_id_and_epoch() -> None:
    model = build_student(spec(drop_path=0.5, drop_path_schedule="constant"), 0)
    ids = [f"image {number}" for number in range(64)]
    first = kept(model, ids, 0, 0)
    assert first.shape == (8, 64)
    assert torch.equal(kept(model, ids[::-1], 0, 0), first.flip(1))
    assert torch.equal(kept(model, ids[10:20], 0, 0), first[:, 10:20])
    assert not torch.equal(kept(model, ids, 1, 0), first)
    assert not torch.equal(kept(model, ids, 0, 1), first)
    assert len({tuple(layer.tolist()) for layer in first}) == 8, "every branch draws for itself"


def test_a_dropped_branch_keeps_the_mean() -> None:
    path = KeyedDropPath(0.25).train()
    path.keep = torch.arange(4) > 0
    x = torch.ones(4, 3, 2)
    out = path(x)
    assert not out[0].any()
    assert torch.allclose(out[1:], torch.tensor(4 / 3))
    assert float(out.mean()) == pytest.approx(1.0)
    model = build_student(spec(drop_path=0.2, drop_path_schedule="constant"), 0)
    ids = [str(number) for number in range(4000)]
    assert float(kept(model, ids, 0, 0).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_paths_are_dropped_in_training_only() -> None:
    model = build_student(spec(drop_path=0.5, drop_path_schedule="constant"), 0)
    plain = build_student(spec(), 0).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    set_drop_paths(model, list("abcd"), 0, 0)
    assert torch.equal(model.eval()(images), plain(images))
    assert not torch.allclose(model.train()(images), plain(images))


def test_without_drawn_paths_none_is_dropped() -> None:
    path = KeyedDropPath(0.5).train()
    x = torch.ones(2, 3)
    assert path(x) is x
    set_drop_paths(torch.nn.Linear(1, 1), ["a"], 0, 0)


def test_the_students_input() -> None:
    assert student_input(build_student(spec(), 0)).size == 32
    wide = build_student(spec(arguments=ARGUMENTS | {"img_size": [32, 48]}), 0)
    with pytest.raises(UsageError, match="input is 32x48 pixels; only square inputs are supported, set student"):
        student_input(wide)


def test_there_is_no_classifier() -> None:
    keys = build_student(spec(arguments=ARGUMENTS | {"num_classes": 7}), 0).state_dict()
    assert not [key for key in keys if key.startswith("head.")]


@pytest.mark.parametrize("name", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate"])
def test_arguments_that_draw_from_a_global_generator_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"student.arguments.{name} draws from a global generator.*student.drop_path"):
        build_student(spec(arguments={name: 0.1}), 0)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224 with .*colour"):
        build_student(spec(arguments=ARGUMENTS | {"colour": 3}), 0)


# Students of clips


def clip_spec(**changes: Any) -> StudentSpec:
    return spec(arguments=ARGUMENTS | {"frames": 6, "tubelet": 3}, **changes)


def test_positions_of_clips_are_fixed_on_the_flattened_index() -> None:
    model: Any = build_student(clip_spec(), 0)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], sinusoid_positions(32, 24))
    assert model.cls_token is None


def test_positions_of_clips_are_learnt_where_asked() -> None:
    first, again, other = (build_student(clip_spec(sincos_positions=False), seed).pos_embed for seed in (0, 0, 1))
    assert isinstance(first, torch.nn.Parameter)
    assert isinstance(again, torch.nn.Parameter)
    assert isinstance(other, torch.nn.Parameter)
    assert first.requires_grad
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.015 < float(first.detach().std()) < 0.025


def test_mae_initialisation_of_tubelets_is_that_of_a_linear_map() -> None:
    model: Any = build_student(clip_spec(), 0)
    bound = math.sqrt(6 / (24 + 3 * 3 * 8 * 8))
    weight = model.patch_embed.proj.weight.detach()
    assert weight.shape == (24, 3, 3, 8, 8)
    assert 0.95 * bound < float(weight.abs().max()) <= bound


def test_the_input_of_a_student_of_clips() -> None:
    found = student_input(build_student(clip_spec(), 0))
    assert (found.size, found.frames, found.interpolation) == (32, 6, "bilinear")
    assert found.mean == student_input(build_student(spec(), 0)).mean


def test_a_frozen_patch_projection_is_random_and_not_trained() -> None:
    model: Any = build_student(StudentSpec(architecture="vit_tiny_patch16_224", freeze_patch_embed=True), 0)
    other: Any = build_student(StudentSpec(architecture="vit_tiny_patch16_224"), 0)
    assert not any(parameter.requires_grad for parameter in model.patch_embed.parameters())
    assert all(parameter.requires_grad for parameter in other.patch_embed.parameters())
    assert torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)
    assert model.blocks[0].attn.qkv.weight.requires_grad

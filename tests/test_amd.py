"""AMD: which teacher it needs, what the student may see, where gradients go, and what is refused."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, smooth_l1_loss

from hdcache.backbones import create_vit, load_backbone
from hdcache.cli import cli
from hdcache.distill.amd import AMD, at, middle_and_last
from hdcache.distill.amd_heads import split_visible
from hdcache.distill.decoder import patch_pixels
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.errors import UsageError
from hdcache.masks import draw_visible
from hdcache.options import Trained
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps

IMAGE: dict[str, Any] = {}
VIDEO: dict[str, Any] = {"frames": 4}
RATIOS: dict[str, Any] = {"teacher_mask_ratio": 0.5, "student_mask_ratio": 0.75}
SMALL: dict[str, Any] = RATIOS | {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "generator_depth": 1}


def vit(seed: int = 0, **arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments, seed=seed)


def card(frames: int | None = None, **changes: Any) -> TeacherCard:
    facts: dict[str, Any] = {
        "architecture": "vit_tiny_patch16_224",
        "weights": "0",
        "preprocessing": Preprocessing(size=16, frames=frames),
        "patch_size": 4,
        "grid": (4, 4),
        "slots": (frames or 2) // 2,
        "prefix_tokens": 0 if frames else 1,
        "class_token": not frames,
        "width": 32,
        "depth": 4,
        "heads": 4,
        "mask": MaskSpec(kind="tube" if frames else "random", ratio=0.5),
        "precision": "fp32",
    }
    return TeacherCard(**facts | changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Setup:
    """A student, its heads and a batch whose teacher saw half of the tokens."""

    def __init__(self, objective: AMD, epoch: int = 0, **arguments: Any) -> None:
        self.objective, frames = objective, arguments.get("frames")
        self.card = card(frames)
        self.student = vit(**arguments)
        self.teacher = vit(1, embed_dim=32, depth=4, num_heads=4, **VIDEO if frames else {})
        self.heads = objective.build(self.student, {"mae": self.card}, 0, torch.Generator().manual_seed(0))
        assert self.card.mask is not None
        ids = ["a", "b", "c"]
        visible = torch.from_numpy(draw_visible(self.card.mask, ids, 0, 16, self.card.slots, "teacher mask"))
        images = normal(3, 3, 4, 16, 16) if frames else normal(3, 3, 16, 16)
        with torch.no_grad():
            targets = forward_taps(self.teacher, images, self.heads.targets, keep=visible)
        self.batch: Any = SimpleNamespace(
            images=images, ids=ids, epoch=epoch, visible={"mae": visible}, targets={"mae": targets}
        )

    def run(self, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        taps = self.objective.forward(self.student, self.batch, self.heads, seed)
        return dict(taps), self.objective.loss(self.batch, taps, self.heads)


# Which teacher and taps


@pytest.mark.parametrize(("depth", "blocks"), [(24, (12, 24)), (12, (6, 12)), (3, (1, 3)), (2, (1, 2)), (1, (1,))])
def test_default_blocks_are_the_middle_and_the_last(depth: int, blocks: tuple[int, ...]) -> None:
    assert middle_and_last(depth) == blocks


def test_names_of_targets_and_taps() -> None:
    objective = AMD(**RATIOS)
    assert objective.wants({"mae": card(depth=24)}) == {"mae": ("block12.out", "block24.out")}
    assert objective.student_taps(12) == ("block6.out", "block12.out", "final")
    assert objective.last_trained(12) == "final"
    alone = AMD(**RATIOS, use=("direct",), teacher_blocks=(3,), student_blocks=(7,))
    assert alone.wants({"mae": card()}) == {"mae": ("block3.out",)}
    assert (alone.student_taps(12), alone.last_trained(12)) == (("block7.out",), "block7.out")
    assert AMD(**RATIOS, use=("generation", "pixels")).parts() == ("pixels", "generation")


def test_the_teacher_with_the_right_mask_is_found() -> None:
    cards = {"whole": card(mask=None), "half": card(), "tube": card(mask=MaskSpec(kind="tube", ratio=0.5))}
    assert list(AMD(**RATIOS).wants(cards)) == ["half"]
    assert list(AMD(**RATIOS, mask="tube").wants(cards)) == ["tube"]
    # The mask's seed is the teacher's affair.
    assert list(AMD(**RATIOS).wants({"t": card(mask=MaskSpec(kind="random", ratio=0.5, seed=9))})) == ["t"]


@pytest.mark.parametrize(
    ("settings", "cards", "message"),
    [
        ({"teacher": "mea"}, {"mae": card()}, "no teacher 'mea'; did you mean 'mae'"),
        (
            {"teacher": "x"},
            {"mae": card(2, slots=1)},
            r"no teacher 'x'; .*--teacher x=MODEL --teacher-mask tube:0\.5 ",
        ),
        (
            {"teacher": "b"},
            {"mae": card(), "sup": card()},
            r"^objective.teacher: no teacher 'b'; choose from: mae, sup; or add it \(M: its middle block, N: its last\): hdcache extract "
            r"--store STORE --teacher b=MODEL --teacher-mask random:0\.5 --tap blockM.out --tap blockN.out$",
        ),
        ({"teacher": "b", "teacher_blocks": (2,)}, {"mae": card()}, r"--teacher-mask random:0\.5 --tap block2\.out$"),
        (
            {},
            {"mae": card(mask=None)},
            r"no teacher was run with objective\.teacher_mask_ratio 0\.5 under random masks \(mae with no mask\); with --online "
            r"and no store give --teacher-mask random:0\.5, else set objective\.teacher=mae-50 and add it: hdcache extract "
            r"--store STORE --teacher mae-50=MODEL --teacher-mask random:0\.5 --tap block2\.out --tap block4\.out$",
        ),
        (
            {},
            {name: card(mask=MaskSpec(kind="random", ratio=0.25), weights="1") for name in ("mae", "mae-50")}
            | {"clip": card(mask=None)},
            r"objective\.teacher=mae-50-2 and add it: .* --teacher mae-50-2=MODEL --teacher-mask random:0\.5 ",
        ),
        (
            {},
            {"a": card(mask=None), "b": card(mask=None, weights="1")},
            r"set objective\.teacher=NAME and add it \(M: .*\): .* --teacher NAME=MODEL --teacher-mask random:0\.5 --tap blockM\.out",
        ),
        (
            {},
            {"one-slot": card(2, slots=1, mask=None)},
            r"under tube masks \(one-slot with no mask\); .*--teacher-mask tube:0\.5",
        ),
        (
            {"teacher": "l"},
            {"l": card(frames=4, depth=24, mask=MaskSpec(kind="tube", ratio=0.75)), "m": card(frames=4)},
            r"under tube masks \(l with tube:0\.75\); .*--teacher-mask tube:0\.5 --tap block12\.out --tap block24\.out$",
        ),
        ({}, {}, r"\(there is none\); .* add it"),
        ({}, {"a": card(), "b": card()}, r"2 teachers were run with .* 0\.5 \(a, b\); set objective\.teacher=NAME"),
        (
            {"teacher_mask_ratio": 0.001},
            {"mae": card(mask=None)},
            r"^objective\.teacher_mask_ratio 0\.001 of 16 cells hides 0 and leaves 16 visible; .* choose another ratio$",
        ),
        (
            {"student_mask_ratio": 0.51},
            {"mae": card(4, mask=None)},
            r"^objective\.student_mask_ratio 0\.51 leaves the student all 8 tokens that teacher 'mae' sees",
        ),
        (
            {"teacher_blocks": (2, 9)},
            {"mae": card()},
            "teacher_blocks has 9, but teacher 'mae' has 4 blocks; choose from 1",
        ),
    ],
)
def test_teachers_that_will_not_do(settings: dict[str, Any], cards: dict[str, TeacherCard], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        AMD(**RATIOS | settings).wants(cards)
    assert "\n" not in str(caught.value)


def test_one_slot_of_a_network_of_clips_is_masked_as_clips_are() -> None:
    """As ``hdcache extract`` reads a bare ratio: by what the network reads, not by how many slots it makes of it."""
    cards = {"t": card(2, slots=1)}
    assert list(AMD(**RATIOS).wants(cards)) == ["t"]
    student = vit(frames=2)
    heads = AMD(**SMALL).build(student, cards, 0, torch.Generator().manual_seed(0))
    assert heads.counts == (8, 4, 1)


@pytest.mark.parametrize("arguments", [IMAGE, {"reg_tokens": 2}])
@pytest.mark.parametrize("use", [("pixels", "direct", "generation"), ("direct",)])
def test_class_tokens_are_never_trained_where_features_are_read(arguments: dict[str, Any], use: Any) -> None:
    setup = Setup(AMD(**SMALL | {"use": use}), **arguments)
    assert setup.objective.pool_trained() == "mean"
    model: Any = setup.student
    seen: list[Tensor] = []
    where = model.norm if "pixels" in use else model.blocks[2]

    def note(_: object, __: object, out: Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    where.register_forward_hook(note)
    _, losses = setup.run()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    (tokens,) = seen
    assert tokens.grad is not None
    prefix = model.num_prefix_tokens
    assert tokens.grad[:, :prefix].abs().max() == 0
    assert tokens.grad[:, prefix:].abs().amax(-1).min() > 0


# The forward


@pytest.mark.parametrize("arguments", [IMAGE, VIDEO, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_shapes_and_parts(arguments: dict[str, Any]) -> None:
    setup = Setup(AMD(**SMALL), **arguments)
    taps, losses = setup.run()
    slots = setup.card.slots
    for index in range(2):
        assert taps[f"direct.{index}"].shape == (3, 4 * slots, 32)
        assert taps[f"generated.{index}"].shape == (3, 4 * slots, 32)
    assert taps["prediction"].shape[:2] == taps["hidden"].shape == (3, 16 * slots)
    assert taps["hidden"].sum(1).tolist() == [12 * slots] * 3
    assert tuple(losses) == ("pixels", "direct", "generation")
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("arguments", [IMAGE, VIDEO])
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 300))
def test_v_is_a_part_of_t_for_all_seeds(arguments: dict[str, Any], seed: int, epoch: int) -> None:
    """And another epoch draws another V from the same V and F together."""
    setup = SETUPS[len(arguments)]
    visible = setup.batch.visible["mae"]
    drawn = [split_visible(setup.batch.ids, at_epoch, seed, setup.heads.counts) for at_epoch in (epoch, epoch + 1)]
    for split in drawn:
        seen, unseen = (visible.gather(1, part) for part in split)
        for row in range(3):
            assert {*seen[row].tolist()} < {*visible[row].tolist()}
            assert {*seen[row].tolist()} | {*unseen[row].tolist()} == {*visible[row].tolist()}
    assert not torch.equal(drawn[0].seen, drawn[1].seen)


SETUPS = [Setup(AMD(**SMALL)), Setup(AMD(**SMALL), **VIDEO)]


def test_another_epoch_is_another_draw_of_the_same_tokens() -> None:
    first, again, later = (Setup(AMD(**SMALL), epoch=epoch).run()[0] for epoch in (0, 0, 1))
    assert torch.equal(first["seen"], again["seen"])
    assert torch.equal(first["prediction"], again["prediction"])
    assert not torch.equal(first["seen"], later["seen"])
    both = [torch.cat([taps["seen"], taps["unseen"]], dim=1).sort(dim=1)[0] for taps in (first, later)]
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("arguments", [IMAGE, VIDEO])
def test_nothing_depends_on_pixels_that_the_student_does_not_see(arguments: dict[str, Any]) -> None:
    """Neither projected nor generated tokens nor predictions."""
    setup = Setup(AMD(**SMALL), **arguments)
    before, _ = setup.run()
    images, tubelet = setup.batch.images, 2 if arguments else None
    cells = before["hidden"].reshape(3, -1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    paint = cells.repeat_interleave(tubelet, 1).unsqueeze(1) if tubelet else cells
    setup.batch.images = torch.where(paint, 5.0, images)
    after, losses = setup.run()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    assert torch.isfinite(losses["pixels"])


def test_prefix_tokens_are_neither_aligned_nor_decoded() -> None:
    setup = Setup(AMD(**SMALL))
    targets = setup.batch.targets["mae"]
    _, before = setup.run()
    for name, value in targets.items():
        targets[name] = Tokens(value.prefix + 100, value.patches)
    _, after = setup.run()
    assert before == after
    assert setup.heads.decoder is not None
    assert setup.heads.decoder.prefix == 0


# The losses


@pytest.mark.parametrize(("align", "distance"), [("l2", mse_loss), ("l1", l1_loss), ("smooth_l1", smooth_l1_loss)])
def test_alignments_are_means_over_tokens_channels_and_pairs(align: Any, distance: Any) -> None:
    setup = Setup(AMD(**SMALL, align=align), **VIDEO)
    taps, losses = setup.run()
    expected = {"direct": 0.0, "generation": 0.0}
    for index, name in enumerate(setup.heads.targets):
        tokens = setup.batch.targets["mae"][name]
        for row in range(3):
            for part, made, where in (("direct", "direct", "seen"), ("generation", "generated", "unseen")):
                rows = tokens.patches[row, taps[where][row]]
                expected[part] += distance(taps[f"{made}.{index}"][row], rows).item() / 6
    for part, value in expected.items():
        assert losses[part].item() == pytest.approx(value, rel=1e-5)


def test_pixels_are_the_error_on_all_that_the_student_does_not_see() -> None:
    setup = Setup(AMD(**SMALL, norm_pix=False))
    taps, losses = setup.run()
    error = (taps["prediction"] - patch_pixels(setup.batch.images, 4)).square().mean(-1)
    assert losses["pixels"].item() == pytest.approx(error[taps["hidden"]].mean().item(), rel=1e-5)


def test_aligned_at_the_target_the_loss_is_zero() -> None:
    setup = Setup(AMD(**SMALL))
    taps, _ = setup.run()
    for index, name in enumerate(setup.heads.targets):
        tokens = setup.batch.targets["mae"][name].patches
        taps |= {f"direct.{index}": at(tokens, taps["seen"]), f"generated.{index}": at(tokens, taps["unseen"])}
    losses = setup.objective.loss(setup.batch, taps, setup.heads)
    assert losses["direct"] == losses["generation"] == 0


@pytest.mark.parametrize("arguments", [IMAGE, VIDEO])
def test_gradient_reaches_student_and_heads_but_no_target(arguments: dict[str, Any]) -> None:
    setup = Setup(AMD(**SMALL), **arguments)
    targets = setup.batch.targets["mae"]
    for name, value in targets.items():
        targets[name] = Tokens(value.prefix.requires_grad_(), value.patches.requires_grad_())
    _, losses = setup.run()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.patches.grad is None and value.prefix.grad is None for value in targets.values())
    for module in (setup.student, setup.heads):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
    for parameter in setup.heads.project.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("arguments", [IMAGE, VIDEO])
def test_losses_under_autocast_are_float32_and_close(arguments: dict[str, Any]) -> None:
    setup = Setup(AMD(**SMALL), **arguments)
    _, exact = setup.run()
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = setup.run()
    for part, value in rounded.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[part].item(), rel=0.05)


def test_generation_trains_the_projection_through_the_generator() -> None:
    """Serial: the generator reads what the direct alignment reads."""
    setup = Setup(AMD(**SMALL | {"use": ("generation",)}))
    _, losses = setup.run()
    assert list(losses) == ["generation"]
    losses["generation"].backward()  # type: ignore[no-untyped-call]
    for parameter in setup.heads.project.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert setup.heads.decoder is None


def test_symmetric_masks_need_no_generator() -> None:
    symmetric = SMALL | {"student_mask_ratio": 0.5, "use": ("pixels", "direct")}
    setup = Setup(AMD(**symmetric))
    taps, losses = setup.run()
    assert torch.equal(setup.batch.visible["mae"].gather(1, taps["seen"]), setup.batch.visible["mae"])
    assert list(losses) == ["pixels", "direct"]
    assert not setup.heads.generators


# The heads


def test_sizes_follow_the_released_code() -> None:
    """Decoder: half the student's width; generators: the teacher's width, two blocks; 64 channels a head in both."""
    student = vit(embed_dim=384, num_heads=6)
    heads = AMD(**RATIOS).build(student, {"l": card(width=128, heads=8)}, 0, torch.Generator().manual_seed(0))
    assert heads.decoder is not None
    blocks: Any = heads.decoder.blocks
    assert (heads.decoder.embed.weight.shape, heads.decoder.embed.bias) == ((192, 384), None)
    assert (len(blocks), blocks[0].attn.num_heads) == (4, 3)
    generator: Any = heads.generators[1]
    assert (len(generator.blocks), generator.blocks[0].attn.num_heads) == (2, 2)
    assert [layer.weight.shape for layer in heads.project] == [(128, 384)] * 2


def test_heads_are_a_function_of_the_generator() -> None:
    first, again = (Setup(AMD(**SMALL)).heads.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert sum(key.endswith("mask_token") for key in first) == 3


@pytest.mark.parametrize("train", [False, True])
def test_mask_tokens_of_generators_are_trained_only_where_asked(train: bool) -> None:
    names = dict(Setup(AMD(**SMALL, train_mask_tokens=train)).heads.named_parameters())
    assert ("generators.0.mask_token" in names) == train
    assert "decoder.mask_token" in names


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mask_ratio": None}, "teacher_mask_ratio"),
        ({"use": ()}, "at least 1 item"),
        ({"use": ("direct", "direct")}, "names a part twice"),
        ({"use": ("pixels",)}, r"use names pixels alone, which needs no teacher; that is objective\.kind=mae"),
        ({"student_mask_ratio": 0.25}, r"student_mask_ratio 0\.25 is below teacher_mask_ratio 0\.5, .* raise it"),
        ({"student_mask_ratio": 0.5}, r'are both 0\.5, .*or set use to \["pixels", "direct"\]'),
        ({"teacher_blocks": ()}, r"teacher_blocks \[\] must name at least one block"),
        ({"student_blocks": (0, 2)}, r"student_blocks \[0, 2\] must name at least one block, from 1"),
        ({"student_mask_ratio": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AMD(**RATIOS | settings)


def test_both_ratios_are_required() -> None:
    with pytest.raises(ValidationError, match="2 validation errors"):
        AMD()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "arguments", "changes", "message"),
    [
        ({}, IMAGE, {"grid": (8, 8)}, r"student has 4x4 patch .*teacher 'mae' 8x8 patch .*arguments\.img_size=32$"),
        ({}, IMAGE, {"grid": (8, 4)}, r"img_size=\[32, 16\]"),
        ({}, VIDEO, {"slots": 4, "frames": 8}, r"2 slots of 4x4.*4 slots of 4x4.*; set student\.arguments\.frames=8"),
        ({"mask": "tube"}, IMAGE, {"slots": 4, "frames": 8}, r"; set student\.arguments\.frames=8"),
        ({"mask": "tube"}, VIDEO, {"frames": None}, r"student\.arguments\.frames=null, student\.arguments\.tubelet=null$"),
        ({"student_blocks": (2, 9)}, IMAGE, {}, "student_blocks has 9, but the student has 3 blocks; choose from 1 to 3"),
        ({"student_blocks": (2,)}, IMAGE, {}, r"at block2\.out, block4\.out, the student at block2\.out: .* the same length"),
        ({"generator_heads": 3}, IMAGE, {}, "generator_heads 3 does not divide .* width 32, that of teacher 'mae'; choose"),
        ({}, IMAGE, {"width": 34, "heads": 1}, "generators are as wide as teacher 'mae', whose 34 channels .* set objective.use to"),
        ({"decoder_heads": 3}, IMAGE, {}, "decoder_heads 3 does not divide .* 16; choose a divisor"),
        ({"decoder_width": 18}, IMAGE, {}, r"decoder's width 18 is not a multiple of 4, .* set objective\.decoder_width=16 or 20$"),
        ({"decoder_width": 18, "decoder_heads": 6}, IMAGE, {}, r" set objective\.decoder_width=12 or 24$"),
        ({"decoder_width": 198, "decoder_heads": None}, IMAGE, {}, r" set objective\.decoder_width=192 or 204$"),
        ({"decoder_width": None}, {"embed_dim": 36}, {}, r"width 18 \(half the student width\) is not a multiple of 4, .*=16 or 20$"),
        ({"student_mask_ratio": 0.51}, IMAGE, {}, r"0\.51 leaves the student all 8 tokens that teacher 'mae' sees, .* raise it"),
        ({}, {"patch_size": (4, 8), "img_size": (16, 32)}, {}, "needs square patches, but the student's are 4x8 pixels"),
    ],
)  # fmt: skip
def test_build_refuses_what_does_not_fit(
    settings: dict[str, Any], arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    frames = (arguments | changes).get("frames")
    mask = MaskSpec(kind=settings.get("mask") or ("tube" if frames else "random"), ratio=0.5)
    given_card = card(frames, **{"mask": mask} | {key: value for key, value in changes.items() if key != "frames"})
    with pytest.raises(UsageError, match=message):
        AMD(**SMALL | settings).build(vit(**arguments), {"mae": given_card}, 0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("teacher", "student", "cells"), [(0.5, 0.75, 1), (0.05, 0.5, 16)])
def test_ratios_that_hide_or_leave_nothing_are_refused(teacher: float, student: float, cells: int) -> None:
    side = int(cells**0.5)
    given_card = card(grid=(side, side), mask=MaskSpec(kind="random", ratio=teacher))
    objective = AMD(**SMALL | {"teacher_mask_ratio": teacher, "student_mask_ratio": student})
    with pytest.raises(UsageError, match=rf"{teacher:g} of {cells} cells? hides 0 and leaves {cells} visible"):
        objective.build(vit(img_size=4 * side), {"mae": given_card}, 0, torch.Generator().manual_seed(0))


# From a store: tests/test_methods.py trains from one and from the live teacher


def test_what_a_store_without_the_mask_is_told_to_do_works(tmp_path: Path, tiny_store: Path) -> None:
    """Refused before the first step; the printed command and setting, taken as they are, then train a student."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    student = StudentSpec(architecture="vit_tiny_patch16_224", arguments=arguments)
    recipe = Recipe(name="amd-test", objective=AMD(**SMALL), student=student, epochs=1, batch_size=8, lr=1e-3)
    store = shutil.copytree(tiny_store, tmp_path / "store")
    with pytest.raises(UsageError, match=r"t with no mask\); set objective\.teacher=t-50 and add it: ") as caught:
        distill(recipe, out=tmp_path / "run", store=store, device="cpu")
    assert not (tmp_path / "run").exists()
    advised, _, command = str(caught.value).rpartition(" and add it: ")
    program, *words = shlex.split(command)
    assert program == "hdcache"
    assert CliRunner().invoke(cli, [*words, "--device", "cpu"]).exit_code == 0
    field, _, name = advised.rpartition("; set ")[2].partition("=")
    pools: list[str] = []

    def monitor(_: object, __: object, trained: Trained) -> dict[str, float]:
        pools.append(trained.pool)
        return {}

    settings: dict[str, Any] = {"store": store, "device": "cpu", "overrides": {field: name}, "monitor": monitor}
    result = distill(recipe, out=tmp_path / "run", **settings)
    assert result["targets"] == {"t-50": ["block1.out", "block3.out"]}
    # The class token is not trained where frozen features are read.
    assert set(pools) == {result["pool_trained"], load_backbone(str(tmp_path / "run")).pool_trained} == {"mean"}

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import RmsNorm
from torch import Tensor

from hdcache.backbones import create_vit, normalize
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.student_files import save_student
from hdcache.taps import Tokens
from hdcache.teachers import (
    Teacher,
    batches,
    choose_device,
    choose_precision,
    load_teacher,
    reload_teacher,
    split_name,
)

TAPS = ["block2.attn_in", "block3.out", "final", "pooled", "block2.rel.qk"]


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def tensors(found: dict[str, Tokens | Tensor]) -> list[Tensor]:
    return [value if isinstance(value, Tensor) else value.sequence() for value in found.values()]


def card_of(teacher: Teacher) -> dict[str, Any]:
    return teacher.card.model_dump(mode="json")


# Forward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_neighbours(tiny: str, precision: str) -> None:
    """Alone, in fives, in whole batches or one over: every row has the same bits, as float32."""
    teacher = load_teacher(tiny, precision=precision)
    images = pixels(33)
    whole = tensors(teacher.forward(images, TAPS))
    assert all(value.dtype == torch.float32 and len(value) == 33 for value in whole)
    alone = [slice(row, row + 1) for row in (0, 7, 31, 32)]
    for span in [*batches(33, 5), *batches(33, 32), *alone]:
        for name, part, value in zip(TAPS, tensors(teacher.forward(images[span], TAPS)), whole, strict=True):
            assert torch.equal(part, value[span]), f"{name} in {span}"


def test_too_little_memory_names_the_batch(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    teacher = load_teacher(tiny, batch=48)
    monkeypatch.setattr("hdcache.teachers.forward_taps", full)
    message = (
        f"teacher {teacher.name}: cpu has too little memory for 48 images at a time; give --batch a number lower than 48, and where a "
        rf"store has {teacher.name} already, which keeps it to its batch, another name too: --teacher NAME=\.\.\.$"
    )
    with pytest.raises(UsageError, match=message):
        teacher.forward(pixels(3), TAPS)


def test_forward_is_the_network_s_own(tiny: str) -> None:
    teacher = load_teacher(tiny, precision="fp32")
    with torch.no_grad():
        expected = teacher.backbone.model.forward_features(normalize(pixels(3), teacher.card.preprocessing))  # type: ignore[operator]
    torch.testing.assert_close(tensors(teacher.forward(pixels(3), ["final"]))[0], expected)


def test_bf16_is_autocast_and_close_to_fp32(tiny: str) -> None:
    exact, rough = (tensors(load_teacher(tiny, precision=p).forward(pixels(3), ["final"]))[0] for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.1, atol=0.1)


def test_no_rows_give_no_rows(tiny: str) -> None:
    found = load_teacher(tiny, precision="fp32", batch=2).forward(pixels(0), TAPS)
    assert [value.shape[0] for value in tensors(found)] == [0] * len(TAPS)
    assert tensors(found)[0].shape == (0, 17, 48)


def test_features_can_be_saved_for_a_backward_pass(tiny: str) -> None:
    """Targets are ordinary tensors: a loss may keep them for its gradient."""
    target = tensors(load_teacher(tiny).forward(pixels(2), ["final"]))[0]
    student = torch.ones_like(target, requires_grad=True)
    (student * target).sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad, target)


@given(count=st.integers(0, 100), size=st.integers(1, 40))
def test_batches_cover_every_row_once(count: int, size: int) -> None:
    spans = list(batches(count, size))
    assert [row for span in spans for row in range(span.start, span.stop)] == list(range(count))
    assert all(span.stop - span.start == size for span in spans[:-1])


# Names, devices, precisions


@pytest.mark.parametrize(
    ("spec", "name", "rest"),
    [
        ("mae=timm:vit_large_patch16_224.mae", "mae", "timm:vit_large_patch16_224.mae"),
        ("vit_large_patch16_224.mae", "vit_large_patch16_224.mae", "vit_large_patch16_224.mae"),
        ("timm:vit_tiny?checkpoint=/a/b.pth", "vit_tiny", "timm:vit_tiny?checkpoint=/a/b.pth"),
        ("random:vit_tiny?seed=1&depth=2", "vit_tiny", "random:vit_tiny?seed=1&depth=2"),
        ("t=random:vit_tiny?seed=1", "t", "random:vit_tiny?seed=1"),
        ("/runs/my student/", "my-student", "/runs/my student/"),
        ("a/b=c", "b-c", "a/b=c"),
        ("...", "teacher", "..."),
    ],
)
def test_names_come_from_the_spec(spec: str, name: str, rest: str) -> None:
    """What stands before the first '=', unless that belongs to a path or an option; else the last part of the spec."""
    assert split_name(spec) == (name, rest)


@pytest.mark.parametrize("spec", ["a b=x", "=x", ".hidden=x", "ä=x"])
def test_a_name_that_is_no_folder_name_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"teacher '.*' may hold only letters, digits"):
        split_name(spec)


def test_a_precision_is_kept_or_chosen() -> None:
    cpu = torch.device("cpu")
    assert [choose_precision(asked, cpu) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", cpu) in ("fp32", "bf16")
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(UsageError, match="precision 'fp16' must be auto, fp32 or bf16"):
        choose_precision("fp16", cpu)


@pytest.mark.parametrize("asked", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match=rf"device '{asked}' cannot be used here \(.+\); try --device auto") as caught:
        choose_device(asked)
    assert "\n" not in str(caught.value)


def test_auto_finds_a_device_that_works() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert torch.ones(2, device=choose_device("auto")).sum() == 2


# Loading


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"precision": "half"}, "precision 'half' must be"),
        ({"taps": ["block9.out"]}, "tap 'block9.out': the network has 3 blocks"),
        ({"taps": ["last"]}, "unknown tap 'last'"),
    ],
)
def test_bad_settings_are_refused_before_any_image(tiny: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(tiny, **keywords)


def test_logits_need_a_classifier(tiny: str) -> None:
    with pytest.raises(
        UsageError, match="no classifier, so it gives no logits; take a checkpoint that has one, or leave"
    ):
        load_teacher(f"{tiny}&num_classes=0", taps=["logits"])
    teacher = load_teacher(f"{tiny}&num_classes=5", taps=["logits"], precision="fp32")
    assert tensors(teacher.forward(pixels(2), ["logits"]))[0].shape == (2, 5)


def test_the_card_says_what_decides_the_outputs(tiny: str) -> None:
    card = load_teacher(f"{tiny}&reg_tokens=2", precision="fp32").card
    assert (card.patch_size, card.grid, card.prefix_tokens, card.class_token) == (8, (4, 4), 3, True)
    assert (card.width, card.depth, card.heads, card.precision) == (48, 3, 3, "fp32")
    assert card.arguments["reg_tokens"] == 2


def test_blocks_without_plain_attention_still_have_a_card() -> None:
    """Parallel blocks have no ``attn``; their outputs can be stored all the same."""
    spec = "random:vit_small_patch16_18x2_224?img_size=32&depth=2&embed_dim=48&num_heads=3"
    teacher = load_teacher(spec, precision="fp32", taps=["block1.out"])
    assert teacher.card.heads == 3
    assert tensors(teacher.forward(pixels(2), ["block1.out"]))[0].shape == (2, 5, 48)


# The frozen pieces


def test_weights_are_those_of_the_tapped_attention(tiny: str) -> None:
    """Only ``attn_in`` and ``qkv`` taps need any; the facts say how to use them."""
    teacher = load_teacher(tiny)
    arrays, facts = teacher.weights_for(["final", "block1.out", "block2.attn_in", "block3.qkv", "block1.rel.qk"])
    assert arrays.keys() == {f"block{n}/qkv_{part}" for n in (2, 3) for part in ("weight", "bias")}
    weight = teacher.backbone.model.blocks[1].attn.qkv.weight  # type: ignore[index, union-attr]
    assert np.array_equal(arrays["block2/qkv_weight"], weight.numpy())  # type: ignore[union-attr]
    assert facts == {f"block{n}": {"heads": 3, "normalised": "", "epsilon": 0.0} for n in (2, 3)}


@pytest.mark.parametrize(
    ("norm", "kind", "parts"),
    [(None, "LayerNorm", ("weight", "bias")), (RmsNorm, "RmsNorm", ("weight",))],
)
def test_weights_of_a_qk_norm_are_kept(norm: Any, kind: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "qk_norm": True}
    spec = "random:vit_tiny_patch16_224?" + "&".join(f"{k}={str(v).lower()}" for k, v in arguments.items())
    teacher = load_teacher(spec + ("&norm_layer=rmsnorm" if norm else ""))
    arrays, facts = teacher.weights_for(["block1.attn_in"])
    assert {name for name in arrays if "norm" in name} == {f"block1/{n}_norm_{p}" for n in "qk" for p in parts}
    assert facts["block1"]["normalised"] == kind
    assert facts["block1"]["epsilon"] == pytest.approx(1e-6)


# Reloading


def test_a_stored_teacher_comes_back_as_it_was(tiny_store: Path) -> None:
    record = Store.open(tiny_store).teacher("t")
    teacher = reload_teacher(record)
    assert (teacher.card, teacher.batch, teacher.name) == (record.card, record.batch, "t")


def test_a_teacher_stored_at_another_size_comes_back_at_that_size(tmp_path: Path, tiny: str, make_npz: Any) -> None:
    """The size may have been given apart from the spec."""
    settings = {"encoding": "fp32", "precision": "fp32", "taps": ["final"], "img_size": 16}
    extract(make_npz(tmp_path / "d.npz", 8), store=tmp_path / "s", teachers=[f"t={tiny}"], **settings)
    record = Store.open(tmp_path / "s").teacher("t")
    assert record.card.preprocessing.size == 16
    assert reload_teacher(record).card == record.card


def test_other_weights_are_refused_with_the_difference(tiny_store: Path, tiny: str) -> None:
    record = Store.open(tiny_store).teacher("t")
    with pytest.raises(StoreMismatch, match=r"teacher t: .*seed=1 is not the network .*weights: .*name the original"):
        reload_teacher(record, f"{tiny}&seed=1")


def test_a_student_folder_is_a_teacher(tmp_path: Path) -> None:
    """What was trained can teach: by its folder, at its own size."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = create_vit("vit_tiny_patch16_224", arguments, seed=3)
    save_student(tmp_path / "run", model, "vit_tiny_patch16_224", arguments, Preprocessing(size=32), "final", {})
    teacher = load_teacher(str(tmp_path / "run"), precision="fp32")
    assert (teacher.name, teacher.card.width) == ("run", 24)
    assert card_of(teacher) == card_of(load_teacher(f"other={tmp_path / 'run'}", precision="fp32"))
    with pytest.raises(InputNotFound, match="no student folder there"):
        load_teacher(str(tmp_path / "gone"))

"""The answers that the papers' published code gives for the inputs in tests/data/golden (or ``$HDCACHE_GOLDEN``).

Every setting is read from the files' metadata and tensor shapes, so files with other shapes can be put beside them.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hdcache.backbones import create_vit
from hdcache.distill.tinymim import TinyMIM
from hdcache.evaluate.knn import knn_classify
from hdcache.relations import KINDS, relation, split_heads
from hdcache.schema import Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps

GOLDEN = Path(os.environ.get("HDCACHE_GOLDEN") or Path(__file__).parent / "data" / "golden")
TINYMIM = sorted(GOLDEN.glob("tinymim*.safetensors"))
TOLERANCE = 1e-5


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build(tensors: dict[str, Tensor], whose: str, facts: dict[str, Any], metadata: dict[str, str]) -> nn.Module:
    """The ViT whose weights are stored under ``whose``, loaded strictly."""
    state = {name.removeprefix(f"{whose}."): t for name, t in tensors.items() if name.startswith(f"{whose}.")}
    arguments = {
        "img_size": int(metadata["img_size"]),
        "patch_size": int(metadata["patch"]),
        "embed_dim": facts["width"],
        "depth": facts["depth"],
        "num_heads": facts["heads"],
        "num_classes": 0,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / facts["width"],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "norm_layer": partial(nn.LayerNorm, eps=float(metadata["layer_norm_eps"])),
    }
    model = create_vit("vit_tiny_patch16_224", arguments)
    model.load_state_dict(state, strict=True)
    return model.eval()


def card_of(model: Any, facts: dict[str, Any], metadata: dict[str, str]) -> TeacherCard:
    return TeacherCard(
        architecture="vit_tiny_patch16_224",
        weights="golden",
        preprocessing=Preprocessing(size=int(metadata["img_size"])),
        patch_size=int(metadata["patch"]),
        grid=model.patch_embed.grid_size,
        prefix_tokens=model.num_prefix_tokens,
        class_token=model.has_class_token,
        width=facts["width"],
        depth=facts["depth"],
        heads=facts["heads"],
        precision="fp32",
    )


class Golden:
    """One file with its two networks, the objective that its settings describe, and one step of it."""

    def __init__(self, path: Path) -> None:
        metadata, self.tensors = read(path)
        teacher_facts, self.student_facts = json.loads(metadata["teacher"]), json.loads(metadata["student"])
        teacher = build(self.tensors, "teacher", teacher_facts, metadata)
        self.student = build(self.tensors, "student", self.student_facts, metadata)
        cards = {"teacher": card_of(teacher, teacher_facts, metadata)}
        heads = self.student_facts["last_block_heads"]
        objective = TinyMIM(
            teacher_block=teacher_facts["target_block_1based"], heads=None if heads == teacher_facts["heads"] else heads
        )
        modules = objective.build(self.student, cards, 0, torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.targets = forward_taps(teacher, self.tensors["image.teacher"], objective.wants(cards)["teacher"])
        batch: Any = SimpleNamespace(images=self.tensors["image.student"], targets={"teacher": self.targets})
        self.taps = objective.forward(self.student, batch, modules, seed=0)
        self.losses = objective.loss(batch, self.taps, modules)

    def target(self, kind: str) -> Any:
        return next(value for name, value in self.targets.items() if f".rel.{kind}" in name)


@pytest.fixture(scope="module", params=TINYMIM, ids=[path.stem for path in TINYMIM])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_tinymim_file_is_there() -> None:
    assert TINYMIM, f"no tinymim*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_teacher_relations(golden: Golden, kind: str) -> None:
    expected = golden.tensors[f"expected.teacher_{kind}"]
    torch.testing.assert_close(golden.target(kind), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_student_relations(golden: Golden, kind: str) -> None:
    (tap,) = golden.taps.values()
    assert isinstance(tap, Tokens)
    qkv = split_heads(tap.sequence(), golden.student_facts["last_block_heads"])
    rows, columns = KINDS[kind]
    expected = golden.tensors[f"expected.student_{kind}"]
    torch.testing.assert_close(relation(qkv[rows], qkv[columns]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_loss(golden: Golden, kind: str) -> None:
    expected = golden.tensors[f"expected.loss_{kind}"]
    # A divergence is a small difference of float32 numbers of order 1; below 1e-4 both sides are rounding noise.
    torch.testing.assert_close(golden.losses[kind], expected, rtol=TOLERANCE, atol=1e-8)


def test_tinymim_gradient(golden: Golden) -> None:
    weight = golden.student.get_parameter("blocks.0.attn.qkv.weight")
    (gradient,) = torch.autograd.grad(golden.losses["qk"] + golden.losses["vv"], weight, retain_graph=True)
    expected = golden.tensors["expected.grad_student_blocks0_qkv_weight"]
    # The gradient is of the order of its largest entry, not of 1.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("knn*.safetensors")), ids=lambda path: path.stem)
def test_knn_golden(path: Path) -> None:
    with safe_open(path, "np") as file:
        settings = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    expected = {name: float(value) for name, value in arrays.items() if name.startswith("expected.")}
    ks = sorted({int(match[1]) for name in expected if (match := re.search(r"\.k(\d+)$", name))})
    assert ks
    result = knn_classify(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
        ks,
        float(settings["T"]),
        classes=range(int(settings["num_classes"])),
        compat_dino=True,
    )
    for k, accuracy in result.per_k.items():
        assert accuracy.top1 == pytest.approx(expected.pop(f"expected.top1.k{k}"), abs=1e-4)
        assert accuracy.top5 == pytest.approx(expected.pop(f"expected.top5_dino.k{k}"), abs=1e-4)
    assert not expected

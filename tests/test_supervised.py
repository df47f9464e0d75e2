from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from hdcache.backbones import create_vit
from hdcache.distill.supervised import Supervised
from hdcache.errors import UsageError
from hdcache.taps import Tokens


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def build(objective: Supervised, classes: int = 3, **arguments: Any) -> nn.Linear:
    return objective.build(vit(**arguments), {}, classes, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", ["class-token", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_agrees_with_a_slow_loop(pool: Literal["class-token", "mean"], smoothing: float) -> None:
    objective = Supervised(pool=pool, label_smoothing=smoothing)
    head = build(objective)
    generator = torch.Generator().manual_seed(1)
    tokens = Tokens(torch.randn(2, 1, 24, generator=generator), torch.randn(2, 16, 24, generator=generator))
    batch: Any = SimpleNamespace(labels=torch.tensor([2, 0]), ids=["a", "b"])
    total = 0.0
    for image, label in enumerate([2, 0]):
        pooled = tokens.prefix[image, 0] if pool == "class-token" else tokens.patches[image].mean(0)
        logits = (head.weight @ pooled + head.bias).tolist()
        log_sum = math.log(sum(math.exp(z) for z in logits))
        wanted = [smoothing / 3 + (1 - smoothing) * (k == label) for k in range(3)]
        total -= sum(w * (z - log_sum) for w, z in zip(wanted, logits, strict=True)) / 2
    loss = objective.loss(batch, {"final": tokens}, head)["cross_entropy"]
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_it_wants_no_teacher() -> None:
    objective = Supervised()
    assert objective.wants({}) == {}
    assert objective.student_taps(12) == ("final",)
    assert objective.last_trained(12) == "final"
    assert build(objective, 7).weight.shape == (7, 24)


def test_a_sample_without_label_is_named() -> None:
    objective = Supervised()
    tokens = Tokens(torch.zeros(2, 1, 24), torch.zeros(2, 16, 24))
    batch: Any = SimpleNamespace(labels=torch.tensor([0, -1]), ids=["a", "b"])
    with pytest.raises(
        UsageError, match="sample 'b' has no label, but objective 'supervised' needs one for every sample"
    ):
        objective.loss(batch, {"final": tokens}, build(objective))


@pytest.mark.parametrize("classes", [0, 1])
def test_a_data_set_without_classes_is_refused(classes: int) -> None:
    with pytest.raises(
        UsageError, match=f"at least 2 classes, but the data set has {classes}; use a labelled data set"
    ):
        build(Supervised(), classes)


def test_a_student_without_class_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'class-token', which the student lacks; set objective\.pool=mean"):
        build(Supervised(), class_token=False, global_pool="avg")
    with pytest.raises(UsageError, match=r"which the student lacks; set objective\.pool=mean"):
        build(Supervised(), class_token=False, reg_tokens=2, global_pool="avg")
    build(Supervised(pool="mean"), class_token=False, global_pool="avg")


def test_its_head_stays_with_the_student() -> None:
    head = build(Supervised())
    assert Supervised().classifier(head) is head

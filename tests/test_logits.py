from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hdcache.backbones import create_vit
from hdcache.distill.logits import Logits, SoftLabelHead
from hdcache.distill.recipes import get_recipe
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, UsageError
from hdcache.extract.run import extract
from hdcache.info import describe_store, format_store
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import open_targets

TEACHER = "t=random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&embed_dim=48&num_heads=3&num_classes=5"

CPU: dict[str, Any] = {"device": "cpu", "threads": 1}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def card(classes: int = 4) -> TeacherCard:
    return TeacherCard(
        architecture="x",
        weights="0",
        preprocessing=Preprocessing(size=16),
        patch_size=4,
        grid=(4, 4),
        prefix_tokens=1,
        class_token=True,
        width=48,
        depth=2,
        heads=3,
        classes=classes,
        precision="fp32",
    )


def build(objective: Logits, classes: int = 4, labels: int = 0, **arguments: Any) -> SoftLabelHead:
    return objective.build(vit(**arguments), {"t": card(classes)}, labels, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", ["class-token", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("hard_labels", [False, True])
def test_loss_agrees_with_a_slow_loop(
    pool: Literal["class-token", "mean"], temperature: float, hard_labels: bool
) -> None:
    """KL(teacher || student) x T^2 and cross-entropy; the teacher's logits may hold any constant."""
    objective = Logits(pool=pool, temperature=temperature, hard_labels=hard_labels)
    heads = build(objective, labels=4 if hard_labels else 0)
    noise = torch.Generator().manual_seed(1)
    tokens = Tokens(torch.randn(2, 1, 24, generator=noise), torch.randn(2, 16, 24, generator=noise))
    target = 3 * torch.randn(2, 4, generator=noise) + 7
    batch: Any = SimpleNamespace(labels=torch.tensor([2, 0]), ids=["a", "b"], targets={"t": {"logits": target}})
    soft = hard = 0.0
    for image, label in enumerate([2, 0]):
        pooled = tokens.prefix[image, 0] if pool == "class-token" else tokens.patches[image].mean(0)
        logits = (heads.classify.weight @ pooled + heads.classify.bias).tolist()

        def log_softmax(values: list[float], t: float) -> list[float]:
            total = math.log(sum(math.exp(v / t) for v in values))
            return [v / t - total for v in values]

        teacher = log_softmax(target[image].tolist(), temperature)
        student = log_softmax(logits, temperature)
        soft += sum(math.exp(p) * (p - q) for p, q in zip(teacher, student, strict=True)) * temperature**2 / 2
        hard -= log_softmax(logits, 1.0)[label] / 2
    parts = objective.loss(batch, {"final": tokens}, heads)
    assert parts.keys() == set(objective.parts())
    assert parts["soft_labels"].item() == pytest.approx(soft, rel=1e-5)
    if hard_labels:
        assert parts["cross_entropy"].item() == pytest.approx(hard, rel=1e-5)


def test_gradient_reaches_the_head_and_not_the_target() -> None:
    objective = Logits()
    heads = build(objective)
    target = torch.randn(2, 4, requires_grad=True)
    tokens = Tokens(torch.randn(2, 1, 24, requires_grad=True), torch.zeros(2, 16, 24))
    batch: Any = SimpleNamespace(labels=torch.tensor([0, 1]), ids=["a", "b"], targets={"t": {"logits": target}})
    objective.loss(batch, {"final": tokens}, heads)["soft_labels"].backward()
    assert target.grad is None
    assert tokens.prefix.grad is not None
    assert heads.classify.weight.grad is not None


def test_the_teacher_with_a_classifier_is_found_among_others() -> None:
    cards = {"mae": card(0), "dino": card(7)}
    assert Logits().wants(cards) == {"dino": ("logits",)}
    assert Logits(teacher="mae").wants(cards) == {"mae": ("logits",)}
    heads = Logits().build(vit(), cards, 0, torch.Generator())
    assert heads.teacher == "dino"
    assert heads.classify.weight.shape == (7, 24)


@pytest.mark.parametrize(
    ("objective", "cards", "labels", "arguments", "message"),
    [
        (Logits(), {"t": card(0)}, 0, {}, r"needs the class probabilities of teacher 't', which was run without a classifier; set objective.teacher=t-2 and add it, .*: hdcache extract --store STORE --teacher t-2=MODEL --tap logits --top-k 10$"),
        (Logits(), {"a": card(0), "b": card(0)}, 0, {}, r"null, and none of the 2 teachers \(a, b\) was run with a classifier; set objective.teacher=NAME and add it, .*: hdcache extract --store STORE --teacher NAME=MODEL --tap logits --top-k 10$"),
        (Logits(teacher="b"), {"t": card()}, 0, {}, "no teacher 'b'; choose from: t; or add it: .*--teacher b=MODEL --tap logits --top-k 10$"),
        (Logits(), {"t": card().model_copy(update={"mask": MaskSpec(kind="random", ratio=0.75)})}, 0, {}, "'t' saw only the tokens that its mask random:0.75 left"),
        (Logits(), {"t": card(0).model_copy(update={"mask": MaskSpec(kind="random", ratio=0.75)})}, 0, {}, r"'t', which was run without a classifier; .* from a checkpoint that has one: .* --teacher t-2=MODEL --tap logits --top-k 10$"),
        (Logits(), {"t": card()}, 0, {"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, r"which the student lacks; set objective\.pool=mean"),
        (Logits(), {}, 0, {}, "objective.teacher not given, and there is no teacher; add one: .*--teacher NAME=MODEL --tap logits --top-k 10$"),
        (Logits(), {"a": card(), "b": card()}, 0, {}, r"but there are 2 \(a, b\)"),
        (Logits(teacher="tt"), {"t": card()}, 0, {}, "no teacher 'tt'; did you mean 't'"),
        (Logits(hard_labels=True), {"t": card()}, 3, {}, "the data set has 3 and teacher 't' 4; set objective.hard_labels=false"),
        (Logits(), {"t": card()}, 0, {"class_token": False, "global_pool": "avg"}, r"which the student lacks; set objective\.pool=mean"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(
    objective: Logits, cards: dict[str, TeacherCard], labels: int, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        objective.build(vit(**arguments), cards, labels, torch.Generator())


def test_hard_labels_need_every_label() -> None:
    objective = Logits(hard_labels=True)
    tokens = Tokens(torch.zeros(2, 1, 24), torch.zeros(2, 16, 24))
    target = {"t": {"logits": torch.zeros(2, 4)}}
    batch: Any = SimpleNamespace(labels=torch.tensor([0, -1]), ids=["a", "b"], targets=target)
    with pytest.raises(UsageError, match="sample 'b' has no label, but objective 'logits' needs one"):
        objective.loss(batch, {"final": tokens}, build(objective, labels=4))


def test_smoothing_without_hard_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing is set, but hard_labels is false"):
        Logits(label_smoothing=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path_factory.mktemp("logits") / "data.npz", 32, classes=5)


def recipe(**changes: Any) -> Recipe:
    fixed = {"student.arguments": STUDENT, "epochs": 2, "batch_size": 16, "warmup_epochs": 0, "log_every": 1}
    return get_recipe("logits-tiny", fixed | {key.replace("__", "."): value for key, value in changes.items()})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_from_the_store_whole_equals_the_teacher_in_the_loop(data: str, tmp_path: Path) -> None:
    """With every class in fp32 the losses are equal to the bit; with a store and without one."""
    settings: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1}
    extract(data, store=tmp_path / "s", teachers=[TEACHER], taps=["logits"], encoding="fp32", **settings)
    distill(recipe(), out=tmp_path / "cached", store=tmp_path / "s", device="cpu")
    distill(recipe(), out=tmp_path / "live", store=tmp_path / "s", online=True, device="cpu")
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    done = distill(recipe(), out=tmp_path / "bare", data=data, online=True, teachers=[TEACHER], device="cpu")
    assert done["targets"] == {"t": ["logits"]}
    assert done["steps"] == 4


def test_from_soft_labels(data: str, tmp_path: Path) -> None:
    """Two of five classes are stored; info shows what that cost; hard labels may join in."""
    extract(data, store=tmp_path / "s", teachers=[TEACHER], taps=["logits"], top_k=2, device="cpu", threads=1)
    store = Store.open(tmp_path / "s")
    stored = store.teacher("t").taps["logits"]
    assert (stored.encoding, stored.arrays["values"].shape, stored.channels) == ("topk", (2,), 5)
    assert store.teacher("t").card.classes == 5
    assert "KL from the exact distributions" in format_store(describe_store(store))
    assert describe_store(store)["teachers"]["t"]["taps"]["logits"]["bytes_fp16"] == 32 * 5 * 2
    done = distill(recipe(objective__hard_labels=True), out=tmp_path / "run", store=tmp_path / "s", device="cpu")
    assert done["steps"] == 4
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"soft_labels", "cross_entropy"} <= set(line) | set(line.get("parts", {}))


def test_a_store_without_logits_names_the_command(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        (UsageError, InputNotFound),
        match=r"a checkpoint that has one: .* --store \S+/store --num-views 2 --teacher t-2=MODEL --tap logits --top-k 10$",
    ):
        distill(recipe(), out=tmp_path / "run", store=tiny_store, device="cpu")


@pytest.mark.parametrize("pool", ["class-token", "mean"])
def test_a_supervised_student_is_the_teacher_of_another(data: str, tmp_path: Path, pool: str) -> None:
    """With the tool alone: the head that was trained is stored with it, and reads what it was trained on."""
    sizes = {"student.arguments": STUDENT, "epochs": 2, "batch_size": 16, "warmup_epochs": 0}
    distill(get_recipe("supervised-tiny", sizes | {"objective.pool": pool}), out=tmp_path / "sup", data=data, **CPU)
    spec = f"s={tmp_path}/sup"
    exact: dict[str, Any] = {"encoding": "fp32", "precision": "fp32", **CPU}
    extract(data, store=tmp_path / "s", teachers=[spec], taps=["logits", "final"], **exact)
    store = Store.open(tmp_path / "s")
    assert store.teacher("s").card.classes == 5
    (stored,), _ = open_targets(store, {"s": ["logits", "final"]})
    read = {key: np.empty((32, *card.shape), card.dtype) for key, card in stored.arrays.items()}
    stored.read(0, 0, 32, [(read, row) for row in range(32)])
    found = stored.finish({key: torch.from_numpy(value) for key, value in read.items()})
    final, logits = found["final"], found["logits"]
    assert isinstance(final, Tokens)
    assert isinstance(logits, Tensor)
    pooled = final.prefix[:, 0] if pool == "class-token" else final.patches.mean(1)
    head = {name: load_file(tmp_path / "sup/state.safetensors")[f"heads/{name}"] for name in ("weight", "bias")}
    assert head["bias"].any(), "it was trained"
    torch.testing.assert_close(logits, nn.functional.linear(pooled, **head), rtol=1e-4, atol=1e-5)
    done = distill(recipe(), out=tmp_path / "run", store=tmp_path / "s", **CPU)
    assert done["targets"] == {"s": ["logits"]}
    live = distill(recipe(), out=tmp_path / "live", data=data, online=True, teachers=[spec], **CPU)
    assert live["steps"] == 4


def test_no_other_student_has_a_classifier(data: str, tmp_path: Path) -> None:
    """Nor an average, which no head was trained with."""
    sizes = {"student.arguments": STUDENT, "epochs": 1, "batch_size": 16, "warmup_epochs": 0}
    distill(get_recipe("supervised-tiny", sizes | {"ema": 0.9}), out=tmp_path / "sup", data=data, device="cpu")
    decoder = {f"objective.decoder_{part}": number for part, number in (("width", 16), ("depth", 1), ("heads", 2))}
    distill(get_recipe("mae-tiny", sizes | decoder), out=tmp_path / "mae", data=data, device="cpu")
    kept = {name: load_file(tmp_path / name / "student.safetensors").keys() for name in ("sup", "sup/ema", "mae")}
    assert kept["sup"] - kept["sup/ema"] == {"head.weight", "head.bias"}
    assert kept["mae"] == kept["sup/ema"]
    with pytest.raises(UsageError, match="no classifier, so it gives no logits"):
        extract(data, store=tmp_path / "s", teachers=[f"m={tmp_path}/mae"], taps=["logits"], device="cpu")


def test_a_mask_is_left_out_before_a_classifier_is_missed(data: str, tmp_path: Path) -> None:
    """Without a store a teacher has no classifier until it is chosen: then its mask is what is wrong."""
    with pytest.raises(UsageError, match=r"every token is compared; leave --teacher-mask out$"):
        distill(
            recipe(), out=tmp_path / "a", data=data, online=True, teachers=[TEACHER], teacher_mask="0.5", device="cpu"
        )

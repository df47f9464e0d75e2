from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hdcache.backbones import create_vit
from hdcache.batch import Batch
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.mae import MAE
from hdcache.distill.objective import (
    Layout,
    Objective,
    initialise,
    linear,
    student_layout,
    teacher_layout,
)
from hdcache.distill.supervised import Supervised
from hdcache.distill.tinymim import TinyMIM
from hdcache.schema import Preprocessing, TeacherCard
from hdcache.taps import Tokens, parse_tap

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
OBJECTIVES: list[Objective] = [
    TinyMIM(),
    TinyMIM(relations=("qq", "kk", "vv"), heads=2, tokens="patches"),
    TinyMIM(strategy="feature"),
    TinyMIM(strategy="feature", feature="qkv", student_block=2),
    TinyMIM(strategy="class-token"),
    Supervised(),
    Supervised(pool="mean"),
    TinyMIM(strategy="feature", tokens="patches"),
    MAE(decoder_width=16, decoder_depth=1, decoder_heads=2),
    Hybrid(relation_teacher="mae", feature_teacher="mae", stages=(1, 2)),
    Hybrid(use=("relation",), scores="softmax", scorer="random"),
    Hybrid(use=("relation",), relation_tokens="patches", scorer="random"),
    Hybrid(relation_teacher="mae", feature_teacher="mae", feature_tokens="patches", keep_ratio=None),
]
NAMES = [
    "relation",
    "relation-patches",
    "feature",
    "feature-qkv",
    "class-token",
    "supervised",
    "supervised-mean",
    "feature-patches",
    "mae",
    "hybrid",
    "hybrid-relation",
    "hybrid-relation-patches",
    "hybrid-feature-patches",
]


def vit(seed: int = 0, **arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments, seed=seed)


def batch_of(objective: Objective, images: int = 2) -> Batch:
    """A batch with random targets of the shapes that the objective asks for."""
    generator = torch.Generator().manual_seed(1)
    targets: dict[str, dict[str, Any]] = {}
    for teacher, names in objective.wants({"mae": CARD}).items():
        targets[teacher] = {}
        for name in names:
            tap = parse_tap(name)
            if tap.kind:
                logits = torch.randn(images, tap.heads or CARD.heads, 17, 17, generator=generator)
                targets[teacher][name] = logits.softmax(-1).requires_grad_()
            else:
                width = 3 * CARD.width if tap.what == "qkv" else CARD.width
                sequence = torch.randn(images, 17, width, generator=generator).requires_grad_()
                targets[teacher][name] = Tokens(sequence[:, :1], sequence[:, 1:])
    return Batch(
        images=torch.randn(images, 3, 16, 16, generator=generator),
        ids=[f"sample{i}" for i in range(images)],
        labels=torch.arange(images) % 3,
        targets=targets,
        epoch=0,
        view=0,
        index=0,
    )


@pytest.fixture(params=OBJECTIVES, ids=NAMES)
def objective(request: pytest.FixtureRequest) -> Objective:
    made: Objective = request.param
    return made


def step(objective: Objective, student: nn.Module, heads: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    return objective.loss(batch, objective.forward(student, batch, heads, seed=0), heads)


def test_loss_gives_the_promised_parts_as_finite_scalars(objective: Objective) -> None:
    student, batch = vit(), batch_of(objective)
    heads = objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(0))
    losses = step(objective, student, heads, batch)
    assert tuple(losses) == objective.parts()
    for value in losses.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert value > 0


def test_loss_is_float32_and_close_under_autocast(objective: Objective) -> None:
    student, batch = vit(), batch_of(objective)
    heads = objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(0))
    exact = step(objective, student, heads, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = step(objective, student, heads, batch)
    for part, value in mixed.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[part], rtol=0.05, atol=0)


def test_gradient_reaches_all_heads_and_no_target(objective: Objective) -> None:
    student, batch = vit(), batch_of(objective)
    heads = objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(0))
    torch.stack(list(step(objective, student, heads, batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
    for targets in batch.targets.values():
        for value in targets.values():
            tensors = [value] if isinstance(value, torch.Tensor) else [value.prefix, value.patches]
            assert all(t.grad is None for t in tensors if t.is_leaf)
    weight = student.get_parameter("blocks.0.attn.qkv.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_last_trained_is_the_deepest_block_with_gradient(objective: Objective) -> None:
    student, batch = vit(), batch_of(objective)
    heads = objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(0))
    torch.stack(list(step(objective, student, heads, batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    last = parse_tap(objective.last_trained(3)).block or 3
    reached = [n for n in range(1, 4) if student.get_parameter(f"blocks.{n - 1}.mlp.fc2.weight").grad is not None]
    assert reached == list(range(1, last + 1))
    assert (student.get_parameter("norm.weight").grad is not None) == (objective.last_trained(3) == "final")


def test_class_tokens_are_pooled_where_a_gradient_reaches_them(objective: Objective) -> None:
    """At the layer that frozen features are read from."""
    student, batch = vit(), batch_of(objective)
    model: Any = student
    heads = objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(0))
    last = parse_tap(objective.last_trained(3)).block
    found: list[torch.Tensor] = []
    layer = model.blocks[last - 1] if last else model.norm

    def note(_: object, __: object, out: torch.Tensor) -> None:
        out.retain_grad()
        found.append(out)

    layer.register_forward_hook(note)
    torch.stack(list(step(objective, student, heads, batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    (tokens,) = found
    assert tokens.grad is not None
    reached = bool(tokens.grad[:, 0].abs().max() > 0)
    assert objective.pool_trained() == ("cls" if reached else "mean")


def test_build_draws_from_its_generator_alone(objective: Objective) -> None:
    student = vit()
    before = torch.get_rng_state()
    states = [
        objective.build(student, {"mae": CARD}, 3, torch.Generator().manual_seed(seed)).state_dict()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not states[0] or any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_an_objective_runs_the_student_on_whole_images_unless_it_says_otherwise() -> None:
    taps = Supervised().forward(vit(), batch_of(Supervised()), nn.Module(), seed=0)
    assert list(taps) == ["final"]
    assert isinstance(taps["final"], Tokens)
    assert taps["final"].patches.shape == (2, 16, 24)


def test_layouts_say_what_messages_need() -> None:
    assert student_layout(vit(class_token=False, global_pool="avg")) == Layout((4, 4), 0, 24)
    assert teacher_layout(CARD) == Layout((4, 4), 1, 32)
    assert str(teacher_layout(CARD)) == "4x4 patch + 1 prefix tokens"


def test_initialise_is_xavier_uniform_with_zero_bias() -> None:
    layer = linear(30, 20, torch.Generator().manual_seed(0))
    bound = (6 / 50) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.95 * bound
    assert not layer.bias.any()


def test_initialise_leaves_other_parameters_alone() -> None:
    norm, embedding = nn.LayerNorm(4), nn.Embedding(2, 4)
    with torch.no_grad():
        norm.bias.fill_(3)
        embedding.weight.fill_(7)
    initialise(nn.Sequential(nn.Linear(4, 4, bias=False), norm, embedding), torch.Generator().manual_seed(0))
    assert not norm.bias.any()
    assert norm.weight.eq(1).all()
    assert embedding.weight.eq(7).all()

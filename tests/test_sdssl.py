"""SDSSL: what learns from what, the momentum copy, schedules, several processes, resumed runs, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hdcache import stopping
from hdcache.backbones import create_vit
from hdcache.distill.contrast import cosine_distance, info_nce, nt_xent, scaled_info_nce
from hdcache.distill.learner import Learner
from hdcache.distill.run import distill
from hdcache.distill.sdssl import SDSSL, SDSSLHeads, class_tokens
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.errors import Interrupted, UsageError
from hdcache.photometric import Photometric
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.taps import Tokens

Python = Callable[..., "subprocess.Popen[str]"]
FRAMEWORKS = ("simclr", "byol", "mocov3")
CACHED = ("cached_final", "cached_anchor")
SMALL: dict[str, Any] = {"projection_dim": 8, "hidden": 24, "hidden_intermediate": 16, "hidden_predictor": 20}
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


def batch_of(count: int = 4, seed: int = 0) -> Any:
    return SimpleNamespace(
        images=normal(count, 3, 16, 16, seed=seed),
        more=(normal(count, 3, 16, 16, seed=seed + 1),),
        targets={"t": {"pooled": normal(count, 32, seed=seed + 2)}},
    )


class Case:
    """One objective with a student, its heads and one step's outputs."""

    def __init__(self, objective: SDSSL, batch: Any = None) -> None:
        self.objective, self.student, self.batch = objective, vit(), batch or batch_of()
        cards = {} if objective.formulation == "online" else {"t": CARD}
        self.heads = objective.build(self.student, cards, 0, torch.Generator().manual_seed(0))
        self.taps: dict[str, Any] = dict(objective.forward(self.student, self.batch, self.heads, seed=0))
        self.losses = objective.loss(self.batch, self.taps, self.heads)

    def reached(self, part: str) -> set[str]:
        """Parameters that a part of the loss gives a gradient other than zero."""
        named = dict(nn.ModuleDict({"student": self.student, "heads": self.heads}).named_parameters())
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        found = torch.autograd.grad(self.losses[part], list(trained.values()), retain_graph=True, allow_unused=True)
        return {name for name, value in zip(trained, found, strict=True) if value is not None and value.any()}


def online(framework: Any, **fields: Any) -> SDSSL:
    sizes = {key: value for key, value in SMALL.items() if key != "projection_dim" or "formulation" not in fields}
    return SDSSL(framework=framework, **sizes | fields)


# What is compared with what


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_losses_are_those_of_projections_of_the_two_views(framework: Any) -> None:
    case = Case(online(framework))
    found = case.losses
    assert tuple(found) == case.objective.parts()
    if framework == "simclr":
        first, second = case.taps["projections first"], case.taps["projections second"]
        assert first.shape == (3, 4, 8)
        torch.testing.assert_close(found["out"], nt_xent((first[-1:], second[-1:]), (first[-1], second[-1]), 0.2))
        torch.testing.assert_close(found["mid"], nt_xent((first[:-1], second[:-1]), (first[-1], second[-1]), 0.2))
        return
    assert case.heads.momentum is not None
    total = {"out": torch.zeros(()), "mid": torch.zeros(()), "det": torch.zeros(())}
    views = (case.batch.images, case.batch.more[0])
    for images, other in (views, views[::-1]):
        tokens = class_tokens(case.student, images, ("block1.out", "block2.out", "block3.out"))
        assert case.heads.projectors is not None
        assert case.heads.predictors is not None
        projected = torch.cat([case.heads.projectors(tokens[:2]), case.heads.projector_last(tokens[2:])])
        p = case.heads.predictors(projected)
        z = case.heads.momentum(other, "block3.out")
        for part, rows in (("out", p[2:]), ("mid", p[:2]), ("det", p)):
            total[part] = total[part] + (
                cosine_distance(rows, z) if framework == "byol" else scaled_info_nce(rows, z, 0.2)
            )
    torch.testing.assert_close(found, total | {"det": 3 * total["det"]})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("formulation", CACHED)
def test_cached_formulations_learn_from_the_stored_vector(framework: Any, formulation: Any) -> None:
    case = Case(online(framework, formulation=formulation))
    z = case.batch.targets["t"]["pooled"]
    kind = "projections" if framework == "simclr" else "predictions"
    pairs = [case.taps[f"{kind} {view}"] for view in ("first", "second")]
    own = [case.taps[f"projections {view}"][-1] for view in ("first", "second")]
    assert pairs[0].shape == (3, 4, 32), "as wide as the teacher"

    def compared(rows: list[Tensor], targets: list[Tensor]) -> Tensor:
        if framework == "simclr":
            return sum(info_nce(p, t, 0.2) for p, t in zip(rows, targets, strict=True)) / 2  # type: ignore[return-value]
        distance = cosine_distance if framework == "byol" else lambda p, t: scaled_info_nce(p, t, 0.2)
        return sum(distance(p, t) for p, t in zip(rows, targets, strict=True))  # type: ignore[return-value]

    torch.testing.assert_close(case.losses["out"], compared([p[-1:] for p in pairs], [z, z]))
    lower = [p[:-1] for p in pairs]
    if formulation == "cached_final":
        expected = compared(lower, [z, z])
    elif framework == "simclr":
        expected = nt_xent((lower[0], lower[1]), (own[0], own[1]), 0.2)
    else:
        expected = compared(lower, own[::-1])
    torch.testing.assert_close(case.losses["mid"], expected)
    assert case.objective.averaged(case.heads) is None
    assert ("det" in case.losses) is (framework != "simclr")


def test_stored_class_tokens_and_pooled_vectors_are_the_same_target() -> None:
    pooled, final = batch_of(), batch_of()
    vectors = pooled.targets["t"]["pooled"]
    final.targets = {"t": {"final": Tokens(vectors.unsqueeze(1), normal(4, 16, 32))}}
    one = Case(online("mocov3", formulation="cached_final"), pooled)
    other = Case(online("mocov3", formulation="cached_final", target="final"), final)
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_baseline_has_one_layer_and_one_loss(framework: Any) -> None:
    whole, alone = Case(online(framework)), Case(online(framework, intermediate=False))
    assert tuple(alone.losses) == alone.objective.parts() == ("out",)
    assert alone.objective.student_taps(12) == ("block12.out",)
    assert alone.objective.factors(3, 10) == {}
    assert alone.heads.projectors is None
    assert alone.taps["projections first"].shape == (1, 4, 8)
    assert alone.reached("out") >= {"student.blocks.0.mlp.fc1.weight", "student.norm.weight"}
    assert whole.objective.student_taps(12)[::11] == ("block1.out", "block12.out")


def test_class_tokens_pass_the_last_norm() -> None:
    student: Any = vit()
    images = normal(2, 3, 16, 16)
    x = student.norm_pre(student._pos_embed(student.patch_embed(images)))
    for number, found in enumerate(class_tokens(student, images, ("block1.out", "block2.out", "block3.out"))):
        x = student.blocks[number](x)
        torch.testing.assert_close(found, student.norm(x)[:, 0])


@pytest.mark.parametrize(("framework", "normalised"), [("simclr", True), ("byol", False), ("mocov3", True)])
def test_networks_have_the_published_shapes(framework: Any, normalised: bool) -> None:
    heads = SDSSL(framework=framework).build(vit(depth=12), {}, 0, torch.Generator().manual_seed(0))
    assert heads.projectors is not None
    assert [tuple(w.shape) for w in heads.projector_last.weights] == [(1, 24, 4096), (1, 4096, 4096), (1, 4096, 256)]
    assert [tuple(w.shape) for w in heads.projectors.weights] == [(11, 24, 2048), (11, 2048, 2048), (11, 2048, 256)]
    assert (heads.projector_last.last_norm is not None) is (heads.projectors.last_norm is not None) is normalised
    if framework == "simclr":
        assert heads.predictors is None
        assert heads.momentum is None
        return
    assert heads.predictors is not None
    assert [tuple(w.shape) for w in heads.predictors.weights] == [(12, 256, 4096), (12, 4096, 256)]
    assert (heads.predictors.last_norm is not None) is (framework == "mocov3")
    assert heads.momentum is not None
    assert not any(parameter.requires_grad for parameter in heads.momentum.parameters())


# Where gradients go


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_intermediate_layers_train_the_backbone_below_them(framework: Any) -> None:
    mid = Case(online(framework)).reached("mid")
    blocks = {name.split(".")[2] for name in mid if name.startswith("student.blocks")}
    assert blocks == {"0", "1"}, "the last block is the target's"
    assert any(name.startswith("heads.projectors.") for name in mid)
    assert not any(name.startswith("heads.projector_last") for name in mid)
    assert "student.norm.weight" in mid


@pytest.mark.parametrize("formulation", ["online", *CACHED])
@pytest.mark.parametrize("framework", ["byol", "mocov3"])
def test_the_detached_loss_reaches_predictors_alone(framework: Any, formulation: Any) -> None:
    case = Case(online(framework, formulation=formulation))
    reached = case.reached("det")
    assert reached
    assert all(name.startswith("heads.predictors.") for name in reached)
    assert reached <= case.reached("out") | case.reached("mid")
    weight = case.heads.predictors.weights[0]  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(case.losses["det"], weight, retain_graph=True)
    assert bool((gradient.abs().sum((1, 2)) > 0).all()), "the predictor of each layer"


def test_the_anchor_is_not_pulled_towards_lower_layers() -> None:
    for framework in FRAMEWORKS:
        mid = Case(online(framework, formulation="cached_anchor")).reached("mid")
        assert not any(name.startswith(("heads.projector_last", "student.blocks.2")) for name in mid)


# The momentum copy


def test_the_copy_follows_its_formula() -> None:
    objective = online("byol", momentum=0.75)
    case = Case(objective)
    momentum = case.heads.momentum
    assert momentum is not None
    with torch.no_grad():
        for parameter in (*case.student.parameters(), *case.heads.projector_last.parameters()):
            parameter.add_(1)
    for step, keep in ((0, 0.75), (5, 0.875), (10, 1.0)):
        before = [parameter.clone() for parameter in momentum.parameters()]
        objective.after_step(case.student, case.heads, step, 10)
        originals = (*case.student.parameters(), *case.heads.projector_last.parameters())
        for old, new, value in zip(before, momentum.parameters(), originals, strict=True):
            torch.testing.assert_close(new, keep * old + (1 - keep) * value)
    assert objective.averaged(case.heads) is momentum.backbone


def test_the_copy_starts_equal_and_keeps_its_own_statistics() -> None:
    case = Case(online("mocov3"))
    assert case.heads.momentum is not None
    own, copied = case.heads.projector_last.state_dict(), case.heads.momentum.projector.state_dict()
    assert own.keys() == copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in own if "running" not in name)
    means = case.heads.momentum.projector.norms[0].get_buffer("running_mean")
    before = means.clone()
    assert before.any(), "the copy's batch norms have seen a batch"
    case.objective.after_step(case.student, case.heads, 0, 10)
    assert torch.equal(means, before)


def test_simclr_has_no_copy() -> None:
    case = Case(online("simclr"))
    case.objective.after_step(case.student, case.heads, 0, 10)
    assert case.objective.averaged(case.heads) is None


@pytest.mark.parametrize(("framework", "most"), [("mocov3", 1.0), ("byol", 0.8), ("simclr", 0.8)])
def test_alpha_rises_by_half_a_cosine(framework: Any, most: float) -> None:
    for alpha, end in ((None, most), (0.5, 0.5)):
        objective = online(framework, alpha=alpha)
        for step in (0, 1, 5, 10):
            expected = end * (1 - math.cos(math.pi * step / 10)) / 2
            assert objective.factors(step, 10) == {"mid": pytest.approx(expected)}


# Whole runs


def recipe(objective: SDSSL, **changes: Any) -> Recipe:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    student = StudentSpec(architecture="vit_tiny_patch16_224", arguments=arguments, freeze_patch_embed=True)
    jitter = Photometric(hue=0.1, probability=0.8, grayscale=0.2, blur=1.0, blur_sigma=(0.1, 0.4))
    fixed: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "log_every": 1,
        "amp": "off",
    }
    return Recipe(
        name="test", objective=objective, student=student, jitter=jitter,
        second_jitter=jitter.model_copy(update={"blur": 0.1, "solarize": 0.2}), **(fixed | changes),
    )  # fmt: skip


def run(plan: Recipe, out: Path, **settings: Any) -> dict[str, Any]:
    return distill(plan, out=out, device="cpu", threads=2, **settings)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def data_of(store: Path) -> dict[str, Any]:
    return {"data": f"npz:{store.parent}/data.npz"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_online_run_needs_no_store(framework: Any, tiny_store: Path, tmp_path: Path) -> None:
    result = run(recipe(online(framework)), tmp_path / "a", **data_of(tiny_store))
    assert math.isfinite(result["loss"])
    assert result["targets"] == {}
    assert (tmp_path / "a" / "ema").exists() is (framework != "simclr")
    if framework != "simclr":
        assert weights(tmp_path / "a" / "ema") != weights(tmp_path / "a")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_mixed_precision_trains_too(framework: Any, tiny_store: Path, tmp_path: Path) -> None:
    exact = run(recipe(online(framework)), tmp_path / "exact", **data_of(tiny_store))
    mixed = run(recipe(online(framework), amp="bf16"), tmp_path / "mixed", **data_of(tiny_store))
    assert mixed["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert mixed["loss"] != exact["loss"]
    assert all(value.dtype == torch.float32 for value in tensors_of(tmp_path / "mixed").values())


def test_drop_path_takes_both_views(tiny_store: Path, tmp_path: Path) -> None:
    plan = recipe(online("simclr"), epochs=1, warmup_epochs=0)
    dropping = plan.model_copy(update={"student": plan.student.model_copy(update={"drop_path": 0.3})})
    results = [run(each, tmp_path / name, **data_of(tiny_store)) for name, each in (("a", plan), ("b", dropping))]
    assert math.isfinite(results[1]["loss"])
    assert results[0]["loss"] != results[1]["loss"]


@pytest.mark.parametrize("formulation", CACHED)
def test_cached_equals_live_to_the_bit(formulation: Any, tiny_store: Path, tmp_path: Path) -> None:
    plan = recipe(online("mocov3", formulation=formulation, target="final"), epochs=3)
    run(plan, tmp_path / "cached", store=tiny_store)
    run(plan, tmp_path / "live", store=tiny_store, online=True)
    assert len(losses(tmp_path / "cached")) == 12
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The saved state: student, heads with momentum copy and batch norm statistics, optimizer."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


@pytest.mark.parametrize("framework", ["mocov3", "simclr"])
def test_stopped_in_an_epoch_and_resumed_equals_undisturbed(
    framework: Any, tiny_store: Path, tmp_path: Path, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(online(framework, **({} if framework == "simclr" else {"momentum": 0.8})), log_every=5)
    run(plan, tmp_path / "whole", **data_of(tiny_store))
    taken, step = [], Learner.step

    def signalled(*rest: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", signalled)
        with pytest.raises(Interrupted, match="epoch 0, step 3 saved"):
            run(plan, tmp_path / "a", **data_of(tiny_store))
    stopping._received.clear()
    assert run(plan, tmp_path / "a", **data_of(tiny_store))["resumed_at"] == 3
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "a")
    assert one.keys() == other.keys()
    assert any(name.endswith("running_var") for name in one)
    assert any(name.startswith("heads/momentum.backbone.") for name in one) is (framework == "mocov3")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


RANKS = """
import json, sys
import torch
from hdcache.distill import run
from hdcache.distill.settings import Recipe
run.leave_ranks = lambda ranks: None
for recipe, out, where in json.loads(sys.argv[1]):
    run.distill(Recipe.model_validate(recipe), out=out, device="cpu", threads=1, **where)
torch.distributed.destroy_process_group()
"""


def noisy(name: str, value: Tensor) -> Tensor:
    """Which values are rounding noise, scaled up by AdamW, because nothing depends on them.

    A shift of all keys changes no softmax: the bias of K. A shift of all class tokens is undone by the projectors'
    first batch norm: the bias of the last norm, which shows in that batch norm's running mean.
    """
    noise = torch.zeros_like(value, dtype=torch.bool)
    if name.endswith("qkv.bias"):
        noise[24:48] = True
    elif name.endswith(("student/norm.bias", "backbone.norm.bias")) or re.search(
        r"projector.*norms.0.running_mean", name
    ):
        noise[:] = True
    return noise


def test_two_processes_train_as_one(tiny_store: Path, tmp_path: Path, together: Callable[..., list[str]]) -> None:
    """Losses, students, heads, momentum copies and statistics after four steps, in one pair of processes for all."""
    objectives = {"simclr": online("simclr")} | {name: online(name, momentum=0.9) for name in ("byol", "mocov3")}
    objectives |= {name: online("mocov3", formulation=name, target="final") for name in CACHED}
    plans = {name: recipe(objective, lr=2e-4, epochs=1, warmup_epochs=0) for name, objective in objectives.items()}
    where = {name: {"store": str(tiny_store)} if name in CACHED else data_of(tiny_store) for name in plans}
    work = [[plan.model_dump(mode="json"), str(tmp_path / f"{name}-2"), where[name]] for name, plan in plans.items()]
    assert "find_unused_parameters" not in "".join(together(RANKS, json.dumps(work)))
    for name, plan in plans.items():
        run(plan, tmp_path / name, **where[name])
        assert len(losses(tmp_path / name)) == 4
        for (step, one), (other_step, two) in zip(losses(tmp_path / name), losses(tmp_path / f"{name}-2"), strict=True):
            assert step == other_step
            assert two == pytest.approx(one, rel=1e-5), name
        first, second = tensors_of(tmp_path / name), tensors_of(tmp_path / f"{name}-2")
        assert first.keys() == second.keys()
        for key in (key for key in first if not key.startswith("optimizer/")):
            gap = (first[key] - second[key]).abs().masked_fill(noisy(key, first[key]), 0)
            assert float(gap.max()) < 1e-5 * max(1, float(first[key].abs().max())), (name, key)


def test_the_patch_projection_keeps_its_initial_weights(tiny_store: Path, tmp_path: Path) -> None:
    run(recipe(online("simclr")), tmp_path / "a", **data_of(tiny_store))
    run(recipe(online("simclr"), epochs=0, warmup_epochs=0), tmp_path / "b", **data_of(tiny_store))
    trained, start = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    same = {name for name in start if torch.equal(start[name], trained[name])}
    assert same == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "t"}, "formulation 'online' learns from the student itself; set teacher to null"),
        ({"intermediate": False, "alpha": 0.5}, "alpha is set, but intermediate is false"),
        ({"formulation": "cached_anchor", "intermediate": False}, "set formulation to cached_final"),
        ({"framework": "dino"}, "'simclr', 'byol' or 'mocov3'"),
        ({"target": "final"}, "formulation 'online' does not read target, .*--set objective.target=pooled"),
        (
            {"formulation": "cached_final", "projection_dim": 8},
            "formulation 'cached_final' does not read projection_dim, .*--set objective.projection_dim=256",
        ),
        (
            {"formulation": "cached_anchor", "momentum": 0.9},
            "'cached_anchor' does not read momentum, .*--set objective.momentum=0.996",
        ),
        ({"framework": "simclr", "momentum_end": 0.9}, "framework 'simclr' does not read momentum_end"),
        ({"framework": "byol", "tau": 0.1}, "framework 'byol' does not read tau, .*--set objective.tau=0.2"),
        ({"tau": 0.0}, "greater than 0"),
        ({"momentum": 1.5}, "less than or equal to 1"),
        ({"ratio": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SDSSL(**settings)


@pytest.mark.parametrize(
    ("objective", "cards", "message"),
    [
        (
            SDSSL(formulation="cached_final"),
            {},
            "objective.teacher not given, and there is no teacher; add one: .*--teacher NAME=MODEL --tap pooled$",
        ),
        (
            SDSSL(formulation="cached_final", teacher="b"),
            {"dino": CARD},
            "no teacher 'b'; choose from: dino; or add it: hdcache extract --store STORE --teacher b=MODEL --tap pooled$",
        ),
        (
            SDSSL(formulation="cached_final"),
            {"t": CARD.model_copy(update={"mask": MaskSpec(kind="random", ratio=0.75)})},
            "'t' saw only the tokens that its mask random:0.75 left.*set objective.teacher=t-2 and add it: .*--tap pooled$",
        ),
        (SDSSL(formulation="cached_final"), {"a": CARD, "b": CARD}, r"but there are 2 \(a, b\)"),
        (SDSSL(formulation="cached_final", teacher="dinoo"), {"dino": CARD}, "no teacher 'dinoo'; did you mean 'dino'"),
        (
            SDSSL(formulation="cached_anchor", target="final"),
            {"t": CARD.model_copy(update={"class_token": False})},
            "'final', whose class token teacher 't' lacks; set objective.target=pooled",
        ),
    ],
)
def test_teacher_that_does_not_fit(objective: SDSSL, cards: dict[str, TeacherCard], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective.wants(cards)


def test_wanted_targets() -> None:
    assert SDSSL().wants({"t": CARD}) == {}
    assert SDSSL(formulation="cached_final").wants({"t": CARD}) == {"t": ("pooled",)}
    assert SDSSL(formulation="cached_anchor", target="final", teacher="t").wants({"t": CARD, "u": CARD}) == {
        "t": ("final",)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "reads class tokens, which the student lacks"),
        ({"global_pool": "avg"}, "after the last norm, which a student that pools its patches lacks; set student.arg"),
        ({"depth": 1}, "the student has one block; set objective.intermediate=false"),
    ],
)
def test_student_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SDSSL().build(vit(**arguments), {}, 0, torch.Generator().manual_seed(0))


def test_batches_that_cannot_be_compared() -> None:
    with pytest.raises(ValidationError, match="accumulate 2 would cut batches whose rows objective 'sdssl' compares"):
        recipe(SDSSL(), accumulate=2)
    with pytest.raises(
        ValidationError, match="batch_size 1 leaves objective 'sdssl' nothing to compare; set 2 or more"
    ):
        recipe(SDSSL(), batch_size=1)
    assert SDSSL().fresh_views() == 2


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = (Case(online("mocov3")).heads for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(one, SDSSLHeads)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

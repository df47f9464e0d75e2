"""One student in training: its step, its optimizer, its arithmetic. Whole runs are in test_trainer.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hdcache.batch import Batch
from hdcache.distill import learner
from hdcache.distill.learner import add_gradients, autocast_precision, build_optimizer, update_average
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.distill.student import build_student
from hdcache.taps import Tokens

Make = Callable[..., Recipe]
CPU = torch.device("cpu")


def run(recipe: Recipe, out: Path, store: Path | None, **settings: Any) -> dict[str, Any]:
    return distill(recipe, out=out, store=store, device="cpu", threads=2, **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


# One step


class Sum(nn.Module):
    """A loss that is linear in the batch: mean of w times the images."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        means = batch.images.mean((2, 3)) @ self.w
        return {"a": means.mean(), "b": (means**2).mean()}


def batch_of(count: int) -> Batch:
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 4, 4, generator=noise)
    tokens = Tokens(torch.zeros(count, 1, 2), torch.arange(count * 6).float().view(count, 3, 2))
    targets: dict[str, dict[str, Tokens | torch.Tensor]] = {"t": {"final": tokens, "pooled": torch.arange(count)}}
    return Batch(images, [str(i) for i in range(count)], torch.arange(count), targets, 0, 0, 0)


def pieces_of(count: int, number: int) -> list[Batch]:
    """A batch as a loader with ``Options.pieces`` yields it."""
    whole, cut = batch_of(count), [slice(count * i // number, count * (i + 1) // number) for i in range(number)]
    return [
        Batch(
            whole.images[part], whole.ids[part], whole.labels[part], {}, 0, 0, 0, i, number, (part.stop - part.start) / count
        )
        for i, part in enumerate(cut)
    ]  # fmt: skip


def gradient(pieces: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module, parts = Sum(), {}
    for piece in pieces_of(6, pieces):
        add_gradients(module, piece, {"a": 1.0, "b": 2.0}, None, CPU, parts)
    assert module.w.grad is not None
    return module.w.grad.clone(), parts


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = gradient(1)
    assert parts["loss"] == pytest.approx(float(parts["a"] + 2 * parts["b"]))
    for pieces in (2, 3, 6):
        grad, pieced = gradient(pieces)
        assert torch.allclose(grad, whole, rtol=1e-5)
        assert all(float(pieced[name]) == pytest.approx(float(parts[name]), rel=1e-5) for name in parts)


def test_gradients_are_clipped_as_a_whole(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each optimizer step, over all pieces and parameters; what is let go of after it."""
    norms: list[list[float]] = []

    def stepped(self: torch.optim.AdamW, *_: Any) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms[-1].append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    for number, clip in enumerate((None, 0.01, 100.0)):
        norms.append([])
        run(small_recipe(clip_grad=clip, accumulate=2), tmp_path / str(number), tiny_store)
    whole, clipped, loose = norms
    assert min(whole) > 0.02
    assert clipped == pytest.approx([0.01] * 8, rel=1e-3)
    assert loose == whole


def test_accumulation_trains_the_same_student(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    for pieces in (1, 2):
        run(small_recipe(accumulate=pieces), tmp_path / str(pieces), tiny_store)
    for (_, one), (_, two) in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_only_matrices_decay(small_recipe: Make) -> None:
    recipe = small_recipe(student__sincos_positions=False, student__arguments={"reg_tokens": 2, "init_values": 0.1})
    student: Any = build_student(recipe.student, 0)
    module = nn.ModuleDict({"student": student, "heads": nn.Linear(2, 2)})
    optimizer, names = build_optimizer(module, recipe)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    assert [of[id(p)] for group in optimizer.param_groups for p in group["params"]] == names
    decaying = {of[id(p)] for p in decayed["params"]}
    tokens = {"student.cls_token", "student.reg_token", "student.pos_embed"}
    assert tokens <= decaying, "as in the released code: only vectors are spared"
    assert all(name.endswith("weight") and "norm" not in name for name in decaying - tokens)
    rest = {of[id(p)] for p in plain["params"]}
    assert "student.blocks.0.ls1.gamma" in rest
    assert len(decaying | rest) == len(list(module.parameters()))


def test_fixed_positions_are_not_optimized(small_recipe: Make) -> None:
    _, names = build_optimizer(build_student(small_recipe().student, 0), small_recipe())
    assert "cls_token" in names
    assert "pos_embed" not in names


def test_an_average_follows_its_momentum() -> None:
    mean, value = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.75 * mean.weight.detach() + 0.25 * value.weight.detach()
    update_average(mean, value, 0.75)
    assert torch.allclose(mean.weight, expected)
    update_average(mean, value, 0.0)
    assert torch.equal(mean.weight, value.weight)


def test_the_averaged_student_is_written_beside_the_other(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    run(small_recipe(ema=0.9), tmp_path / "a", tiny_store)
    run(small_recipe(ema=0.0), tmp_path / "b", tiny_store)
    run(small_recipe(), tmp_path / "c", tiny_store)
    assert weights(tmp_path / "a" / "ema") != weights(tmp_path / "a")
    assert weights(tmp_path / "b" / "ema") == weights(tmp_path / "b")
    assert not (tmp_path / "c" / "ema").exists()
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    assert json.loads((tmp_path / "a/ema/config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


# Arithmetic


def test_mixed_precision_runs_on_a_cpu(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    exact = run(small_recipe(), tmp_path / "exact", tiny_store)
    mixed = run(small_recipe(amp="bf16"), tmp_path / "mixed", tiny_store)
    assert (exact["amp"], mixed["amp"]) == ("None", "torch.bfloat16")
    assert mixed["loss"] != exact["loss"]
    assert mixed["loss"] == pytest.approx(exact["loss"], rel=0.1)
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "mixed" / "student.safetensors").values())


def test_mixed_precision_is_what_the_recipe_says(small_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autocast_precision(small_recipe(amp="off"), CPU) is None
    assert autocast_precision(small_recipe(amp="bf16"), CPU) is torch.bfloat16
    for native, expected in (("bf16", torch.bfloat16), ("fp32", None)):
        monkeypatch.setattr(learner, "choose_precision", lambda *_, native=native: native)
        assert autocast_precision(small_recipe(amp="auto"), CPU) is expected


def test_no_epochs_write_the_untrained_student(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe(epochs=0, warmup_epochs=0)
    result = run(recipe, tmp_path / "a", tiny_store)
    assert (result["steps"], result["loss"]) == (0, None)
    json.dumps(result, allow_nan=False)
    assert "NaN" not in (tmp_path / "a" / "run.json").read_text()
    written = load_file(tmp_path / "a" / "student.safetensors")
    untrained = build_student(recipe.student, recipe.seed).state_dict()
    assert written.keys() == untrained.keys()
    assert all(torch.equal(written[key], untrained[key]) for key in written)
    assert lines(tmp_path / "a") == []


def test_the_last_block_of_relation_distillation_keeps_its_tail(
    tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    recipe = small_recipe()
    assert run(recipe, tmp_path / "a", tiny_store)["last_trained"] == "block2.out"
    written, start = load_file(tmp_path / "a" / "student.safetensors"), build_student(recipe.student, 0).state_dict()
    same = {key for key in start if torch.equal(written[key], start[key])}
    assert {"blocks.2.mlp.fc1.weight", "blocks.2.attn.proj.weight", "norm.weight", "pos_embed"} <= same
    assert not {"blocks.2.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "cls_token"} & same

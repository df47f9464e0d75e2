from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hdcache.errors import InputNotFound, UsageError
from hdcache.taps import Coded, Tokens, parse_tap
from hdcache.targets import Derivation, FrozenAttention, derivation, plan_targets, sources
from hdcache.teachers import Teacher, load_teacher

KINDS = ("qk", "vv", "qq", "kk")


def teacher_with(tiny: str, more: str = "") -> Teacher:
    """A teacher whose norms and biases are not what they were initialised to."""
    teacher = load_teacher(f"t={tiny.partition('=')[2] if tiny.startswith('t=') else tiny}{more}", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.backbone.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return teacher


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def tensor(value: Tokens | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else value.sequence()


def derived(teacher: Teacher, targets: list[str], held: list[str]) -> Derivation:
    plan = plan_targets(targets, held, depth=teacher.card.depth, teacher=teacher.name, store="s.hdc")
    arrays, facts = teacher.weights_for(held)
    return derivation(plan, facts, {name: torch.from_numpy(value) for name, value in arrays.items()})


# Derived equals tapped


@pytest.mark.parametrize("source", ["attn_in", "qkv"])
@pytest.mark.parametrize(
    ("more", "heads"),
    [
        ("", (None, 3, 6, 1)),
        ("&qkv_bias=false", (None, 6)),
        ("&reg_tokens=2", (None, 6)),
        ("&class_token=false&global_pool=avg", (None, 6)),
        ("&qk_norm=true", (None, 3)),
        ("&qk_norm=true&norm_layer=rmsnorm", (None, 3)),
        ("&qk_norm=true&norm_layer=layernorm", (None, 3)),
    ],
)
def test_every_relation_follows_from_what_is_stored(
    tiny: str, more: str, heads: tuple[int | None, ...], source: str
) -> None:
    """From ``attn_in`` or ``qkv``, with own or other heads, the relations are those of the network itself."""
    teacher = teacher_with(tiny, more)
    names = [f"block2.rel.{kind}" + (f"@{count}" if count else "") for kind in KINDS for count in heads]
    live = teacher.forward(images(), [*names, f"block2.{source}", "block2.qkv"])
    found = derived(teacher, [*names, "block2.qkv"], [f"block2.{source}", "final"]).derive(live)
    assert list(found) == [*names, "block2.qkv"]
    for name, value in found.items():
        torch.testing.assert_close(tensor(value), tensor(live[name]), rtol=1e-5, atol=1e-6)
    assert found["block2.qkv"].prefix.shape == live["block2.qkv"].prefix.shape  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", ["", "&qkv_bias=false", "&reg_tokens=2", "&class_token=false&global_pool=avg"])
def test_codes_are_joined_with_the_matrix_that_follows(tiny: str, more: str, dtype: torch.dtype) -> None:
    """Targets of coded tokens are those of the decoded ones, up to rounding; the tap itself is decoded where it is asked for."""
    teacher = teacher_with(tiny, more)
    names = ["block2.rel.qk", "block2.rel.vv@6", "block2.qkv", "block2.attn_in"]
    live = teacher.forward(images(), ["block2.attn_in"])["block2.attn_in"]
    assert isinstance(live, Tokens)
    noise = torch.Generator().manual_seed(2)
    inverse, mean = torch.randn(30, 48, generator=noise) / 7, torch.randn(48, generator=noise)
    codes = (live.patches @ torch.linalg.pinv(inverse)).to(dtype)
    coded = Coded(live.prefix.to(dtype), codes.split(2), inverse.to(dtype), mean.to(dtype))
    plan = derived(teacher, names, ["block2.attn_in"])
    found, expected = plan.derive({"block2.attn_in": coded}), plan.derive({"block2.attn_in": coded.tokens()})
    assert list(found) == names
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name in names:
        assert tensor(found[name]).dtype == tensor(expected[name]).dtype
        torch.testing.assert_close(tensor(found[name]), tensor(expected[name]), rtol=tolerance, atol=tolerance)
    again = plan.derive({"block2.attn_in": coded})
    assert torch.equal(tensor(again["block2.rel.qk"]), tensor(found["block2.rel.qk"]))


@pytest.mark.parametrize("source", ["attn_in", "qkv"])
@pytest.mark.parametrize("coded", [False, True])
def test_what_else_is_asked_for_changes_no_bits(tiny: str, source: str, *, coded: bool) -> None:
    """Students that train together, each with its own targets, see what each of them sees alone."""
    teacher = teacher_with(tiny)
    names = [*(f"block2.rel.{kind}" for kind in KINDS), "block2.rel.vv@6", "block2.qkv"]
    tap = f"block2.{source}"
    value = teacher.forward(images(), [tap])[tap]
    assert isinstance(value, Tokens)
    if coded:
        width = value.patches.shape[-1]
        value = Coded(value.prefix, [value.patches[..., :30].contiguous()], torch.randn(30, width), torch.randn(width))  # type: ignore[assignment]
    together = derived(teacher, names, [tap]).derive({tap: value})
    for name in names:
        alone = derived(teacher, [name], [tap]).derive({tap: value})
        assert torch.equal(tensor(alone[name]), tensor(together[name])), name


def test_only_what_is_asked_for_is_computed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Q, K and V those that a relation relates, each once."""
    teacher = teacher_with(tiny)
    live = teacher.forward(images(), ["block2.attn_in"])
    asked: list[str] = []
    project = FrozenAttention.project

    def watch(self: FrozenAttention, value: Any, letters: list[str], **more: Any) -> dict[str, Tensor]:
        asked.extend(letters)
        return project(self, value, letters, **more)

    monkeypatch.setattr(FrozenAttention, "project", watch)
    for names, letters in (
        (["block2.rel.vv"], "v"),
        (["block2.rel.qk", "block2.rel.kk", "block2.rel.qk@6"], "kq"),
        (["block2.rel.qq", "block2.qkv"], "kqv"),
    ):
        asked.clear()
        derived(teacher, names, ["block2.attn_in"]).derive(live)
        assert asked == list(letters)


def test_values_under_a_qk_norm_can_be_cut_into_any_heads(tiny: str) -> None:
    teacher = teacher_with(tiny, "&qk_norm=true")
    live = teacher.forward(images(), ["block2.attn_in", "block2.rel.vv@6"])
    found = derived(teacher, ["block2.rel.vv@6"], ["block2.attn_in"]).derive(live)
    torch.testing.assert_close(found["block2.rel.vv@6"], live["block2.rel.vv@6"], rtol=1e-5, atol=1e-6)


def test_half_precision_codes_give_relations_too(tiny: str) -> None:
    """Decoded to bfloat16, relations are still float32 probabilities near the exact ones, Q/K norms or not."""
    for more in ("", "&qk_norm=true", "&qk_norm=true&norm_layer=rmsnorm"):
        teacher = teacher_with(tiny, more)
        live = teacher.forward(images(), ["block2.attn_in", "block2.rel.qk"])
        attn_in = live["block2.attn_in"]
        assert isinstance(attn_in, Tokens)
        rough = {"block2.attn_in": Tokens(attn_in.prefix.bfloat16(), attn_in.patches.bfloat16())}
        found = tensor(derived(teacher, ["block2.rel.qk"], ["block2.attn_in"]).derive(rough)["block2.rel.qk"])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(-1), torch.ones(3, 3, 17))
        torch.testing.assert_close(found, tensor(live["block2.rel.qk"]), rtol=0.2, atol=0.02)


def test_what_is_stored_itself_passes_unchanged(tiny: str) -> None:
    teacher = teacher_with(tiny)
    names = ["final", "block1.out", "pooled", "block3.rel.kk"]
    live = teacher.forward(images(), names)
    found = derived(teacher, names, names)
    assert found.derive(live) == live
    assert found.attention == {}
    assert found.taps == sorted(names)


def test_targets_carry_no_gradient(tiny: str) -> None:
    """Nothing upstream of a target is trained, even where the decoded taps ask for a gradient."""
    teacher = teacher_with(tiny)
    live = teacher.forward(images(), ["block2.qkv"])["block2.qkv"]
    assert isinstance(live, Tokens)
    asking = {"block2.qkv": Tokens(live.prefix.clone().requires_grad_(), live.patches.clone().requires_grad_())}
    assert not tensor(derived(teacher, ["block2.rel.vv"], ["block2.qkv"]).derive(asking)["block2.rel.vv"]).requires_grad


# Plans


@pytest.mark.parametrize(
    ("target", "held", "source"),
    [
        ("block2.rel.qk", ["block2.attn_in", "block2.qkv", "block2.rel.qk"], "block2.attn_in"),
        ("block2.rel.qk", ["final", "block2.qkv", "block2.rel.qk"], "block2.qkv"),
        ("block2.rel.qk", ["block2.rel.qk"], "block2.rel.qk"),
        ("block2.rel.qk@6", ["block2.rel.qk@6"], "block2.rel.qk@6"),
        ("block2.qkv", ["block2.attn_in", "block2.qkv"], "block2.attn_in"),
        ("block2.qkv", ["block2.qkv"], "block2.qkv"),
        ("block2.qkv", ["block2.attn_in"], "block2.attn_in"),
        ("final", ["final"], "final"),
        ("block2.attn_in", ["block2.attn_in"], "block2.attn_in"),
    ],
)
def test_the_cheapest_tap_that_is_held_gives_a_target(target: str, held: list[str], source: str) -> None:
    assert plan_targets([target], held, depth=3, teacher="t", store="s") == {target: source}
    assert source in sources(parse_tap(target))


@pytest.mark.parametrize(
    ("targets", "held", "flags"),
    [
        (["block2.rel.qk"], ["block3.attn_in"], "--tap block2.attn_in"),
        (["block2.rel.qk@6"], ["block2.rel.qk"], "--tap block2.attn_in"),
        (["block2.qkv", "final"], ["block2.out", "final"], "--tap block2.attn_in --tap final"),
        (["block2.rel.vv", "final", "block2.rel.qk"], ["pooled"], "--tap block2.attn_in --tap final"),
    ],
)
def test_a_missing_tap_names_the_command_that_adds_it(targets: list[str], held: list[str], flags: str) -> None:
    with pytest.raises(InputNotFound, match=r"s: teacher 't' holds .*, which cannot give block2") as caught:
        plan_targets(targets, held, depth=3, teacher="t", store="s", again="t-2")
    command = f"; ask for teacher 't-2', and store it under that name too: hdcache extract --store STORE --teacher t-2=MODEL {flags}"
    assert str(caught.value).endswith(command)
    options = {"again": "t-3", "model": "random:x?seed=1", "options": " --img-size 32", "command": "hdcache extract"}
    with pytest.raises(
        InputNotFound, match=r"that name too: hdcache extract --teacher 't-3=random:x\?seed=1' --img-size 32 --tap"
    ):
        plan_targets(targets, held, depth=3, teacher="t", store="s", **options)
    fields = ["objective.relation_teacher", "objective.feature_teacher"]
    with pytest.raises(
        InputNotFound, match=r"; set objective\.relation_teacher=t-2 and objective\.feature_teacher=t-2, and"
    ):
        plan_targets(targets, held, depth=3, teacher="t", store="s", again="t-2", fields=fields)


def test_a_target_beyond_the_teacher_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tap 'block4\.rel\.qk': the network has 3 blocks"):
        plan_targets(["block4.rel.qk"], ["block3.attn_in"], depth=3, teacher="t", store="s")


@pytest.mark.parametrize(
    ("more", "target", "message"),
    [
        ("", "block2.rel.qk@5", "QKV of width 144 = 3 x 48 cannot be split into 5 heads: 5 does not divide 48"),
        ("&qk_norm=true", "block2.rel.qk@6", "relations with 6 heads: the block normalises Q and K for its own 3"),
    ],
)
def test_heads_that_cannot_be_are_refused_before_the_first_batch(
    tiny: str, more: str, target: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        derived(teacher_with(tiny, more), [target], ["block2.attn_in"])


def test_an_unknown_qk_norm_is_refused_where_it_matters() -> None:
    """Only queries and keys pass the norm; a stored value relation needs none of it."""
    facts: dict[str, Any] = {"block1": {"heads": 2, "normalised": "OddNorm", "epsilon": 0.0}}
    weights = {"block1/qkv_weight": torch.randn(24, 8)}
    with pytest.raises(UsageError, match="a teacher with OddNorm on Q and K cannot be derived; store the matrices"):
        derivation({"block1.rel.qk": "block1.attn_in"}, facts, weights)
    found = derivation({"block1.rel.vv": "block1.attn_in"}, facts, weights)
    taps = {"block1.attn_in": Tokens(torch.randn(2, 1, 8), torch.randn(2, 4, 8))}
    assert tensor(found.derive(taps)["block1.rel.vv"]).shape == (2, 2, 5, 5)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hdcache.errors import UsageError
from hdcache.relations import KINDS, log_relation, relation, relation_kl, relation_logits, split_heads


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_split_heads_cuts_columns_as_timm_does() -> None:
    qkv = torch.arange(2 * 3 * 24, dtype=torch.float32).reshape(2, 3, 24)
    for part, tensor in enumerate(split_heads(qkv, 4)):
        assert tensor.shape == (2, 4, 3, 2)
        for head in range(4):
            start = 8 * part + 2 * head
            assert torch.equal(tensor[:, head], qkv[:, :, start : start + 2])


@pytest.mark.parametrize("heads", [0, 3, 5, 16])
def test_split_heads_refuses_a_count_that_does_not_divide(heads: int) -> None:
    with pytest.raises(UsageError, match=f"width 24 = 3 x 8 cannot be split into {heads} heads.*choose a head count"):
        split_heads(torch.zeros(1, 2, 24), heads)


@pytest.mark.parametrize("kind", KINDS)
def test_relation_agrees_with_a_slow_loop(kind: str) -> None:
    qkv = split_heads(normal(2, 5, 18), 3)
    x, y = (qkv[i] for i in KINDS[kind])
    fast, slow = relation(x, y), torch.empty(2, 3, 5, 5)
    for image in range(2):
        for head in range(3):
            for row in range(5):
                scores = [float(x[image, head, row] @ y[image, head, column]) / math.sqrt(2) for column in range(5)]
                total = sum(math.exp(score) for score in scores)
                slow[image, head, row] = torch.tensor([math.exp(score) / total for score in scores])
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(log_relation(x, y), slow.log())


def test_scale_is_the_head_width_unless_given() -> None:
    x, y = normal(1, 1, 3, 16), normal(1, 1, 3, 16, seed=1)
    torch.testing.assert_close(relation_logits(x, y), x @ y.transpose(-2, -1) / 4)
    torch.testing.assert_close(relation_logits(x, y, scale=1.0), x @ y.transpose(-2, -1))


def test_relations_are_float32_under_autocast_and_from_half() -> None:
    x, y = normal(1, 2, 4, 8), normal(1, 2, 4, 8, seed=1)
    expected = relation(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation(x, y), expected)
        kl = relation_kl(expected, log_relation(y, x))
    assert kl.dtype == torch.float32
    assert torch.equal(kl, relation_kl(expected, log_relation(y, x)))
    assert relation(x.half(), y.half()).dtype == torch.float32


def test_log_relation_is_finite_where_the_softmax_underflows() -> None:
    x = torch.tensor([[[[1000.0], [0.0]]]])
    assert relation(x, x)[0, 0, 0, 1] == 0
    assert torch.isfinite(log_relation(x, x)).all()


def test_kl_agrees_with_a_slow_loop() -> None:
    t, p = (normal(2, 3, 4, 4, seed=seed).softmax(-1) for seed in (0, 1))
    total = 0.0
    for row_t, row_p in zip(t.reshape(-1, 4).tolist(), p.reshape(-1, 4).tolist(), strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(row_t, row_p, strict=True))
    torch.testing.assert_close(relation_kl(t, p.log()), torch.tensor(total / (2 * 3 * 4)))


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30))
def test_kl_is_zero_at_identity_and_never_negative(seed: int, scale: float) -> None:
    logits = scale * normal(1, 2, 5, 5, seed=seed)
    other = scale * normal(1, 2, 5, 5, seed=seed + 1)
    assert abs(float(relation_kl(logits.softmax(-1), logits.log_softmax(-1)))) < 1e-5
    assert float(relation_kl(logits.softmax(-1), other.log_softmax(-1))) > -1e-6


def test_kl_ignores_entries_where_the_teacher_is_zero() -> None:
    t = torch.tensor([[0.0, 0.5, 0.5]])
    p = torch.tensor([[0.0, 0.5, 0.5]]).log().requires_grad_()
    kl = relation_kl(t, p)
    kl.backward()  # type: ignore[no-untyped-call]
    assert kl == 0
    assert p.grad is not None
    assert torch.isfinite(p.grad).all()


def test_kl_sends_no_gradient_to_the_teacher() -> None:
    t = normal(1, 1, 3, 3).requires_grad_()
    s = normal(1, 1, 3, 3, seed=1).requires_grad_()
    relation_kl(t.softmax(-1), s.log_softmax(-1)).backward()  # type: ignore[no-untyped-call]
    assert t.grad is None
    assert s.grad is not None


def test_kl_refuses_other_shapes() -> None:
    with pytest.raises(
        UsageError, match=r"\(1, 2, 3, 3\) \(teacher\) and \(1, 4, 3, 3\) \(student\) cannot be compared"
    ):
        relation_kl(torch.ones(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))

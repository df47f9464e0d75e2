"""Soft labels: the kept classes are exact to half precision, the rest shares what is left, and the seal says what it cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hdcache.encodings import Encoder, fit
from hdcache.schema import TapCard, TapRequest
from hdcache.soft_labels import decode_soft_labels, encode_soft_labels, soft_label_arrays


def draw(rows: int, classes: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def encoder(logits: torch.Tensor, top_k: int, heldout: torch.Tensor | None = None) -> Encoder:
    asked = TapRequest(tap="logits", encoding="topk", top_k=top_k)
    return fit(asked, logits, logits if heldout is None else heldout)


def rebuilt(found: Encoder, logits: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    parts, clipped = found.encode(logits)
    assert clipped == 0
    for name, part in parts.items():
        card = found.card.arrays[name]
        assert (part.shape[1:], str(part.dtype)) == (card.shape, card.dtype)
    value = found.decode({name: torch.from_numpy(np.array(part)) for name, part in parts.items()}, dtype)
    assert isinstance(value, torch.Tensor)
    return value


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 40),
    top_k=st.integers(1, 45),
    spread=st.floats(0.0, 200.0),
    shift=st.floats(-100, 100),
)
def test_kept_classes_are_exact_to_half_precision_and_mass_is_one(
    seed: int, classes: int, top_k: int, spread: float, shift: float
) -> None:
    """Any logits, any k, any constant added to a row: the largest classes come back, all others are equal."""
    logits = draw(3, classes, spread, seed) + shift
    found = rebuilt(encoder(logits, top_k), logits).double()
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-5)
    chosen = torch.from_numpy(encode_soft_labels(logits, top_k)[0]["classes"].astype(np.int64))
    assert chosen.shape == (3, min(top_k, classes))
    for row in range(3):
        largest = chosen[row]
        error = (found[row, largest] - exact[row, largest]).abs()
        # One unit of half precision, that of all of them where they are brought back to a mass of one, and float32's own
        # rounding of the logits.
        entropy = -(exact[row].exp() * exact[row]).sum()
        assert (error <= (exact[row, largest].abs() + entropy) * 2**-10 + 2**-24 + 1e-4 * (1 + spread) / 8).all()
        rest = np.setdiff1d(np.arange(classes), largest.numpy())
        assert len({float(value) for value in found[row, rest]}) <= 1
        # Float32 logits tie where float64 ones do not.
        if len(rest):
            assert exact[row, rest].max() <= exact[row, largest].min() + 1e-5 * (1 + spread + abs(shift))


def test_the_values_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 with two kept: the quarter that is left is shared by two classes."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0]]) * math.log(2) + 5
    parts, _ = encode_soft_labels(logits, 2)
    assert parts["classes"].tolist() == [[0, 2]]
    np.testing.assert_allclose(parts["values"].astype(float), [[math.log(0.5), math.log(0.25)]], rtol=1e-3)
    stored = {name: torch.from_numpy(part) for name, part in parts.items()}
    dense = decode_soft_labels(stored["values"], stored["classes"], 4, torch.float32)
    torch.testing.assert_close(dense.exp(), torch.tensor([[0.5, 0.125, 0.25, 0.125]]), rtol=0, atol=5e-4)


def test_mass_is_never_negative_because_values_are_rounded_down() -> None:
    logits = draw(200, 12, 6.0)
    parts, _ = encode_soft_labels(logits, 11)
    assert (np.exp(parts["values"].astype(np.float64)).sum(1) <= 1 + 1e-6).all()
    exact = logits.log_softmax(-1).sort(dim=-1, descending=True).values[:, :11].numpy()
    assert (parts["values"].astype(np.float32) <= exact + 1e-6).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_certain_row_stays_finite(kind: torch.dtype) -> None:
    """One class holds everything: the others get a share that float32 still has a logarithm for."""
    logits = torch.tensor([[1e4, 0.0, -1e4, 3.0]])
    found = rebuilt(encoder(logits, 1), logits, kind)
    assert found.dtype == kind
    assert torch.isfinite(found).all()
    assert found.float().softmax(-1)[0, 0] == 1


def test_logarithms_below_half_precision_are_clipped_and_counted() -> None:
    parts, clipped = encode_soft_labels(torch.tensor([[0.0, -1e5, -2e5]]), 3)
    assert clipped == 2
    assert parts["values"].tolist() == [[0.0, -65504.0, -65504.0]]


def test_equal_logits_keep_the_smaller_class() -> None:
    """Rows that could not be read are zeros; they must be the same bytes in every run."""
    parts, _ = encode_soft_labels(torch.zeros(2, 300), 4)
    assert parts["classes"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("classes", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_the_last_class_has_an_index(classes: int, dtype: str) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 20.0
    found = encoder(logits, 2)
    assert found.card.arrays["classes"].dtype == dtype
    assert int(rebuilt(found, logits).argmax()) == classes - 1


def test_k_beyond_the_classes_keeps_all() -> None:
    logits = draw(5, 7)
    found = encoder(logits, 100)
    assert found.card.arrays == soft_label_arrays(7, 7)
    torch.testing.assert_close(rebuilt(found, logits), logits.log_softmax(-1), rtol=2e-3, atol=2e-3)


def test_the_certificate_is_the_divergence_on_rows_it_was_not_fitted_on() -> None:
    logits, held = draw(20, 30), draw(13, 30, seed=1)
    found = encoder(logits, 5, held)
    seal = found.card.certificate
    exact, copy = held.double().softmax(-1), rebuilt(found, held).double().softmax(-1)
    assert seal.kl == pytest.approx(float((exact * (exact / copy).log()).sum(-1).mean()), rel=1e-5)
    assert seal.kl is not None
    assert seal.kl > 0.01
    spread = ((exact - exact.mean(0)) ** 2).mean()
    assert seal.relative_rmse == pytest.approx(float((((exact - copy) ** 2).mean() / spread).sqrt()))
    assert seal.cosine_min > 0.9
    assert (seal.calibration_rows, seal.heldout_rows, seal.saturated) == (20, 13, 0)
    # Five halves and five 16-bit classes for thirty values.
    assert seal.bits_per_value == pytest.approx(5 * 32 / 30)


def test_more_classes_cost_less_divergence() -> None:
    logits = draw(40, 50)
    costs = [encoder(logits, top_k).card.certificate.kl or 0.0 for top_k in (1, 3, 10, 30, 50)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 1e-5


def test_a_card_that_is_not_one_of_soft_labels_is_refused() -> None:
    card = encoder(draw(4, 9), 3).card
    assert card.row == (9,)
    whole: dict[str, Any] = card.model_dump()
    for arrays in (
        {"values": whole["arrays"]["values"]},
        whole["arrays"] | {"classes": {"shape": (4,), "dtype": "uint16"}},
        {name: {"shape": (10,), "dtype": value["dtype"]} for name, value in whole["arrays"].items()},
    ):
        with pytest.raises(ValidationError, match="arrays and constants are not those of a topk tap"):
            TapCard.model_validate(whole | {"arrays": arrays})

"""SDSSL's losses against slow loops; their gradients; several processes against one."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdcache.distill import contrast
from hdcache.distill.contrast import (
    contrasted_parts,
    cosine_distance,
    info_nce,
    nt_xent,
    predicted_parts,
    scaled_info_nce,
)

TAU = 0.2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine_of(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def picked(similarities: list[float], place: int, tau: float) -> float:
    """Cross-entropy of picking ``place`` by a softmax of similarities / tau."""
    return math.log(sum(math.exp((s - similarities[place]) / tau) for s in similarities))


# Against slow loops


@settings(max_examples=20)
@given(seed=st.integers(0, 99), layers=st.integers(1, 3), images=st.integers(2, 5), tau=st.floats(0.1, 1))
def test_info_nce_agrees_with_a_slow_loop(seed: int, layers: int, images: int, tau: float) -> None:
    p, z = normal(layers, images, 6, seed=seed), normal(images, 6, seed=seed + 100)
    rows = [
        picked([cosine_of(p[layer, image], key) for key in z], image, tau)
        for layer in range(layers)
        for image in range(images)
    ]
    assert float(info_nce(p, z, tau)) == pytest.approx(sum(rows) / len(rows), rel=1e-4, abs=1e-5)
    assert float(scaled_info_nce(p, z, tau)) == pytest.approx(2 * tau * sum(rows) / len(rows), rel=1e-4, abs=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), layers=st.integers(1, 3), images=st.integers(1, 5))
def test_cosine_distance_agrees_with_a_slow_loop(seed: int, layers: int, images: int) -> None:
    p, z = normal(layers, images, 6, seed=seed), normal(images, 6, seed=seed + 100)
    rows = [2 - 2 * cosine_of(p[layer, image], z[image]) for layer in range(layers) for image in range(images)]
    assert float(cosine_distance(p, z)) == pytest.approx(sum(rows) / len(rows), rel=1e-4, abs=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), layers=st.integers(1, 3), images=st.integers(1, 4))
def test_nt_xent_agrees_with_a_slow_loop(seed: int, layers: int, images: int) -> None:
    """The query's own image and view is no key, its other view is the one to find; all else are negatives."""
    q, k = normal(2, layers, images, 6, seed=seed), normal(2, images, 6, seed=seed + 100)
    rows = []
    for view in range(2):
        for layer in range(layers):
            for image in range(images):
                keys = [(v, i) for v in range(2) for i in range(images) if (v, i) != (view, image)]
                similarities = [cosine_of(q[view, layer, image], k[v, i]) for v, i in keys]
                rows.append(picked(similarities, keys.index((1 - view, image)), TAU))
    assert float(nt_xent((q[0], q[1]), (k[0], k[1]), TAU)) == pytest.approx(sum(rows) / len(rows), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("distance", [partial(scaled_info_nce, tau=TAU), cosine_distance])
def test_parts_are_means_over_layers_summed_over_views(distance: Any) -> None:
    p, d = (normal(4, 5, 6), normal(4, 5, 6, seed=1)), (normal(4, 5, 6, seed=2), normal(4, 5, 6, seed=3))
    z, other = (normal(5, 6, seed=4), normal(5, 6, seed=5)), (normal(5, 6, seed=6), normal(5, 6, seed=7))

    def layer(outputs: tuple[Tensor, Tensor], index: int, targets: tuple[Tensor, Tensor]) -> Tensor:
        return distance(outputs[0][index].unsqueeze(0), targets[0]) + distance(
            outputs[1][index].unsqueeze(0), targets[1]
        )

    for middle in (None, other):
        below = z if middle is None else middle
        parts = predicted_parts(distance, p, d, z, middle)
        torch.testing.assert_close(parts["out"], layer(p, 3, z))
        torch.testing.assert_close(parts["mid"], sum(layer(p, i, below) for i in range(3)) / 3)
        torch.testing.assert_close(parts["det"], (sum(layer(d, i, below) for i in range(3)) + layer(d, 3, z)) / 4)
    assert predicted_parts(distance, (p[0][-1:], p[1][-1:]), None, z).keys() == {"out"}
    assert predicted_parts(distance, p, None, z).keys() == {"out", "mid"}


def test_simclr_s_lower_layers_look_for_the_last_one() -> None:
    views = normal(4, 5, 6), normal(4, 5, 6, seed=1)
    parts = contrasted_parts(views, TAU)
    keys = views[0][-1], views[1][-1]
    mids = [nt_xent((views[0][i : i + 1], views[1][i : i + 1]), keys, TAU) for i in range(3)]
    torch.testing.assert_close(parts["mid"], torch.stack(mids).mean())
    torch.testing.assert_close(parts["out"], nt_xent((views[0][-1:], views[1][-1:]), keys, TAU))
    assert contrasted_parts((views[0][-1:], views[1][-1:]), TAU).keys() == {"out"}


def test_order_and_length_of_vectors_do_not_matter() -> None:
    p, z, order = normal(2, 6, 5), normal(6, 5, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    for distance in (partial(info_nce, tau=TAU), cosine_distance):
        torch.testing.assert_close(distance(p[:, order], z[order]), distance(p, z))
        torch.testing.assert_close(distance(3 * p, 0.1 * z), distance(p, z))
    assert float(cosine_distance(z.unsqueeze(0), z)) == pytest.approx(0, abs=1e-6)


# Gradients


def test_targets_get_no_gradient() -> None:
    p, z = normal(2, 4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    for distance in (partial(scaled_info_nce, tau=TAU), cosine_distance):
        found = torch.autograd.grad(distance(p, z), (p, z), allow_unused=True)
        assert found[0] is not None
        assert found[0].abs().sum() > 0
        assert found[1] is None


def test_simclr_s_last_layer_learns_nothing_from_the_lower_ones() -> None:
    first, second = normal(3, 4, 5).requires_grad_(), normal(3, 4, 5, seed=1).requires_grad_()
    parts = contrasted_parts((first, second), TAU)
    lower, _ = torch.autograd.grad(parts["mid"], (first, second), retain_graph=True)
    assert bool((lower[:2].abs().sum((1, 2)) > 0).all())
    assert not lower[2].any()
    upper, _ = torch.autograd.grad(parts["out"], (first, second))
    assert not upper[:2].any()
    assert upper[2].abs().sum() > 0


def test_mixed_precision_does_not_reach_the_losses() -> None:
    views = normal(3, 8, 32), normal(3, 8, 32, seed=1)
    plain = [
        contrasted_parts(views, TAU),
        predicted_parts(partial(info_nce, tau=TAU), views, None, (views[1][0], views[0][0])),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [
            contrasted_parts(views, TAU),
            predicted_parts(partial(info_nce, tau=TAU), views, None, (views[1][0], views[0][0])),
        ]
    for one, other in zip(plain, mixed, strict=True):
        for part, value in one.items():
            assert torch.equal(value, other[part])


# Rows of other processes


def test_keys_of_other_processes_are_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the second of two processes, whose keys come after the first one's."""
    p, z, k = normal(2, 6, 5), normal(6, 5, seed=1), normal(2, 6, 5, seed=2)
    whole = info_nce(p, z, TAU), nt_xent((p, k), (z, k[0]), TAU)
    means = []
    for part in (slice(0, 2), slice(2, 6)):
        gathered = iter([z, z, k[0]])

        def gather_rows(x: Tensor, gathered: Any = gathered, part: slice = part) -> tuple[Tensor, int]:
            rows = contrast.unit(next(gathered))
            assert torch.equal(x, rows[part])
            return rows, part.start

        monkeypatch.setattr(contrast, "gather_rows", gather_rows)
        means.append(
            torch.stack(
                [info_nce(p[:, part], z[part], TAU), nt_xent((p[:, part], k[:, part]), (z[part], k[0][part]), TAU)]
            )
        )
    torch.testing.assert_close((2 * means[0] + 4 * means[1]) / 6, torch.stack(whole))

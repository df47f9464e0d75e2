"""Batch norm over all processes and the MLPs of all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hdcache.distill import projectors
from hdcache.distill.projectors import JointBatchNorm, LayerMLPs
from hdcache.errors import UsageError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def shake(module: nn.Module) -> None:
    """Give the affine parameters values that show."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.ndim == 1:
                parameter.add_(0.3 * normal(*parameter.shape, seed=number))


@pytest.mark.parametrize("affine", [True, False])
def test_each_layer_has_torch_s_batch_norm(affine: bool) -> None:
    found = JointBatchNorm(3, 4, affine=affine)
    shake(found)
    expected = [nn.BatchNorm1d(4, affine=affine) for _ in range(3)]
    for layer, norm in enumerate(expected):
        if found.weight is not None and found.bias is not None:
            norm.weight.data = found.weight.data.view(3, 4)[layer].clone()
            norm.bias.data = found.bias.data.view(3, 4)[layer].clone()
    for step in range(3):
        x = 2 + 3 * normal(3, 7, 4, seed=step)
        torch.testing.assert_close(found(x), torch.stack([n(part) for n, part in zip(expected, x, strict=True)]))
    for name in ("running_mean", "running_var"):
        statistics = torch.stack([norm.get_buffer(name) for norm in expected])
        torch.testing.assert_close(found.get_buffer(name).view(3, 4), statistics)
    found.eval()
    x = normal(3, 1, 4)
    parts = [norm.eval()(part) for norm, part in zip(expected, x, strict=True)]
    torch.testing.assert_close(found(x), torch.stack(parts))


@pytest.mark.parametrize("counts", [(4, 4), (2, 5), (1, 6, 3)])
def test_statistics_are_those_of_all_processes(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of several processes computes from the others' statistics is its part of the whole; gradients too."""
    x = (1 + normal(2, sum(counts), 3)).requires_grad_()
    whole = JointBatchNorm(2, 3)
    shake(whole)
    expected = whole(x)
    parts = x.split(list(counts), dim=1)
    flat = [part.transpose(0, 1).flatten(1) for part in parts]
    own = torch.stack([torch.stack([f.new_full((6,), len(f)), f.mean(0), f.var(0, unbiased=False)]) for f in flat])
    norms = [JointBatchNorm(2, 3) for _ in counts]
    monkeypatch.setattr(projectors, "world_size", lambda: len(counts))
    found = []
    for rank, (norm, part) in enumerate(zip(norms, parts, strict=True)):
        norm.load_state_dict(JointBatchNorm(2, 3).state_dict() | dict(whole.named_parameters()))

        def gather(statistics: Tensor, rank: int = rank) -> Tensor:
            torch.testing.assert_close(statistics, own[rank])
            return own

        monkeypatch.setattr(projectors, "gather", gather)
        found.append(norm(part))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    for norm in norms:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(norm.get_buffer(name), whole.get_buffer(name))
    weight = normal(*x.shape, seed=5)
    gradients = [
        torch.autograd.grad((value * weight).sum(), x, retain_graph=True)[0]
        for value in (torch.cat(found, dim=1), expected)
    ]
    torch.testing.assert_close(*gradients)


def test_one_image_has_no_variance() -> None:
    with pytest.raises(UsageError, match="batch normalisation needs at least 2 images in a batch; raise batch_size"):
        JointBatchNorm(1, 3)(normal(1, 1, 3))


def test_norms_keep_the_dtype_and_compute_in_float32() -> None:
    x = normal(2, 64, 3) + 200
    found = JointBatchNorm(2, 3)(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, JointBatchNorm(2, 3)(x.to(torch.bfloat16).float()).to(torch.bfloat16))


@pytest.mark.parametrize("normalised", [True, False])
def test_mlps_are_those_of_torch_layer_by_layer(normalised: bool) -> None:
    found = LayerMLPs(3, [5, 8, 7, 4], normalised=normalised, generator=generator())
    shake(found)
    x = normal(3, 6, 5)
    y = found(x)
    for layer in range(3):
        modules: list[nn.Module] = []
        for index, weight in enumerate(found.weights):
            linear = nn.Linear(weight.shape[1], weight.shape[2], bias=False)
            linear.weight.data = weight.data[layer].T
            modules.append(linear)
            if index < 2:
                norm, shared = nn.BatchNorm1d(weight.shape[2]), found.norms[index]
                assert isinstance(shared, JointBatchNorm)
                assert shared.weight is not None
                assert shared.bias is not None
                norm.weight.data = shared.weight.data.view(3, -1)[layer]
                norm.bias.data = shared.bias.data.view(3, -1)[layer]
                modules += [norm, nn.ReLU()]
        if normalised:
            modules.append(nn.BatchNorm1d(4, affine=False))
        torch.testing.assert_close(nn.Sequential(*modules)(x[layer]), y[layer])


def test_layers_do_not_mix() -> None:
    mlps = LayerMLPs(3, [5, 8, 4], normalised=True, generator=generator())
    x = normal(3, 6, 5).requires_grad_()
    (gradient,) = torch.autograd.grad((mlps(x)[1] * normal(6, 4, seed=1)).sum(), x)
    assert gradient[1].abs().sum() > 0
    assert not gradient[0].any()
    assert not gradient[2].any()


def test_initial_weights_are_torch_s_default_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = (LayerMLPs(2, [400, 300, 4], normalised=False, generator=generator()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert float(one.weights[0].detach().abs().max()) == pytest.approx(1 / 20, rel=1e-3)
    assert float(one.weights[0].detach().std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_vectors_are_spared_from_weight_decay() -> None:
    """The trainer's rule is that parameters of one dimension do not decay."""
    mlps: Any = LayerMLPs(3, [5, 8, 4], normalised=False, generator=generator())
    dimensions = {name: parameter.ndim for name, parameter in mlps.named_parameters()}
    assert dimensions == {"weights.0": 3, "weights.1": 3, "norms.0.weight": 1, "norms.0.bias": 1}

"""Projectors and predictors of self-supervised losses: small MLPs, one per layer of a network, computed side by side.

Legend: L layers of the network, B images of this process, D inputs, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from hdcache.distill.collective import gather, world_size
from hdcache.errors import UsageError


class JointBatchNorm(nn.Module):
    """Batch normalisation of [L, B, C] over the images of all processes, for each layer and channel by itself.

    It gives what torch's SyncBatchNorm gives, on the CPU too. Statistics are float32; variances are those of the
    batch, running ones unbiased. Parameters are flat [L C], so that weight decay spares them as it spares any norm's.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, layers: int, channels: int, *, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.shape, self.momentum, self.eps = (layers, channels), momentum, eps
        self.weight = nn.Parameter(torch.ones(layers * channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(layers * channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(layers * channels))
        self.register_buffer("running_var", torch.ones(layers * channels))

    def forward(self, x_LBC: Tensor) -> Tensor:
        """Normalised ``x_LBC``, in its own dtype.

        Raises
        ------
        UsageError
            in training, where there is one image only.
        """
        x = x_LBC.transpose(0, 1).flatten(1).float()
        if self.training and world_size() > 1:
            x = self._jointly(x)
        else:
            if self.training and len(x) < 2:
                raise UsageError("batch normalisation needs at least 2 images in a batch; raise batch_size")
            x = batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        return x.view(-1, *self.shape).transpose(0, 1).to(x_LBC.dtype)

    def _jointly(self, x: Tensor) -> Tensor:
        """``x`` [B, L C] by the statistics of all processes, put together from each one's own."""
        own = torch.stack([x.new_full((x.shape[1],), len(x)), x.mean(0), x.var(0, unbiased=False)])
        counts, means, variances = gather(own).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class LayerMLPs(nn.Module):
    """One MLP for each of L layers, computed together: linear layers without bias, batch norm and ReLU in between.

    Parameters
    ----------
    layers
        L.
    widths
        inputs, hidden widths, outputs.
    normalised
        whether a batch norm without learnt affine comes last.
    generator
        of the initial weights: uniform up to 1 / sqrt(inputs), torch's default for linear layers.
    """

    def __init__(self, layers: int, widths: Sequence[int], *, normalised: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.empty(layers, inputs, outputs).uniform_(
                -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator
            )
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(JointBatchNorm(layers, width) for width in widths[1:-1])
        self.last_norm = JointBatchNorm(layers, widths[-1], affine=False) if normalised else None

    def forward(self, x_LBD: Tensor) -> Tensor:
        """[L, B, inputs] -> [L, B, outputs]."""
        *hidden, last = self.weights
        for weight, norm in zip(hidden, self.norms, strict=True):
            x_LBD = relu(norm(x_LBD @ weight))
        x_LBD = x_LBD @ last
        return x_LBD if self.last_norm is None else self.last_norm(x_LBD)
